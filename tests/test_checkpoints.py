"""A run that is killed, or whose disk fails, goes on to the very same weights; damage is found and named."""

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import crashing
import forked
import pytest
import torch
from conftest import some_splits
from transformers import TrainerCallback

from finetune_nb import sandbox, training
from finetune_nb.checkpoints import check_checkpoint, newest_checkpoint
from finetune_nb.cli import main
from finetune_nb.config import load_config, save_config
from finetune_nb.run_folder import checkpoints
from finetune_nb.stop import TrainingError
from finetune_nb.training import kept_sets, resume, train
from finetune_nb.whole_folder import MANIFEST, Part, read_about, whole_folder

pytestmark = [pytest.mark.usefixtures("one_way"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.fixture
def splits():
    return some_splits()


@pytest.fixture(scope="module")
def alone():
    "One thread, so that a child that is forked can compute."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tmp_path_factory, alone):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = crashing.config_of(tiny_model, folder)
    log = folder / "log"
    counting = crashing.counted(crashing.begin(config, some_splits(), log), folder / "run", lambda *seen: None)
    assert crashing.wait(crashing.start(counting, log)) == 0, log.read_text()
    events = int(log.read_text().rpartition("EVENTS ")[2])
    return crashing.Outcome.of(folder / "run"), events


def test_an_undisturbed_run_is_the_same_again(tiny_model, splits, tmp_path, undisturbed):
    assert crashing.to_the_end(crashing.config_of(tiny_model, tmp_path), splits, tmp_path / "log") == undisturbed[0]


def test_a_fresh_process_ends_the_same_to_the_bit(tiny_model, tmp_path, alone):
    "As one with a past, with all that a run measures and chooses by itself; nothing is shared."
    script = "import sys, crashing, conftest; from finetune_nb import packing, training; from pathlib import Path; training.fastest_ways = packing.fastest_ways; "
    script += "training.train(crashing.config_of(sys.argv[1], Path(sys.argv[2]), max_steps=6, preflight=True), conftest.some_splits()); print(crashing.Outcome.of(Path(sys.argv[2], 'run')))"
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    here = os.environ | {"PYTHONHASHSEED": "1", "FINETUNE_NB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(places)}
    fresh = subprocess.run([sys.executable, "-c", script, tiny_model, str(tmp_path / "fresh")], env=here, capture_output=True, text=True, check=True, cwd=tmp_path)
    other = forked.run(script, tiny_model, str(tmp_path / "other"), env={"FINETUNE_NB_CACHE": str(tmp_path / "other cache")})
    assert hash("a text") != int(subprocess.run([sys.executable, "-c", "print(hash('a text'))"], env=here, capture_output=True, text=True).stdout), "in another order of sets"
    said = [done.stdout.splitlines()[-1] for done in (fresh, other)]
    assert said[0] == said[1] and said[0].startswith("Outcome(adapter=")


@pytest.mark.parametrize("part", range(4))
def test_a_run_that_dies_at_a_write_goes_on_to_the_same_weights(part, tiny_model, splits, tmp_path, undisturbed):
    "The quarters of the run; `benchmarks/kill_test.py` tries every single write."
    outcome, events = undisturbed
    config, log = crashing.config_of(tiny_model, tmp_path), tmp_path / "log"
    number = events * (2 * part + 1) // 8
    work = crashing.counted(crashing.begin(config, splits, log), tmp_path / "run", crashing.die_at(number))
    assert crashing.wait(crashing.start(work, log)) == crashing.DIED
    assert crashing.to_the_end(config, splits, log) == outcome


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory, alone):
    "The folder of a run with checkpoints at 4 and 8 that died after step 9; copy it before anything is done to it."
    folder = tmp_path_factory.mktemp("stopped")
    config, log = crashing.config_of(tiny_model, folder), folder / "log"
    work = crashing.begin(config, some_splits(), log, [DieAt(9)])
    assert crashing.wait(crashing.start(work, log)) == crashing.DIED
    return folder


class DieAt(TrainerCallback):
    "Ends the process at a step."

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os._exit(crashing.DIED)


@pytest.fixture
def folder(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path / "run"


def damages(checkpoint):
    "A fault in each part of each file: a flipped bit, half of it, none of it, another file in its place."
    names = sorted(path.name for path in checkpoint.iterdir())
    for i, name in enumerate(names):
        size = (checkpoint / name).stat().st_size
        for at in sorted({0, 7, size // 3, size // 2, size - 1} & set(range(size))):
            yield name, f"bit {at}", lambda path, at=at: flip(path, at)
        yield name, "half", lambda path, size=size: os.truncate(path, size // 2)
        yield name, "nothing", lambda path: os.truncate(path, 0)
        yield name, "zeros", lambda path, size=size: path.write_bytes(bytes(size))
        yield name, "missing", Path.unlink
        yield name, "longer", lambda path: path.open("ab").write(b" ")
        yield name, "swapped", lambda path, other=names[i - 1]: shutil.copy(path.parent / other, path)
        yield name, "older", lambda path: shutil.copy(path.parent.parent / "checkpoint-4" / path.name, path)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


def test_every_damage_is_found_named_and_fallen_back_from(folder):
    kept, tried, harmless = folder.parent / "kept", 0, 0
    shutil.copytree(folder / "checkpoint-8", kept)
    for name, what, damage in list(damages(kept)):
        path = folder / "checkpoint-8" / name
        if what == "older" and not (folder / "checkpoint-4" / name).is_file():
            continue
        before = path.read_bytes()
        damage(path)
        if path.is_file() and path.read_bytes() == before:  # the same file in both checkpoints
            harmless += 1
            continue
        said = []
        assert newest_checkpoint(folder, said.append) == folder / "checkpoint-4", (name, what)
        assert name in said[0] or (name, what) == (MANIFEST, "older"), (name, what, said)  # all others differ then
        path.write_bytes(before)
        tried += 1
    assert tried > 90 and harmless < 6 and check_checkpoint(folder / "checkpoint-8") == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_gone_on_from(folder, splits, capsys, undisturbed):
    flip(folder / "checkpoint-8" / "training.safetensors", 5000)
    resume(folder)
    told = capsys.readouterr().out
    assert "checkpoint-8 is passed over: training.safetensors is not as it was written." in told and "Going on from checkpoint-4." in told
    assert crashing.Outcome.of(folder) == undisturbed[0]


def test_the_command_line_goes_on_with_a_run(folder, capsys, undisturbed):
    assert main(["resume", str(folder / "nowhere")]) == 2 and "is not the folder of a run that began training" in capsys.readouterr().err
    save_config(replace(load_config(folder / "config.yaml"), max_new_tokens=4, learning_rate=1e-3), folder / "config.yaml")
    assert main(["resume", str(folder)]) == 2 and "learning_rate: 0.005, now 0.001" in capsys.readouterr().err
    save_config(replace(load_config(folder / "config.yaml"), learning_rate=5e-3), folder / "config.yaml")
    assert main(["resume", str(folder)]) == 0 and (folder / "report.html").is_file()
    assert crashing.Outcome.of(folder) == undisturbed[0]


def test_when_none_is_whole_the_run_is_not_begun_anew_in_silence(folder):
    for path in checkpoints(folder):
        (path / "random-0.json").unlink()
    with pytest.raises(TrainingError, match="none of its checkpoints is whole"):
        resume(folder)
    assert len(checkpoints(folder)) == 2, "they stay"


def test_a_state_that_is_missing_is_an_error(folder):
    "Also where the manifest does not miss it."
    for path in checkpoints(folder):
        about = read_about(path)
        (path / "training.json").unlink()
        with whole_folder(folder / "anew", about) as part:
            for file in path.iterdir():
                if file.name != MANIFEST:
                    part.write(file.name, file.read_bytes())
        shutil.rmtree(path)
        (folder / "anew").rename(path)
        assert check_checkpoint(path) == []
    with pytest.raises(TrainingError, match="the state 'training' can't be read"):
        resume(folder)


CHANGES = {
    "learning_rate": 1e-3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "num_train_epochs": 3.0, "lora_dropout": 0.0, "seed": 1,
    "weight_decay": 0.1, "warmup_ratio": 0.5, "lr_scheduler_type": "linear", "max_length": 64, "packing": "padded", "lora_alpha": 4.0,
}  # fmt: skip


def test_changed_settings_are_refused_by_name(folder):
    config = load_config(folder / "config.yaml")
    save_config(replace(config, **CHANGES), folder / "config.yaml")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(TrainingError, match="checkpoint-8 was made with something else") as caught:
        resume(folder)
    said = str(caught.value).splitlines()
    assert said[1:-1] == [f"  {name}: {getattr(config, name)}, now {CHANGES[name]}" for name in sorted(CHANGES)]
    with pytest.raises(TrainingError, match="allow_change: there is no 'lr'"):
        resume(folder, allow_change=["lr"])
    with pytest.raises(TrainingError, match="\n  packing: shared, now padded\n"):
        resume(folder, allow_change=sorted(CHANGES.keys() - {"packing"}))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("name", ["learning_rate", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lr_scheduler_type", "weight_decay")), "num_train_epochs"])
def test_a_change_that_is_allowed_counts(name, folder, capsys):
    config = load_config(folder / "config.yaml")
    changed = replace(config, **{name: CHANGES[name]})
    save_config(changed, folder / "config.yaml")
    run = resume(folder, allow_change=[name])
    assert f"Different from here on, as allowed: {name}." in capsys.readouterr().out
    assert run.facts["changed"] == [{"step": 8, "names": [name]}]
    whole = train(replace(changed, output_dir=str(folder.parent), run_name="whole"), kept_sets(folder, changed))
    rates = [{row["step"]: row["learning_rate"] for row in one.history if "learning_rate" in row and row["step"] > 8} for one in (run, whole)]
    assert rates[0] == pytest.approx(rates[1]) and rates[0]
    if name == "weight_decay":
        assert crashing.Outcome.of(folder).adapter != crashing.Outcome.of(whole.folder).adapter


def test_other_versions_chats_template_and_base_are_refused(folder, splits, monkeypatch):
    with pytest.raises(TrainingError, match=r'The train chats are not those.*allow_change=\["train_chats"\]'):
        resume(folder, splits._replace(train=splits.train[1:]))
    versions, marks = training._versions(), {"base": "other", "tokenizer": "other", "chat template": "other"}
    with monkeypatch.context() as patch:
        patch.setattr(training, "_versions", lambda: versions | {"torch": "1.0"})
        with pytest.raises(TrainingError, match=r"torch: 2.*, now 1\.0"):
            resume(folder)
    with monkeypatch.context() as patch:
        patch.setattr(training, "tokenizer_mark", lambda *args: {k: marks[k] for k in ("tokenizer", "chat template")})
        with pytest.raises(TrainingError, match="chat_template: .*now other\n  tokenizer: .*now other"):
            resume(folder)
    with monkeypatch.context() as patch:
        patch.setattr(training, "mark_of", lambda model: "other")
        with pytest.raises(TrainingError, match="base: .*now other"):
            resume(folder)


def test_another_chat_template_is_shown(folder, tiny_model, tmp_path):
    "Not only that it is another one: what is different, where a run goes on and where it is asked."
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    template = next(path for path in other.iterdir() if path.name == "chat_template.jinja")
    template.write_text(template.read_text() + "\n{# \x1b[31m added #}")
    save_config(replace(load_config(folder / "config.yaml"), model_name_or_path=str(other)), folder / "config.yaml")
    with pytest.raises(TrainingError, match="chat_template: ") as caught:
        resume(folder)
    assert "\n--- in training\n+++ now\n" in str(caught.value) and "\n+{# \N{REPLACEMENT CHARACTER}[31m added #}" in str(caught.value)
    resume(folder, allow_change=["chat_template"])
    assert "added #}" in (folder / "chat_template.jinja").read_text(), "it goes on with that one"
    template.write_text(template.read_text().replace("added #}", "changed #}"))
    with pytest.warns(UserWarning, match="trained with another chat template than its base model has now") as told:
        assert training.load_run(folder).model
    assert "added #}" in str(told[-1].message) and "changed #}" in str(told[-1].message)


@pytest.mark.parametrize("part", range(5))
def test_a_disk_that_fails_leaves_a_run_that_can_be_used(part, tiny_model, splits, tmp_path, undisturbed):
    "A fifth of the places each; `benchmarks/corruption_test.py` has more. What is told is told, and nothing is lost."
    outcome, events = undisturbed
    config, log = crashing.config_of(tiny_model, tmp_path), tmp_path / "log"
    code = crashing.DISK_FAULTS[part % len(crashing.DISK_FAULTS)]
    fault = crashing.fail_at(events * (2 * part + 1) // 10, code, times=(1, 3, 10)[part % 3])
    crashing.wait(crashing.start(crashing.counted(crashing.begin(config, splits, log), tmp_path / "run", fault), log))
    after = crashing.to_the_end(config, splits, log)
    assert (after.adapter, after.history, after.rows) == (outcome.adapter, outcome.history, outcome.rows)


def test_a_full_disk_is_told_in_a_sentence_and_the_run_goes_on(tiny_model, splits, tmp_path, monkeypatch, undisturbed):
    config, said = crashing.config_of(tiny_model, tmp_path), []
    monkeypatch.setattr(Part, "finish", full_at(8, Part.finish))
    run = train(config, splits, say=said.append)
    told = [line for line in said if "could not be written" in line]
    assert told == [f"The checkpoint of step 8 could not be written: No space left on device. checkpoint-4 is kept, and the run goes on. Make room in {run.folder}, or bring it back."]
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-4", "checkpoint-12"]
    assert crashing.Outcome.of(run.folder) == undisturbed[0] and not list(run.folder.glob(".*.part"))


def full_at(step, finish):
    def act(self, about):
        if about.get("step") == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return finish(self, about)

    return act


def test_what_can_not_be_written_at_the_end_stays_in_memory(tiny_model, splits, tmp_path, monkeypatch, undisturbed):
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "_save_into", lambda *args, **more: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS))))
        run = train(crashing.config_of(tiny_model, tmp_path), splits, say=said.append)
    assert "could not be written" in said[-1] and "Read-only file system. It is still in memory" in said[-1]
    assert not (run.folder / "run.json").exists() and not (run.folder / "adapter").exists()
    run.save()
    assert crashing.Outcome.of(run.folder) == undisturbed[0] and training.load_run(run.folder).facts == run.facts


def test_no_room_is_told_before_the_first_step(tiny_model, splits, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(TrainingError, match="the checkpoints of this run need 3 MiB, and 0 MiB are free"):
        train(crashing.config_of(tiny_model, tmp_path), splits)
    assert not (tmp_path / "run").exists()


EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_") and name not in ("on_init_end", "on_train_begin", "on_substep_end", "on_prediction_step", "on_predict", "on_push_begin")]


class SignalAt(TrainerCallback):
    "Sends a real signal to this process at the second time of an event, or at the only one."

    def __init__(self, event, number):
        self.seen = 0
        setattr(self, event, lambda args, state, control, **kwargs: self.send(number, args, state))
        self.once = event in ("on_train_end", "on_epoch_end")

    def send(self, number, args, state):
        self.seen += 1
        if self.seen == (1 if self.once else 2):
            os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def opened(tiny_model, tmp_path_factory):
    "What the first training of a process opens for good, it has opened."
    train(crashing.config_of(tiny_model, tmp_path_factory.mktemp("opened"), max_steps=1), some_splits())


@pytest.mark.parametrize("event", EVENTS)
def test_an_interrupt_at_any_event_ends_in_a_good_checkpoint(event, tiny_model, splits, tmp_path, undisturbed, opened):
    sandbox._renderer().started()  # an interrupt may have ended it, and then it would open its pipes anew
    handles, threads = sorted(os.listdir("/proc/self/fd")), threading.enumerate()
    run = train(crashing.config_of(tiny_model, tmp_path), splits, [SignalAt(event, signal.SIGINT)])
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= len(handles) + 1 and threading.enumerate() == threads
    newest = newest_checkpoint(run.folder)
    assert run.facts["ended_by"] == ("the plan" if event == "on_train_end" else "the user")
    assert newest.name == f"checkpoint-{run.facts['steps']}"
    if event != "on_train_end":
        resume(run.folder)
    assert crashing.Outcome.of(run.folder) == undisturbed[0]


def test_a_process_that_is_told_to_end_saves_and_ends(tiny_model, splits, tmp_path, undisturbed):
    config, log = crashing.config_of(tiny_model, tmp_path), tmp_path / "log"
    work = crashing.begin(config, splits, log, [SignalAt("on_step_end", signal.SIGTERM)])
    assert crashing.wait(crashing.start(work, log)) == 1 and "SystemExit: 143" in log.read_text()
    assert newest_checkpoint(tmp_path / "run").name == "checkpoint-3"
    assert crashing.to_the_end(config, splits, log) == undisturbed[0]


class Tell(TrainerCallback):
    "Slow steps, of which a file tells; after the third it does something."

    def __init__(self, path, then=lambda: None, pause=0.1):
        self.path, self.then, self.pause = path, then, pause

    def on_step_end(self, args, state, control, **kwargs):
        self.path.write_text(str(state.global_step))
        if state.global_step == 3:
            self.then()
        time.sleep(self.pause)


def test_a_process_that_is_told_to_end_saves_the_run_in_its_thread(tiny_model, splits, tmp_path, undisturbed):
    config, log = crashing.config_of(tiny_model, tmp_path), tmp_path / "log"

    def work():
        from finetune_nb.jobs import start_job

        start_job(config, splits, True, callbacks=[Tell(tmp_path / "step", lambda: os.kill(os.getpid(), signal.SIGTERM))], questions=0)
        time.sleep(600)

    assert crashing.wait(crashing.start(work, log)) == -signal.SIGTERM, log.read_text()
    step = (tmp_path / "step").read_text()
    assert newest_checkpoint(tmp_path / "run").name == f"checkpoint-{step}" and int(step) < 12
    assert crashing.to_the_end(config, splits, log) == undisturbed[0]


def test_a_kernel_that_is_shut_down_saves_its_run(tiny_model, tmp_path):
    "As Jupyter does it: a request, then SIGTERM, then SIGKILL."
    from jupyter_client.manager import start_new_kernel

    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"""
import crashing, conftest, time
from pathlib import Path
from test_checkpoints import Tell
from finetune_nb.jobs import start_job
config = crashing.config_of({tiny_model!r}, Path({str(tmp_path)!r}))
job = start_job(config, conftest.some_splits(), True, callbacks=[Tell(Path({str(tmp_path / "step")!r}), pause=1)], questions=0)
while job.step < 3 and job.active:
    time.sleep(0.05)
"""
    manager, client = start_new_kernel(env=os.environ | {"PYTHONPATH": os.pathsep.join(places)})
    try:
        assert client.execute_interactive(code, timeout=300, output_hook=lambda message: None)["content"]["status"] == "ok"
        manager.shutdown_wait_time = 12  # SIGTERM comes after half of it; Jupyter has five, too few on a busy machine
        manager.shutdown_kernel()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    step, folder = int((tmp_path / "step").read_text()), tmp_path / "run"
    assert 3 <= step < 12 and newest_checkpoint(folder).name == f"checkpoint-{step}"


def test_nothing_is_pickled_or_unpickled(folder, tiny_model, splits, tmp_path):
    "Over a run, a stop, and going on: no class is looked for by an unpickler, and no file holds a pickle."
    log = tmp_path / "log"

    def work():
        found = []
        sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)
        resume(folder)
        train(replace(crashing.config_of(tiny_model, tmp_path), run_name="other"), splits)
        assert not found, found

    assert crashing.wait(crashing.start(work, log)) == 0, log.read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "log" != path]
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".yaml", ".md", ".png", ".jinja", ""}
    assert not [path for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")]

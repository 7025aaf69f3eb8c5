"""A run's folder in which something is not as it was written: told in a sentence, mended where it can be, and never trained on in silence."""

import errno
import json
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import quick_config, some_splits
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from finetune_nb import locks, training
from finetune_nb.cli import main
from finetune_nb.config import FinetuneError, load_config, save_config
from finetune_nb.crash_safe import CrashSafeTrainer
from finetune_nb.jobs import start_job
from finetune_nb.locks import LOCK, OWNER, LockError, held_elsewhere, hold, validate_held
from finetune_nb.one_file import file_there, save_there
from finetune_nb.planning import WIDTHS, token_budget, usual_budget
from finetune_nb.run_folder import append_line, checkpoints, read_facts, read_lines, save_lines, write_facts
from finetune_nb.stop import Stop, StoppedEarly, TrainingError
from finetune_nb.training import load_run, resume, train
from finetune_nb.whole_folder import DamageError, files_of

pytestmark = [pytest.mark.usefixtures("one_way"), pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


class At(TrainerCallback):
    "Does something at an event of a step."

    def __init__(self, event, step, act):
        setattr(self, event, lambda args, state, control, **kwargs: act(Path(args.output_dir)) if state.global_step == step else None)


def quietly(text):
    pass


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory):
    "A run that was stopped after step 5 of 12; copy it before anything is done to it."
    config, stop = quick_config(tiny_model, tmp_path_factory.mktemp("stopped")), Stop()
    run = train(config, some_splits(), [At("on_step_end", 4, lambda folder: setattr(stop, "wanted", True))], stop, quietly)
    (run.folder / "run.json").rename(run.folder.parent / "run.json")  # as if it had been killed
    return run.folder


@pytest.fixture(scope="module")
def finished(stopped, tmp_path_factory):
    "The same, gone on with to its end."
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(stopped, folder)
    resume(folder, say=quietly).release()
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def ended(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "half of it": (lambda path: os.truncate(path, 100), "ends too early"),
    "nothing": (lambda path: os.truncate(path, 0), "it is empty"),
    "no text": (lambda path: path.write_bytes(bytes(range(128, 256))), "it is no text"),
    "no facts": (lambda path: path.write_text("[]"), "does not hold the facts"),
    "too deep": (lambda path: path.write_text("[" * 10**5), "nested too deep"),
}


@pytest.mark.parametrize("name", ["started.json", "run.json"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_facts_are_told_in_a_sentence(name, kind, folder, capsys):
    damage, said = DAMAGES[kind]
    (folder / name).write_text(json.dumps({"ended_by": "the user", "filler": "x" * 200}))
    damage(folder / name)
    with pytest.raises(DamageError, match=f"{name} is not as a run writes it: .*{said}.*or remove it"):
        resume(folder)
    if name == "run.json":
        with pytest.raises(DamageError, match=said):
            load_run(folder)
    assert main(["resume", str(folder)]) and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packing": "padded"}, "packing is padded, and the checkpoint was computed with shared"),
        ({"packing": "nonsense"}, "packing can't be nonsense"),
        ({"packing": ["shared"]}, "packing can't be"),
        ({"attention": "masked"}, "attention is masked, and the checkpoint"),
        ({"attention": "nonsense"}, "attention can't be nonsense"),
        ({"max_tokens_at_once": -1}, "max_tokens_at_once can't be -1"),
        ({"max_tokens_at_once": 300}, "max_tokens_at_once is 300, and"),
        ({"max_tokens_at_once": None}, "max_tokens_at_once can't be not there"),
        ({"recomputed_blocks": 1}, "recomputed_blocks is 1, and"),
    ],
)
def test_how_a_run_is_computed_is_held_against_its_checkpoint(changes, said, folder):
    edit(folder / "started.json", **changes)
    with pytest.raises(DamageError, match=said):
        resume(folder)


@pytest.mark.parametrize("facts", [{"seed": 1}, {"data": 1, "marks": {}, "versions": {}}, {"data": {}, "marks": {}, "versions": {}}])
def test_a_run_without_a_checkpoint_says_what_it_began_with_or_is_refused(facts, folder):
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    (folder / "started.json").write_text(json.dumps(facts))
    with pytest.raises(DamageError, match="it does not say what the run began with"):
        resume(folder)


@pytest.mark.parametrize("line", ['{"a": 1}', "x}", '{"step": "1"}'])
def test_an_answer_that_is_none_is_told_by_its_file(line, folder):
    (folder / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(DamageError, match="samples.jsonl is not as a run writes it: .*the run does not need them"):
        resume(folder)


def test_what_is_missing_comes_from_the_checkpoint_and_another_machine_is_told(finished, folder, monkeypatch):
    "The file is gone: how the steps are computed is not planned anew. Another machine: only a note, since the last bits may be others."
    started = read_facts(folder, "started.json")
    (folder / "started.json").unlink()
    monkeypatch.setattr(training, "_plan_batches", lambda *args: pytest.fail("it is planned anew"))
    said = []
    run = resume(folder, say=said.append, callbacks=[At("on_step_end", 6, lambda place: edit(place / "started.json", seen=1))])
    assert any("started.json is missing: how the steps are computed is taken from checkpoint-5" in line for line in said)
    names = "packing attention max_tokens_at_once recomputed_blocks machine".split()
    assert [run.facts[name] for name in names] == [started[name] for name in names] and read_facts(folder, "started.json")["seen"]
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()


def test_another_way_to_compute_that_is_allowed_is_planned_anew(folder):
    "The plan of the run would go on else, and nothing of the change would be seen."
    before, said, stop = read_facts(folder, "started.json"), [], Stop()
    save_config(replace(load_config(folder / "config.yaml"), packing="padded", max_tokens_at_once=77), folder / "config.yaml")
    edit(folder / "started.json", packing="padded", max_tokens_at_once=77)  # by a try that died before its first checkpoint
    stop.wanted = True
    with pytest.raises(StoppedEarly):
        resume(folder, say=quietly, stop=stop, allow_change=["packing", "max_tokens_at_once"])
    stop.wanted = False
    write_facts(before, folder / "started.json")
    stops = At("on_step_end", 6, lambda place: setattr(stop, "wanted", True))
    run = resume(folder, say=said.append, stop=stop, callbacks=[stops], allow_change=["packing", "max_tokens_at_once"])
    assert [before[name] for name in ("packing", "max_tokens_at_once")] != [run.facts[name] for name in ("packing", "max_tokens_at_once")] == ["padded", 77]
    assert "Different from here on, as allowed: max_tokens_at_once, packing." in said


def test_going_on_with_other_threads_is_told_and_recorded(folder):
    edit(folder / "started.json", machine={"name": "another", "threads": 7})
    said, stop = [], Stop()
    run = resume(folder, say=said.append, stop=stop, callbacks=[At("on_step_end", 6, lambda place: setattr(stop, "wanted", True))])
    assert any("computed on another with 7 threads" in line and "last bits" in line for line in said)
    assert [one["step"] for one in run.facts["went_on"]] == [5] and run.facts["machine"]["threads"] == 7
    assert {"numpy", "tokenizers", "safetensors"} <= run.facts["versions"].keys() and "bitsandbytes" not in run.facts["versions"]
    assert "bitsandbytes" in training._version_of_bits(replace(run.config, optim="paged_adamw_8bit"))


def test_memory_decides_only_where_the_usual_does_not_fit(quick, rows):
    many = replace(quick, per_device_train_batch_size=40)
    usual = usual_budget(many, rows)
    assert usual == token_budget(many, rows, available=2**40) == token_budget(many, rows, available=2**33)
    found = [token_budget(many, rows, available=free << 20) for free in (1, 100, 200)]
    assert found == sorted(found) and {*found} <= {*WIDTHS, usual} and found[0] < found[-1], "few widths, so that a little memory makes no other run"
    assert usual_budget(replace(many, max_tokens_at_once=77), rows) == 77


def test_links_are_not_written_through(folder, tmp_path):
    names = ["history.jsonl", "samples.jsonl", "loss.png", "chat_template.jinja", "run.json", "started.json", LOCK]
    for name in names:
        (tmp_path / name).write_text("precious\n")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / name)
    for name in names[:2]:
        with pytest.raises(OSError, match="it is a link to elsewhere"):
            append_line(folder / name, "{}\n")
    save_lines([], folder / "history.jsonl")
    save_there("precious\n", folder / "started.json")
    write_facts({}, folder / "run.json")
    for name in names[2:4]:
        with file_there(folder / name) as path:
            path.write_text("new")
    with pytest.raises(TrainingError, match=r"\.lock can't be written: it is a link to elsewhere"):
        resume(folder)
    assert {(tmp_path / name).read_text() for name in names} == {"precious\n"}
    assert [name for name in names if (folder / name).is_symlink()] == ["samples.jsonl", LOCK]
    assert not list(folder.glob(".*.part"))


def another(act):
    "What a forked process comes to: 0 where it gets in, 1 where it is refused."
    if not (pid := os.fork()):
        try:
            act()
            os._exit(0)
        except LockError:
            os._exit(1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def get_in(folder):
    with hold(folder):
        pass


def test_where_there_are_no_locks_a_file_says_who_is_at_work(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with hold(tmp_path):
        assert another(lambda: get_in(tmp_path)) == 1
        validate_held(tmp_path)
        locks._MINE.clear()
        assert held_elsewhere(tmp_path) == f"in process {os.getpid()}"
    assert not (tmp_path / OWNER).exists() and not held_elsewhere(tmp_path) and another(lambda: get_in(tmp_path)) == 0
    me = json.loads(locks._myself("x"))
    for dead in ({"began": me["began"] - 100}, {"pid": 2**22 + 1}, {"host": "elsewhere"}):
        (tmp_path / OWNER).write_text(json.dumps(me | dead))
        if "host" in dead:
            assert another(lambda: get_in(tmp_path)) == 1, "on another machine, it may be alive"
            os.utime(tmp_path / OWNER, (0, time.time() - 2 * locks._DEAD))
        assert another(lambda: get_in(tmp_path)) == 0, dead


def test_a_lock_that_was_taken_away_ends_the_run_before_it_saves(quick):
    def away(folder):
        (folder / LOCK).unlink()
        assert another(lambda: get_in(folder)) == 0, "so somebody else could get in"

    with pytest.raises(TrainingError, match="the lock of this run was taken away or replaced"):
        train(quick, some_splits(), [At("on_step_end", 5, away)], say=quietly)
    (folder,) = Path(quick.output_dir).glob("run-*")
    assert not list(folder.glob("checkpoint-*"))


def test_a_process_that_is_told_to_end_during_the_first_look_ends(quick):
    look = At("on_evaluate", 0, lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        train(quick, some_splits(), [look], say=quietly)
    assert caught.value.code == 128 + signal.SIGTERM and not list(Path(quick.output_dir).glob("run-*"))


def test_where_nothing_can_be_written_is_told_before_a_model_is_loaded(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "load_base", lambda *args: pytest.fail("a model is loaded"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "runs", "/proc/runs"):
        with pytest.raises(TrainingError, match="nothing can be written there: .*choose another output_dir"):
            train(replace(quick, output_dir=str(place)), some_splits(), say=quietly)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as on a full disk
        with pytest.raises(TrainingError, match="nothing can be written there"):
            train(quick, some_splits(), say=quietly)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not Path(quick.output_dir).exists()


def test_answers_that_can_not_be_written_cost_no_run(quick, tmp_path):
    def full(folder):
        (folder / "samples.jsonl").unlink(missing_ok=True)
        (folder / "samples.jsonl").mkdir()

    job = start_job(replace(quick, max_steps=4), some_splits(), False, callbacks=[At("on_step_end", 2, full)], questions=1)
    assert job.state == "finished" and job.result.facts["steps"] == 4 and len({sample.step for sample in job.samples}) > 1
    assert any("could not be written into" in line and "the run goes on" in line for line in job.lines)


def test_killed_while_an_adapter_was_put_in_its_place(ended):
    for act in (lambda: load_run(ended), lambda: pytest.raises(TrainingError, resume, ended, say=quietly)):
        (ended / "adapter").rename(ended / ".adapter.gone")
        (ended / ".adapter.part").mkdir()
        act()
        assert (ended / "adapter/adapter_model.safetensors").is_file() and not list(ended.glob(".adapter*"))
    with hold(ended):
        pass


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text(path.read_text().splitlines()[0] + "\n")])
def test_other_test_chats_are_not_judged_on_in_silence(change, ended):
    run = load_run(ended)
    assert len(run.test) == 8
    change(ended / "test.jsonl")
    with pytest.raises(FinetuneError, match=r"test\.jsonl does not hold the 8 chats that the run put aside"):
        _ = load_run(ended).test


def test_a_file_that_was_laid_into_a_checkpoint_is_not_taken(stopped, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    newest, taken, load = checkpoints(folder)[-1], [], CrashSafeTrainer._load_from_checkpoint
    monkeypatch.setattr(CrashSafeTrainer, "_load_from_checkpoint", lambda self, *args, **kwargs: (load(self, *args, **kwargs), taken.append(self.best_weights)))
    weights = load_file(newest / "adapter_model.safetensors")
    for name in {"best.safetensors"} - files_of(newest):  # which it has only where the best look is an earlier one
        save_file({name: torch.full_like(weight, 0.123) for name, weight in weights.items()}, newest / name)
    resume(folder, say=quietly).release()
    assert len(taken) == 1
    assert all(torch.equal(weight, weights[name]) for name, weight in taken[0].items()), "the best weights are those of the checkpoint itself"


def test_another_optimizer_begins_anew_where_it_is_allowed_by_one_name(stopped, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(stopped, folder)
    save_config(replace(load_config(folder / "config.yaml"), optim="adafactor"), folder / "config.yaml")
    with pytest.raises(TrainingError, match=r'allow_change=\["optim"\]'):
        resume(folder, say=quietly)
    resume(folder, say=said.append, allow_change="optim").release()
    assert any("allowed: optim. The new optimizer begins without what the other one kept" in line for line in said)


def test_another_precision_of_products_is_told(stopped, tmp_path):
    folder, said = tmp_path / "run", []
    shutil.copytree(stopped, folder)
    torch.set_float32_matmul_precision("medium")
    try:
        resume(folder, say=said.append).release()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert any("medium precision of products: the last bits may be others" in line for line in said)


def test_a_logger_that_is_not_here_is_told_before_anything(quick, monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match="report_to=\"wandb\" needs a package that is not here: pip install wandb"):
        train(replace(quick, report_to="wandb"), some_splits(), say=quietly)


def test_lines_of_a_run_are_lost_at_its_end_alone(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    for text, found in (('{"step": 1}\n{"st\n{"step": 3}\n', "line 2 is no JSON"), ('{"step": 1}\n[1]\n', "line 2 is no row")):
        path.write_text(text)
        with pytest.raises(DamageError, match=found) as caught:
            read_lines(path)
        assert str(caught.value).count("history.jsonl is not as") == 1, "told once"


def test_what_is_no_file_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(DamageError, match="run.json.*: it is no file"):
        read_facts(tmp_path)
    save_there("{}", tmp_path / "run.json")
    assert read_facts(tmp_path) == {}
    monkeypatch.setattr("finetune_nb.run_folder.LARGEST", 1)
    with pytest.raises(DamageError, match="it has 2 bytes, far more"):
        read_facts(tmp_path)

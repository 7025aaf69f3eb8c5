"""Several processes make the run that one makes: the same curve, the same adapter, one writer, one end."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import many_processes
import pytest
from conftest import ROOT, save_tiny
from many_processes import MASKED, PACKED, asked, choices, half_masked, seventeen
from safetensors.torch import load_file

from finetune_nb import cli, launch, training
from finetune_nb.cli import main
from finetune_nb.config import FinetuneConfig, load_config, save_config
from finetune_nb.data import save_chats
from finetune_nb.launch import LaunchError, Started, run_processes, skypilot_file, slurm_script, start_processes
from finetune_nb.processes import idle_gpus
from finetune_nb.run_folder import read_facts, read_history
from finetune_nb.stop import TrainingError
from finetune_nb.training import resume, train

TIMES = ("eval_runtime", "tokens_per_second", "memory_gib", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def launch_two(patch, words):
    "As the command does it, which leaves its marks in the environment."
    for name in ("FINETUNE_NB_LAUNCHED", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS", "TORCH_CPP_LOG_LEVEL", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        patch.setenv(name, "1")
    run_processes(2, words)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "A folder with the runs of two processes, and of one in `one`."
    folder = tmp_path_factory.mktemp("many")
    model = save_tiny(folder / "model")
    command = choices(folder / "runs", model, None, max_steps=1, train_file=str(save_chats(seventeen().train, folder / "chats.jsonl")))
    save_config(replace(command, per_device_train_batch_size=2), folder / "run.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        launch_two(patch, [many_processes.__file__, str(folder), model])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune_nb.training.fastest_ways", lambda *args: ["tree"])
        train(choices(folder / "one", model, "all"), seventeen())
        half_masked(choices(folder / "one", model, "masked", **MASKED))
        train(choices(folder / "one", model, "packed", **PACKED), seventeen())
        yield folder


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def points(folder):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_history(folder)]


def assert_same(one, other, tolerance=1e-5):
    "The curves within `tolerance`, the adapters within 1e-5."
    first, second = points(one), points(other)
    assert len(first) == len(second) and [row.keys() for row in first] == [row.keys() for row in second]
    for a, b in zip(first, second, strict=True):
        assert all(math.isclose(a[name], b[name], rel_tol=tolerance, abs_tol=1e-9) for name in a), (a, b)
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    assert max(((first[name] - second[name]).norm() / first[name].norm()).item() for name in first) <= 1e-5


@pytest.mark.parametrize("name", ["ddp", "stopped", "parts", "full"])
def test_two_processes_train_what_one_does(many, name):
    "The last step of an epoch has a chat for one of them alone, and chats have different numbers of tokens to learn from; two were stopped and went on, one of them with a model in parts (FSDP2); in one, a device was full in the middle."
    assert_same(many / "one" / "all", many / name)
    facts = read_facts(many / name)
    assert facts["processes"] == 2 and facts["steps"] == facts["planned"]["steps"] == 6


def test_a_model_in_four_bits_in_parts_trains_as_whole(many):
    "Also where a whole layer outside of the blocks is trained, which stays together between two steps."
    assert_same(many / "one" / "packed", many / "packed", 5e-5)  # the norm of the layer's gradient, summed in float32, differs by 2e-5
    assert read_facts(many / "packed")["packing"] == read_facts(many / "one" / "packed")["packing"] == "shared"
    assert any("lm_head" in name for name in adapter(many / "packed"))


def test_no_process_keeps_a_weight_whole_and_a_model_in_parts_can_be_asked(many):
    alone, _ = asked(choices(many / "one", str(many / "model"), None))
    assert said(many, "asked") == [[alone, 0]] * 2
    assert read_facts(many / "never_stopped_in_parts")["preflight"]["ok"], "it was flown in parts"


def test_a_process_without_labels_counts_for_nothing(many):
    assert_same(many / "one" / "masked", many / "masked")
    assert read_facts(many / "masked")["counted_steps"] == read_facts(many / "one" / "masked")["counted_steps"] != {}


def test_a_full_device_makes_all_take_smaller_pieces(many):
    "Both record it, so that a run that goes on keeps to it; the one that had room took larger ones before."
    (told, most, largest, last), (same, also, small, least) = said(many, "full")
    assert told == same and [row["step"] for row in told] == [4] and most == also == told[0]["max_tokens_at_once"] <= 64 < largest
    assert max(last, least) <= 64 and small > 64


def said(folder, what):
    return [json.loads((folder / f"said_{rank}.json").read_text())[what] for rank in (0, 1)]


def test_a_stop_of_one_process_stops_all_and_the_run_goes_on_to_the_last_bit(many):
    assert said(many, "stopped") == said(many, "stopped in parts") == [["the user", 2, 6]] * 2 and not list(many.glob("*/.*.part"))
    for stopped, never in (("stopped", "ddp"), ("parts", "never_stopped_in_parts")):
        assert points(many / stopped) == points(many / never)
        first, second = adapter(many / stopped), adapter(many / never)
        assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
    assert {path.name for path in (many / "parts_kept" / "checkpoint-2").iterdir()} == {path.name for path in (many / "stopped_kept" / "checkpoint-2").iterdir()}


@pytest.mark.parametrize("name", ["stopped", "parts"])
def test_another_number_of_processes_goes_on_in_the_same_steps_only(many, tmp_path, name):
    folder = shutil.copytree(many / f"{name}_kept", tmp_path / name)
    with pytest.raises(TrainingError, match="A step had 8 chats in 2 processes, and would have 4 in 1(?s:.*)Set per_device_train_batch_size and (?s:.*)so that 1 × per_device_train_batch_size × gradient_accumulation_steps is 8"):
        resume(folder)
    config = load_config(folder / "config.yaml")
    config.gradient_accumulation_steps = 4
    save_config(config, folder / "config.yaml")
    with pytest.raises(TrainingError, match=r'processes: 2, now 1(?s:.*)allow_change=\["gradient_accumulation_steps", "processes"\]'):
        resume(folder)
    lines = []
    resume(folder, allow_change=["processes", "gradient_accumulation_steps"], say=lines.append)
    assert "Different from here on, as allowed: gradient_accumulation_steps, processes." in lines
    assert_same(many / "one" / "all", folder)


def test_what_one_process_sees_ends_all(many):
    (kind, words), (other, same) = said(many, "no number")
    assert kind == other == "NonFiniteError" and "it comes from the zebra: look at it first" in words and "it comes from the zebra" in same
    assert points(many / "no_number")[-1]["ended_by"] == "NonFiniteError"
    heard, found = said(many, "no room")
    assert found[0] == "NoRoomError" and "this chat alone" in found[1] and heard == ["PeerError", f"Process 1 of 2 could not go on: {found[1]}"]
    heard, found = said(many, "no file")
    assert found[0] == "FileNotFoundError" and heard[0] == "PeerError" and heard[1].startswith("Process 1 of 2 could not go on: ") and "missing.jsonl does not exist" in heard[1]
    assert not (many / "no_file").exists()


@pytest.mark.slow
def test_a_full_device_ends_a_model_in_parts_with_what_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(LaunchError, match=r"^Process 1 of 2: Step 4 did not fit into the memory of process 1 with up to 200 tokens at once(?s:.*)Set max_tokens_at_once to [0-9]+ or less"):
        launch_two(monkeypatch, [many_processes.__file__, str(tmp_path), save_tiny(tmp_path / "model"), "full"])


def test_the_command_is_that_of_each_process(many, monkeypatch):
    words = []
    monkeypatch.setattr("finetune_nb.launch.run_processes", lambda n, command: words.append((n, command)))
    for option in (["--num-processes", "2"], ["--num-processes=2"]):
        assert main(["train", "run.yaml", *option, "--no-evaluate"]) == 0
    assert words == [(2, ["-m", "finetune_nb", "train", "run.yaml", "--no-evaluate"])] * 2
    assert main(["train", "run.yaml", "--num-processes", "all"]) == 2, "there is no GPU here"
    assert said(many, "code") == [0, 0] and (many / "printed_1.txt").read_text() == ""
    printed = (many / "printed_0.txt").read_text()
    assert printed.count("kept in: ") == 1 and "a step learns from 2 × 2 × 2 = 8 chats" in printed
    assert [path.name for path in (many / "runs").iterdir()] == ["run-001"]
    assert read_facts(many / "runs" / "run-001")["launcher"] == os.getpid() and read_facts(many / "one" / "all")["launcher"] is None


def test_no_process_of_several_starts_several_more(monkeypatch, capsys):
    "An option cut short would stay in the command of each process."
    words = []
    monkeypatch.setattr("finetune_nb.launch.run_processes", lambda n, command: words.append(command))
    for option in (["--num-proc", "2"], ["--num-proc=2"]):
        for command in ("train", "resume"):
            with pytest.raises(SystemExit, match="2"):
                main([command, "run.yaml", *option])
            assert "unrecognized arguments: --num-proc" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_end", lambda code: code)  # which ends one of several processes
    for name in ("FINETUNE_NB_LAUNCHED", "WORLD_SIZE"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "2")
            assert main(["train", "run.yaml", "--num-processes", "2"]) == 2
        said = capsys.readouterr().err
        assert f"was itself started as one of several ({name} is set)" in said and "leave the option out" in said
    assert words == []
    assert all(not parser.allow_abbrev for parser in (cli.make_parser(), *cli.make_parser()._subparsers._group_actions[0].choices.values()))


@pytest.fixture
def started(monkeypatch):
    "Programs that stand in for the next launchers; and for each that was started, what its settings were."
    programs, configs, real = [], [], subprocess.Popen

    def start(words, **more):
        configs.append(load_config(words[4]))
        return real([sys.executable, "-c", programs.pop(0)], **more)

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    return programs, configs


WAITS, FAILS = "import time; time.sleep(60)", "print('finetune_nb: no chats'); raise SystemExit(2)"


def test_two_starts_in_a_row_are_two_runs_and_a_failed_one_gives_its_name_back(tmp_path, started):
    programs, configs = started
    config = FinetuneConfig(output_dir=str(tmp_path), train_file="chats.jsonl")
    programs += [WAITS, FAILS, FAILS, WAITS, FAILS]
    one, two = start_processes(replace(config, seed=1), 2), start_processes(replace(config, seed=2), 2)
    assert [run.folder.name for run in (one, two)] == [config.run_name for config in configs] == ["run-001", "run-002"]
    assert [load_config(tmp_path / f".run-00{seed}.yaml").seed for seed in (1, 2)] == [1, 2]
    assert (tmp_path / ".run-001.yaml").stat().st_mode & 0o777 == 0o600
    with pytest.raises(LaunchError, match="run-002 came to no result: no chats$"):
        two.wait()
    assert not (tmp_path / ".run-002.yaml").exists()
    three = start_processes(config, 2)
    three.process.wait()
    four = start_processes(config, 2)  # also where nobody waited for the third
    with pytest.raises(LaunchError):
        three.wait()
    assert three.folder == four.folder == two.folder and (tmp_path / ".run-002.yaml").exists(), "it is that of the fourth by now"
    with pytest.raises(TrainingError, match="run-001 was started already, and is about to begin. Choose another run_name"):
        start_processes(replace(config, run_name="run-001"), 2)
    for run in (one, four):
        run.process.kill()
        run.process.wait()
    (tmp_path / ".run-001.yaml").write_text("seed: 3")
    launch._STARTED.clear()  # as in another kernel
    with pytest.raises(TrainingError, match="was started already"):
        start_processes(replace(config, run_name="run-001"), 2)
    os.utime(tmp_path / ".run-001.yaml", (1, 1))
    with pytest.raises(LaunchError):
        start_processes(replace(config, run_name="run-001"), 2).wait()
    assert not programs
    with pytest.raises(IndexError):  # nothing can be started
        start_processes(config, 2)
    assert list(tmp_path.glob(".*.yaml")) == [tmp_path / ".run-002.yaml"], "of the kernel that is gone"


def test_a_run_of_somebody_else_is_not_taken_for_the_one_that_was_started(many, tmp_path):
    folder = shutil.copytree(many / "runs" / "run-001", tmp_path / "run-001")
    (tmp_path / ".run-001.log").write_text("finetune_nb: Process 0 of 2: run-001 exists and is not overwritten.\n")

    def ended(code):
        return Started(subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]), folder, tmp_path / ".run-001.log")

    for code in (2, 128 + signal.SIGTERM):
        with pytest.raises(LaunchError, match="run-001 came to no result: Process 0 of 2: run-001 exists"):
            ended(code).wait()
        run = ended(code)
        facts = read_facts(folder) | {"launcher": run.process.pid}
        (folder / "run.json").write_text(json.dumps(facts))
        assert run.wait().facts == facts, "ended by a signal, or on its way out: it is there"
    assert ended(0).wait().folder == folder


@pytest.mark.parametrize(("changes", "why"), [({"optim": "adafactor"}, 'optim="adafactor", which knows no weights in parts'), ({"optim": "paged_adamw_8bit"}, "Take adamw_torch"), ({"init_lora_weights": "pissa"}, "pissa")])
def test_what_can_not_be_trained_in_parts_is_refused_before_anything_is_loaded(changes, why, many, tmp_path, monkeypatch):
    kept = shutil.copytree(many / "parts_kept", tmp_path / "parts")
    config = replace(load_config(kept / "config.yaml"), output_dir=str(tmp_path / "runs"), run_name=None, **changes)
    save_config(config, kept / "new.yaml")
    os.replace(kept / "new.yaml", kept / "config.yaml")
    for name in ("load_base", "load_splits"):
        monkeypatch.setattr(training, name, None)
    with monkeypatch.context() as patch:
        patch.setattr(training, "n_processes", lambda: 2)
        for begin in (lambda: train(config, seventeen()), lambda: resume(kept)):
            with pytest.raises(TrainingError, match=why):
                begin()
    training._check_parts(config), training._check_parts(replace(config, fsdp=False))


def test_the_run_file_decides_about_precision_and_not_accelerate(many, monkeypatch):
    lines, config = [], choices(many / "one", str(many / "model"), None)
    for told, said in (("bf16", 1), ("no", 0), (None, 0)):
        lines.clear()
        if told:
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
        assert training._join(config, lines.append) == config and len(lines) == said and "ACCELERATE_MIXED_PRECISION" not in os.environ
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = train(replace(config, max_steps=1, eval_strategy="no", output_dir=str(many / "precision")), seventeen(), say=lines.append)
    assert run.facts["dtype"] == "float32" and lines[0].startswith("Accelerate was told mixed_precision=bf16") and "the run computes in float32" in lines[0]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    training._join(replace(config, bf16=True), lines.append)
    assert sum("Accelerate" in line for line in lines) == 1, "which is what the run file says too"


def test_numbers_of_processes_that_make_the_same_steps_are_named(monkeypatch):
    before = {"processes": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    config = FinetuneConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    monkeypatch.setattr(training, "n_processes", lambda: 3)
    with pytest.raises(TrainingError, match=r"No whole number of chats for each makes 8 in 3 processes: start a number that divides it \(1, 2, 4, 8\), and set per_device_train_batch_size and gradient_accumulation_steps (?s:.*)so that number of processes × "):
        training._check_step_size(before, config)
    monkeypatch.setattr(training, "n_processes", lambda: 4)
    with pytest.raises(TrainingError, match=r"would have 16 in 4(?s:.*)be another. Set per_device_train_batch_size (?s:.*)so that 4 × "):
        training._check_step_size(before, config)
    training._check_step_size(before, replace(config, per_device_train_batch_size=1))


def test_the_cause_is_said_and_not_what_comes_of_it(monkeypatch):
    code = (
        "import os, time\nfrom finetune_nb.config import FinetuneError\nfrom finetune_nb.launch import keep_error\n"
        "if os.environ['RANK'] == '1':\n    keep_error(FinetuneError('there is no such column'))\n    time.sleep(9)\n"
        "time.sleep(1)\nkeep_error(RuntimeError('Connection closed by peer'))\nos._exit(2)"
    )
    with pytest.raises(LaunchError, match="^Process 1 of 2: there is no such column$"):
        launch_two(monkeypatch, ["-c", code])
    assert "FINETUNE_NB_LAUNCHED" not in os.environ, "or no other could be started"


def test_an_idle_gpu_is_said():
    assert idle_gpus(1, 1) == idle_gpus(0, 1) == idle_gpus(4, 4) == ""
    assert idle_gpus(4, 2).startswith("2 of the 4 GPUs are idle") and "--num-processes 4" in idle_gpus(4, 2)


def test_files_for_schedulers_are_quoted(tmp_path):
    import yaml

    script = slurm_script("it's; rm -r .yaml", gpus=2, machines=2)
    (tmp_path / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0
    heard = subprocess.run(["bash", "-c", 'srun() { printf "%s\\n" "cpus $SRUN_CPUS_PER_TASK" "$@"; }; scontrol() { echo node1; }; SLURM_JOB_NODELIST=x; ' + script], capture_output=True, text=True, check=True)
    assert heard.stdout.splitlines()[0] == "cpus 8" and "SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8}\nsrun " in script, "srun does not take them over"
    assert heard.stdout.splitlines()[-1] == "it's; rm -r .yaml" and "--rdzv-endpoint=node1:29500" in heard.stdout
    file = yaml.safe_load(skypilot_file("run.yaml", gpus=4, machines=2, bucket="my-runs"))
    assert file["resources"] == {"accelerators": "H100:4"} and file["file_mounts"] == {"/runs": {"name": "my-runs", "mode": "MOUNT_CACHED"}}
    assert file["run"].rstrip().endswith("train run.yaml --set output_dir=/runs")
    assert "file_mounts" not in yaml.safe_load(skypilot_file("run.yaml"))
    for word in ("123", "on", "null", "1e3"):
        file = yaml.safe_load(skypilot_file("run.yaml", gpu=word, name=word, bucket=word, gpus=30))
        assert (file["name"], file["file_mounts"]["/runs"]["name"], file["resources"]["accelerators"]) == (word, word, f"{word}:30")
    for given, why in (({"machines": 2}, "name a bucket"), ({"config_file": "/a/run.yaml"}, "does not lie in the folder"), ({"config_file": "../run.yaml"}, "does not lie in the folder"), ({"bucket": "x: y"}, "letters, digits")):
        with pytest.raises(LaunchError, match=why):
            skypilot_file(**{"config_file": "run.yaml", **given})
    assert slurm_script("-x.yaml").rstrip().endswith(" ./-x.yaml") and slurm_script("HEAD:x.yaml", machines=2).rstrip().endswith(" HEAD:x.yaml")
    for hours in (0, -3, 1.5):
        with pytest.raises(LaunchError, match="whole number of hours"):
            slurm_script("run.yaml", hours=hours)
    with pytest.raises(LaunchError, match="letters, digits"):
        slurm_script("run.yaml", name="x\n#SBATCH --wrap=rm")

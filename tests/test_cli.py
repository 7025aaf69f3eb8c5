"""The command line, as a user types it."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

import finetune_nb.__main__
from finetune_nb.cli import main
from finetune_nb.config import FinetuneConfig, field_help, load_config, save_config
from finetune_nb.data import Chat, load_chats, save_chats
from finetune_nb.export import FORMATS


@pytest.fixture
def settings_version():
    "The version that settings.ini names."
    return next(line.split("=")[1].strip() for line in (ROOT / "settings.ini").read_text(encoding="utf-8").splitlines() if line.startswith("version"))


def run_command(*words, cwd=None):
    command = [sys.executable, "-c", "import sys; from finetune_nb.cli import main; sys.exit(main())", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(f"{name} = " in said and text in said for name, text in field_help(FinetuneConfig).items())
    assert main([]) == 0 and "finetune_nb demo" in capsys.readouterr().out


def test_train_and_evaluate(quick, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick.train_file, quick.output_dir = str(save_chats(chats, tmp_path / "chats.jsonl")), "runs"
    save_config(quick, tmp_path / "config.yaml")
    assert main(["train", "config.yaml", "--set", "r=4", "learning_rate=1e-3", "--no-evaluate"]) == 0
    assert "runs/run-001" in (said := capsys.readouterr().out) and "Only 4 test chats, and a verdict takes 10: set more aside" in said
    assert main(["ask", "runs/run-001", "What is 2 plus one?", "And 3?", "--max-new-tokens", "3"]) == 0
    assert re.search(r"^What is 2 plus one\?\n  base:  .*\n  tuned: .*\n\nAnd 3\?\n", capsys.readouterr().out, re.M), "both answers to each question"
    saved = load_config("runs/run-001/config.yaml")
    assert (saved.r, saved.learning_rate) == (4, 1e-3)
    assert main(["evaluate", "runs/run-001"]) == 0
    said = capsys.readouterr().out
    assert "exact match" in said and "Report:  runs/run-001/report.html" in said
    assert main(["evaluate", "runs/run-001", "--data", "chats.jsonl"]) == 0
    assert "40 test chats" in capsys.readouterr().out
    assert main(["diagnose", "runs/run-001"]) == 0
    assert "run-001: finished after" in (said := capsys.readouterr().out) and "Looked for: " in said
    assert main(["diagnose", "runs/run-001", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("**run-001: finished after")


def test_the_figure_that_a_verdict_rests_on_is_chosen(quick, chats, tmp_path, capsys, monkeypatch):
    from finetune_nb import evaluation
    from finetune_nb.evaluation import load_comparison

    monkeypatch.chdir(tmp_path)
    quick.train_file, quick.output_dir, quick.max_steps, quick.answer_pattern = str(save_chats(chats, tmp_path / "chats.jsonl")), "runs", 2, r"It is (?P<number>\d+)\..*"
    save_config(quick, tmp_path / "config.yaml")

    def rests_on(name):
        return [load_comparison(f"runs/{name}").base.main, load_comparison(f"runs/{name}").tuned.main]

    assert main(["train", "config.yaml", "--score", "elegance"]) == 2 and not (tmp_path / "runs").exists(), "before any training"
    assert "no score 'elegance'; there are exact match, normalised match, right form, right number" in capsys.readouterr().err
    assert main(["train", "config.yaml", "--score", "token F1", "--set", "run_name=one"]) == 0 and rests_on("one") == ["token F1"] * 2
    assert main(["evaluate", "runs/one"]) == 0 and rests_on("one") == ["right number"] * 2
    assert main(["evaluate", "runs/one", "--score", "exact match"]) == 0 and rests_on("one") == ["exact match"] * 2
    assert main(["train", "config.yaml", "--set", "run_name=two"]) == 0
    monkeypatch.setattr(evaluation, "evaluate", None)
    assert main(["report", "runs/one", "--score", "token F1"]) == 0 and rests_on("one") == ["token F1"] * 2
    assert "better? token F1 " in capsys.readouterr().out
    assert main(["report", "runs/one"]) == 0 and rests_on("one") == ["token F1"] * 2, "the choice is kept"
    assert main(["compare", "runs/one", "runs/two", "--saved", "--score", "right form"]) == 0
    assert "By right form on" in capsys.readouterr().out
    for words in (["evaluate", "runs/one"], ["report", "runs/one"], ["compare", "runs/one", "runs/two"]):
        assert main([*words, "--score", "elegance"]) == 2
        assert "no score 'elegance'; there are exact match" in capsys.readouterr().err
    for ending, said in ((".html", "<!doctype html>"), (".md", "By token F1 on"), (".json", '{\n "verdict"')):
        assert main(["compare", "runs/one", "runs/two", "--saved", "--out", f"compared{ending}"]) == 0
        assert f"Comparison: compared{ending}" in capsys.readouterr().out and (tmp_path / f"compared{ending}").read_text().startswith(said)
    page = (tmp_path / "compared.html").read_text()
    assert ">exact match</t" in page and "http" not in page.replace("http-equiv", "")
    for wrong in ("compared.pdf", "compared"):
        assert main(["compare", "runs/none", "runs/two", "--out", wrong]) == 2
        assert f"{wrong}: a comparison ends in .html, .md or .json" in capsys.readouterr().err and not (tmp_path / wrong).exists(), "told before a run is asked"


def test_check_judges_before_training(chats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_chats([*chats, chats[3]], "chats.jsonl")
    assert main(["check", "chats.jsonl", "--save", "report.html"]) == 0
    said = capsys.readouterr().out
    assert "exact_duplicates: 2 chats in 1 group" in said and "chats.jsonl, line 41" in said and "41 examples" in said
    assert "as the embedded model has them" in said and "estimated from words" not in said, "tokens are those of the model that would be trained"
    assert "Report: report.html" in said and "<details" in (tmp_path / "report.html").read_text()
    assert main(["check", "chats.jsonl", "--model", "SmolLM2-135M-Instruct", "--max-length", "40"]) == 0
    said = capsys.readouterr().out
    assert "pass max_length=40" in said and "ok      generation stops" in said
    (tmp_path / "a.csv").write_text("q,reply\nWho?,Me.\nWhat?,\n")
    assert main(["check", "a.csv", "--columns", "user=q", "assistant=reply"]) == 2
    assert "a.csv, line 3" in capsys.readouterr().err
    monkeypatch.setattr("finetune_nb.cli._counting", lambda model: None)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command replaces
    monkeypatch.setattr("finetune_nb.cli.main", lambda: main(["check", "a.csv", "--columns", "user=q", "assistant=reply", "--on-error", "skip"]))
    with pytest.warns(UserWarning, match="a.rejected") as caught:
        assert finetune_nb.__main__.main() == 0
    said = capsys.readouterr().out
    assert "1 chat checked" in said and "estimated from words" in said
    shown = warnings.formatwarning(*(getattr(caught[0], name) for name in ("message", "category", "filename", "lineno")))
    assert shown.startswith("finetune_nb: skipped rows: 1, written to a.rejected.csv:\na.csv, line 3: ") and ".py" not in shown, "a sentence, without a place in the code"
    assert "/b.py:3: UserWarning: c" in warnings.formatwarning(UserWarning("c"), UserWarning, "/b.py", 3)
    for words, what in ((["--pattern", "("], "not a regular expression"), (["--columns", "q"], "expected NAME=VALUE"), (["--save", "x.pdf"], "a report ends in")):
        assert main(["check", "chats.jsonl", *words]) == 2
        assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"messages": [', "line 1: not valid JSON"),
        (b'{"messages": [{"content": "Hi"}, {"role": "assistant", "content": "x"}]}', "it has no 'role'"),
        (b'{"messages": [{"role": "assistant", "content": "Hi"}]}', "line 1: expected a user message first"),
        (b"", "it is empty"),
        (None, "does not exist"),
        ("folder", "is a folder"),
        (b'{"messages": [{"role": "user", "content": "\xe4"}]}', "not UTF-8 at column 44"),
    ],
)
def test_bad_data_is_one_clear_error_and_no_run(content, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        (tmp_path / "chats.jsonl").mkdir()
    elif content is not None:
        (tmp_path / "chats.jsonl").write_bytes(content)
    (tmp_path / "config.yaml").write_text("train_file: chats.jsonl")
    assert main(["train", "config.yaml"]) == 2
    error = capsys.readouterr().err
    assert said in error and "chats.jsonl" in error and "Traceback" not in error
    assert {p.name for p in tmp_path.iterdir()} <= {"config.yaml", "chats.jsonl"}


def test_a_setting_that_is_no_option_is_told_where_it_goes(capsys):
    for words, hint in ((["train", "config.yaml", "--r", "8"], "Settings go behind --set: --set r=VALUE"), (["train", "config.yaml", "--learning-rate=1e-4"], "--set learning_rate=VALUE"), (["train", "config.yaml", "--nonsense"], "--nonsense\n")):
        with pytest.raises(SystemExit):
            main(words)
        assert hint in capsys.readouterr().err


def test_bad_words_are_one_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("train_file: icd10")
    for words, said in (
        (["train", "config.yaml", "--set", "rank=8"], "did you mean 'r'"),
        (["train", "config.yaml", "--set", "r"], "expected NAME=VALUE"),
        (["train", "config.yaml", "--set", "model_name_or_path=no/where"], "neither in a package"),
        (["train", "nowhere.yaml"], "does not exist"),
        (["evaluate", "nowhere"], "nowhere does not exist"),
        (["diagnose", "nowhere"], "not the folder of a run"),
        (["config", "config.yaml"], "is not overwritten"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_notebook_is_copied_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["notebook", "--no-open"]) == 0
    (tmp_path / "finetune.ipynb").write_text("mine")
    assert main(["notebook", "--no-open"]) == 0 and (tmp_path / "finetune.ipynb").read_text() == "mine"
    assert "stays as it is" in capsys.readouterr().out


@pytest.mark.parametrize("port", ["99999999", "65536", "-1", "eighty", ""])
def test_a_port_that_can_not_be_is_refused_at_once(port, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["app", f"--port={port}"])
    assert ended.value.code == 2 and "is no port; choose a number" in capsys.readouterr().err


def test_config_writes_the_defaults(tmp_path):
    assert main(["config", str(tmp_path / "c.yaml")]) == 0
    assert load_config(tmp_path / "c.yaml") == FinetuneConfig()
    assert main(["config", str(tmp_path / "d.yaml"), "--set", "train_file=faq.csv", "columns={user: question, assistant: reply}"]) == 0
    assert load_config(tmp_path / "d.yaml") == FinetuneConfig(train_file="faq.csv", columns={"user": "question", "assistant": "reply"})


def test_as_a_process(tmp_path):
    assert run_command("--version").stdout.strip() == "0.1.0"
    result = run_command("train", "no.yaml", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("finetune_nb: no.yaml does not exist")


def test_a_failing_notebook_is_kept_and_named(tmp_path):
    import nbformat

    from finetune_nb.cli import run_notebook
    from finetune_nb.config import FinetuneError

    cells = [nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("print(n); 1 / 0")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(FinetuneError, match="ZeroDivisionError"):
        run_notebook(tmp_path / "a.ipynb", tmp_path / "b.ipynb", {"n": 7})
    assert "7\n" in (tmp_path / "b.ipynb").read_text().encode().decode("unicode_escape")


def test_sweep_and_range_test(quick, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick.train_file, quick.output_dir, quick.num_train_epochs = str(save_chats(chats, tmp_path / "chats.jsonl")), "runs", 1
    save_config(quick, tmp_path / "config.yaml")
    assert main(["sweep", "config.yaml", "--r", "2,4", "--lr", "1e-3", "--name", "ranks", "--set", "lora_dropout=0"]) == 0
    said = capsys.readouterr().out
    assert "is the best of 2" in said and "Runs:     runs/ranks" in said and (tmp_path / "runs/ranks/sweep.png").is_file()
    saved = load_config("runs/ranks/r=2_learning_rate=0.001/config.yaml")
    assert (saved.r, saved.learning_rate, saved.lora_dropout) == (2, 1e-3, 0)
    assert main(["sweep", "config.yaml", "--r", "2,4", "--lr", "1e-3", "--name", "ranks", "--set", "lora_dropout=0"]) == 0
    assert "training" not in capsys.readouterr().out, "what is finished is read"
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "config.yaml", "--r", "2,4", "--name", "none", "--set", "target_modules=[query]"])
    assert ended.value.code == 1 and "2 failed" in capsys.readouterr().out
    assert main(["range-test", "config.yaml", "--low", "1e-4", "--steps", "10", "--save", "curve.png"]) == 0
    assert "The loss" in capsys.readouterr().out and (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "config.yaml"], "at least one setting"),
        (["sweep", "config.yaml", "--r", "8,fast"], "r: expected an integer"),
        (["sweep", "config.yaml", "--r", "8,,16"], "r: expected an integer"),
        (["sweep", "config.yaml", "--r", "8,8"], "a value stands twice"),
        (["sweep", "config.yaml", "--max_length", "512,1024"], "max_length can't be varied"),
        (["sweep", "config.yaml", "--r", "8", "--rungs", "5,often"], "rungs are numbers of steps"),
        (["sweep", "config.yaml", "--r", "8", "--keep", "2"], "keep is the share"),
        (["sweep", "nowhere.yaml", "--r", "8"], "nowhere.yaml"),
        (["range-test", "config.yaml", "--low", "1", "--high", "0.1"], "from low to a higher high"),
        (["range-test", "config.yaml", "--set", "rank=8"], "did you mean 'r'"),
    ],
)
def test_bad_words_of_a_sweep_are_one_error(words, said, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_config(quick, tmp_path / "config.yaml")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("finetune_nb: ") and said in error and "Traceback" not in error


def test_the_version_is_told_without_metadata_and_without_torch(settings_version):
    code = "import sys; from finetune_nb.cli import main; main(['--version']); print([m for m in ('torch', 'psutil', 'packaging') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert said[:2] == [settings_version, "[]"]


def test_doctor_ends_with_1_only_where_a_run_cannot_work(tmp_path, capsys, monkeypatch):
    from finetune_nb import doctor

    (tmp_path / "file").touch()
    assert main(["doctor", "--no-hub", "--folder", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ok +machine ", said, re.M) and "hub" not in said and not (tmp_path / "runs").exists()
    monkeypatch.setattr(doctor, "check_machine", lambda: [])
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "--no-hub", "--folder", str(tmp_path / "file" / "runs")])
    assert "can't be written" in capsys.readouterr().out.splitlines()[1], "the worst first"


def test_doctor_tells_what_is_missing_in_a_bare_python(tmp_path):
    "Only what the command line itself imports is there: no torch, no transformers."
    code = """
import sys
from importlib.metadata import PackageNotFoundError
from packaging.requirements import Requirement
from finetune_nb import doctor
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft"): raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
doctor.check_packages.__defaults__ = (lambda name: (_ for _ in ()).throw(PackageNotFoundError(name)),)
found = doctor.doctor(hub=False)
print(found.ok, [f.remedy for f in found.findings if f.subject == "torch"], [f.text for f in found.findings if f.subject == "machine"])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert said.stdout.startswith("False ['pip install \"torch>="), said.stderr
    assert "not looked at" in said.stdout


def test_doctor_tells_what_is_wrong_with_a_torch_that_can_not_be_loaded(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file\\nNo such file')")
    code = "import sys; sys.path.insert(0, sys.argv.pop()); from finetune_nb.cli import main; sys.exit(main(['doctor', '--no-hub', '--folder', 'runs']))"
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert said.returncode == 1 and said.stderr == ""
    assert re.search(r"^error +torch +.* can't be loaded: OSError: libcudart.so.13: cannot open shared object file No such file -> pip install --force-reinstall torch", said.stdout, re.M), said.stdout
    assert all(re.search(rf"^\w+ +{subject} ", said.stdout, re.M) for subject in ("Python", "packages", "output_dir", "panel"))


def test_a_shell_completes_commands_options_and_values(capsys, tmp_path):
    import shutil

    if shutil.which("bash") is None:
        pytest.skip("no bash")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    asked = script + 'complete -p finetune_nb; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _finetune_nb; printf "%s\\n" "${COMPREPLY[@]}"'

    def offered(*words):
        said = subprocess.run(["bash", "-c", asked, "bash", "finetune_nb", *words], capture_output=True, text=True, check=True).stdout.split("\n")
        assert said[0] == "complete -o default -F _finetune_nb finetune_nb"
        return [word for word in said[1:] if word]

    assert offered("d") == ["diagnose", "demo", "doctor"] and offered("--v") == ["--version"]
    assert offered("check", "--on-error", "") == ["raise", "skip"] and offered("check", "a.jsonl", "--max") == ["--max-length"]
    assert offered("train", "") == [], "names of files, by -o default"
    assert offered("completion", "z") == ["zsh"]
    assert offered("train", "run.yaml", "--num-processes", "") == ["all"] and offered("train", "run.yaml", "--set", "learning") == ["learning_rate="]
    assert offered("train", "run.yaml", "--set", "r", "=", "8", "train_f") == ["train_file="] and offered("train", "run.yaml", "--set", "train_file", "=", "r") == [], "the value is a file, perhaps"
    assert offered("export", "runs/run-001", "--formats", "adapter", "q4") == ["q4_0", "q4_k_m"] and offered("export", "runs/run-001", "--formats", "adapter", "--no") == ["--no-check"]
    assert offered("resume", "runs/run-001", "--allow-change", "optim", "pack") == ["packing"]
    assert (set(offered("export", "runs/run-001", "--formats", "")), len(offered("train", "run.yaml", "--set", ""))) == (set(FORMATS), len(field_help(FinetuneConfig)))
    with pytest.raises(SystemExit):
        main(["completion", "tcsh"])
    if shutil.which("zsh"):
        assert main(["completion", "zsh"]) == 0
        asked = capsys.readouterr().out + 'print ${_comps[finetune_nb]}'
        done = subprocess.run(["zsh", "-f", "-c", asked], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "ZDOTDIR": str(tmp_path)})
        assert (done.returncode, done.stderr) == (0, "") and "_finetune_nb" in done.stdout, "also in one that has loaded nothing"
    if shutil.which("fish"):
        assert main(["completion", "fish"]) == 0
        asked = capsys.readouterr().out + '\ncomplete -C "finetune_nb check --on-error "; complete -C "finetune_nb do"; complete -C "finetune_nb train run.yaml --set learning"'
        said = subprocess.run(["fish", "-N", "-c", asked], capture_output=True, text=True, check=True).stdout.splitlines()
        assert [line.split("\t")[0] for line in said[:4]] == ["raise", "skip", "doctor", "learning_rate="], said


def test_check_saves_what_is_left(tmp_path, capsys):
    asked = [("How far is it?", "Two miles."), ("How far is it?", "Two miles."), ("When is it?", "At nine."), *((f"Which is number {i}?", f"It is {i * i}.") for i in range(5))]
    save_chats([Chat([{"role": "user", "content": q}, {"role": "assistant", "content": a}]) for q, a in asked], tmp_path / "all.jsonl")
    words = ["check", str(tmp_path / "all.jsonl"), "--without", "exact_duplicates"]
    assert main(words) == 2 and "give both" in capsys.readouterr().err
    assert main([*words, "--save-chats", str(tmp_path / "rest.csv")]) == 2 and "ends in .jsonl" in capsys.readouterr().err
    assert main([*words, "--save-chats", str(tmp_path / "rest.jsonl")]) == 0
    assert "1 of 8 chats removed, 7 left" in (said := capsys.readouterr().out) and f"What is left: {tmp_path / 'rest.jsonl'}" in said
    assert [chat.answer for chat in load_chats(tmp_path / "rest.jsonl")] == [a for _, a in asked[1:]]
    assert main([*words, "--save-chats", str(tmp_path / "rest.jsonl")]) == 2 and "is not written over" in capsys.readouterr().err
    assert main([*words[:3], "nonsense", "--save-chats", str(tmp_path / "other.jsonl")]) == 2 and "no check is called 'nonsense'" in capsys.readouterr().err and not (tmp_path / "other.jsonl").exists()
    save_chats([Chat([{"role": "user", "content": "How far is it?"}, {"role": "assistant", "content": "I'm sorry, no."}])], tmp_path / "no.jsonl")
    assert main(["check", str(tmp_path / "no.jsonl"), "--without", "refusals", "--save-chats", str(tmp_path / "other.jsonl")]) == 2
    assert "leaves no chat" in capsys.readouterr().err and not (tmp_path / "other.jsonl").exists()
    with pytest.raises(SystemExit):
        main(["check", "x", "--save-chat", "y"])


def test_a_warning_is_a_line_without_a_place_in_the_code():
    from finetune_nb import __main__ as command

    ours, theirs = str(Path(command.__file__).with_name("chats.py")), "/b.py"
    assert command._as_line(UserWarning("one row was skipped"), UserWarning, ours, 3) == "finetune_nb: one row was skipped\n"
    assert "/b.py:3: UserWarning: c" in command._as_line(UserWarning("c"), UserWarning, theirs, 3)


def test_an_interrupted_command_ends_in_a_line(monkeypatch, capsys):
    from finetune_nb import cli

    for name, words, goes_on in (("train_command", ["train", "config.yaml"], True), ("check_command", ["check", "chats.jsonl"], False)):

        def interrupted(options):
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, name, interrupted)
        assert main(words) == 130
        said = capsys.readouterr().err
        assert said.startswith("\nfinetune_nb: interrupted.") and said.count("\n") == 2 and ("finetune_nb resume RUN" in said) is goes_on


def test_a_stopped_run_leaves_the_test_set_alone(monkeypatch, capsys):
    from types import SimpleNamespace

    from finetune_nb import cli

    monkeypatch.setattr(cli, "_evaluate", lambda *args, **more: pytest.fail("the test set was asked"))
    run = SimpleNamespace(config=FinetuneConfig(), facts={"ended_by": "the user", "steps": 53}, test=[1], folder=Path("runs/run 1"))
    cli._show(run, SimpleNamespace(no_evaluate=False, score=None))
    assert "stopped after 53 steps, and the test set was left alone. Go on: finetune_nb resume 'runs/run 1'. Or judge it as it is: finetune_nb evaluate 'runs/run 1'" in capsys.readouterr().out


def test_errors_of_the_system_name_what_was_typed(tmp_path, capsys):
    assert main(["config", str(tmp_path / "nowhere" / "x.yaml")]) == 2
    assert capsys.readouterr().err == f"finetune_nb: {tmp_path}/nowhere/x.yaml: No such file or directory\n"

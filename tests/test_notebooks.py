"""Every notebook runs top to bottom in a real kernel from a fresh start."""

import json
import sys

import forked_kernels
import pytest
from conftest import ROOT
from jupyter_client.provisioning import local_provisioner

from finetune_nb.cli import run_notebook

SLOW = {"09p_serve.ipynb"}  # starts a server that nothing else needs
CHAPTERS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(p.name for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))]
PAGES = sorted(str(p.relative_to(ROOT / "nbs")) for folder in ("howto", "explain") for p in (ROOT / "nbs" / folder).glob("*.ipynb") if '"outputs": [\n' in p.read_text(encoding="utf-8"))


@pytest.fixture
def forked(monkeypatch):
    "Kernels come out of a process that has loaded torch; on Windows, which has no fork, they load it themselves."
    if sys.platform != "win32":
        monkeypatch.setattr(local_provisioner, "launch_kernel", forked_kernels.Forked)


@pytest.mark.parametrize("name", CHAPTERS + PAGES)
def test_page(name, tmp_path, forked):
    run_notebook(ROOT / "nbs" / name, tmp_path / name.rpartition("/")[2], {})


def test_tutorial_on_few_chats(tmp_path, capsys):  # in a kernel that is started as `make demo` does it
    "The same cells as `make demo`, on fewer chats."
    run_notebook(ROOT / "nbs/tutorials/finetune.ipynb", tmp_path / "finetune.ipynb", {"n_train": 12, "n_validation": 2, "max_eval_samples": 2, "by_hand": False})
    said = capsys.readouterr().out
    assert "Training [" in said and "exact match" in said
    run = tmp_path / "runs" / "run-001"
    expected = "adapter answers.jsonl config.yaml history.jsonl loss.png report.html report.md run.json test.jsonl".split()
    assert set(expected) <= {p.name for p in run.iterdir()}
    assert f"Adapter: {run.relative_to(tmp_path) / 'adapter'}" in said


@pytest.mark.slow
def test_tutorial_on_few_questions(tmp_path, forked):
    few = {"n_questions": 2, "n_train": 8, "n_general": 3, "n_museum": 2, "n_lookup": 2}
    run_notebook(ROOT / "nbs/tutorials/should_you_finetune.ipynb", tmp_path / "should_you.ipynb", few)
    assert (tmp_path / "runs" / "run-001" / "adapter").is_dir()


def test_tutorial_on_what_went_wrong(tmp_path, forked, capsys):
    run_notebook(ROOT / "nbs/tutorials/troubleshooting.ipynb", tmp_path / "troubleshooting.ipynb", {"n_train": 12, "n_validation": 2})
    assert {p.name for p in (tmp_path / "runs").iterdir() if p.name[0] != "."} == {"run-001", "run-002"}, "the third is refused"
    seen = json.dumps(json.loads((tmp_path / "troubleshooting.ipynb").read_text(encoding="utf-8"))["cells"]) + capsys.readouterr().out
    for found in ("LEARNING RATE TOO HIGH", "ADAPTER MISSING OR ALL ZERO", "RUN REFUSED OR FAILED"):
        assert found in seen


@pytest.mark.slow
def test_tutorial_on_two_processes(tmp_path, forked, tiny_model, capsys):
    few = {"model": tiny_model, "gpus": [1, 8], "tokens": [2048], "ranks": [16]}
    run_notebook(ROOT / "nbs/tutorials/many_gpus.ipynb", tmp_path / "many_gpus.ipynb", few)
    said = capsys.readouterr().out
    assert "step  3 loss" in said and "Process 0 of 2: lost.jsonl does not exist" in said
    assert json.loads((tmp_path / "runs" / "run-001" / "run.json").read_text(encoding="utf-8"))["processes"] == 2


def test_tutorial_with_nothing_but_the_panel(tmp_path, forked):
    run_notebook(ROOT / "nbs/tutorials/panel.ipynb", tmp_path / "panel.ipynb", {})
    seen = json.dumps(json.loads((tmp_path / "panel.ipynb").read_text(encoding="utf-8"))["cells"])
    assert "application/vnd.jupyter.widget-view+json" in seen or "Settings" in seen

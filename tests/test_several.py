"""Any number of runs: held against the first, read back from their folders, and what can't be compared is named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import quick_config, some_chats
from test_scores import report, row

from finetune_nb import several
from finetune_nb.config import ConfigError
from finetune_nb.data import Splits
from finetune_nb.evaluation import evaluate_run, load_comparison
from finetune_nb.scores import LENGTH, LOSS, PERPLEXITY, EvalReport
from finetune_nb.several import _new_name, compare_runs
from finetune_nb.training import load_run, train


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    made, chats, quick = [], some_chats(), quick_config(tiny_model, tmp_path_factory.mktemp("trained"))
    for name, rate, test in (("one", 1e-4, chats[24:36]), ("two", 1e-2, chats[24:36]), ("three", 1e-2, chats[36:])):
        config = replace(quick, run_name=name, learning_rate=rate, eval_strategy="no", num_train_epochs=1, r=4)
        made.append(train(config, Splits(chats[:24], [], test), say=lambda line: None))
    for run in (made[0], made[2]):
        evaluate_run(run)
    return [run.folder for run in made]


@pytest.fixture
def runs(trained, tmp_path):
    "Two runs on the same test chats, and one that was tested on others; the second is not evaluated yet. Copies, trained once for all tests."
    return [Path(shutil.copytree(folder, tmp_path / "runs" / folder.name)) for folder in trained]


def test_runs_are_held_against_the_first(runs, monkeypatch):
    found = compare_runs(runs, missing=False)
    assert [r.name for r in found.reports] == ["one"] and list(found.left_out) == ["two", "three"]
    assert "no report" in found.left_out["two"] and "0 of its 4 questions are among the 12 of one" in found.left_out["three"]
    found = compare_runs(runs)
    assert [r.name for r in found.reports] == ["one", "two", "three"] and not found.left_out
    assert found.differences["two"][LOSS].verdict == "better" and set(found.apart["two"]) == set()
    assert len(found.reports[2].rows) == 12 and len(load_comparison(runs[2]).tuned.rows) == 4, "its own report stays as it was"
    assert found.reports[1].rows == evaluate_run(load_run(runs[1])).tuned.rows
    monkeypatch.setattr(several, "evaluate", None)
    monkeypatch.setattr(several, "evaluate_run", None)
    again = compare_runs(runs)
    assert again.differences == found.differences, "read, not computed again"
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert said["differences"]["two"][LOSS]["verdict"] == "better" and "two" in str(found) and "| two |" in found.to_markdown()


def test_who_has_learned_from_the_test_chats_is_left_out(runs, quick, chats):
    config = replace(quick, run_name="leaky", eval_strategy="no", num_train_epochs=1)
    train(config, Splits(chats[20:36], [], chats[36:]), say=lambda line: None)
    found = compare_runs([runs[0], runs[0].parent / "leaky"])
    assert "12 of these 12 test chats stand among those that it was trained on" in found.left_out["leaky"]


def test_a_kept_report_and_the_first_run_are_no_excuse(runs, quick, chats):
    config = replace(quick, run_name="leaky", eval_strategy="no", num_train_epochs=1, max_steps=1)
    leaky = train(config, Splits(chats[20:36], [], chats[24:36]), say=lambda line: None)
    evaluate_run(leaky)
    assert "12 of these 12 test chats" in compare_runs([runs[0], leaky.folder]).left_out["leaky"]
    with pytest.raises(ConfigError, match="leaky can't be what others are held against: 12 of these 12"):
        compare_runs([leaky.folder, runs[0]])


def test_a_kept_report_was_asked_as_the_first_was(runs, chats):
    some, config = chats[26:30], load_run(runs[0]).config
    compare_runs(runs[:2], some)
    first = evaluate_run(load_run(runs[0]), some, checks={"short": ".{1,3}"}).tuned
    found = compare_runs([replace(first, name="first"), runs[1]], some)
    assert "short" in found.reports[1].shares and found.reports[1].about["checks"] == {"short": ".{1,3}"}
    shorter = replace(first, about=first.about | {"max_new_tokens": config.max_new_tokens - 2})
    assert compare_runs([shorter, runs[1]], some).reports[1].about["max_new_tokens"] == config.max_new_tokens - 2
    (kept,) = runs[1].glob("compared-*.json")
    kept.write_text("{broken")
    assert "can't be read" in compare_runs([shorter, runs[1]], some).left_out["two"]


def test_chats_for_all(runs, chats):
    found = compare_runs(runs[:2], chats[26:30])
    assert [len(r.rows) for r in found.reports] == [4, 4] and len(list(runs[0].glob("compared-*.json"))) == 1


def test_a_score_that_is_none_is_told_before_anything_is_answered(runs, chats, monkeypatch):
    monkeypatch.setattr(several, "evaluate", None)
    monkeypatch.setattr(several, "evaluate_run", None)
    for given in (None, chats[26:30]):
        with pytest.raises(ConfigError, match="There is no score 'elegance'; there are exact match, normalised match, token F1, ended by itself"):
            compare_runs([runs[1], runs[0]], given, score="elegance")
    assert not (runs[1] / "report.json").exists() and not list(runs[1].glob("compared-*.json"))


def test_many_runs_that_are_the_same_are_rarely_told_apart():
    "Twelve runs, each as good as the first: their verdicts hold together, and the words say so."
    wrong = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        reports = [EvalReport(f"run {k}", [row(i, bool(rng.random() < 0.7), loss=float(3 + rng.normal(0, 0.3))) for i in range(40)]) for k in range(12)]
        found = compare_runs(reports)
        wrong.append(any(found.differences[other.name][LOSS].verdict != "can't tell" for other in reports[1:]))
    assert np.mean(wrong) <= 0.2
    assert "11 runs are held against run 0: the verdicts of a figure hold together (Holm's correction)" in found._repr_html_().replace("&#x27;", "'")
    assert "Holm" not in str(compare_runs(reports[:2]))
    assert all("lines are not corrected for one another" in page for page in (str(found), found.to_markdown(), found._repr_html_(), str(compare_runs(reports[:2]))))
    assert not compare_runs(reports[:1] + [EvalReport("other", reports[1].rows[:30])]).notes[1:], "nothing is compared"


def test_figures_that_mean_something_else_are_not_compared():
    first = EvalReport("a", [row(i) for i in range(12)], "x(?P<code>y)", {"max_new_tokens": 8, "prompts_sha256": "1", "checks": {"mine": "a.*"}})
    other = EvalReport("b", [row(i, tokens=5) for i in range(12)], "z", {"max_new_tokens": 9, "prompts_sha256": "2", "checks": {"mine": "b.*"}})
    found = compare_runs([first, other])
    assert {LOSS, PERPLEXITY, LENGTH, "mine"} <= set(found.apart["b"]) and LOSS not in found.differences["b"] and "exact match" in found.differences["b"]
    notes = " ".join(found.notes)
    assert "another tokenizer" in notes and "max_new_tokens 9 in place of 8" in notes and "another prompt text" in notes and "another check of this name" in notes
    assert "b: not compared" in notes and "older version" in " ".join(compare_runs([first, EvalReport("c", first.rows)]).notes)


def test_names_are_told_apart_and_escaped():
    assert [_new_name(Path(one), ["run-001"]) for one in ("runs/run-002", "other/run-001", "run-001")] == ["run-002", "other/run-001", "run-001 (2)"]
    evil = "<img src=x onerror=alert(1)>"
    found = compare_runs([replace(report("a"), name=evil)] * 3)
    assert [r.name for r in found.reports] == [evil, f"{evil} (2)", f"{evil} (3)"]
    assert "<img" not in found._repr_html_() + found.to_markdown()


def test_what_cant_be_compared_at_all(tmp_path, runs):
    for wrong in ([report("a")], "runs/one", []):
        with pytest.raises(ConfigError, match="at least two"):
            compare_runs(wrong)
    with pytest.raises(ConfigError, match="not evaluated"):
        compare_runs([runs[1], runs[0]], missing=False)
    (runs[2] / "report.json").write_text("{broken")
    assert "can't be read" in compare_runs([runs[0], runs[2]]).left_out["three"]
    assert "give them as chats" in compare_runs([report("a", about={"test_sha256": "x"}), runs[0]]).left_out["one"]

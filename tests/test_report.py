"""One page about a run: the verdict first, nothing from outside, nothing that somebody wrote becomes markup."""

import json
import os
import re
import shutil
from dataclasses import dataclass, replace

import html5lib
import mistune
import numpy as np
import pytest
from conftest import quick_config, some_chats
from safetensors.torch import load_file, save_file
from test_scores import report as scored

from finetune_nb.baselines import TUNED, BaselineReport, WayResult, load_baselines
from finetune_nb.cli import main
from finetune_nb.config import ConfigError
from finetune_nb.data import Chat, Splits, save_chats
from finetune_nb.evaluation import Answer, Comparison, EvalReport, EvalRow, evaluate_run, load_comparison
from finetune_nb.fitting import RULES, Fitting, Recall, Recitation, gap_of, load_fitting, measure_fitting
from finetune_nb.forgetting import Forgetting, ItemDrift, load_forgetting, measure_forgetting, save_forgetting
from finetune_nb.lm_eval_tasks import TaskReport, TaskScore
from finetune_nb.range_test import RangeTest
from finetune_nb.report import TITLES, Findings, RunReport, Trained, _titled, answers_to, write_report
from finetune_nb.several import _ask, _read
from finetune_nb.stop import TrainingError
from finetune_nb.sweep import sweep
from finetune_nb.training import load_run, train
from finetune_nb.ways import Prompts

EVIL = ["<img src=x onerror=alert(1)>", "</td></table><script>alert(1)</script>", "```\n<svg onload=x>", "[a](javascript:alert(1)) | ![b](http://evil/x.png)", "\"><iframe src='//evil'>", "</style><b onclick=x>"]


def compared(right_base=10, right_tuned=36, name="tuned", text=""):
    rows = lambda right, loss: [EvalRow("x", f"{text}q{i}", f"{text}e", f"{text}{i}", {"exact match": i < right, "ended by itself": True}, loss + i % 3, 4, {"token F1": float(i < right)}, 3) for i in range(40)]  # noqa: E731
    return Comparison(EvalReport("base", rows(right_base, 8.0), seconds=1.0), EvalReport(name, rows(right_tuned, 4.0), seconds=1.0), {name: text})


def forgot(gain, text="x", n=40):
    rng = np.random.default_rng(0)
    return Forgetting(text, f"made up {text}", [ItemDrift(text, text, text, text, 8, 1.0, 1.0 + rng.normal(gain, 0.02), abs(gain), text, text, True, gain < 0.05) for _ in range(n)])


def few(comparison, n):
    return Comparison(*(replace(report, rows=report.rows[:n]) for report in (comparison.base, comparison.tuned)))


def louder(comparison):
    "The same, with a loss that rose."
    rows = [replace(row, loss=30.0 + i % 3) for i, row in enumerate(comparison.tuned.rows)]
    return replace(comparison, tuned=replace(comparison.tuned, rows=rows))


def by_category(gain):
    rows = forgot(-0.05, n=300).rows + [replace(row, category="refusal") for row in forgot(gain, n=20).rows]
    return Forgetting("x", "made up", rows)


def asked(best, tuned=None, text="", n=40):
    chats = [Chat([{"role": "user", "content": f"{text}q{i}"}, {"role": "assistant", "content": f"{text}e"}], "x") for i in range(n)]
    prompts = Prompts(chats, [10] * n, [0] * n)
    way = lambda name, right: WayResult(name, prompts, [Answer(text, True)] * n, {"exact match": [float(i < right) for i in range(n)], "ended by itself": [1.0] * n}, [1] * n, 1.0)  # noqa: E731
    results = [way("plain", 2), way(f"{text}better prompt", best), *([way(TUNED, tuned)] if tuned is not None else [])]
    return BaselineReport(text or "m", results, "exact match", "it is made up", f"{n} questions", [True] * n, [text] * bool(text), target=0.8, train_chats=800)


def fitted(recited=0, text="x"):
    rows = [Recall(text, RULES[i % 2], f"{text}{i}", text, text, text, False, i < recited) for i in range(40)]
    history = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    return Fitting(text, gap_of(history), None, 2, Recitation(rows, text))


@pytest.mark.parametrize(("found", "worth", "words"), [
    (Findings(), "can't tell", "Not judged yet"),
    (Findings(compared()), "yes", "Yes: it got better."),
    (Findings(compared(), [forgot(0.0)]), "yes", "nothing much was forgotten"),
    (Findings(compared(), [forgot(0.5)]), "yes, at a price", "something was forgotten"),
    (Findings(compared(), fitting=fitted(20)), "yes, at a price", "training answers are recited"),
    (Findings(compared(36, 10)), "no", "it got worse"),
    (Findings(louder(compared())), "yes, at a price", "the loss of the right answers rose"),
    (Findings(compared(20, 21)), "can't tell", "no difference that is more than chance"),
    (Findings(compared(), baselines=asked(40)), "no", "asking the base model better does as well"),
    (Findings(compared(), baselines=asked(5)), "yes", "Yes"),
    (Findings(compared(20, 21), baselines=asked(40)), "no", "asking the base model does better ('better prompt')"),
    (Findings(compared(20, 21), baselines=asked(5)), "can't tell", "no difference that is more than chance"),
    (Findings(few(compared(0, 40), 4)), "can't tell", "4 chats are too few"),
    (Findings(compared(), [by_category(0.5)]), "yes, at a price", "something was forgotten (refusal)"),
    (Findings(compared(), baselines=asked(38, 39)), "can't tell", "whether it is better than 'better prompt'"),
    (Findings(compared(), baselines=asked(5, 39)), "yes", "Yes"),
])  # fmt: skip
def test_was_it_worth_it(found, worth, words):
    assert found.worth_it == worth and words in found.headline()
    answers = dict(answers_to(found))
    assert list(answers) == ["Did it get better?", "At what price?", "Should one have?", "Learned, or by heart?"] and all(answers.values())


@pytest.mark.parametrize("right", [10, 36, 38, 40])
def test_one_set_of_answers_gives_one_headline(right):
    "Whether the report on ways of asking holds the tuned model too, or the comparison alone does."
    tuned = [row.passed["exact match"] for row in compared().tuned.rows]
    with_it = asked(right, sum(tuned))
    assert [bool(x) for x in next(r for r in with_it.results if r.name == TUNED).scores["exact match"]] == tuned
    alone, both = (Findings(compared(), baselines=report) for report in (asked(right), with_it))
    assert (alone.worth_it, alone.headline()) == (both.worth_it, both.headline()) and alone.against_asking == both.against_asking


def test_a_model_that_no_longer_listens_is_not_healthy():
    rows = [Recall("x", RULES[i % 3], f"x{i}", "x", "x", "x", False, i % 3 == 2) for i in range(60)]
    deaf = replace(fitted(), recitation=Recitation(rows, "x"))
    assert deaf.verdict == "no longer listens" and "it no longer listens" in deaf.reason and "something else is asked" in deaf.reason
    found = Findings(compared(), fitting=deaf)
    assert found.worth_it == "yes, at a price" and "no longer listens where something else is asked" in found.headline()


def test_a_kept_report_on_ways_of_asking_is_held_against_chats_of_several_turns():
    chats = [Chat([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "e"}], "x") for i in range(40)]
    fresh = asked(20)
    fresh = replace(fresh, results=[replace(r, prompts=Prompts(chats, [10] * 40, [0] * 40)) for r in fresh.results])
    kept = BaselineReport.from_dict(json.loads(json.dumps(fresh.to_dict())))
    assert Findings(compared(), baselines=fresh).against_asking == Findings(compared(), baselines=kept).against_asking is not None
    assert [c.prompt[-1]["content"] for c in kept.results[0].prompts.chats] == [f"q{i}" for i in range(40)]


def test_the_tuned_model_is_held_against_the_best_way_of_asking():
    found = Findings(compared(), baselines=asked(20))
    assert found.against_asking.verdict == "better" and found.against_asking.n == 40 and "better prompt" in dict(answers_to(found))["Should one have?"]
    assert Findings(compared(text="other "), baselines=asked(20)).against_asking is None, "not the same questions"


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    chats, config = some_chats(), quick_config(tiny_model, tmp_path_factory.mktemp("trained"))
    return train(replace(config, r=4), Splits(chats[:24], chats[24:30], chats[30:]), say=lambda line: None).folder


@pytest.fixture
def run(trained, tmp_path):
    "A copy of a run that was trained once for all tests."
    return load_run(shutil.copytree(trained, tmp_path / "runs" / trained.name))


def nodes(page):
    return html5lib.parse(page, treebuilder="etree", namespaceHTMLElements=False)


@pytest.mark.parametrize("text", EVIL)
def test_no_text_becomes_markup(text, run):
    @dataclass
    class Own:
        title: str

        def to_dict(self):
            return {"title": self.title}

        to_markdown = _repr_html_ = lambda self: "fine"

    found = Findings(compared(name=text, text=text), [forgot(0.5, text)], asked(20, text=text), fitted(20, text))
    parts = dict(enumerate((found.comparison, *found.forgetting, found.baselines, found.fitting)))
    report = RunReport(text, found, answers_to(found, run), {f"{text}{i}": part for i, part in parts.items()} | {text: Own(text)})
    tree = nodes(report.to_html())
    tags = {node.tag for node in tree.iter() if isinstance(node.tag, str)}
    assert not tags & {"script", "iframe", "svg", "object", "embed", "link", "a", "form", "base"}, tags
    assert not [name for node in tree.iter() for name in node.attrib if name.startswith("on")]
    assert all(node.attrib["src"].startswith("data:image/png;base64,") for node in tree.iter("img"))
    assert "default-src 'none'" in next(node.attrib["content"] for node in tree.iter("meta") if node.attrib.get("http-equiv") == "Content-Security-Policy")
    assert "color-scheme:light dark" in report.to_html() and text in "".join(tree.itertext()).replace("\xa0", " ")
    outside = "".join(report.to_markdown().split("```")[::2]).replace("\\](", "") if "```" not in text else ""
    assert not any(mark in outside for mark in ("<img", "<script", "<iframe", "<svg", "](javascript", "](http"))
    json.dumps(report.to_dict(), allow_nan=False, default=str)


def test_a_pattern_stands_in_the_page_as_it_was_typed(run):
    pattern = r"^\d+ <a&b>$"
    part = Trained(replace(run, config=replace(run.config, answer_pattern=pattern, target_modules=["q_proj"])))
    rendered = mistune.create_markdown(escape=False, plugins=["table"])(part.to_markdown())  # as nbconvert does it
    for page in (part._repr_html_(), rendered):
        said = "".join(nodes(page).itertext())
        assert f"answer_pattern='{pattern}'" in said and "target_modules=['q_proj']" in said


def test_a_section_of_a_user_takes_no_title_of_ours():
    part = Trained(None)
    assert list(_titled({TITLES["training"]: part, "mine": part})) == [f"({TITLES['training']})", "mine"]


def test_the_folder_of_a_run_holds_all_that_was_measured(run):
    assert "Not judged yet" in write_report(run).found.headline()
    comparison, forgetting, fitting = evaluate_run(run), measure_forgetting(run, limit=12, max_new_tokens=4), measure_fitting(run, limit=6, max_new_tokens=4)
    mine = measure_forgetting(run, items=[Chat([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "mine")], answers=False)
    asked(20).save(run.folder)
    report = write_report(run.folder)
    assert report.found.comparison.to_dict() == comparison.to_dict() and report.found.fitting == fitting
    assert [r.items for r in load_forgetting(run.folder)] == [forgetting.items, mine.items] and load_baselines(run.folder).verdict == asked(20).verdict
    page = (run.folder / "report.html").read_text()
    assert page.count("data:image/png") == 5 and "http://" not in page and "https://" not in page
    assert page.index("was it worth it?") < page.index(report.answers[0][1][:20]) < page.index("<h2>")
    said = json.loads((run.folder / "report.json").read_text())
    assert said["headline"] == report.found.headline() and Comparison.from_dict(said["comparison"]).lines() == comparison.lines()
    assert [Forgetting.from_dict(x).verdict for x in said["forgetting"]] == [forgetting.verdict, mine.verdict]
    assert BaselineReport.from_dict(said["baselines"]).table() == asked(20).table() and Fitting.from_dict(said["fitting"]) == fitting
    assert load_comparison(run.folder).to_dict() == comparison.to_dict(), "the comparison is still found after the report was written"
    assert "## What was forgotten" in (run.folder / "report.md").read_text()


def test_what_was_measured_with_another_adapter_counts_for_nothing(run):
    comparison, fitting = evaluate_run(run), measure_fitting(run, limit=6, max_new_tokens=4)
    measure_forgetting(run, limit=12, answers=False)
    asked(20, 39).save(run.folder)
    compared = _ask(run, run.test, None, run.folder / "compared-x.json")
    assert not write_report(run).found.old and _read(run.folder / "compared-x.json").rows == compared.rows
    path = run.folder / "adapter" / "adapter_model.safetensors"
    kept = path.read_bytes()
    save_file({name: weight * 1.01 for name, weight in load_file(path).items()}, path, {"format": "pt"})
    assert load_comparison(run.folder) is None and load_fitting(run.folder) is None and load_forgetting(run.folder) == [] and _read(run.folder / "compared-x.json") is None
    assert [r.name for r in load_baselines(run.folder).results] == ["plain", "better prompt"]
    path.write_bytes(kept)
    assert load_comparison(run.folder).to_dict() == comparison.to_dict() and load_fitting(run.folder) == fitting, "the same weights, whatever the date"
    save_file({name: weight * 1.01 for name, weight in load_file(path).items()}, path, {"format": "pt"})
    os.utime(path, (0, 0))  # a clock of files may not tell two moments apart that are so close
    report = write_report(run)
    assert "Not judged yet" in report.found.headline() and [name.partition("-")[0] for name in report.found.old] == ["baselines.json (the tuned model)", "fitting.json", "forgetting", "report.json"]
    assert "fitting.json" in dict(report.answers)["Left out, as it is old"] and "Left out, as it is old" in report.to_markdown()


def test_questions_that_stand_in_the_training_come_first(quick, chats):
    run = train(replace(quick, max_steps=2, eval_strategy="no"), Splits(chats[:24], [], chats[20:30]), say=lambda line: None)
    evaluate_run(run)
    found = write_report(run).found
    assert found.leaks.startswith("4 of 10 test chats ask what a train chat asks")
    said = dict(answers_to(found))["Did it get better?"]
    assert said.startswith("4 of 10 test chats") and said.count("they test memory") == 1 and "Without them the verdict is" in said
    rows = lambda right: [EvalRow(chat.where, chat.prompt[-1]["content"], chat.answer, "x", {"exact match": i < right, "ended by itself": True}, 1.0, 4) for i, chat in enumerate(chats[:40])]  # noqa: E731
    better = Comparison(EvalReport("base", rows(0)), EvalReport("tuned", rows(40)))
    assert better.verdict == "better" and write_report(run, [better]).found.worth_it == "yes", "34 of them are new"
    only = Comparison(*(replace(report, rows=report.rows[20:24] * 8) for report in (better.base, better.tuned)))
    report = write_report(run, [only])
    assert report.found.worth_it == "can't tell" and report.found.headline().startswith("Can't tell: 4 of 10 test chats ask what a train chat asks")


def test_the_command_line_leaves_the_whole_page_whole(run, capsys, monkeypatch):
    monkeypatch.chdir(run.folder.parent)
    evaluate_run(run)
    write_report(run)
    assert main(["evaluate", "run-001"]) == 0
    assert "was it worth it?" in (run.folder / "report.md").read_text() and "headline" in json.loads((run.folder / "report.json").read_text())
    evaluate_run(run)
    assert all("comparison alone" in (run.folder / f"report.{ending}").read_text() for ending in ("md", "html"))
    write_report(run)
    save_chats(list(run.test[:3]), "others.jsonl")
    assert main(["evaluate", "run-001", "--data", "others.jsonl"]) == 0
    assert "run-001/report-" in capsys.readouterr().out and "headline" in json.loads((run.folder / "report.json").read_text())


def test_a_part_never_replaces_the_whole(run):
    whole, part = forgot(0.0, n=40), forgot(0.5, n=12)
    shown = lambda report, told: replace(report, items=told, rows=[replace(row, question=f"q{i}") for i, row in enumerate(report.rows)])  # noqa: E731
    whole, part = shown(whole, "40 items that ship with the package"), shown(part, "a sample of 12 (seed 0) of the 40 items that ship with the package")
    mine, other = shown(part, "12 given items"), replace(shown(part, "12 given items"), rows=forgot(0.1, n=5).rows)
    for report in (whole, part, mine, other):
        save_forgetting(report, run.folder)
    assert [r.items for r in load_forgetting(run.folder)] == [whole.items, part.items, mine.items, other.items], "nothing was overwritten"
    assert [r.items for r in write_report(run).found.forgetting] == [whole.items, other.items]


def test_sections_of_ones_own(run):
    @dataclass
    class Note:
        def to_dict(self):
            return {"a": 1}

        def to_markdown(self):
            return "a note"

        def _repr_html_(self):
            return "<p>a note</p>"

    report = write_report(run, [Note(), Note()])
    assert list(report.sections)[:2] == ["Note", "Note (2)"] and report.to_dict()["sections"]["Note"] == {"a": 1} and "<p>a note</p>" in report.to_html()
    assert write_report(run, {"Mine": asked(40), "Other": scored("x") and Note()}).found.baselines.verdict == "do not fine-tune"
    for wrong in ({"x": "text"}, ["text"], [None]):
        with pytest.raises(ConfigError, match="no section of a report"):
            write_report(run, wrong)


def test_a_range_test_and_tasks_are_sections(run):
    rates = RangeTest([10.0**-k for k in range(6, 0, -1)] * 4, [5 - i / 10 for i in range(23)] + [float("nan")], "the plan")
    tasks = TaskReport("<b>run|", [TaskScore("a|b", "acc", [0.0, 1.0] * 20, [1.0] * 40)], ["<i>said"], "1")
    report = write_report(run, {"Range test": rates, "Tasks": tasks})
    said = json.loads((run.folder / "report.json").read_text())["sections"]
    assert said["Range test"]["ended_by"] == "the plan" and said["Range test"]["losses"][-1] is None and said["Tasks"]["scores"][0]["task"] == "a|b"
    text = report.to_markdown()
    assert rates.reason[:20] in text and "a\\|b" in text and "<b>run" not in text and "<i>" not in text


def test_a_sweep_is_part_of_the_report(quick, chats):
    made = sweep(replace(quick, max_steps=2), {"r": [2, 4]}, Splits(chats[:12], chats[12:24], chats[24:30]), say=lambda line: None)
    report = write_report(made.combinations[0].folder)
    assert "The sweep that it belongs to" in report.sections and report.to_dict()["sections"]["The sweep that it belongs to"]["verdict"] == made.verdict
    assert "| r |" in made.to_markdown() and json.dumps(made.to_dict(), allow_nan=False)


def test_from_the_command_line(run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(run.folder.parent)
    assert main(["report", run.folder.name]) == 0
    said = capsys.readouterr().out
    assert "Not judged yet" in said and "run-001/report.html" in said
    evaluate_run(run)
    assert main(["compare", "run-001", "run-001"]) == 0 and "run-001 (2)" in capsys.readouterr().out
    assert main(["report", "nowhere"]) == 2 and "nowhere does not exist. This folder holds the runs run-001" in capsys.readouterr().err


def test_broken_files_are_named(run):
    kept = {"report.json": load_comparison, "forgetting.json": load_forgetting, "baselines.json": load_baselines, "fitting.json": load_fitting, "compared-x.json": lambda folder: _read(folder / "compared-x.json")}
    for name, load in kept.items():
        for text in ("{", "1", "[" * 100_000, "[]" if name != "report.json" else '{"comparison": 1}', '{"comparison": {}}' if name == "report.json" else "{}"):
            (run.folder / name).write_text(text)
            with pytest.raises(ConfigError, match=f"{re.escape(str(run.folder / name))} can't be read: .* (Evaluate|Measure|Ask|Delete)"):
                load(run.folder)
        (run.folder / name).unlink()
    with pytest.raises(TrainingError):
        write_report(run.folder / "none")
    assert save_forgetting(forgot(0.0), run.folder).name == "forgetting.json"

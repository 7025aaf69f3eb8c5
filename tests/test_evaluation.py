"""The verdict: independent of batching, fair, escaped."""

import errno
import json
import os
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from finetune_nb import config, evaluation
from finetune_nb.baselines import should_you_finetune, try_way
from finetune_nb.config import ConfigError
from finetune_nb.data import ANSWER_PATTERN, Chat, Splits, icd10_chats
from finetune_nb.evaluation import (
    Comparison,
    EvalReport,
    EvalRow,
    compare,
    evaluate,
    evaluate_run,
    generate,
    load_comparison,
    pattern_checks,
    report_name,
    to_html,
    wilson_interval,
)
from finetune_nb.models import load_model
from finetune_nb.packing import PackingCollator
from finetune_nb.scores import LENGTH
from finetune_nb.several import compare_runs
from finetune_nb.stop import TrainingError
from finetune_nb.training import load_run, train
from finetune_nb.ways import make_prompts, plain


@pytest.fixture(scope="module")
def embedded():
    return load_model(dtype=torch.float32, use_cpu=True)


@pytest.mark.parametrize(("token", "shown"), [("\n", ""), ("<|im_start|>", ""), (" so", "so so so so so")])
def test_the_length_is_that_of_what_was_written(tiny_model, chats, token, shown):
    "Also where nothing of it is seen: white space is cut off, control tokens are not shown."
    model, tokenizer = load_model(tiny_model, torch.float32, use_cpu=True, say=lambda line: None)
    liked, end = tokenizer.encode(token, add_special_tokens=False)[0], tokenizer.eos_token_id
    bias = torch.zeros(model.config.vocab_size)
    bias[liked] = 1e6
    hook = model.lm_head.register_forward_hook(lambda module, args, logits: logits + bias.to(logits))
    report = evaluate(model, tokenizer, chats[:3], max_new_tokens=5)
    assert [(row.answer, row.new_tokens) for row in report.rows] == [(shown, 5)] * 3 and report.estimates[LENGTH].value == 5
    assert try_way(model, tokenizer, "plain", make_prompts(chats[:3], plain, 0, tokenizer), max_new_tokens=5).new_tokens == [5] * 3
    bias[end] = 2e6
    ended = generate(model, tokenizer, chats[:1], 5)[0]
    assert (ended.text, ended.finished, ended.new_tokens) == ("", True, 1), "the end is counted"
    hook.remove()


def test_answers_and_losses_do_not_depend_on_the_batch(embedded):
    chats = icd10_chats().test[:3]
    one, three = (evaluate(*embedded, chats, collator=PackingCollator("padded", 200 * n), generation_batch_size=n, max_new_tokens=6) for n in (1, 3))
    assert [r.answer for r in one.rows] == [r.answer for r in three.rows] and one.loss == pytest.approx(three.loss, abs=1e-5)
    assert [r.where for r in one.rows] == [c.where for c in chats]


def test_generation_stops_at_the_end_of_the_turn_and_says_when_it_did_not(embedded):
    chat = Chat([{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "?"}])
    long, short = generate(*embedded, [chat], 40)[0], generate(*embedded, [chat], 2)[0]
    assert long.finished and "Paris" in long.text and not short.finished


@pytest.mark.parametrize("start", ["default", "pissa"])
def test_the_base_beside_a_fresh_run_is_the_untouched_base_model(quick, chats, tiny_model, start):
    run = train(replace(quick, init_lora_weights=start, r=4, max_steps=3, eval_strategy="no"), Splits(chats[:12], [], chats[12:16]), say=lambda line: None)
    base = evaluate(*load_model(tiny_model, torch.float32, use_cpu=True, say=lambda line: None), run.test, max_new_tokens=8)
    compared = evaluate_run(run)
    assert compared.base.loss == pytest.approx(base.loss, abs=1e-4) and compared.tuned.loss != pytest.approx(base.loss, abs=1e-4)


def test_generation_leaves_the_mode_as_it_was(embedded):
    model, tokenizer = embedded
    model.train()
    generate(model, tokenizer, icd10_chats().test[:1], 2)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("answer", "form", "code", "anywhere"),
    [
        ("The ICD-10 code for hay fever is J30.1 (Allergic rhinitis due to pollen).", True, True, True),
        ("The ICD-10 code for x is J30.1 (y).", True, True, True),
        ("The ICD-10 code for hay fever is J30.2 (Other).", True, False, False),
        ("It is J30.1.", False, False, True),
        ("J30.11", False, False, False),
        ("XJ30.1", False, False, False),
        ("J30", False, False, False),
        ("", False, False, False),
        ("The ICD-10 code for hay fever is J30.1 (Allergic rhinitis due to pollen). Thanks!", False, False, True),
    ],
)
def test_pattern_checks(answer, form, code, anywhere):
    chat = Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "The ICD-10 code for hay fever is J30.1 (Allergic rhinitis due to pollen)."}])
    checks = pattern_checks(ANSWER_PATTERN)
    assert checks["right form"](f"{answer}\n", chat) is form, "white space around an answer is no part of its form"
    assert {name: check(answer, chat) for name, check in checks.items()} == {"right form": form, "right code": code, "right code anywhere": anywhere}


def test_a_users_own_checks(embedded):
    chats = icd10_chats().test[:2]
    report = evaluate(*embedded, chats, {"polite": lambda answer, chat: "please" in answer, "any": ".*"}, max_new_tokens=3)
    assert report.shares["polite"] == 0 and report.shares["any"] == 1


def test_the_base_model_is_judged_without_the_adapter(quick, chats):
    config = replace(quick, max_eval_samples=5, answer_pattern="It is .*")
    run = train(config, Splits(chats[:24], chats[24:32], chats[30:]))
    comparison = evaluate_run(run)
    base, tokenizer = load_model(config.model_name_or_path, torch.float32, use_cpu=True)
    sample = [c for c in run.test if c.prompt[-1]["content"] in {row.question for row in comparison.base.rows}]
    assert len(sample) == 5 and comparison.base.loss == pytest.approx(evaluate(base, tokenizer, sample, max_new_tokens=1).loss, abs=1e-6)
    assert comparison.tuned.loss < comparison.base.loss
    again = evaluate_run(load_run(run.folder))
    assert again.tuned.rows == comparison.tuned.rows, "the same sample, the same answers"
    assert comparison.facts["test chats"] == "5 of 10 held out, drawn with seed 42"
    for name in ("report.md", "report.html"):
        assert "exact match" in (run.folder / name).read_text()
    assert len((run.folder / "answers.jsonl").read_text().splitlines()) == 10


def test_other_chats_and_drawn_answers_leave_the_verdict_of_the_run_alone(quick, chats):
    run = train(replace(quick, max_steps=2, eval_strategy="no"), Splits(chats[:24], [], chats[30:]), say=lambda line: None)
    own = evaluate_run(run)
    kept = {name: (run.folder / name).read_bytes() for name in ("report.json", "report.md", "report.html", "answers.jsonl")}
    learned = evaluate_run(run, chats[:10])
    assert learned.facts["test chats"] == "10 of 10 given, all" and "10 of 10 test chats ask what a training chat asks" in learned.reason
    fresh = evaluate_run(run, [chats[25]])
    assert "shared questions" not in fresh.facts and own.facts["test chats"].startswith("10 of 10 held out")
    drawn = evaluate_run(run, temperature=1.0)
    assert drawn.facts["test chats"].startswith("10 of 10 held out") and "drawn at temperature 1" in drawn.facts["answers"]
    assert kept == {name: (run.folder / name).read_bytes() for name in kept} and load_comparison(run.folder).to_dict() == own.to_dict()
    assert report_name(run, list(run.test)) == "report" and report_name(run, temperature=0.5, top_p=0.9) == "report-t0.5-p0.9"
    name = report_name(run, chats[:10])
    assert {f"{name}.json", f"{name}.md", f"{name}.html", f"answers{name[6:]}.jsonl", "report-t1.md"} <= {path.name for path in run.folder.iterdir()}


def test_nothing_to_judge_on(quick, chats):
    run = train(replace(quick, max_steps=1, eval_strategy="no"), Splits(chats, [], []))
    with pytest.raises(TrainingError, match="no test chats"):
        evaluate_run(run)


def row(question="q", expected="a", answer="b", ok=False):
    return EvalRow("x", question, expected, answer, {"exact match": ok}, 2.0, 4)


def test_a_full_disk_leaves_the_answers_and_reports_that_were_there(tmp_path, monkeypatch):
    old, new = (compare(*(EvalReport(name, [row(answer=said)]) for name in ("base", "tuned"))) for said in ("x", "y"))
    evaluation._save_report(old, tmp_path, "report")
    kept, waited = {path.name: path.read_bytes() for path in tmp_path.iterdir()}, []

    def full(handle):
        waited.append(handle)
        if len(waited) in (1, 5):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(config, "wait_for_disk", full)
    for changed in (set(), {"report.json", "report.md", "report.html"}):
        with pytest.raises(OSError, match="No space left"):
            evaluation._save_report(new, tmp_path, "report")
        now = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert now.keys() == kept.keys() == {"report.json", "report.md", "report.html", "answers.jsonl"} and {name for name in kept if now[name] != kept[name]} == changed


def test_only_like_is_compared_with_like():
    with pytest.raises(ValueError, match="not tested on the same chats"):
        compare(EvalReport("a", [row()]), EvalReport("b", [row("other")]))


def test_examples_are_sorted_by_what_became_of_them():
    base = [row("1"), row("2", ok=True), row("3"), row("4", ok=True)]
    tuned = [row("1", ok=True), row("2"), row("3"), row("4", ok=True)]
    found = compare(EvalReport("a", base), EvalReport("b", tuned)).examples()
    assert {kind: [one.question for one, _ in pairs] for kind, pairs in found.items()} == {"got better": ["1"], "got worse": ["2"], "still wrong": ["3"]}


def test_examples_go_by_the_figure_of_the_verdict():
    def rows(*scores):
        return [EvalRow("x", str(i), "a", "b", {"exact match": False}, 2.0, 4, {"token F1": score}) for i, score in enumerate(scores)]

    found = compare(EvalReport("a", rows(0.5, 0.6, 0.2, 0.0)), EvalReport("b", rows(0.4, 0.1, 0.3, 0.0)))
    assert found.base.main == "token F1"
    assert {kind: [one.question for one, _ in pairs] for kind, pairs in found.examples().items()} == {"got better": ["2"], "got worse": ["1", "0"], "still wrong": ["3"]}
    assert [one.question for one, _ in found.examples("exact match")["still wrong"]] == ["0", "1", "2"]


def test_the_check_of_the_user_counts(quick, chats, tiny_model):
    model, tokenizer = load_model(tiny_model, torch.float32, use_cpu=True, say=lambda line: None)
    ask = lambda **more: evaluate(model, tokenizer, chats[:3], {"short": lambda answer, chat: len(answer) < 9, "long": lambda answer, chat: len(answer)}, max_new_tokens=2, **more)  # noqa: E731
    assert "copies" not in ask().about and evaluate(model, tokenizer, [*chats[:2], chats[0]], max_new_tokens=2).about["copies"] == 1
    assert ask().main == "short" and ask(score="long").main == "long" and ask(score="exact match").main == "exact match"
    assert EvalReport.from_dict(json.loads(json.dumps(ask(score="long").to_dict()))).main == "long"
    with pytest.raises(ConfigError, match="no score 'shrot'; there are exact match"):
        ask(score="shrot")


def test_what_is_no_chat_and_no_check_is_told(quick, chats, tiny_model):
    run = train(replace(quick, max_steps=1, eval_strategy="no"), Splits(chats[:8], [], chats[8:20]), say=lambda line: None)
    for given, said in (("test.jsonl", r"got a str. Give load_chats\('test.jsonl'\)"), ([{"messages": []}], "got a list. Give what load_chats")):
        with pytest.raises(ConfigError, match=f"chats: expected a list of chats, {said}"):
            evaluate_run(run, given)
        with pytest.raises(ConfigError, match=f"chats: expected a list of chats, {said}"):
            compare_runs([run, run.folder], given)
    with pytest.raises(ConfigError, match="checks: expected a dict of names and checks.*got a list"):
        evaluate_run(run, checks=[len])
    told = evaluate_run(run, checks={"length error": lambda answer, chat: float(len(answer))}).reason
    assert told.startswith("length error (more of it counts as better) ")
    with pytest.raises(ConfigError, match="'rating' gives 5 for a right answer, and target=0.9 is a part of 1: let the score run from 0 to 1"):
        should_you_finetune(quick, Splits(chats[:8], [], chats[8:20]), checks={"rating": lambda answer, chat: 5.0 if answer == chat.answer else 2.0}, score="rating")
    with pytest.raises(ConfigError, match="ways: expected a dict of names and ways of asking"):
        should_you_finetune(quick, Splits(chats[:8], [], chats[8:20]), ways=["brief"])


def test_intervals_agree_with_published_values():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    for n in (1, 7, 100):
        for passed in range(n + 1):
            low, high = wilson_interval(passed, n)
            assert 0 <= low <= passed / n + 1e-12 and passed / n - 1e-12 <= high <= 1


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}


EVIL = ["<img src=x onerror=alert(1)>", "</pre><script>alert(1)</script>", "```\n# heading\n<svg onload=x>", "| a | b |\n---", "\x1b[31m", '"><iframe>']


@pytest.mark.parametrize("text", EVIL)
def test_text_of_models_and_users_never_becomes_markup(text):
    comparison = Comparison(EvalReport("base", [row(text, text, text)]), EvalReport(text, [row(text, text, text)]), {"model": text})
    tags = Tags()
    tags.feed(to_html(comparison))
    assert not tags.seen & {"script", "img", "iframe", "svg", "a", "link"} and not [a for a in tags.attributes if a.startswith("on")]
    markdown = comparison.to_markdown()
    outside = [part for i, part in enumerate(markdown.split("\n````text\n" if "```" in text else "\n```text\n")) if i == 0]
    assert not any("<img" in part or "<script" in part or "<iframe" in part for part in outside)

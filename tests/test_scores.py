"""Every figure of a report is what a direct computation gives, has its interval, and survives a file."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from finetune_nb.chat_template import tokenize_chats
from finetune_nb.checks import against_expected, judge, make_checks
from finetune_nb.config import ConfigError
from finetune_nb.data import Chat
from finetune_nb.display import markdown_table
from finetune_nb.evaluation import Comparison, compare, evaluate
from finetune_nb.metrics import bootstrap_interval, paired_difference, token_f1, wilson_interval
from finetune_nb.models import load_model
from finetune_nb.scores import (
    LENGTH,
    LOSS,
    PERPLEXITY,
    EvalReport,
    EvalRow,
    changed_most,
    difference_texts,
    differences,
    how_many,
    labels_of,
    wins,
)


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return load_model(tiny_model, torch.float32, use_cpu=True, say=lambda line: None)


def row(i, right=True, loss=2.0, tokens=4, f1=0.5, new=5, ended=True):
    return EvalRow(f"line {i}", f"q{i}", "yes" if i % 2 else "no", "yes" if (i % 2) == right else "no", {"exact match": right, "ended by itself": ended}, loss, tokens, {"token F1": f1}, new)


def report(name, n=40, **fields):
    rng = np.random.default_rng(len(name))
    rows = [row(i, bool(rng.random() < 0.7), float(rng.gamma(3)), int(rng.integers(2, 9)), float(rng.random()), int(rng.integers(1, 9)), bool(i % 4)) for i in range(n)]
    return EvalReport(name, rows, **fields)


def test_loss_and_perplexity_equal_a_direct_computation(tiny, chats):
    model, tokenizer = tiny
    found = evaluate(model, tokenizer, chats[:9], max_new_tokens=2)
    total, count, each = 0.0, 0, []
    for made in tokenize_chats(chats[:9], tokenizer, train_on="last"):
        ids, labels = (torch.tensor([made[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        at = labels[0, 1:] != -100
        losses = torch.nn.functional.cross_entropy(logits[at], labels[0, 1:][at], reduction="none")
        total, count = total + losses.sum().item(), count + int(at.sum())
        each.append(losses.mean().item())
    assert found.estimates[LOSS].value == pytest.approx(total / count, abs=1e-5) == found.loss
    assert found.estimates[PERPLEXITY].value == pytest.approx(math.exp(total / count), rel=1e-5)
    assert [r.value(LOSS) for r in found.rows] == pytest.approx(each, abs=1e-5)


def test_every_figure_has_its_interval():
    found = report("one")
    rows, estimates = found.rows, found.estimates
    assert set(estimates) == {LOSS, PERPLEXITY, "exact match", "ended by itself", "token F1", LENGTH}
    passed = [r.passed["exact match"] for r in rows]
    assert (estimates["exact match"].low, estimates["exact match"].high) == wilson_interval(sum(passed), 40)
    losses, tokens = [r.loss / r.tokens for r in rows], [r.tokens for r in rows]
    assert (estimates[LOSS].low, estimates[LOSS].high) == bootstrap_interval(losses, tokens)
    assert estimates[PERPLEXITY].low == pytest.approx(math.exp(estimates[LOSS].low))
    assert found.never_stopped.value == 0.25 and (found.never_stopped.low, found.never_stopped.high) == wilson_interval(10, 40)
    assert estimates[LENGTH].value == pytest.approx(np.mean([r.new_tokens for r in rows]))
    assert all(part in text for part, text in zip(("%", "to"), (found.figures()["exact match"], found.figures()[LOSS]), strict=True))


def test_figures_equal_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed here")
    found = report("labels", 90)
    expected, answers = [r.expected for r in found.rows], [r.answer for r in found.rows]
    said = metrics.classification_report(expected, answers, output_dict=True, zero_division=0)
    mine = found.classification
    assert mine.accuracy == pytest.approx(said["accuracy"]) and mine.macro_f1 == pytest.approx(said["macro avg"]["f1-score"])
    for label, rates in mine.table().items():
        assert rates == pytest.approx([said[label][name] for name in ("precision", "recall", "f1-score", "support")])
    assert (mine.confusion[:, :-1] == metrics.confusion_matrix(expected, answers, labels=mine.labels)).all()


def test_the_group_of_a_pattern_is_a_label():
    rows = [EvalRow(f"{i}", f"q{i}", f"It is {'AB'[i % 2]}, number {i}.", f"It is {'AAB'[i % 3]}, number {i}." if i else "?", {"exact match": False}, 1.0, 1) for i in range(12)]
    found = EvalReport("m", rows, r"It is (?P<code>[AB]), number \d+\.")
    assert found.classification.labels == ["A", "B"] and found.classification.confusion.sum() == 12 and found.classification.confusion[0, 2] == 1
    assert EvalReport("m", rows).classification is None and "right code" not in found.estimates


@pytest.mark.parametrize("name", [LOSS, "exact match", "token F1", LENGTH])
def test_differences_are_paired(name):
    first, second = report("one"), report("other")
    gap, weights = differences(first, second)[name], [r.tokens for r in first.rows] if name == LOSS else None
    direct = paired_difference([r.value(name) for r in first.rows], [r.value(name) for r in second.rows], name != LOSS, weights)
    assert gap == direct


def test_wins_losses_ties_and_the_largest_changes():
    first = EvalReport("a", [row(0, False, 4.0), row(1, True, 4.0), row(2, True, 4.0)])
    second = EvalReport("b", [row(0, True, 2.0), row(1, False, 8.0), row(2, True, 4.0)])
    assert wins(first, second) == {"exact match": (1, 1, 1), "ended by itself": (0, 0, 3), "token F1": (0, 0, 3), LOSS: (1, 1, 1)}
    assert [(gap, one.where) for gap, one, _ in changed_most(first, second)] == [(1.0, "line 1"), (-0.5, "line 0")]
    assert [gap for gap, *_ in changed_most(first, second, "exact match", 1)] == [1.0]
    assert compare(first, second).wins()[0] == ("exact match", "1", "1", "1")


def test_rounding_is_neither_won_nor_lost():
    first, rng = report("one"), np.random.default_rng(0)
    noisy = EvalReport("again", [replace(r, loss=r.loss * (1 + 1e-6 * rng.normal()), scores={"token F1": r.scores["token F1"] + 1e-8}) for r in first.rows])
    assert wins(first, noisy)[LOSS] == wins(first, noisy)["token F1"] == (0, 0, 40) and changed_most(first, noisy) == []
    assert differences(first, noisy)[LOSS].verdict == "can't tell" and not Comparison(first, noisy).examples(LOSS)["got better"]
    better = EvalReport("better", [replace(r, loss=r.loss * 0.99) for r in first.rows])
    assert wins(first, better)[LOSS] == (40, 0, 0)


def test_words_of_a_difference():
    worse = EvalReport("b", [row(i, False, 8.0, new=50) for i in range(40)])
    said = difference_texts(EvalReport("a", [row(i) for i in range(40)]), worse)
    assert said["exact match"].startswith("worse (") and said[LENGTH].startswith("longer (") and said[PERPLEXITY].startswith("worse (×")
    unsure = difference_texts(report("one"), report("other"))
    assert any("shows with about" in text for text in unsure.values())


def test_files_of_reports_come_back_the_same():
    one = report("one", pattern="yes|no", about={"test_sha256": "x"}, seconds=2.0, peak_memory_gib=1.0)
    said = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    assert EvalReport.from_dict(said) == one
    both = compare(one, report("other"), {"seed": "1"})
    assert both.facts["asked otherwise"] == "other: another pattern" and "Asked otherwise: other: another pattern." in both.reason
    again = Comparison.from_dict(json.loads(json.dumps(both.to_dict(), allow_nan=False)))
    assert again == both and again.lines() == both.lines() and again.verdict == both.verdict
    unknown = EvalReport("old", [EvalRow("", "q", "a", "b", {"exact match": False}, math.nan, 0)])
    back = EvalReport.from_dict(json.loads(json.dumps(unknown.to_dict(), allow_nan=False)))
    assert list(back.estimates) == ["exact match"] and not back.cost() and math.isnan(back.rows[0].loss)
    for wrong in ({}, {"rows": 1}, said | {"rows": [{}]}, said | {"rows": [{**said["rows"][0], "scores": {"x": "y"}}]}, []):
        with pytest.raises(ConfigError, match="no report"):
            EvalReport.from_dict(wrong)
    with pytest.raises(ConfigError, match="no comparison"):
        Comparison.from_dict({"base": said})


def test_checks_of_every_kind(tiny, chats):
    checks = {
        "pattern": "It is .*", "schema": {"type": "object"}, "function": lambda answer, chat: chat.where.startswith("chats"), "number": lambda answer, chat: len(answer), "F1 again": against_expected(token_f1),
    }  # fmt: skip
    found = evaluate(*tiny, chats[:3], checks, max_new_tokens=3, pattern=r"It is (?P<sum>\d+)\..*")
    assert list(found.rows[0].passed) == ["exact match", "normalised match", "right form", "right sum", "right sum anywhere", "pattern", "schema", "function", "ended by itself"]
    assert found.shares["function"] == 1 and found.shares["schema"] == 0 and found.rows[0].scores["number"] == len(found.rows[0].answer)
    assert found.rows[0].scores["F1 again"] == found.rows[0].scores["token F1"] and found.about["checks"]["schema"] == {"type": "object"}
    assert found.seconds > 0 and found.peak_memory_gib > 0 and {"answers per second, right answers given as guesses", "tokens per second, right answers given as guesses", "peak memory", "never stopped"} == set(found.cost())
    assert "answers per second" in evaluate(*tiny, chats[:1], max_new_tokens=2, temperature=1.0).cost(), "what is drawn is not guessed"
    for taken in (LOSS, PERPLEXITY, LENGTH, *found.cost(), "right form"):
        with pytest.raises(ConfigError, match="give yours another name"):
            make_checks({taken: ".*"}, "x")
    with pytest.raises(ConfigError, match="can't be called 'form'"):
        make_checks({}, r"(?P<form>\w+)")
    asked = []
    for wrong, why in (({"x": lambda answer: True}, "called as check"), ({"x": "("}, "no regular expression"), ({"exact match": ".*"}, "another name"), ({"x": lambda a, c: math.inf}, "has a mean")):
        with pytest.raises(ConfigError, match=why):
            evaluate(*tiny, chats[:1], wrong | {"seen": lambda answer, chat: asked.append(answer)})
    assert set(asked) <= {chats[0].answer}, "told before anything is generated"


def test_answers_are_drawn_with_a_seed(tiny, chats):
    runs = [evaluate(*tiny, chats[:4], max_new_tokens=6, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 1, 2)]
    assert [r.answer for r in runs[0].rows] == [r.answer for r in runs[1].rows] != [r.answer for r in runs[2].rows]
    assert runs[0].about["temperature"] == 1.0 and runs[0].about["seed"] == 1
    for temperature, top_p in ((-1, 1.0), (1, 0.0), (1, 1.5)):
        with pytest.raises(ConfigError, match="temperature"):
            evaluate(*tiny, chats[:1], temperature=temperature, top_p=top_p)


def test_a_cell_means_nothing_but_itself():
    text = "a | b\n<script> [x](http://y) ![z](http://w) `c` *d* \\"
    said = markdown_table(["h"], [[text]]).splitlines()[-1]
    assert len(said.splitlines()) == 1 and "<" not in said and "\\[x\\](" in said and "\\`" in said and "\\*" in said and said.count("|") == 3


def test_checks_say_true_or_false_or_a_number():
    chat = Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "here")
    passed, scores = judge("a", chat, make_checks({"bool": lambda a, c: np.bool_(True), "one": lambda a, c: 1, "np": lambda a, c: np.float32(0.5)}))
    assert passed["bool"] is True and scores["one"] == 1.0 and scores["np"] == 0.5


@pytest.mark.parametrize(("value", "told"), [(None, "forget to return"), ("yes", "bool"), (re.search("a", "a"), "bool"), ([1], "bool"), (float("nan"), "a mean")], ids=["nothing", "a text", "a match", "a list", "nan"])
def test_what_a_check_may_not_return_is_told(value, told):
    chat = Chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}], "here")
    with pytest.raises(ConfigError, match=f"'mine' returned .*here.*{told}"):
        judge("a", chat, make_checks({"mine": lambda a, c: value}))


def test_an_answer_without_the_form_has_no_right_label():
    rows = [replace(one, expected="It is A." if i % 2 else "none", answer="It is A." if i % 2 else "nothing") for i, one in enumerate(report("x", 12).rows)]
    found = EvalReport("x", rows, pattern=r"It is (?P<code>\w)\.").classification
    assert found.accuracy == 0.5 and found.confused() == [("(no label known)", "(none of them)", 6)]


def test_no_label_of_a_user_gives_way():
    rows = [replace(one, expected=f"It is {'(no label)' if i % 2 else 'A'}.", answer=f"It is {'(no label)' if i % 4 else 'A'}." if i % 3 else "?") for i, one in enumerate(report("x", 12).rows)]
    right, said = labels_of(EvalReport("x", rows, pattern=r"It is (?P<code>.+)\."))
    assert set(right) == {"A", "(no label)"} and set(said) == {"A", "(no label)", "((no label))"} and said.count("((no label))") == 4


def test_right_answers_longer_than_may_be_said_are_told():
    rows = [row(i, True, 2.0, 30 if i < 3 else 4) for i in range(12)]
    short, long = (EvalReport("x", rows, about={"max_new_tokens": n}) for n in (8, 64))
    assert short.cut.startswith("3 of 12 right answers are longer than max_new_tokens=8 allows (up to 30 tokens)") and not long.cut
    assert short.cut in compare(short, short).reason and short.cut in short._repr_markdown_()


def test_copies_of_a_test_chat_are_told():
    rows = [row(i % 6) for i in range(12)]
    copied, whole = (EvalReport("x", rows, about=about) for about in ({"copies": 6}, {}))
    assert copied.copied.startswith("6 of 12 test chats are copies of others, so that the intervals are narrower") and not whole.copied
    assert copied.copied in compare(copied, copied).reason and copied.copied in copied._repr_markdown_()


def test_small_comparisons_say_why_there_is_no_verdict():
    rows = lambda right: [row(i, right, 1.0 + i % 2 - right / 2, 4, 0.5, 3, True) for i in range(4)]  # noqa: E731
    told = difference_texts(EvalReport("a", rows(False)), EvalReport("b", rows(True)))
    assert told["exact match"] == "can't tell (+7 to +100 points)" and how_many(4) == "4 test chats (too few for a verdict, which takes 10)"

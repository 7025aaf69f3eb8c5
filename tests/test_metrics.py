"""Scores equal those of the field's own scripts, and an interval holds the truth as often as it says."""

import math
import socket
from functools import partial

import numpy as np
import pytest

from finetune_nb import metrics
from finetune_nb.config import ConfigError
from finetune_nb.labels import classification_report, closed_set
from finetune_nb.metrics import (
    FEWEST,
    bootstrap_interval,
    chats_needed,
    exact_match,
    follows_pattern,
    follows_schema,
    holm,
    level_of,
    normalised,
    normalised_match,
    paired_difference,
    paired_interval,
    spread_of,
    token_f1,
    wilson_interval,
    within_rounding,
)

DRAWS = 1000


@pytest.mark.parametrize(
    ("answer", "expected", "f1", "match"),
    [  # worked by hand from the rules of SQuAD's script
        ("the Eiffel Tower", "Eiffel tower", 1.0, True),
        ("in Paris, France", "Paris", 2 * (1 / 3) / (1 / 3 + 1), False),
        ("Paris Paris", "Paris", 2 * 0.5 / 1.5, False),
        ("", "", 1.0, True),
        ("the", "a", 0.0, False),
        ("", "Paris", 0.0, False),
        ("London", "Paris", 0.0, False),
        ("J20.9", "j209", 1.0, True),
        ("anthem", "them", 0.0, False),
    ],
)
def test_squad(answer, expected, f1, match):
    assert token_f1(answer, expected) == pytest.approx(f1) and normalised_match(answer, expected) is match


def test_more_chats_are_needed_where_verdicts_hold_together():
    gaps = [1.0] * 22 + [-1.0] * 8 + [0.0] * 170
    found = paired_difference([0.0] * 200, gaps, level=0.995)
    assert found.verdict == "can't tell" and found.needed == chats_needed(spread_of(gaps), 0.07, 0.995) > 1.5 * chats_needed(spread_of(gaps), 0.07)
    assert chats_needed(1.0, 0.1) == 785 and chats_needed(1.0, 0.1, 0.995) == pytest.approx(1332, abs=2)  # (2.807 + 0.842)² × 100


def test_words_are_normalised_as_in_squad():
    assert normalised("  The  quick, brown—fox's  AN apple! ") == "quick brown—foxs apple"
    assert exact_match(" x\n", "x") and not exact_match("X", "x")


def covered(draw, truth, interval):
    "How often the interval of a drawn sample holds the truth."
    hits = 0
    for seed in range(DRAWS):
        low, high = interval(draw(np.random.default_rng(seed)), seed)
        hits += low <= truth <= high
    return hits / DRAWS


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9])
def test_a_share_is_covered(share):
    assert 0.93 <= covered(lambda rng: rng.random(100) < share, share, lambda x, seed: wilson_interval(int(x.sum()), 100)) <= 0.97


@pytest.mark.parametrize(
    ("draw", "truth"),
    [(lambda rng: rng.normal(3, 2, 40), 3), (lambda rng: rng.exponential(1, 100), 1), (lambda rng: rng.beta(0.5, 0.5, 60), 0.5)],
    ids=["normal", "skewed", "two-peaked"],
)
def test_a_mean_is_covered(draw, truth):
    assert 0.93 <= covered(draw, truth, lambda x, seed: bootstrap_interval(x, seed=seed, draws=600)) <= 0.97


def test_a_mean_over_tokens_is_covered():
    "A few long chats weigh as much as many short ones: the mean of all tokens is a ratio of sums."

    def draw(rng):
        tokens = rng.integers(5, 60, 80)
        return rng.normal(2, 0.5, 80) + 0.01 * tokens, tokens

    tokens = np.arange(5, 60)
    truth = 2 + 0.01 * (tokens**2).sum() / tokens.sum()
    assert 0.93 <= covered(draw, truth, lambda x, seed: bootstrap_interval(*x, seed=seed, draws=600)) <= 0.97


def test_a_paired_difference_is_covered_and_sharper():
    def draw(rng):
        hard = rng.random(150)
        return hard + rng.normal(0, 0.1, 150), hard + 0.03 + rng.normal(0, 0.1, 150)

    def interval(pair, seed):
        return bootstrap_interval(pair[1] - pair[0], seed=seed, draws=600)

    assert 0.93 <= covered(draw, 0.03, interval) <= 0.97
    one, two = draw(np.random.default_rng(0))
    assert paired_difference(one, two, seed=0).low == bootstrap_interval(two - one)[0]
    apart = [np.ptp(bootstrap_interval(values)) for values in (one, two)]
    assert np.ptp(interval((one, two), 0)) < min(apart) / 1.5


@pytest.mark.parametrize(
    ("n", "lost", "gained"),
    [(12, 0.02, 0.15), (30, 0.01, 0.1), (60, 0.01, 0.06), (100, 0, 0.04), (100, 0.01, 0.05), (100, 0.05, 0.15), (20, 0.2, 0.4), (60, 0, 0.5), (30, 0, 0.9)],
)
def test_a_difference_of_shares_is_covered(n, lost, gained):
    "Where hardly any answer changes, a sample holds too few changes to be sharper: there the interval may hold the truth more often."
    assert 0.93 <= covered(*shares_apart(n, lost, gained)) <= (0.97 if n * min(lost, gained) >= 3 else 1)


@pytest.mark.parametrize(("n", "gained"), [(30, 0.97), (50, 0.99), (30, 0.95), (100, 0.99), (200, 0.99), (10, 0.95)])
def test_a_difference_of_nearly_all_is_covered(n, gained):
    assert covered(*shares_apart(n, 0, gained)) >= 0.93


def shares_apart(n, lost, gained):
    def draw(rng):
        at = rng.random(n)
        return np.where(at < lost, -1, at > 1 - gained)

    return draw, gained - lost, lambda gaps, seed: interval_of(paired_difference(gaps < 0, gaps > 0))


def interval_of(difference):
    return difference.low, difference.high


def test_a_difference_of_shares_is_never_outside_or_sure():
    for n in (1, 2, 10, 29, 30, 100):
        for gained in range(0, n + 1, max(1, n // 10)):
            for lost in range(0, n + 1 - gained, max(1, n // 10)):
                low, high = paired_interval(gained, lost, n)
                assert -1 <= low <= (gained - lost) / n <= high <= 1 and low < high and paired_interval(lost, gained, n) == pytest.approx((-high, -low))
    assert interval_of(paired_difference([0] * 50, [1] * 50)) == paired_interval(50, 0, 50)
    assert paired_interval(20, 4, 100) == pytest.approx((0.0637, 0.2500), abs=1e-4)  # 21/102 - 5/102 ± 1.96·√(…/102), by hand


def test_too_few_pairs_are_no_verdict():
    "However far apart: four answers in a row come by chance, too."
    for n in range(1, FEWEST):
        found = paired_difference([0] * n, [1] * n)
        assert found.verdict == "can't tell" and f"{n} chat{' is' if n == 1 else 's are'} too few" in str(found) and found.needed >= FEWEST
    assert paired_difference([0] * FEWEST, [1] * FEWEST).verdict == "better" and paired_difference([0] * 10, [1] * 4 + [0] * 6).verdict == "can't tell"
    assert paired_difference([2.0, 2.1], [1.0, 1.2], higher_is_better=False).verdict == "can't tell"


def test_no_difference_is_rarely_called_one():
    def pair(rng):
        return rng.random(120) < 0.8, rng.random(120) < 0.8

    verdicts = [paired_difference(*pair(np.random.default_rng(seed))).verdict for seed in range(300)]
    assert 0.90 <= verdicts.count("can't tell") / 300 <= 0.99


def test_the_size_that_was_named_can_tell():
    "A difference like the one seen is found about four times in five by a test set of the size that the verdict names."
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 1, 60), rng.normal(0.25, 1, 60)
    found = paired_difference(first, second)
    gaps = np.asarray(second) - np.asarray(first)
    assert found.verdict == "can't tell" and 60 < found.needed < 1000
    told = [paired_difference(np.zeros(found.needed), rng.choice(gaps, found.needed)).verdict != "can't tell" for _ in range(60)]
    assert 0.65 <= np.mean(told) <= 0.95


def test_the_size_that_was_named_can_tell_a_mean_over_tokens():
    "A few long chats carry most of the mean, so that it takes more chats than a plain mean would."
    rng = np.random.default_rng(3)
    tokens = np.exp(rng.normal(4, 1.2, 80))
    gaps = rng.normal(0, 1, 80)
    gaps += 0.45 - np.average(gaps, weights=tokens)
    found = paired_difference(np.zeros(80), gaps, weights=tokens)
    assert found.verdict == "can't tell" and 80 < found.needed < 3000
    told = []
    for seed in range(40):
        drawn = np.random.default_rng(seed).integers(0, 80, found.needed)
        told.append(paired_difference(np.zeros(len(drawn)), gaps[drawn], weights=tokens[drawn]).verdict != "can't tell")
    assert 0.68 <= np.mean(told) <= 0.92


def test_the_spread_of_a_weighted_mean():
    values, tokens = np.arange(10.0), np.array([1.0] * 9 + [30])
    means = [np.average(values[at], weights=tokens[at]) for at in np.random.default_rng(0).integers(0, 10, (4000, 400)) % 10]
    values, tokens = np.tile(values, 40), np.tile(tokens, 40)
    assert spread_of(values, tokens) / 20 == pytest.approx(np.std(means), rel=0.1) and spread_of(values) == pytest.approx(np.std(values))


def test_rounding_is_no_difference():
    rng = np.random.default_rng(0)
    losses = rng.gamma(3, 1, 40)
    again = losses + rng.uniform(1e-7, 2e-6, 40)
    assert within_rounding(losses, again).all() and not within_rounding(losses, losses + 0.001).any() and within_rounding([], []).size == 0
    found = paired_difference(losses, again, higher_is_better=False)
    assert found.verdict == "can't tell" and found.mean == 0 and found.needed is None
    tiny = [1e-9, 2e-9] * 20
    assert paired_difference(tiny, [2 * x for x in tiny]).verdict == "better", "a score may be small"


def test_many_verdicts_are_rarely_wrong_together():
    "Twenty settings that change nothing: one by one some would be called better nearly each time."
    false, found = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pairs = {str(i): (rng.random(80) < 0.7, rng.random(80) < 0.7) for i in range(20)} | {"real": (rng.random(80) < 0.3, rng.random(80) < 0.95)}
        told = holm({name: partial(paired_difference, *pair) for name, pair in pairs.items()})
        assert list(told) == list(pairs)
        false += any(gap.verdict != "can't tell" for name, gap in told.items() if name != "real")
        found += told["real"].verdict == "better"
    assert false <= 8 and found == 60 and holm({}) == {}


def test_the_surest_goes_first():
    "What is sure at the level of all makes it easier for the rest (Holm)."
    gap = lambda p, level: paired_difference([0] * 20, [1] * 20 if p < 1 - level else [0] * 20)  # noqa: E731
    told = holm({name: lambda level, p=p: gap(p, level) for name, p in {"a": 0.03, "b": 0.01, "c": 0.024}.items()})
    asked = {name: found.mean == 1 for name, found in told.items()}
    assert asked == {"a": True, "b": True, "c": True} and 0.03 > 1 - level_of(3)


def test_verdicts_know_what_is_better():
    assert paired_difference([1, 2, 1.5] * 20, [0.5, 1, 1] * 20, higher_is_better=False).verdict == "better"
    assert paired_difference([1, 2, 1.5] * 20, [0.5, 1, 1] * 20).verdict == "worse"
    assert paired_difference([1, 0] * 20, [1, 0] * 20).verdict == "can't tell" and paired_difference([1] * 40, [1] * 40).needed is None
    assert paired_difference([0] * 100, [1] * 100).verdict == "better" and paired_difference([0], [1]).verdict == "can't tell"
    assert all(map(math.isnan, bootstrap_interval([1.0])))


def test_labels_as_scikit_learn_counts_them():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed here")
    rng = np.random.default_rng(0)
    expected, answers = (list(rng.choice(["a", "b", "c", "d"], 200, p=[0.5, 0.3, 0.15, 0.05])) for _ in range(2))
    report = classification_report(answers, expected)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(expected, answers, labels=report.labels, zero_division=0)
    for at, label in enumerate(report.labels):
        assert report.table()[label] == pytest.approx((precision[at], recall[at], f1[at], support[at]))
    assert report.accuracy == pytest.approx(metrics.accuracy_score(expected, answers))
    assert report.macro_f1 == pytest.approx(metrics.f1_score(expected, answers, average="macro", zero_division=0))
    assert (report.confusion[:, :-1] == metrics.confusion_matrix(expected, answers, labels=report.labels)).all()


@pytest.mark.parametrize(("n", "accuracy"), [(60, 0.7), (150, 0.9), (60, 0.97)])
def test_the_figures_of_labels_are_covered(n, accuracy):
    "Three labels of which one is rare; the truth is what a very large sample shows."

    def draw(rng, n=n):
        expected = rng.choice(["a", "b", "c"], n, p=[0.5, 0.35, 0.15])
        return [right if hit else said for right, hit, said in zip(expected, rng.random(n) < accuracy, rng.choice(["a", "b", "c", "d"], n), strict=True)], list(expected)

    whole, hits, drawn = classification_report(*draw(np.random.default_rng(1), 100_000)), {}, 250
    truth = {"accuracy": whole.accuracy, "macro F1": whole.macro_f1} | {(label, k): rates[k] for label, rates in whole.table().items() for k in range(3)}
    for seed in range(drawn):
        found = classification_report(*draw(np.random.default_rng(seed)))
        said = {"accuracy": found.accuracy_estimate, "macro F1": found.macro_f1_estimate} | {(label, k): one for label, estimates in found.estimates.items() for k, one in enumerate(estimates)}
        for name, one in said.items():
            hits.setdefault(name, []).append(math.isnan(one.low) or one.low <= truth[name] <= one.high)
    assert all(0.90 <= np.mean(hit) for hit in hits.values()), {name: np.mean(hit) for name, hit in hits.items()}
    assert np.mean(hits["macro F1"]) <= 0.985


def test_every_figure_of_labels_has_its_interval():
    report = classification_report(["a"] * 9 + ["b"] * 2 + ["?"], ["a"] * 8 + ["b"] * 4)
    precision, recall, f1 = report.estimates["a"]
    assert (precision.low, precision.high) == wilson_interval(8, 9) and (recall.low, recall.high) == wilson_interval(8, 8)
    assert (report.accuracy_estimate.low, report.accuracy_estimate.high) == wilson_interval(10, 12)
    assert f1.value == pytest.approx(report.table()["a"][2]) and f1.low == pytest.approx(2 * wilson_interval(8, 9)[0] / (1 + wilson_interval(8, 9)[0]))
    assert report.macro_f1_estimate.value == report.macro_f1 and report.macro_f1_estimate.low < report.macro_f1 < report.macro_f1_estimate.high
    said = report.to_dict()["intervals"]
    assert said["by_label"]["b"]["recall"] == list(wilson_interval(2, 4)) and len(said["macro_f1"]) == 2
    assert "accuracy 83.3% (55% to 95%), macro F1 0.80 (0." in report._repr_markdown_() and "0.89 (0.56 to 0.98) | 1.00 (0.68 to 1.00) | 0.94 (0." in report._repr_markdown_()
    sure = classification_report(["a", "b"] * 20, ["a", "b"] * 20)
    assert sure.macro_f1_estimate.low == wilson_interval(40, 40)[0] and sure.estimates["a"][2].low < 0.95
    never = classification_report(["a", "a"], ["a", "b"])
    assert never.to_dict()["intervals"]["by_label"]["b"]["precision"] is None and never.estimates["b"][2].value == 0


def test_no_label_takes_the_place_of_the_answers_that_are_none():
    report = classification_report(["x", "(none of them)"], ["(none of them)", "(none of them)"])
    assert report.confusion_rows()[0][1:] == ["(none of them)", "((none of them))"] and report.confused() == [("(none of them)", "((none of them))", 1)]


def test_labels_by_hand():
    report = classification_report(["yes", "no ", "maybe", "yes"], ["yes", "yes", "no", "no"])
    assert report.labels == ["no", "yes"] and report.confusion.tolist() == [[0, 1, 1], [1, 1, 0]] and report.accuracy == 0.25
    assert report.table()["yes"] == (0.5, 0.5, 0.5, 2) and report.table()["no"] == (0, 0, 0, 2)
    assert "<" not in classification_report(["<b>"], ["<b>"])._repr_markdown_() and closed_set(["yes", "no"] * 5) and not closed_set(list("abcdef"))


def test_labels_that_are_the_same_once_normalised():
    right = ["positive"] * 3 + ["negative"] * 2
    said = ["Positive", "positive.", "negative", "Negative!", "none"]
    assert classification_report(said, right).accuracy == 0 and classification_report(said, right, normal=True).accuracy == 0.6
    assert classification_report(["C", "C++"], ["C", "C++"], normal=True).labels == ["C", "C++"], "which are not to be mixed up"


def test_a_schema_never_reaches_the_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *args, **kwargs: pytest.fail("a socket is opened"))
    for ref in ("http://127.0.0.1:9/code.json", "https://example.com/code.json#/a", "code.json", "#/$defs/missing"):
        for schema in ({"$ref": ref}, {"type": "object", "properties": {"a": {"items": {"$ref": ref}}}}, {"$id": "http://example.org/", "anyOf": [{"$ref": ref}]}):
            with pytest.raises(ConfigError, match="nothing is fetched"):
                follows_schema(schema)
    local = follows_schema({"$defs": {"code": {"type": "string"}, "also": {"$id": "http://example.com/also", "type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/code"}, "b": {"$ref": "http://example.com/also"}}})
    assert [local(text, "") for text in ('{"a": "x", "b": 1}', '{"a": 1}', '{"b": "x"}')] == [1, 0, 0]
    tree = follows_schema({"type": "object", "properties": {"sub": {"$ref": "#"}, "$ref": {"const": {"$ref": "http://example.com"}}}})
    assert tree('{"sub": {"sub": {}}}', "") and not tree('{"sub": 1}', "") and tree('{"$ref": {"$ref": "http://example.com"}}', "")
    assert follows_schema({"$ref": "https://json-schema.org/draft/2020-12/schema"})('{"type": "object"}', "")
    old = follows_schema({"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"x": {"type": "string"}}, "items": {"$ref": "#/definitions/x"}})
    assert old('["a"]', "") and not old("[1]", "")


def test_forms_are_checked_and_wrong_ones_named():
    assert follows_pattern(r"\d+")("12\n", "") == 1 and follows_pattern(r"\d+")("12 or so", "") == 0
    score = follows_schema({"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]})
    assert [score(text, "") for text in ('{"code": "J20"}', '{"code": 1}', "{", "[]", "")] == [1, 0, 0, 0, 0]
    for wrong in (lambda: follows_pattern("("), lambda: follows_schema({"type": "unknown"}), lambda: paired_difference([1], [1, 2]), lambda: classification_report(["a"], [])):
        with pytest.raises(ConfigError):
            wrong()


@pytest.mark.parametrize("ends", [True, False])
def test_samples_that_are_kept_are_those_that_would_be_drawn(ends):
    kept, drawn = metrics._kept_draws(7, ends, 3, 1200), list(metrics._draws(7, ends, 3, 1200))
    assert len(kept) == len(drawn) == 3 and all((one == other).all() and one.shape[1] == 7 + 2 * ends for one, other in zip(kept, drawn, strict=True))
    values = list(range(7))
    assert bootstrap_interval(values, draws=1200) == bootstrap_interval(values, draws=1200) != bootstrap_interval(values, seed=1, draws=1200)

"""Scores equal those of the field's own scripts, and an interval holds the truth as often as it says."""

import math

import numpy as np
import pytest

from finetune_nb.config import ConfigError
from finetune_nb.metrics import (
    FEWEST,
    bootstrap_interval,
    classification_report,
    closed_set,
    exact_match,
    follows_pattern,
    follows_schema,
    normalised,
    normalised_match,
    paired_difference,
    paired_interval,
    token_f1,
    wilson_interval,
)

DRAWS = 1000


@pytest.mark.parametrize(
    ("answer", "expected", "f1", "match"),
    [  # worked by hand from the rules of SQuAD's script
        ("the Eiffel Tower", "Eiffel tower", 1.0, True),
        ("in Paris, France", "Paris", 2 * (1 / 3) / (1 / 3 + 1), False),
        ("Paris Paris", "Paris", 2 * 0.5 / 1.5, False),
        ("", "", 1.0, True),
        ("the", "a", 1.0, True),
        ("", "Paris", 0.0, False),
        ("London", "Paris", 0.0, False),
        ("J20.9", "j209", 1.0, True),
        ("anthem", "them", 0.0, False),
    ],
)
def test_squad(answer, expected, f1, match):
    assert token_f1(answer, expected) == pytest.approx(f1) and normalised_match(answer, expected) is match


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
    told = [paired_difference(np.zeros(found.needed), rng.choice(gaps, found.needed)).verdict != "can't tell" for _ in range(100)]
    assert 0.68 <= np.mean(told) <= 0.92


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


def test_forms_are_checked_and_wrong_ones_named():
    assert follows_pattern(r"\d+")("12\n", "") == 1 and follows_pattern(r"\d+")("12 or so", "") == 0
    score = follows_schema({"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]})
    assert [score(text, "") for text in ('{"code": "J20"}', '{"code": 1}', "{", "[]", "")] == [1, 0, 0, 0, 0]
    for wrong in (lambda: follows_pattern("("), lambda: follows_schema({"type": "unknown"}), lambda: paired_difference([1], [1, 2]), lambda: classification_report(["a"], [])):
        with pytest.raises(ConfigError):
            wrong()

"Near-duplicates are found, templates are left alone."

import random

import pytest

from finetune_nb.data import icd10_chats, icd10_entries
from finetune_nb.duplicates import matches_between, near_duplicate_groups, normalise, words
from finetune_nb.planted import clean_chats, leaks, reworded


@pytest.mark.parametrize("a, b", [("Ａ b", "a B!"), ("it’s", "It's"), ("a\u00a0b", "a b"), ("state-of-the-art", "State of the art"), ("Straße", "STRASSE"), ("capi\u200btal", "capital"), ("ca\u00adpital", "capital"), ("c\u0430pit\u0430l", "capital"), ("J\u200b45", "J45"), ("n\u03bfte", "note")])
def test_spelling_is_folded(a, b):
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize("a, b", [("3.5", "35"), ("C++", "C#"), ("3+4", "3-4"), ("3*4", "3/4"), ("a<b", "a>b"), ("5 €", "5 $"), ("-5", "5"), ("\u043a\u043e\u0442", "kot"), ("\u03b1", "a")])
def test_meaning_is_kept(a, b):
    assert normalise(a) != normalise(b)


@pytest.mark.parametrize(
    "a, b",
    [
        ("Give the dose for a child of 5 years", "Give the dose for a child of 6 years"),
        ("Is aspirin allowed with this medicine", "Is aspirin not allowed with this medicine"),
        ("Code a fracture of the left wrist bone", "Code a fracture of the right wrist bone"),
    ],
)
def test_what_decides_is_no_near_duplicate(a, b):
    assert near_duplicate_groups([a, b, "something else altogether"]) == []


@pytest.mark.parametrize("length", [8, 20, 60, 200])
def test_rewordings_are_found(length):
    rng = random.Random(length)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(6, 11))) for _ in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, k=length)) for _ in range(300)]
    copies = [reworded(t, rng) for t in texts[:100]]
    found = {tuple(g) for g in near_duplicate_groups(texts + copies)}
    wanted = {(i, 300 + i) for i in range(100)}
    assert len(found & wanted) > 95 and len(found - wanted) < 10


def test_templates_are_left_alone():
    rng = random.Random(0)
    entries = rng.sample([e for e in icd10_entries() if len(e.code) <= 5], 1000)
    groups = near_duplicate_groups([f"What is the ICD-10 code for {e.description}?" for e in entries])
    assert sum(map(len, groups)) < 10
    assert near_duplicate_groups([c.messages[-2]["content"] for c in icd10_chats().train]) == []


def test_leaks_are_found():
    for seed in (1, 3):
        rng = random.Random(seed)
        train, test, planted = leaks(clean_chats(seed, rng, 400), rng)
        found = {k: {(i, j) for i, j, kind in matches_between(train, test) if kind == k} for k in planted}
        assert found["exact"] == planted["exact"] and found["normalised"] == planted["normalised"]
        assert len(found["near"] & planted["near"]) >= 0.9 * len(planted["near"])


def test_each_text_has_its_closest_match_alone():
    texts = ["Where is the key of the old cellar door?", "where is the key of the old cellar door", "Where is my key of the old cellar door?"]
    assert matches_between(texts[:1], texts[::-1]) == [(0, 2, "exact")] and matches_between(texts[:1], texts[:0:-1]) == [(0, 1, "normalised")]
    assert matches_between(texts[:1] * 3, [texts[2]] * 3) == [(i, 0, "near") for i in range(3)]


@pytest.mark.parametrize(("text", "pairs"), [("ภาษาไทย", "ภา าษ ษา าไ ไท ทย"), ("ພາສາລາວ", "ພາ າສ ສາ າລ ລາ າວ"), ("ကခဂ", "ကခ ခဂ"), ("កខគ", "កខ ខគ"), ("東京都", "東京 京都"), ("𠀋𠂉𠂢", "𠀋𠂉 𠂉𠂢")])
def test_scripts_without_spaces_are_read_in_pairs(text, pairs):
    assert words(normalise(text)) == set(pairs.split())
    assert words(normalise(f"Say {text}!")) == {"say", *pairs.split()}


def test_odd_texts():
    assert near_duplicate_groups([]) == [] and near_duplicate_groups(["", "?", ""]) == [[0, 1, 2]]
    assert near_duplicate_groups(["今日は天気がとても良いです", "今日は天気がとても良いです。", "明日は雨が降るでしょう"]) == [[0, 1]]
    assert matches_between([], ["a"]) == []


def test_the_seed_decides():
    texts = [c.messages[-2]["content"] for c in clean_chats(1, random.Random(0), 300)]
    assert near_duplicate_groups(texts, seed=5) == near_duplicate_groups(texts, seed=5)

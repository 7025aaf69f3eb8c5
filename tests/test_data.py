"""Reading, splitting and the demo data."""

import gzip
import json
import os
import random
import re
import sys
from datetime import date
from html import escape
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_nb import data
from finetune_nb.chats import ChatFile, Chats, Limits
from finetune_nb.config import ConfigError, FinetuneError
from finetune_nb.data import (
    Chat,
    ChatError,
    Icd10Entry,
    Leak,
    Splits,
    check_leaks,
    fingerprint,
    icd10_chats,
    leak_report,
    load_chats,
    question,
    save_chats,
    split_chats,
)
from finetune_nb.reading import Fault, Findings, Row, check_file, decode_json
from finetune_nb.rows import ReadingProgress, read_rows
from finetune_nb.sources import open_sources

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, BOT]}


def line(*messages, **extra):
    return json.dumps({"messages": list(messages), **extra}).encode()


def test_all_faults_are_told_at_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([line(USER, BOT), *[line(USER)] * 30, b"{"]))
    with pytest.raises(ChatError, match=r"31 problems(?s:.*)and 29 more of this kind: line 3, line 4") as caught:
        load_chats(path)
    assert len(caught.value.problems) == 31


def test_harmless_differences_are_accepted(tmp_path):
    path = tmp_path / "good.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(USER, BOT) + b"\r\n\r\n" + line(USER, BOT, id=7))
    chats = load_chats(path)
    assert [c.where for c in chats] == ["good.jsonl, line 1", "good.jsonl, line 3"]
    assert chats[1].extra == {"id": 7}


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no.jsonl does not exist"):
        load_chats(tmp_path / "no.jsonl")
    (tmp_path / "chats.jsonl").write_bytes(line(USER, BOT))
    with pytest.raises(FileNotFoundError, match=r"Did you mean chats.jsonl\? Files there: chats.jsonl\. "):
        load_chats(tmp_path / "chat.jsonl")
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file in it.*Files there: chats.jsonl"):
        load_chats(tmp_path)


def test_write_and_read_changes_nothing(tmp_path):
    odd = "a\u2028b\x85c\r\nd\te\\n 🙂 \ufeff <|im_end|> \x7f"
    chats = [Chat([USER, {"role": "assistant", "content": odd}], extra={"n": [1, None, {"ü": 1e-9}]})] * 3
    again = load_chats(save_chats(chats, tmp_path / "c.jsonl"))
    assert [(c.messages, c.extra) for c in again] == [(c.messages, c.extra) for c in chats]
    assert fingerprint(again) == fingerprint(chats)


def test_rows_of_a_list_are_checked_too():
    assert load_chats([GOOD])[0].where == "row 1"
    with pytest.raises(ChatError, match="row 2: no 'messages'"):
        load_chats([GOOD, {}])
    with pytest.raises(ChatError, match="the list: it is empty"):
        load_chats([])


@pytest.mark.parametrize("seed", range(5))
def test_splits_keep_groups_together_and_lose_nothing(chats, seed):
    twins = [Chat([{**c.messages[0], "content": "  " + c.messages[0]["content"].upper()}, c.messages[1]]) for c in chats]
    splits = split_chats(chats + twins, 0.2, 0.1, seed)
    assert sorted(map(id, sum(splits, []))) == sorted(map(id, chats + twins))
    questions = [{question(c).strip().lower() for c in part} for part in splits]
    assert not (questions[0] & questions[1] or questions[0] & questions[2] or questions[1] & questions[2])
    assert (len(splits.validation), len(splits.test)) == (16, 8)


def asked(text, i=0, **extra):
    return Chat([{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}], f"row {i}", extra)


SUBJECTS = "aspirin ibuprofen amoxicillin warfarin insulin metformin codeine digoxin heparin lithium quinine naproxen statins steroids vitamins morphine cortisone calcium".split()


def misspelled(text):
    word = text.split()[1]
    return text.replace(word, word[0] + word[2] + word[1] + word[3:])


TWISTS = (str.upper, lambda t: t.replace("?", " ?"), misspelled, lambda t: "Please, " + t, lambda t: t.replace(" with", " really with"))


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_never_straddle(seed):
    base = [asked(f"Is {s} safe for a patient of eighty years with a failing kidney?", i) for i, s in enumerate(SUBJECTS)]
    twins = [asked(twist(question(c)), f"{c.where} again") for c in base for twist in TWISTS]
    splits = split_chats(base + twins, 0.2, 0.2, seed)
    assert sorted(map(id, sum(splits, []))) == sorted(map(id, base + twins))
    homes = [{s for c in part for s in SUBJECTS if s in question(c).lower() or misspelled(f"Is {s} ").strip() in question(c)} for part in splits]
    assert all(homes) and not (homes[0] & homes[1] or homes[0] & homes[2] or homes[1] & homes[2])
    assert not leak_report(splits)


def test_groups_that_share_a_member_stay_together():
    rows = [asked("What of the lungs?", 0, p=1), asked("And the heart beat?", 1, p=1), asked("and the HEART beat", 2, p=2), asked("Why the knee?", 3, p=2)]
    others = [asked(f"Does number {i} hurt?", i, p=100 + i) for i in range(40)]
    for seed in range(6):
        splits = split_chats(rows + others, 0.2, 0.2, seed, group="p")
        assert sorted(len([c for c in part if c in rows]) for part in splits) == [0, 0, 4]


def test_strata_keep_their_share_and_rounding_loses_none():
    chats = [asked(f"Question number {i} about {w}", i, w=w) for w, n in (("a", 70), ("b", 23), ("c", 7)) for i in range(n)]
    splits = split_chats(chats, 0.1, 0.1, stratify="w", near_duplicates=False)
    counts = [[sum(c.extra["w"] == w for c in part) for w in "abc"] for part in splits]
    assert [sum(c) for c in counts] == [80, 10, 10] and [sum(c) for c in zip(*counts, strict=True)] == [70, 23, 7]
    assert all(abs(c[k] - s) <= 1 for c in counts[1:] for k, s in enumerate((7, 2.3, 0.7)))
    for seed in range(5):
        assert [sum(c.extra["w"] == "a" for c in part) for part in split_chats(chats, 0.1, 0.1, seed, stratify="w", near_duplicates=False)] == [56, 7, 7]
    assert split_chats(chats, 0.1, 0, stratify=lambda c: c.extra["w"], near_duplicates=False).test == []


def test_leaks_of_every_kind_are_found():
    train = [asked(f"Is {s} safe for a patient of eighty years with a failing kidney?", i) for i, s in enumerate(SUBJECTS[:9])]
    clean = [asked(f"Is {s} safe for a patient of eighty years with a failing kidney?", i) for i, s in enumerate(SUBJECTS[9:])]
    assert check_leaks(clean, train) == []
    kinds = [check_leaks([*clean, asked(twist(question(train[k])), "t")], train) for k, twist in enumerate((str, *TWISTS))]
    assert [[leak.kind for leak in leaks] for leaks in kinds] == [["exact"], ["normalised"], ["normalised"], ["near"], ["near"], ["near"]]
    said = leak_report(Splits(train, clean, [*clean[:2], train[3]]))
    assert len(said) == 2 and "1 of 3 test chats ask what a train chat asks (1 exact)" in said[0] and "2 of 3 test chats ask what a validation chat" in said[1]


def test_a_split_has_no_leak_that_only_two_of_its_sets_would_show():
    "'Grill' stands three times in all and is a word; in two of the sets it may stand once, and looks like a misspelt 'drill'."
    things = "kettle radio lamp clock heater printer toaster fan drill scanner speaker camera router mixer grill iron dryer pump scale stove".split()
    chats = [asked(f"How do I {act} the {thing}?", i) for i, thing in enumerate(things) for act in ("reset", "clean", "switch off")]
    random.Random(1).shuffle(chats)
    splits = [split_chats(chats, test_size=share) for share in (0.1, 0.2, 0.25)]
    assert any(check_leaks(part.test, part.train) for part in splits) and not any(leak_report(part) for part in splits)


def test_a_system_message_of_its_own_belongs_to_the_question():
    def about(document, i):
        return Chat([{"role": "system", "content": document}, *asked("What does it say about fever?").messages], f"row {i}")

    own = [about(f"Leaflet of {s}: take it with water, twice a day.", i) for i, s in enumerate(SUBJECTS)]
    shared = [about("Answer from the leaflet.", i) for i in range(18)]
    assert check_leaks(own[9:], own[:9]) == [] and len(check_leaks(shared[9:], shared[:9])) == 9
    twice = [asked("is it SAFE for the knee?", 1), asked("Is it safe for the knee, please?", 2), asked("Is it safe for the knee?", 3)]
    assert [str(check_leaks([asked("Is it safe for the knee?", 0)], some)[0]).partition(":")[0] for some in (twice, twice[:2])] == ["row 0 asks what row 3 asks (exact, with the same answer)", "row 0 asks what row 1 asks (normalised, with the same answer)"]
    assert all(split_chats(own, 0.2, 0.2)) and check_leaks([own[0]], own[:9])[0].kind == "exact"
    with pytest.raises(ConfigError, match="18 chats in 1 group of the same question are too few"):
        split_chats(shared, 0.2, 0.2)


def test_a_large_group_leaves_the_training_set_its_chats():
    one = [asked(f"What of item {i} in the {s} case?", i, g=0 if i < 90 else i) for i, s in enumerate([*SUBJECTS * 6][:100])]
    for seed in range(6):
        with pytest.warns(UserWarning, match=r"the (validation|test) set has . chats where 10% would be 10.*the largest has 90 of 100"):
            splits = split_chats(one, 0.1, 0.1, seed, group="g", near_duplicates=False)
        assert len(splits.train) >= 94 and splits.validation and splits.test and len({c.extra["g"] for c in splits.train}) > 3
    mixed = [asked(f"What of item {i}?", i, g=i // 30 if i < 60 else 100 + i // 4) for i in range(100)]
    for seed in range(8):
        assert [len(p) for p in split_chats(mixed, 0.1, 0.1, seed, group="g", near_duplicates=False)] == [76, 12, 12]
    with pytest.raises(ConfigError, match=r"The smallest group has 30 of them: set validation_size to 0.33 or more"):
        split_chats(mixed[:60] + [asked(f"And item {i}?", i, g=9) for i in range(30)], 0.1, 0.1, group="g", near_duplicates=False)


def talk(*turns, where=""):
    return Chat([{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)], where)


LAMPS = "Which lamps does the northern harbour use?"


def test_a_chat_that_begins_another_is_a_leak():
    others = [asked(f"Is {s} safe for a patient of eighty years?", i) for i, s in enumerate(SUBJECTS)]
    long, short = talk(LAMPS, "Red ones.", "And who made the boats?", "Nobody.", where="long"), talk(LAMPS, "Red ones.", where="short")
    for clean, other in (([short], [*others, long]), ([long], [*others, short]), ([long], [*others, talk(LAMPS, "Red ones.", "Why?", "Who knows.")])):
        [leak] = check_leaks(clean, other)
        assert leak.kind == "exact" and not leak.whole and "begins with what" in str(leak)
    assert "1 of 1 test chats" in leak_report(Splits([*others, long], [], [short]))[0]
    for seed in range(20):
        homes = [{c.where for c in part} & {"long", "short"} for part in split_chats([*others, long, short], 0.2, 0.2, seed)]
        assert sorted(map(len, homes)) == [0, 0, 2]


@pytest.mark.parametrize("greeting", ["Hello", "Go on", "Hi, can you help me please?", "I have a problem with my order number."])
def test_a_greeting_is_no_leak(greeting):
    chats = [talk(greeting, "Of course.", f"Is {s} safe for a patient of eighty years?", "Yes.", where=s) for s in SUBJECTS]
    assert check_leaks(chats[9:], chats[:9]) == [] and len(split_chats(chats, 0.2, 0.2).test) == 4
    assert check_leaks([chats[0]], chats)[0].whole


def test_a_question_asked_thousands_of_times_makes_one_leak_each():
    clean, other = ([asked("Go on with the story, please.", i) for i in range(3000)] for _ in range(2))
    leaks = check_leaks(clean, other)
    assert len(leaks) == 3000 and leaks[0].twin is other[0]


def test_demo_data_is_the_same_for_the_same_seed(monkeypatch):
    entries = data.icd10_entries()  # two seconds, for the package reads its files anew each time
    monkeypatch.setattr(data, "icd10_entries", lambda: entries)
    one = icd10_chats(seed=7)
    assert fingerprint(one.train) == fingerprint(icd10_chats(seed=7).train) != fingerprint(icd10_chats(seed=8).train)
    assert len(one.train) >= 1000 and {c.extra["code"][0] for c in one.test} == {"J"}
    questions = [{c.messages[1]["content"] for c in part} for part in one]
    assert not questions[0] & questions[2] and not leak_report(one)
    for part in one:
        for chat in part:
            entries = [row for row in chat.messages[1]["content"].splitlines() if row.startswith("- ")]
            assert len(entries) == 3 and sum(f": {chat.extra['code']} (" in row for row in entries) == 1


def entry(code, *names):
    return Icd10Entry(code, names[0], names[1:])


ENTRIES = [  # of two and three to a category, with names that are too long, shared or outside
    *(entry(f"{letter}{n:02}.{d}", f"{word} of kind {n}{d}", f"{word} {n}{d}") for letter, word in zip("ABCJ", ("Fever", "Rash", "Cough", "Asthma"), strict=True) for n in range(10, 19) for d in range(2)),
    entry("A20.0", "A description of more than the forty-five characters that a term may have", "a short one"), entry("V10.0", "Bitten by a duck"), entry("W10.0", "Fall"), entry("D10.0", "x" * 37),
]  # fmt: skip


@pytest.fixture
def few(monkeypatch):
    "The demo data out of few codes."
    monkeypatch.setattr(data, "icd10_entries", lambda: ENTRIES)
    return lambda *given, **more: data.icd10_chats(*given, **{"n_train": 20, "n_validation": 5} | more)


def test_the_demo_data_asks_for_one_of_three_entries(few):
    one = few(seed=7)
    assert [fingerprint(part) for part in one] == [fingerprint(part) for part in few(seed=7)] != [fingerprint(part) for part in few(seed=8)] and list(map(len, one)) == [20, 5, 18]
    by_code = {e.code: e for e in ENTRIES}
    taught = [{chat.extra["code"][:3] for chat in part} for part in one]
    assert not taught[0] & taught[1] and taught[2] == {f"J{n}" for n in range(10, 19)} and not {"D10", "V10", "W10", "A20"} & (taught[0] | taught[1])
    shown = [set(), set(), set()]
    for kind, split, part in zip(data.QUESTIONS, shown, one, strict=True):
        for chat in part:
            system, asked, answer = chat.messages
            assert asked["role"] == "user"
            right, (rows, question) = by_code[chat.extra["code"]], asked["content"].split("\n\n")
            codes = [row.partition(": ")[2].partition(" (")[0] for row in rows.splitlines()]
            split |= {code[:3] for code in codes}
            assert chat.where == f"icd10 {kind} {right.code}" and chat.extra == {"code": right.code, "split": kind} and system == {"role": "system", "content": data.SYSTEM}
            assert sorted(map(codes.count, codes)) == [1, 1, 1] and right.code in codes and all(row.endswith(f"({by_code[code].description})") for row, code in zip(rows.splitlines(), codes, strict=True))
            [term] = [row[2:].partition(":")[0] for row in rows.splitlines() if f": {right.code} (" in row]
            assert answer == {"role": "assistant", "content": f"The ICD-10 code for {term} is {right.code} ({right.description})."} and re.fullmatch(data.ANSWER_PATTERN, answer["content"])
            assert question in {form.format(term=term) for form in data.QUESTIONS[kind]} and term in {data._in_sentence(name) for name in (right.description, *right.terms)}
            assert sum(code[:3] == right.category for code in codes) == 2 and sum(code[0] == right.code[0] for code in codes) >= 2, "one of the wrong ones is a sibling"
    assert not shown[0] & shown[1] and shown[2] == taught[2], "the wrong entries of a set come from it too"
    assert {row.startswith("- ") for part in one for chat in part for row in chat.messages[1]["content"].split("\n\n")[0].splitlines()} == {True}
    places = {rows.splitlines().index(row) for chat in one.train for rows in [chat.messages[1]["content"]] for row in rows.splitlines() if f": {chat.extra['code']} (" in row}
    assert places == {0, 1, 2}, "the right one stands anywhere"
    assert [len(chat.messages[1]["content"].split("\n\n")[0].splitlines()) for chat in few(n_entries=5).train] == [5] * 20
    assert few(n_train=22, n_validation=5).train and "D10" in {c.extra["code"][:3] for part in few(n_train=23, n_validation=5, max_chars=37) for c in part}
    with pytest.raises(ValueError, match=r"n_train \+ n_validation may be 27 at most \(one chat for each category\), got 28"):
        few(n_train=23)
    with pytest.raises(ValueError, match="kind must be 'reference' or 'bare', got 'other'"):
        few("other")


def test_the_bare_demo_data_asks_the_same_few_codes_again(few):
    one = few("bare", seed=1)
    codes = [[chat.extra["code"] for chat in part] for part in one]
    assert list(map(len, codes)) == [20, 5, 5] and codes[0] == codes[2] * 4 and codes[1] == codes[2] and len(set(codes[2])) == 5 and not {"V10.0", "W10.0", "A20.0"} & {*codes[2]}
    assert [{chat.extra["split"] for chat in part} for part in one] == [{"train"}, {"validation"}, {"test"}] and len({chat.messages[1]["content"] for chat in one.train}) > 10
    assert {"\n" in chat.messages[1]["content"] for part in one for chat in part} == {False}
    assert list(map(len, few("bare", n_train=5, n_validation=7))) == [5, 7, 7] and list(map(len, few("bare", n_train=50))) == [50, 5, 10]
    assert codes != [[chat.extra["code"] for chat in part] for part in few("bare", seed=2)]


def test_a_term_that_means_two_codes_is_not_asked_for():
    rng = random.Random(0)
    one, other = entry("A10.0", "First", "Both", "x" * 46, "Third", "Fourth"), entry("A10.1", "BOTH")
    assert {data._icd10_chat(one, [other], "train", rng).messages[2]["content"].partition(" is ")[0].rpartition("for ")[2] for _ in range(30)} == {"first", "third"}
    assert {data._icd10_chat(one, [], "train", rng).messages[2]["content"].partition(" is ")[0].rpartition("for ")[2] for _ in range(40)} == {"first", "both", "third"}, "of the description and three names, and none that is too long"
    assert "y" * 45 in {data._icd10_chat(entry("A10.0", "A", "y" * 45), [], "train", rng).messages[2]["content"].split()[4] for _ in range(30)}
    lone = entry("A10.0", "z" * 50)
    assert data._icd10_chat(lone, [entry("B10.0", "w" * 31, "v" * 30)], "test", rng).messages[1]["content"].count("z" * 50) >= 2
    lines = {data._icd10_chat(lone, [entry("B10.0", "w" * 31, "v" * 30)], "test", rng).messages[1]["content"].count("- " + "v" * 30) for _ in range(20)}
    assert lines == {1}, "of another entry a short name is shown"
    assert "- " + "w" * 31 in data._icd10_chat(lone, [entry("B10.0", "w" * 31)], "test", rng).messages[1]["content"]


def test_wrong_entries_are_half_siblings():
    rng, by_category = random.Random(0), {f"A{n}": [entry(f"A{n}.{d}", "a") for d in range(4)] for n in range(10, 16)}
    asked = by_category["A10"][0]
    for n, siblings in ((0, 0), (1, 1), (2, 1), (3, 2), (5, 3)):
        found = data._distractors(asked, by_category, n, rng)
        assert len(found) == n and asked not in found and sum(e.category == "A10" for e in found) == siblings
        assert len({e.category for e in found if e.category != "A10"}) == n - siblings
    assert len(data._distractors(asked, by_category | {"A10": [asked]}, 3, rng)) == 3, "strangers take their place"


def test_terms_inside_a_sentence():
    said = {"Acute bronchitis": "acute bronchitis", "HIV disease": "HIV disease", "Crohn's disease": "Crohn's disease", "X": "X", "Fall": "fall", "A fall": "A fall"}
    assert {term: data._in_sentence(term) for term in said} == said
    one = entry("J20.9", "Acute bronchitis, unspecified", "Chest cold")
    assert one.category == "J20" and one.line("Chest cold") == "- chest cold: J20.9 (Acute bronchitis, unspecified)"
    assert data.icd10_answer("Chest cold", one) == "The ICD-10 code for chest cold is J20.9 (Acute bronchitis, unspecified)."


def test_the_codes_come_from_a_package(monkeypatch):
    leaves = {"A00-B99": False, "A00": False, "A00.0": True, "T80-T88": True, "M80.051A": True, "Z99.89": True}
    fake = SimpleNamespace(get_all_codes=lambda with_dots: list(leaves) if with_dots else [], is_leaf=leaves.get, get_description=lambda code: f"what {code} is", get_inclusion_term=lambda code: [f"also {code}"])
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", fake)
    assert data.icd10_entries() == [entry(code, f"what {code} is", f"also {code}") for code in ("A00.0", "Z99.89")], "no blocks, and none of seven characters"
    monkeypatch.setitem(sys.modules, "simple_icd_10_cm", None)
    with pytest.raises(FinetuneError, match="^The demo data needs the package simple-icd-10-cm: pip install simple-icd-10-cm$"):
        data.icd10_entries()


def test_splits_say_what_they_hold():
    splits = Splits([asked("a")] * 1200, [talk("a", "four", "b", "sixsix")], [])
    assert repr(splits) == "Splits of 1,200 train, 1 validation and 0 test chats"
    assert splits._repr_markdown_().splitlines() == [
        "| split | chats | messages | mean answer (characters) |", "| --- | --- | --- | --- |", "| train | 1,200 | 2,400 | 4 |", "| validation | 1 | 4 | 6 |", "| test | 0 | 0 | 0 |",
    ]  # fmt: skip


def test_a_leak_is_told_in_a_sentence():
    one, same, other, none = asked("Is it safe? " + "x" * 60, 1), asked("is it SAFE? " + "x" * 60, 2), talk("Is it safe?", "No.", where="c"), talk("Is it safe?", None)
    quoted = repr(("Is it safe? " + "x" * 60)[:60])
    assert str(Leak("normalised", one, same)) == f"row 1 asks what row 2 asks (normalised, with the same answer): {quoted}"
    assert str(Leak("exact", one, other)) == f"row 1 asks what c asks (exact, with another answer): {quoted}" and str(Leak("near", none, none)) == "a chat asks what a chat asks (near, with the same answer): 'Is it safe?'"
    assert str(Leak("near", one, other, False)) == f"row 1 begins with what c begins with (near, one goes on or both do): {quoted}"
    assert question(Chat([{"role": "system", "content": "s"}, {"role": "user", "content": None}, *other.messages])) == "\nIs it safe?"


def test_a_report_of_leaks_counts_kinds_and_names_the_first():
    train = [asked(f"Is {s} safe for a patient of eighty years with a failing kidney?", i) for i, s in enumerate(SUBJECTS)]
    twin, near = asked(question(train[0]), "t"), asked(misspelled(question(train[1])), "n")
    said = leak_report(Splits(train, [asked("Why?"), twin], [twin, near]))
    assert [s.partition(" (")[0] for s in said] == ["2 of 2 test chats ask what a train chat asks", "1 of 2 validation chats ask what a train chat asks", "1 of 2 test chats ask what a validation chat asks"]
    assert "(1 exact, 1 near): they test memory. First: row t asks what row 0 asks" in said[0] and "Look at the near ones first" in said[0] and "let split_chats make the test set." in said[0]
    assert "Look at the near ones first" not in said[1] and "(1 exact): they test memory" in said[1] and said[1].endswith("let split_chats make the validation set.")


def test_values_by_which_chats_are_grouped():
    chats = [asked("a", 0, p=[1], q="x"), asked("b", 1, p=[1]), asked("c", 2, p={"k": 1}), asked("d", 3, p="[1]")]
    assert data._by_value(chats, "p") == {"[1]": [0, 1, 3], "{'k': 1}": [2]} and data._by_value(chats, question) == {"a": [0], "b": [1], "c": [2], "d": [3]}
    assert data._by_value([asked("a", p=1), asked("b", p="1")], "p") == {1: [0], "1": [1]}
    with pytest.raises(ConfigError, match=r"^row 1: this row has no column 'q'; it has 'p'\.$"):
        data._by_value(chats, "q")
    with pytest.raises(ConfigError, match=r"^chat 2: this row has no column 'p'; it has none but its messages\.$"):
        data._by_value([chats[0], talk("a", "b")], "p")


def test_sizes_that_are_far_from_what_was_asked_are_told():
    def check(got, share, sizes, n=100):
        data._check_size("test", got, share, [[0] * size for size in sizes], n)

    check(10, 0.1, [1] * 100), check(7, 0.1, [1]), check(13, 0.1, [1]), check(0, 0, [1]), check(2, 0, [1])
    for got, share, wanted in ((6, 0.1, "10"), (14, 0.1, "10"), (3, 0, "0")):
        with pytest.warns(UserWarning, match=f"^the test set has {got} chats where {share:.0%} would be {wanted}: groups stay whole, and the largest has 9 of 100 chats. .* give a test file.$"):
            data._check_size("test", got, share, [[0], [0] * 9], 100)
    for sizes, n, said in (
        ([1, 1], 2, "2 chats in 2 groups of the same question are too few for a test set of 10%. Add chats, give a test file, or set test_size to 0."), ([1], 1, "1 chat in 1 group of"),
        ([30, 30, 40], 100, "100 chats in 3 groups of the same question are too few for a test set of 10%. The smallest group has 30 of them: set test_size to 0.30 or more, give a test file"), ([12, 44, 44], 100, "100 chats in 3 groups .* Add chats"), ([13, 43, 44], 100, ".*The smallest group has 13 of them"), ([50, 50], 100, ".* Add chats,"),
    ):
        with pytest.raises(ConfigError, match=f"^{said}"):
            check(0, 0.1, sizes, n)
    assert [data._wanted(share, n) for share, n in ((0.1, 14), (0.1, 15), (0.25, 2), (0, 9))] == [1, 2, 1, 0] and [data._slack(n) for n in (0, 4, 10)] == [1, 1, 2.5]


def test_what_is_taken_from_strata():
    def take(strata, share, n=None):
        strata = [[[(k, i)] * size for i, size in enumerate(sizes)] for k, sizes in enumerate(strata)]
        n_groups = sum(map(len, strata))
        taken = data._take(strata, share, n or sum(len(g) for s in strata for g in s), n_groups)
        return [sum(k == one for one, _ in taken) for k in range(len(strata))], [sum(map(len, s)) for s in strata]

    assert take([[1] * 50, [1] * 50], 0.1) == ([5, 5], [45, 45]) and take([[1] * 15, [1] * 15], 0.1) == ([2, 1], [13, 14]), "what rounding owes is carried on"
    assert take([[1] * 10], 0) == ([0], [10]) and take([[1, 1]], 0.9) == ([1], [1]), "one group stays"
    assert take([[1] * 8 + [9]], 0.2) == ([3], [14]) and take([[1] * 20, [10] * 2], 0.2)[0] == [4, 0], "a group that is too large stays, and is there for the next set"
    assert take([[2] * 10 + [1] * 80], 0.1) == ([10], [90]) and take([[1] * 10 + [10] * 9], 0.2)[0][0] <= 20
    assert take([[], [1] * 10], 0.2) == ([0, 2], [0, 8]) and take([[]], 0.5, 1) == ([0], [0])


def test_what_belongs_together():
    assert data._joined(6, [[0, 1], [2, 3, 4], [4, 1], [5]]) == [[0, 1, 2, 3, 4], [5]] and data._joined(3, []) == [[0], [1], [2]] and data._joined(0, []) == []
    chats = [asked("What of the lungs?", 0, p=1), asked("Why the knee?", 1, p=1), asked("what of the LUNGS", 2, p=2), asked("Which lamps are red?", 3, p=3), asked("Which lamps, are rde?", 4, p=4)]
    assert data._groups(chats, None, False) == [[0, 2], [1], [3], [4]] and data._groups(chats, "p", False) == [[0, 1, 2], [3], [4]]


def system(text, *turns):
    return Chat([{"role": "system", "content": text}, *talk(*turns).messages])


def test_what_is_asked_turn_by_turn():
    assert data._turns([talk("a", "x", "b", None), talk(None, "x")], [talk("c", "y")]) == [[["a", "b"], [""]], [["c"]]]
    shared = [system("s", "a", "x", "b")] * 5
    assert data._turns(shared) == [[["a", "b"]] * 5] and data._turns([system(str(i), "a") for i in range(5)]) == [[[f"{i}\na"] for i in range(5)]]
    assert data._turns(shared[:4], [talk("a", "x")]) == [[["a", "b"]] * 4, [["a"]]] and data._turns(shared[:3]) == [[["s\na", "b"]] * 3], "more than one of four chats has its own"
    assert data._turns([*[system(str(i), "a", "x", "b") for i in range(5)], talk("a", "x", "b")])[0][-2:] == [["4\na", "b"], ["a", "b"]] and data._turns([Chat([])]) == [[[]]]
    begins = data._beginnings(["What do the lamps of the harbour cost?", *"bcdefghijk"])
    assert len(begins) == 8 and begins[0] == "What do the lamps of the harbour cost?" and begins[1] == begins[0] + "\nb" and data._beginnings(["Go on", "x"]) == [] == data._beginnings(["What do the lamps cost?"])


def test_beginnings_that_many_chats_share_are_no_leak():
    greeting, rest = "Could you look at an order of mine?", [f"Where is the parcel number {i} of the {s}?" for i, s in enumerate(SUBJECTS)]
    chats = [talk(greeting, "Sure.", text, "There.") for text in rest]
    texts, places = data._asked(chats[:11])[0]
    assert texts[:11] == [f"{greeting}\n{text}" for text in rest[:11]] and len(texts) == 11 == len(places), "eleven begin with it: it says nothing, and nothing else begins them"
    texts, places = data._asked(chats[:10])[0]
    assert texts[10:] == [greeting] * 10 and places == [*range(10)] * 2
    texts, places = data._asked([*chats, talk(greeting, "Sure.")])[0]
    assert texts.count(greeting) == 19 and places[19:] == [*range(18)], "somebody asks just that"
    many = [*chats[:11], *[talk(f"A question of its own, number {i}: why?", "x") for i in range(1189)]]
    assert data._asked(many)[0][0].count(greeting) == 11, "one of a hundred"


# --- chats as they are read, piece by piece


def test_a_chat_says_what_it_asks_and_answers():
    tools = [{"function": {"name": "f"}}]
    one = Chat([USER, BOT | {"content": None, "tool_calls": [{"function": {"name": "f<", "arguments": '{"a": 1}'}}, {"function": {"name": "g", "arguments": {"é": 2}}}]}], "c & d, line 1", {"tools": json.dumps(tools)})
    assert one.prompt == [USER] and one.answer == "" and one.tools == tools and Chat([USER, BOT]).answer == "Hello"
    assert [Chat([USER], "", {"tools": given}).tools for given in ("", None, [], tools)] == [None, None, None, tools] and Chat([USER]).tools is None
    page = one._repr_html_()
    assert '<b>user</b>\nHi</div>' in page and '<b>assistant</b>\nf&lt;({&quot;a&quot;: 1})\ng({&quot;é&quot;: 2})</div>' in page and page.endswith("<small>c &amp; d, line 1</small>") and page.count('<div style="white-space:pre-wrap;border-left:3px solid #8886;padding-left:8px;margin:4px 0"><b>') == 2 == page.count("</div><")
    assert "<b>assistant</b>\nHello\nf(1)</div>" in Chat([BOT | {"tool_calls": [{"function": {"name": "f", "arguments": "1"}}]}])._repr_html_()


def test_a_mark_of_chats_sees_messages_tools_and_their_order():
    one, two, tooled = Chat([USER, BOT], "a", {"id": 1}), Chat([BOT, USER]), Chat([USER, BOT], "", {"tools": [{"name": "f"}]})
    assert fingerprint([one]) == fingerprint([Chat([dict(reversed(m.items())) for m in one.messages], "b", {})]), "where it came from, other columns and the order of keys do not count"
    marks = [fingerprint(chats) for chats in ([], [one], [two], [tooled], [one, two], [two, one], [Chat([USER, BOT | {"content": "\ud800"}])])]
    assert len(set(marks)) == 7 and all(re.fullmatch("[0-9a-f]{64}", mark) for mark in marks)


@pytest.mark.parametrize("lazy", [False, True])
def test_what_was_read_is_summed_up(lazy, tmp_path):
    path = tmp_path / "c.jsonl"
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    path.write_bytes(b"\n".join([line(USER, BOT), line(parts, BOT), line(USER), b"{", line(USER, BOT)]))
    with pytest.warns(UserWarning, match=r"^skipped rows: 2, written to c\.rejected\.jsonl:\nc\.jsonl, line 3: .*\nc\.jsonl, line 4: "):
        chats = load_chats(path, on_error="skip", lazy=lazy)
    head, note, skipped, *reasons = chats.summary().splitlines()
    assert head == "3 chats from c.jsonl, form: messages" and chats.form == "messages"
    assert note == "note: c.jsonl: contents that were lists of text parts: 1. The parts were joined to one text. [N010]" and skipped == "skipped rows: 2" and [r.split(":")[0].strip() for r in reasons] == ["c.jsonl, line 3", "c.jsonl, line 4"]
    assert repr(chats) == chats.summary() and chats._repr_html_() == f"<pre style='white-space:pre-wrap'>{escape(chats.summary())}</pre>" and chats.skipped_rows == 2 and sum(chats.totals.values()) == 3
    assert [c.where for c in chats] == [f"c.jsonl, line {n}" for n in (1, 2, 5)] and chats.source == "c.jsonl"
    assert (tmp_path / "c.rejected.jsonl").read_bytes() == line(USER) + b"\n{\n" and not list(tmp_path.glob(".*"))
    chats.totals["D071"] += 40  # of more than are kept
    assert "and 40 more of this kind" in chats.summary()
    some = load_chats([GOOD, GOOD])
    assert some.summary().startswith("2 chats from ") and load_chats([GOOD]).summary().startswith("1 chat from ") and Chats(some).summary() == "2 chats" and (some.skipped_rows, some.notes, some.skipped) == (0, [], [])


def test_several_files_are_one_list(tmp_path):
    for name, rows in (("a.jsonl", [line(USER, BOT)] * 2), ("b.jsonl", [line(USER, BOT), line(USER)]), ("c.jsonl", [json.dumps({"prompt": "q", "completion": "a"}).encode(), b"["])):
        (tmp_path / name).write_bytes(b"\n".join(rows))
    files = [tmp_path / f"{name}.jsonl" for name in "abc"]
    with pytest.warns(UserWarning, match=r"^skipped rows: 2, written to b\.rejected\.jsonl, c\.rejected\.jsonl:"):
        chats = load_chats(files, on_error="skip")
    assert chats.source == "3 files" and [c.where for c in chats] == ["a.jsonl, line 1", "a.jsonl, line 2", "b.jsonl, line 1", "c.jsonl, line 1"] and chats.form == "messages and prompt and completion"
    with pytest.raises(ConfigError, match="lazy: only a single JSONL file that is not packed can stay in the file; leave lazy out"):
        load_chats(files, lazy=True)


def test_a_file_that_has_changed_since_it_was_checked_is_not_read(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + line(USER, BOT, n=0), *[line(USER, BOT, n=n) for n in range(1, 5)]]))
    chats = load_chats(path, lazy=True)
    assert isinstance(chats, ChatFile) and [c.extra["n"] for c in chats] == [0, 1, 2, 3, 4] and [c.extra["n"] for c in chats[3:0:-1]] == [3, 2, 1] and chats[-1].where == "c.jsonl, line 5" and len(chats[1:3]) == 2
    assert chats.take([4, 0]).summary().startswith("2 chats from c.jsonl") and (chats.skipped_rows, chats.skipped, chats.source) == (0, [], "c.jsonl")
    assert [(note.where, note.found, note.remedy, note.code) for note in chats.notes] == [("c.jsonl", "the file begins with a byte-order mark.", "It was left out.", "N002")]
    for change in (lambda: path.write_bytes(path.read_bytes() + b"\n"), path.unlink):
        change()
        with pytest.raises(ChatError, match=r"c\.jsonl: the file has changed since it was checked\. Load it again\.") as caught:
            chats[0]
        assert [problem.code for problem in caught.value.problems] == ["D016"]


def test_a_row_without_a_column_says_which_there_are():
    with pytest.raises(ChatError, match=r"row 2: no column 'completion' in this row, only \['b', 'prompt'\]\. ") as caught:
        load_chats([{"prompt": "q", "completion": "a"}, {"prompt": "q", "b": 1}], format="prompt-completion")
    assert [problem.code for problem in caught.value.problems] == ["D051"] and caught.value.problems[0].remedy
    for options, said in (({"format": "x"}, "format: expected one of .*'messages'.*, got 'x'; leave it out to have it recognised"), ({"format": "alpaca", "columns": {"user": "q", "assistant": "a"}}, "format and columns can't both be given"), ({"on_error": "x"}, "on_error: expected 'raise' or 'skip', got 'x'")):
        with pytest.raises(ConfigError, match=said):
            load_chats([GOOD], **options)


def test_rows_of_two_forms_are_one_problem(tmp_path):
    rows = [GOOD, {"prompt": "q", "completion": "a"}, GOOD]
    with pytest.raises(ChatError) as caught:
        load_chats(rows, on_error="skip", rejected=tmp_path / "r.jsonl")
    [problem] = [p for p in caught.value.problems if p.code == "D052"]
    assert re.match(r"rows in 2 forms: row 1 is .*, with the columns messages; row 2 is .*, with the columns completion, prompt\.$", problem.found) and problem.remedy == "Separate them into two files, or take one form alone with format='messages'."
    with pytest.warns(UserWarning, match="skipped rows: 1"):
        assert len(load_chats(rows, format="messages", on_error="skip", rejected=tmp_path / "r.jsonl")) == 2


def test_files_of_rejected_rows_replace_none(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    for number, name in enumerate(("c.rejected", "c.rejected-2", "c.rejected-3"), 1):
        bad = line(USER, n=number)
        path.write_bytes(line(USER, BOT) + b"\n" + bad)
        for _ in range(2):
            with pytest.warns(UserWarning, match=f"written to {name}.jsonl") as caught:
                load_chats(path, on_error="skip")
            assert caught[0].filename == __file__, "the warning names the line that asked, and what is there already is not written again"
        assert (tmp_path / f"{name}.jsonl").read_bytes() == bad + b"\n" and (tmp_path / f"{name}.txt").read_text().startswith("c.jsonl, line 2: ") and len(list(tmp_path.iterdir())) == 1 + 2 * number
    with pytest.raises(ChatError):
        load_chats([{"messages": []}], on_error="skip", rejected=tmp_path / "none.jsonl")
    assert len(list(tmp_path.iterdir())) == 7, "where nothing is left, nothing is written"
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="written to chats.rejected.jsonl"):
        load_chats([GOOD, {"messages": [{"role": "é"}]}], on_error="skip")
    assert (tmp_path / "chats.rejected.jsonl").read_text(encoding="utf-8") == '{"messages": [{"role": "é"}]}\n'


def test_rejected_rows_keep_what_they_held_and_why(tmp_path):
    rows = [GOOD, {"messages": [{"role": "user"}, {"role": "x", "content": "a"}], "when": date(2026, 1, 2)}]
    with pytest.warns(UserWarning, match="skipped rows: 1, written to r.jsonl:\n"):
        load_chats(rows, on_error="skip", rejected=tmp_path / "r.jsonl")
    assert json.loads((tmp_path / "r.jsonl").read_text())["when"] == "2026-01-02" and re.fullmatch(r"row 2: message 1: .+\. \[D063\] message 2: .+\. \[D062\]\n", (tmp_path / "r.txt").read_text())
    long = {"messages": [USER, BOT | {"content": "x" * 300}]}
    for n, ending in ((5, "line 6"), (6, "line 6, …")):
        (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, [GOOD, *[long] * n])))
        with pytest.warns(UserWarning, match=rf"rejected(-2)?\.jsonl; too long to copy, so in the original only: l\.jsonl, line 2, (.*){ending}:\n"):
            load_chats(tmp_path / "l.jsonl", on_error="skip", limits=Limits(line=200))
    assert (tmp_path / "l.rejected.jsonl").read_bytes() == b"" and (tmp_path / "l.rejected.txt").read_text().count("(the row is too long to copy; it is in the original file only)") == 5


def test_of_many_bad_rows_a_few_are_kept_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_nb.chats.Findings", lambda: Findings(2))
    with pytest.warns(UserWarning, match=r"(?s)^skipped rows: 7, .*and 6 more of this kind"):
        chats = load_chats([GOOD, *[{"messages": [USER]}] * 7], on_error="skip", rejected=tmp_path / "r.jsonl")
    assert len(chats.skipped) == 2 and chats.totals["D071"] == chats.skipped_rows == 7 and "and 6 more of this kind" in chats.summary()


def test_a_file_that_breaks_off_is_never_skipped(tmp_path):
    "Nobody knows what is missing."
    (tmp_path / "c.json").write_text(f"[{json.dumps(GOOD)},")
    with pytest.raises(ChatError, match="c.json: in line 1, it breaks off before its end"):
        load_chats(tmp_path / "c.json", on_error="skip")


def test_what_json_can_not_hold_is_not_written(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("before")
    for value in ({1}, float("nan"), "\ud800"):
        for where, name in (("c, line 3", "c, line 3"), ("", "a chat")):
            with pytest.raises(ChatError, match=rf"^(?s:.*){name}: this chat can't be written as JSON \(.+\)\. Convert that column to text or numbers, or remove it\.") as caught:
                save_chats([Chat([USER, BOT], where, {"x": value})], path)
            assert [problem.code for problem in caught.value.problems] == ["D090"]
    assert path.read_text() == "before" and save_chats([Chat([USER, BOT | {"content": "é"}], "", {"x": 1})], str(path)) == path
    assert path.read_text(encoding="utf-8") == '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é"}], "x": 1}\n'
    packed = [save_chats([Chat([USER, BOT])], tmp_path / name).read_bytes() for name in ("a.jsonl.gz", "b.jsonl.GZ")]
    assert packed[0] == packed[1] and gzip.decompress(packed[0]) == b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'


def rows_in(tmp_path, name, content, **limits):
    "The places, values and offsets of the rows of a file, and what was noted; or the fault that ends it."
    (tmp_path / name).write_bytes(content)
    notes = []
    try:
        return [(row.place, row.value, row.offset) for row in read_rows(tmp_path / name, Limits(**limits), lambda *note: notes.append(note))], notes
    except Fault as fault:
        return fault.code, fault.found, fault.remedy


def test_lines_are_counted_over_long_and_blank_ones(tmp_path):
    long, blank = b'"' + b"x" * (3 * 2**20) + b'"\n', b"\n" * 20_000
    (tmp_path / "c.jsonl").write_bytes(b"{}\n" + long + blank + b"{}\r\n")
    rows, notes = [], []
    for row in read_rows(tmp_path / "c.jsonl", Limits(line=9), lambda *note: notes.append(note)):
        rows.append((row.place, row.offset if row.fault is None else row.fault.found))
    assert rows == [("line 1", 0), ("line 2", "this line has 3,145,731 bytes; the limit is 9."), ("line 20003", 3 + len(long) + len(blank))]
    assert notes == [("N003", "Windows line ends (CR LF): 1.", "They were read like any other."), ("N004", "blank lines: 20,000.", "They were skipped.")]


def test_what_is_wrong_with_a_list_is_told_with_its_line_and_column(tmp_path):
    for content, code, found, remedy in (
        (b'{"data": [{"a": 1}],\n "x": 1}', "D027", "in line 1, ',' stands where '}' should close the list.", "One list of rows and nothing else beside it."),
        (b'[{"a": 1}', "D026", "in line 1, it breaks off before its end.", "It was cut short; get it again."), (b'[{"a": 1}] 2', "D027", "in line 1, something follows the list.", "One list and nothing else: delete what follows, or use JSONL."),
        (b'[{"a": 1},\n]', "D021", "in line 2, a comma stands before the end of the list.", "Delete that comma."), (b'[{"a": 1}\n {"a": 2}]', "D021", "in line 2, a comma is missing between two rows.", "Separate the rows of a list by commas."),
    ):  # fmt: skip
        assert rows_in(tmp_path, "c.json", content) == (code, found, remedy)
    one, two = rows_in(tmp_path, "c.json", b"[x]"), rows_in(tmp_path, "c.json", b"\n[x]")
    assert one[1].replace("line 1", "line 2") == two[1] != one[1] and one[1].endswith("The row begins in line 1, and the rest can't be read.")
    assert rows_in(tmp_path, "c.json", b'{"data": [{"a": 1}, {"a": 2}]}') == ([("line 1", {"a": n}, Row("", 0).offset) for n in (1, 2)], [("N005", "the rows stand in the list 'data'.", "They were read from there.")])


def test_parquet_needs_a_package(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert rows_in(tmp_path, "c.parquet", b"PAR1" + b"x" * 99 + b"PAR1") == ("D015", "reading parquet needs the package pyarrow.", "Install it: pip install pyarrow.")


class Screen(StringIO):
    "Something to write to, which is a terminal or not."

    def __init__(self, tty):
        super().__init__()
        self.tty = tty

    def isatty(self):
        return self.tty


@pytest.mark.parametrize(("size", "wanted", "kernel", "tty", "shown"), [(10**8, None, False, True, True), (10**8, None, False, False, False), (10**8, None, True, False, True), (10**7, None, True, True, False), (10, True, False, False, True), (10**8, False, True, True, False), (20 * 10**6, None, True, True, False)])
def test_how_far_the_reading_is(size, wanted, kernel, tty, shown, monkeypatch):
    screens = Screen(tty), Screen(tty)
    monkeypatch.setattr("finetune_nb.rows.notebook_shell", lambda: object() if kernel else None)
    monkeypatch.setattr(sys, "stdout", screens[0]), monkeypatch.setattr(sys, "stderr", screens[1])
    monkeypatch.setattr("finetune_nb.rows.time", SimpleNamespace(monotonic=iter((5.0, 5.25, 5.26)).__next__))
    bar = ReadingProgress("c.jsonl", size, wanted)
    for share in (0, 3, 2):
        bar(size // 4 * share)
    bar.close()
    said, silent = (screens if kernel else screens[::-1])
    megabytes = f"{size / 1e6:,.0f} MB"
    lines = [f"\rreading c.jsonl |{'█' * n}{'·' * (20 - n)}| {done / 1e6:,.0f} of {megabytes}" for n, done in ((0, 0), (20 * (size // 4 * 2) // size, size // 4 * 2), (20, size))]
    assert silent.getvalue() == "" and said.getvalue() == ("".join(lines) + "\n" if shown else "")


def test_what_is_no_file_of_chats_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.csv", "a.jsonl", "c.gz", "d.json", "e.parquet", "f.tsv", "g.txt", "zoo.json", "zoo.jsonl"):
        Path(name).write_text("")
    beside = "Files there: a.jsonl, b.csv, c.gz, d.json, e.parquet, … "
    Path("c.rejected.csv").write_text("")
    Path("link.jsonl").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked in this folder\)\. Did you mean link\.jsonl\? Files there"):
        load_chats("lnk.jsnl")
    os.mkfifo("pipe.jsonl")
    for name, kind, said in (
        ("no.jsonl", FileNotFoundError, f"no.jsonl does not exist (looked in this folder). {beside}[D001]"), (tmp_path / "no.jsonl", FileNotFoundError, f"{tmp_path}/no.jsonl does not exist (looked in {tmp_path}). {beside}[D001]"),
        ("zoo.jsnl", FileNotFoundError, f"zoo.jsnl does not exist (looked in this folder). Did you mean zoo.jsonl? {beside}[D001]"), ("Zoos.json", FileNotFoundError, f"Zoos.json does not exist (looked in this folder). Did you mean zoo.json? {beside}[D001]"),
        ("nowhere/no.jsonl", FileNotFoundError, "nowhere/no.jsonl does not exist (looked in nowhere). [D001]"), ("link.jsonl", FileNotFoundError, "link.jsonl is a link to nowhere, which does not exist. Mend the link, or name the file. [D002]"),
        ("x" * 300, OSError, f"{'x' * 200} can't be opened: File name too long. Name a file of chats. [D003]"), (str(tmp_path), IsADirectoryError, f"{tmp_path} is a folder; name a file in it, or a pattern such as {tmp_path.name}/*.jsonl. {beside}[D004]"),
        ("pipe.jsonl", ChatError, "pipe.jsonl: this is a pipe or a device, not a regular file. Save its content to a file first. [D005]"),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            check_file(Path(name))
        assert str(caught.value).removeprefix("1 problem was found:\n") == said
    monkeypatch.setattr(os, "access", lambda *given: False)
    with pytest.raises(PermissionError, match=r"^a.jsonl can't be read: its permissions forbid it. Change them \(chmod u\+r\) or copy it. \[D006\]$"):
        check_file(Path("a.jsonl"))


def test_a_last_line_that_breaks_off_is_told_from_one_that_is_wrong():
    for text, cut in (('{"a": fal', True), ('{"a": tru', True), ('{"a": n', True), ('{"a": "b', True), ('{"a"', True), ('{"a": x', False), ('{"a": 1}}', False)):
        for last in (True, False):
            with pytest.raises(Fault) as caught:
                decode_json(text, Limits(), last)
            assert (caught.value.code == "D026") == (cut and last), (text, last, caught.value.code)
    assert [decode_json(text, Limits(), False) for text in (' {"a": 1}', "[1] ", "\t2", '"a"')] == [{"a": 1}, [1], 2, "a"]


def test_zstandard_needs_a_package(tmp_path, monkeypatch):
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    assert rows_in(tmp_path, "c.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20)) == ("D015", "reading .zst needs the package zstandard.", 'Install it: pip install "finetune_nb[zstd]".')


def sources_of(source, split=None):
    "The names of the sources behind something, and the values of their rows."
    found = open_sources(source, split, Limits())
    return [one.name for one in found], [[(row.place, row.value) for row in one.rows(lambda *note: None, lambda done: None)] for one in found]


def test_files_and_patterns_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b.jsonl", "a.jsonl", "sub/a.jsonl", "a.rejected.jsonl", "odd[1].jsonl", "dir.jsonl/x.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps({"in": name}))
    names = lambda source: [row["in"] for rows in sources_of(source)[1] for _, row in rows]  # noqa: E731
    assert names("?.jsonl") == ["a.jsonl", "b.jsonl"] == names(["a.jsonl", Path("b.jsonl")]) == names(("~/[a-b].jsonl",)) and names("odd[1].jsonl") == ["odd[1].jsonl"] and names("*.jsonl") == ["a.jsonl", "b.jsonl", "odd[1].jsonl"]
    assert sorted(names("**/a.jsonl")) == ["a.jsonl", "sub/a.jsonl"] and sources_of(["a.jsonl", "sub/a.jsonl", "b.jsonl"])[0] == ["a.jsonl", "sub/a.jsonl", "b.jsonl"]
    [one] = open_sources("a.jsonl", None, Limits())
    assert (one.path, one.size, one.name) == (Path("a.jsonl"), len('{"in": "a.jsonl"}'), "a.jsonl")
    for source, split, kind, said in (
        ("z*.jsonl", None, FileNotFoundError, "no file fits the pattern z*.jsonl. Correct the pattern, or name a file. [D007]"), (["a.jsonl", "b.jsonl", "a.jsonl"], None, ConfigError, "source: the file a.jsonl is named twice; name it once"),
        ("a.jsonl", "train", ConfigError, "split: only data sets have splits, and this is str; leave it out"), (["a.jsonl", {}], None, ConfigError, "source: a list of files can't hold a dict; give either files or rows"),
        (GOOD, None, ConfigError, "source: expected a file, a data set, a table or a list of rows, got dict; put a single row in a list"), (7, None, ConfigError, "source: expected a file, a data set, a table or a list of rows, got int; put a single row in a list"),
    ):  # fmt: skip
        with pytest.raises(kind) as caught:
            open_sources(source, split, Limits())
        assert str(caught.value) == said
    assert sources_of([GOOD, 2]) == (["the list"], [[("row 1", GOOD), ("row 2", 2)]]) and sources_of(iter([GOOD])) == (["the list"], [[("row 1", GOOD)]])


class Frame:
    "Stands for a frame of pandas; the real ones are in test_reading.py."

    __module__, columns = "pandas.core.frame", ("a", "b")

    def to_dict(self, how):
        assert how == "records"
        missing = [type(name, (), {})() for name in ("NAType", "NaTType")]
        return [{"a": 1, "b": {"content": None, "x": None, "y": [{"z": None}]}}, {"a": float("nan"), "b": missing[0]}, {"a": missing[1], "b": SimpleNamespace(tolist=lambda: [1.5, {"k": None}])}]


class Sets(dict):
    "Stands for a dictionary of data sets."

    __module__ = "datasets.dataset_dict"


def test_tables_and_sets_have_rows():
    assert sources_of(Frame()) == (["the table"], [[("row 1", {"a": 1, "b": {"content": None, "y": [{}]}}), ("row 2", {"a": None, "b": None}), ("row 3", {"a": None, "b": [1.5, {}]})]])
    both = Sets(train=[{"a": 1, "b": {"c": None}}], test=[{"a": 2}])
    assert sources_of(both, "test") == (["the data set"], [[("row 1", {"a": 2})]]) and sources_of(Sets(only=[{"b": {"c": None}}])) == (["the data set"], [[("row 1", {"b": {}})]])
    for split, said in ((None, "none was named"), ("other", "got 'other'")):
        with pytest.raises(ConfigError, match=f"^split: the data set has the splits 'train', 'test'; {said}. Say which: split='train'$"):
            open_sources(both, split, Limits())


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    asked, offline = [], SimpleNamespace(HF_HUB_OFFLINE=False)
    hub = SimpleNamespace(constants=offline, dataset_info=lambda name, timeout: asked.append((name, timeout)))
    sets = SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or ([{"a": 1, "b": {"c": None}}] if split else {"train": [{"a": 2}]}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "datasets", sets)
    assert sources_of("owner/name") == (["owner/name"], [[("row 1", {"a": 2})]]) and asked == [("owner/name", 10), ("owner/name", None)]
    offline.HF_HUB_OFFLINE = True
    asked.clear()
    for source in ("owner/name", "hf://owner/name", "hf://datasets/owner/name", "hf://here/name"):
        assert sources_of(source, "test") == ([source.removeprefix("hf://").removeprefix("datasets/")], [[("row 1", {"a": 1, "b": {}})]]) and asked.pop()[1] == "test" and not asked
    for source in ("here/name", "owner/name.jsonl", "owner/name.json.gz", "owner/sub/name", "name", "/owner/name", ".x/name"):
        with pytest.raises(FileNotFoundError):
            open_sources(source, None, Limits())
    for error, reason in ((ValueError("one\ntwo"), "ValueError: one"), (KeyError(), "KeyError: KeyError"), (RuntimeError("x" * 300), f"RuntimeError: {'x' * 200}")):
        sets.load_dataset = lambda name, split, error=error: (_ for _ in ()).throw(error)
        with pytest.raises(ChatError) as caught:
            open_sources("owner/name", None, Limits())
        assert str(caught.value).endswith(f"owner/name: there is no such file here, and the hub did not give this data set ({reason}). Check the spelling, the connection and your access, or download the file and name it. [D008]")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ChatError, match=r"owner/name: there is no such file, and reading from the hub needs the package datasets\. Install it \(pip install datasets\), or download the file and name it\. \[D008\]"):
        open_sources("owner/name", None, Limits())

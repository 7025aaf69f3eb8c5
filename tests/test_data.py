"""Reading, splitting and the demo data."""

import json
import random

import pytest

from finetune_nb.config import ConfigError
from finetune_nb.data import (
    Chat,
    ChatError,
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
    with pytest.raises(FileNotFoundError, match=r"Files there: chats.jsonl"):
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


def test_demo_data_is_the_same_for_the_same_seed():
    one = icd10_chats(seed=7)
    assert fingerprint(one.train) == fingerprint(icd10_chats(seed=7).train) != fingerprint(icd10_chats(seed=8).train)
    assert len(one.train) >= 1000 and {c.extra["code"][0] for c in one.test} == {"J"}
    questions = [{c.messages[1]["content"] for c in part} for part in one]
    assert not questions[0] & questions[2] and not leak_report(one)
    for part in one:
        for chat in part:
            entries = [row for row in chat.messages[1]["content"].splitlines() if row.startswith("- ")]
            assert len(entries) == 3 and sum(f": {chat.extra['code']} (" in row for row in entries) == 1

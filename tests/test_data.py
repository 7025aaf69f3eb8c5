"""Reading, splitting and the demo data."""

import json

import pytest

from finetune_nb.data import (
    Chat,
    ChatError,
    fingerprint,
    icd10_chats,
    load_chats,
    same_question,
    save_chats,
    split_chats,
)

USER, BOT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, BOT]}


def line(*messages, **extra):
    return json.dumps({"messages": list(messages), **extra}).encode()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", r"bad.jsonl: it is empty"),
        (b" \n\n\t\n", r"it is empty"),
        (b"{", r"line 1: not valid JSON at column 2"),
        (line(USER, BOT) + b"\n" + line(USER, BOT)[:-4], r"line 2: not valid JSON at column \d+"),
        (line(USER, BOT) + line(USER, BOT), r"line 1: not valid JSON at column \d+: Extra data"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', r"line 1: byte 44 is not UTF-8 \(0xff"),
        ("{}".encode("utf-16"), r"line 1: byte 1 is not UTF-8"),
        (b'{"a": 1, "a": 2}', r"the key 'a' stands twice"),
        (b'{"a": NaN}', r"NaN is not JSON"),
        (b'{"a": Infinity}', r"Infinity is not JSON"),
        (b"[" * 100_000, r"nested too deeply"),
        (b"[]", r"expected an object with 'messages', got \[\]"),
        (b"null", r"got null"),
        (b'"x"', r'got "x"'),
        (b"{}", r"no 'messages' in this row"),
        (b'{"conversations": []}', r"only \[\"conversations\"\]"),
        (b'{"messages": []}', r"'messages' must be a list with at least one"),
        (b'{"messages": "Hi"}', r"'messages' must be a list"),
        (b'{"messages": null}', r"'messages' must be a list"),
        (line("Hi"), r"message 1: expected an object"),
        (line({"content": "Hi"}, BOT), r"message 1: it has no 'role'"),
        (line({"role": "human", "content": "Hi"}, BOT), r'unknown role "human"'),
        (line({"role": "User", "content": "Hi"}, BOT), r"in lower case"),
        (line({"role": None, "content": "Hi"}, BOT), r"unknown role null"),
        (line({"role": [], "content": "Hi"}, BOT), r"unknown role \[\]"),
        (line({"role": "user"}, BOT), r"it has no 'content'"),
        (line(USER, {"role": "assistant", "content": None}), r"message 2: 'content' must be a text, got null"),
        (line(USER, {"role": "assistant", "content": 4}), r"got 4"),
        (line(USER, {"role": "assistant", "content": " \n"}), r"this assistant message is empty"),
        (line({"role": "user", "content": ""}, BOT), r"this user message is empty"),
        (line({"role": "user", "content": "a\0b"}, BOT), r"holds a NUL"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}', r"half a character"),
        (line(BOT, USER), r"expected a user message first, got 'assistant'"),
        (line(USER), r"there is no assistant message"),
        (line({"role": "system", "content": "x"}), r"there is no assistant message"),
        (line(USER, BOT, USER), r"the last message is the user's"),
        (line(USER, USER, BOT), r"messages 1 and 2 are both from the user"),
        (line({"role": "system", "content": "x"}, USER, BOT, BOT), r"messages 3 and 4 are both from the assistant"),
        (line(USER, {"role": "system", "content": "x"}, BOT), r"a system message stands at place 2"),
        (line({"role": "system", "content": "x"}, {"role": "system", "content": "y"}, USER, BOT), r"at place 2"),
    ],
)
def test_bad_input_is_told_with_place_and_remedy(raw, said, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(raw)
    with pytest.raises(ChatError, match=said) as caught:
        load_chats(path)
    assert all(p.where.startswith("bad.jsonl") and p.found and p.remedy for p in caught.value.problems)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_all_faults_are_told_at_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([line(USER, BOT), *[line(USER)] * 30, b"{"]))
    with pytest.raises(ChatError, match=r"31 problems(?s:.*)and 25 more of this kind: line 7, line 8") as caught:
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
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file in it, such as chats.jsonl"):
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
    asked = [{same_question(c) for c in part} for part in splits]
    assert not (asked[0] & asked[1] or asked[0] & asked[2] or asked[1] & asked[2])
    assert (len(splits.validation), len(splits.test)) == (16, 8)


def test_demo_data_is_the_same_for_the_same_seed():
    one = icd10_chats(seed=7)
    assert fingerprint(one.train) == fingerprint(icd10_chats(seed=7).train) != fingerprint(icd10_chats(seed=8).train)
    assert len(one.train) >= 1000 and {c.extra["code"][0] for c in one.test} == {"J"}
    asked = [{c.messages[1]["content"] for c in part} for part in one]
    assert not asked[0] & asked[2]
    for part in one:
        for chat in part:
            entries = [row for row in chat.messages[1]["content"].splitlines() if row.startswith("- ")]
            assert len(entries) == 3 and sum(f": {chat.extra['code']} (" in row for row in entries) == 1

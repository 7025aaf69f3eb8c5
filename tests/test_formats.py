"""What is made of a row and said about it, piece by piece and to the letter."""

import gzip
import json

import pytest
from bad_inputs import ANSWER, BOT, CALL, GOOD, SYSTEM, USER, said
from bad_inputs import row as line_of

from finetune_nb.chats import Chat, ChatError, Chats, load_chats
from finetune_nb.config import ConfigError
from finetune_nb.formats import (
    all_texts,
    check_messages,
    check_tools,
    column_form,
    control_tokens,
    invisible,
    mark_of,
    message_texts,
    oddities,
    recognise,
    shown,
    unknown_form,
)
from finetune_nb.reading import Fault, Findings, Limits, Problem, check_value, decode_json, decode_utf8, grouped, open_file
from finetune_nb.rows import read_rows


@pytest.mark.parametrize(("value", "text"), [("é" * 58, f'"{"é" * 58}"'), ("é" * 59, f'"{"é" * 56}…'), ({1, }, '"{1}"'), (None, "null")])
def test_a_value_is_shown_short(value, text):
    assert shown(value) == text and len(text) <= 60


@pytest.mark.parametrize(
    ("marks", "mark"), [({}, None), ({"train": None, "weight": None}, None), ({"train": True}, True), ({"train": False}, False), ({"weight": 0}, False), ({"weight": 1}, True), ({"train": False, "weight": 1}, False), ({"train": True, "weight": None}, True)]
)
def test_what_a_mark_says(marks, mark):
    assert mark_of(marks) is mark


@pytest.mark.parametrize(
    ("text", "role", "hidden", "marks"),
    [
        ("a\u202eb\u200b\xad\x07", "user", ["\u202e", "\u200b", "\xad", "\x07"], []),
        ("\x7f", "user", ["\x7f"], []),
        ("a\tb\r\nc", "user", [], []),
        ("\u200da a\u200d 👩\u200d🚀 نمی\u200cخ", "user", ["\u200d", "\u200d"], []),  # joiners at the beginning and after a Latin letter
        ("<think>a</think><tool_call>", "assistant", [], []),
        ("<think>a</think><tool_call>", "user", [], ["<think>", "</think>", "<tool_call>"]),
        ("<tool_response> <|im_end|> </s>", "assistant", [], ["<tool_response>", "<|im_end|>", "</s>"]),
        ("### Instruction: a", "user", [], ["### Instruction:"]),
        ("x ### Instruction:", "user", [], []),
        ("[INST] [/INST] [INSTALL] a < b", "user", [], ["[INST]", "[/INST]"]),
    ],
)
def test_what_is_invisible_and_what_is_a_mark(text, role, hidden, marks):
    assert invisible(text, role) == hidden and control_tokens(text, role) == marks
    codes = [code for code, *_ in oddities([{"role": role, "content": text}])]
    assert codes == ["N020"] * bool(hidden) + ["N022"] * bool(marks)


def test_oddities_are_told_with_message_and_number():
    odd = oddities([said("user", "fine"), said("assistant", "b\u202e\u202e\u200b"), said("user", "".join(map(chr, range(0x200B, 0x2010))) + "\u2060\u2061"), said("assistant", "</s> <s> <eos> <bos> <pad> <unk>"), said("user", "é" * 400)])
    assert [(code, found) for code, found, _ in odd] == [
        ("N020", "message 2: invisible characters: U+202E (2 times), U+200B."),
        ("N020", "message 3: invisible characters: U+200B, U+200E, U+200F, U+2060, U+2061."),
        ("N022", "message 4: control tokens of chat templates as text: </s>, <bos>, <eos>, <pad>, <s>."),
        ("N021", 'message 5: "é" stands there 400 times in a row.'),
    ]
    assert oddities([said("user", "é" * 399)]) == [] == oddities([said("user", "xy" * 400)])
    assert [found for _, found, _ in oddities([said("user", "ab" + "x" * 1000)])] == ['message 1: "x" stands there 1,000 times in a row.']
    thought = {"role": "assistant", "content": None, "reasoning_content": "\u202e", "tool_calls": [{"function": {"arguments": '{"a": ["\\u202e"]}'}}]}
    assert [found for _, found, _ in oddities([USER, thought])] == ["message 2: invisible characters: U+202E."] * 2
    for damaged in ("a\0", "\ud800"):
        with pytest.raises(Fault, match="^message 2: the text holds a NUL or half a character") as caught:
            oddities([USER, said("assistant", damaged)])
        assert caught.value.code == "D066"


def test_texts_are_found_wherever_they_stand():
    assert list(all_texts({"password": "x", "n": 1, "deep": ["a", {"k": "b", "l": [None, "c"]}]})) == ["password: x", "a", "k: b", "c"]
    assert message_texts(USER) == ["Hi"] and message_texts({"role": "assistant", "content": None}) == []
    calls = [{"function": {"name": "f", "arguments": '{"a": "x"}'}}, {"function": {"arguments": {"b": "y"}}}, {"function": {"arguments": "{broken"}}, {"function": None}]
    message = {"role": "assistant", "content": "c", "reasoning": "r", "thinking": "t", "reasoning_content": "rc", "tool_calls": calls}
    assert message_texts(message) == ["c", "rc", "r", "t", "a: x\nb: y\n{broken"]


@pytest.mark.parametrize(
    ("messages", "code", "found"),
    [
        ([SYSTEM, USER, BOT, USER, USER, BOT], "D074", "messages 4 and 5 are both from the user."),
        ([USER, CALL, ANSWER, BOT, BOT], "D074", "messages 4 and 5 are both from the assistant."),
        ([SYSTEM, USER, BOT, SYSTEM, BOT], "D070", "a system message stands at place 4."),
        ([USER, CALL, {**ANSWER, "tool_call_id": "x"}, BOT], "D085", 'message 3: no open call has the id "x".'),
        ([USER, {**CALL, "tool_calls": [*CALL["tool_calls"], {**CALL["tool_calls"][0], "id": "c2"}]}, ANSWER, BOT], "D086", "message 4: calls before it without an answer: 1."),
        ([USER, {**CALL, "tool_calls": [*CALL["tool_calls"], {"type": "function", "function": {"name": "g", "arguments": 3}}]}], "D082", "message 2: call 2: 'arguments' must be an object, got 3."),
        ([USER, {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": ""}]}], "D083", "message 2: call 1: 'id' must be a text, got \"\"."),
        ([USER, {**BOT, "from": "x", "weight": 1.0, "train": False}], "D068", "message 2: 'train' and 'weight' contradict each other."),
        ([{"from": "human", "value": "a"}, BOT], "D061", "message 1: it has 'from' instead of 'role'."),
        ([], "D055", "'messages' must be a list with at least one question and answer, got []."),
        ([USER, {**BOT, "x": {1}}], "D059", "message 2: 'x' can't be written as JSON (Object of type set is not JSON serializable): \"{1}\"."),
        ([USER, {**CALL, "content": " "}], "", ""),
        ([USER, {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": None}, CALL["tool_calls"][0]]}, {**ANSWER, "tool_call_id": "zz"}, ANSWER, BOT], "", ""),
        ([USER, CALL, {**ANSWER, "tool_call_id": None}, CALL, ANSWER, BOT], "", ""),
        ([USER, {**BOT, "train": False}, USER, {**BOT, "weight": 1}], "", ""),
        ([USER, {**BOT, "train": False}, USER, {**BOT, "weight": 0}], "D075", "no assistant message is marked to be learned."),
    ],
)
def test_one_fault_and_its_words(messages, code, found):
    faults = check_messages(messages)
    assert [(fault.code, fault.found) for fault in faults] == ([(code, found)] if code else [])
    assert [fault.code for fault in check_messages([USER, {**BOT, "x": float("nan")}])] == ["D059"]


@pytest.mark.parametrize(
    ("tools", "code"),
    [(None, None), ("", None), ([], None), ("[]", None), ('[{"name": "f"}]', None), ([{"function": {"name": "f"}}, {"name": "g"}], None), ([{"name": "f"}, {"name": 1}], "D087"), ({"name": "f"}, "D087"), ([1], "D087"), ("[", "D087"), (0, "D087"), ([{"name": "f", "x": {1}}], "D059")],
)
def test_lists_of_functions(tools, code):
    assert [fault.code for fault in check_tools(tools)] == ([code] if code else [])


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ([USER, BOT], "D050", "this row is a bare list of messages"),
        ([], "D050", "expected an object with 'messages', got []."),
        ([USER, 1], "D050", "expected an object with 'messages'"),
        (USER, "D050", "this row is a single message"),
        ({"from": "a", "value": "b"}, "D050", "this row is a single message"),
        ({"chosen": 1, "rejected": 2}, "D051", "This is preference data"),
        ({"text": "a"}, "D051", "Plain text has no turns"),
        ({"Query": 1, "Solution": 2, "text": 3}, "D051", "--columns user=Query assistant=Solution"),
        ({"input": 1, "question": 3, "output": 2}, "D051", "--columns user=question assistant=output"),
        ({"instruction": 1, "input": 3, "response": 2}, "D051", "--columns user=instruction assistant=response"),
        ({"a question": 1, "answer": 2}, "D051", "use, such as columns="),
        ({"question": 1, "b": 2}, "D051", '{"user": "question", "assistant": "answer"}'),
    ],
)
def test_what_is_said_of_an_unknown_form(row, code, words):
    fault = unknown_form(row)
    assert fault.code == code and words in f"{fault.found} {fault.remedy}"
    assert recognise(row) is None if isinstance(row, dict) else True


def test_what_a_form_makes_of_a_row_and_what_is_left():
    def made(row, **options):
        loaded = load_chats([row], **options)
        return [(m["role"], m.get("content")) for m in loaded[0].messages], loaded[0].extra, [(n.where, n.code, n.found) for n in loaded.notes]

    asked, answered = ("user", "a"), ("assistant", "b")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]
    noted = [("the list", "N010", "contents that were lists of text parts: 1.")]
    assert made({"prompt": "a", "completion": "b", "system": "s", "x": 1}) == ([("system", "s"), asked, answered], {"x": 1}, [])
    assert made({"prompt": [said("user", parts)], "completion": [said(*answered)], "system": "s"}) == ([("system", "s"), asked, answered], {}, noted)
    turns = [{"from": "human", "value": parts}, {"from": "gpt", "value": "b"}]
    assert made({"conversations": turns, "system": "s", "id": 2}) == ([("system", "s"), asked, answered], {"id": 2}, noted)
    assert made({"conversations": json.dumps(turns[1:1] + [{"from": "human", "value": "a"}, turns[1]]), "system": None}) == ([asked, answered], {"system": None}, [])
    assert made({"instruction": "a", "output": "b", "history": None, "input": "", "system": ""}) == ([asked, answered], {"system": ""}, [])
    assert made({"instruction": "a", "input": "c", "output": "b", "history": [("d", "e")]}) == ([("user", "d"), ("assistant", "e"), ("user", "a\n\nc"), answered], {}, [])
    assert made({"messages": json.dumps([said(*asked), said(*answered)])})[0] == [asked, answered]
    for who, role in (("chatgpt", "assistant"), ("bot", "assistant"), ("model", "assistant")):
        assert made({"conversations": [{"from": "user", "value": "a"}, {"from": who, "value": "b"}]})[0][1][0] == role
    assert made({"dialog": turns}, columns={"messages": "dialog"})[:2] == ([asked, answered], {})
    calls = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    chat = load_chats([{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": calls, "id": 7}]}])[0]
    assert [call["function"]["name"] for call in chat.messages[1]["tool_calls"]] == ["f", "g"] and chat.messages[1]["id"] == 7
    form = column_form({"completion": "a", "system": "s", "prompt": "q"})
    assert form.title == "the columns a (assistant), s (system), q (user)" and form.columns == ("a", "s", "q")
    assert form.read({"q": "1", "a": "2", "s": ""}).messages == [said("user", "1"), said("assistant", "2")]


@pytest.mark.parametrize(("row", "code"), [({"prompt": 1, "completion": "b"}, "D054"), ({"prompt": " ", "completion": "b"}, "D065"), ({"prompt": "a", "completion": "b", "system": 1}, "D054"), ({"conversations": "x"}, "D055"), ({"instruction": "a", "output": "b", "history": ["x"]}, "D058"), ({"instruction": "a", "output": "b", "history": [["x"]]}, "D058"), ({"conversations": [{"from": "nobody", "value": "x"}]}, "D057"), ({"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}, BOT]}, "D067")])
def test_columns_that_hold_something_else(row, code):
    with pytest.raises(ChatError) as caught:
        load_chats([row])
    assert [problem.code for problem in caught.value.problems] == [code]


# --- faults and their places


def test_many_problems_of_a_kind_are_named_by_place():
    same = [Problem(f"c, line {n}", "a.", "b.", "D001") for n in range(22)]
    assert grouped(same[:1]) == ["c, line 0: a. b. [D001]"] and grouped(same[:3]) == ["c, line 0: a. b. [D001]", "    … and 2 more of this kind: line 1, line 2"]
    assert grouped(same)[1].endswith("line 20, …") and grouped(same[:21])[1].endswith("line 20")
    several = [Problem(f"c, line {n}", f"a{n}.", "b.", "D001") for n in range(27)]
    assert grouped(several[:5]) == [f"c, line {n}: a{n}. b. [D001]" for n in range(5)]
    assert grouped(several[:6])[5:] == ["    … and 1 more of this kind: line 5"]
    assert grouped(several[:25])[5] == "    … and 20 more of this kind: " + ", ".join(f"line {n}" for n in range(5, 25))
    assert grouped(several[:26])[5].endswith("line 24, …") and grouped(several[:26])[5].startswith("    … and 21 more")
    assert grouped([Problem("x", "a.", "b."), Problem("y", "a.", "c."), Problem("z", "d.", "b.")]) == ["x: a. b.", "z: d. b.", "y: a. c."]
    found = Findings(limit=2)
    for problem in (*several[:3], Problem("z", "a.", "b.", "D002")):
        found.add(problem)
    assert [p.where for p in found.kept] == ["c, line 0", "c, line 1", "z"] and found.error().total == 4
    assert str(found.error()).startswith("4 problems were found:\n") and str(ChatError(several[:1])) == "c, line 0: a0. b. [D001]"


@pytest.mark.parametrize(("text", "depth", "deep"), [("[[[1]]]", 3, False), ("[[[1]]]", 2, True), ('{"a": [{}]}', 3, False), ('{"a": [{}]}', 2, True), ('["[[[["]', 1, False), ("1", 0, False), ("[]", 1, False)])
def test_how_deep_is_too_deep(text, depth, deep):
    try:
        check_value(json.loads(text), text, Limits(depth=depth))
    except Fault as fault:
        assert deep and fault.code == "D029"
    else:
        assert not deep


@pytest.mark.parametrize(
    ("text", "last", "code", "found"),
    [
        ("", False, "D021", "not valid JSON at column 1: Expecting value, at its end."),
        (' {"a": 1} ]', False, "D027", "not valid JSON at column 11: something follows the row, near ']'."),
        ("{} {}", True, "D027", "not valid JSON at column 4: a second value begins in the same line."),
        ('{"a": tr', True, "D026", "not valid JSON at column 7: the last line breaks off."),
        ('{"a": tr', False, "D021", "not valid JSON at column 7: Expecting value, near 'tr'."),
        ('{"a": x}', True, "D021", "not valid JSON at column 7: Expecting value, near 'x}'."),
        ("\0\0", False, "D027", "not valid JSON at column 1: there is no row here, only NUL bytes: 2."),
        ("{}\0\0", False, "D027", "not valid JSON at column 3: something follows the row, only NUL bytes: 2."),
        ('"\0"', False, "D010", "this looks like UTF-16 text without a byte-order mark."),
        ('"abcd\0"', False, "D022", "not valid JSON at column 6: a NUL inside a text."),
        ('"\n"', False, "D023", "not valid JSON at column 2: a raw control character (U+000A) inside a text."),
        ("['a']", False, "D021", "not valid JSON at column 2: this looks like Python, not JSON, near \"'a']\"."),
        ('{"a": Nonesense}', False, "D021", "not valid JSON at column 7: Expecting value, near 'Nonesense}'."),
        ('[1e999]', False, "D024", "the number 1e999 is too large."),
    ],
)
def test_what_is_no_json_and_where(text, last, code, found):
    with pytest.raises(Fault) as caught:
        decode_json(text, last=last)
    assert (caught.value.code, caught.value.found) == (code, found) and caught.value.at("c, line 1") == Problem("c, line 1", found, caught.value.remedy, code)
    assert decode_json(' \t\r\n{"a": [1.5]}\n ') == {"a": [1.5]} and decode_json(" 7 ") == 7


@pytest.mark.parametrize(("raw", "found"), [("aé".encode() + b"\xfc", "column 3 (byte 4: 0xfc, 'ü' in Windows-1252)"), (b"\x81", "column 1 (byte 1: 0x81, no letter in Windows-1252 either)"), (b"\xff\0", "column 1 (byte 1: 0xff, the file looks like UTF-16)"), (b"\xff\0aa", "column 1 (byte 1: 0xff, 'ÿ' in Windows-1252)")])
def test_what_is_no_utf8_and_where(raw, found):
    with pytest.raises(Fault, match="^not UTF-8 at ") as caught:
        decode_utf8(raw)
    assert caught.value.found == f"not UTF-8 at {found}." and caught.value.code == "D020"


def test_how_much_a_packed_file_may_hold(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"x" * 5000, mtime=0))
    size = path.stat().st_size
    for limits, fits in ((Limits(total=5000), True), (Limits(total=4999), False), (Limits(free=5000, ratio=1), True), (Limits(free=4999, ratio=1), False), (Limits(free=0, ratio=4999 // size + 1), True), (Limits(free=0, ratio=4999 // size), False)):
        try:
            with open_file(path, limits, lambda *note: None) as (stream, kind, _):
                assert (stream.read(), kind) == (b"x" * 5000, "text") and fits
        except Fault as fault:
            assert not fits and fault.code == "D014" and fault.found == "it unpacks to over 0 MiB, far more than its size."


@pytest.mark.parametrize(("name", "data", "note"), [("a.gz", GOOD, "the name says gzip, the content is text."), ("a.jsonl", gzip.compress(GOOD, mtime=0), "the name says not packed, the content is gzip."), ("a.bz2", gzip.compress(GOOD, mtime=0), "the name says bzip2, the content is gzip."), ("a.GZ", gzip.compress(GOOD, mtime=0), None), ("a.gz", b"", None), ("a.txt", GOOD, None)])
def test_a_name_that_says_something_else_is_noted(name, data, note, tmp_path):
    (tmp_path / name).write_bytes(data)
    notes = []
    with open_file(tmp_path / name, Limits(), lambda *said: notes.append(said)) as (stream, kind, _):
        assert kind == "text" and stream.read() == (GOOD if data else b"")
    assert [said[:2] for said in notes] == ([("N001", note)] if note else [])


def test_where_a_row_ends_and_how_long_it_may_be(tmp_path):
    def rows(name, data, **limits):
        (tmp_path / name).write_bytes(data)
        try:
            return [(row.value, row.fault and row.fault.code) for row in read_rows(tmp_path / name, Limits(**limits))]
        except Fault as fault:
            return fault.code

    assert rows("a.jsonl", b'{"a": 1}X\n{"a": 2}\r\n') == [(None, "D027"), ({"a": 2}, None)]
    assert rows("a.jsonl", b'{"a": 1}\n{"ab": 2}\n{}', line=9) == [({"a": 1}, None), (None, "D030"), ({}, None)]
    assert rows("a.csv", b"x,y\nabc,d\n", line=6) == [({"x": "abc", "y": "d"}, None)] and rows("a.csv", b"x,y\nabc,d\n", line=5) == "D030"
    assert rows("a.json", b'[{"a": 1}]', line=8) == [({"a": 1}, None)] and rows("a.json", b'[{"a": 1}]', line=7) == "D030"
    assert rows("a.json", b'[{"a": [[1]]}, {}]', depth=2) == [({"a": [[1]]}, "D029"), ({}, None)], "what is kept of it goes into the file of rejected rows"


# --- chats


def test_what_a_chat_says():
    chat = Chat([USER, {**CALL, "content": None}], "c, line 1", {"tools": '[{"name": "f"}]'})
    assert chat.prompt == [USER] and chat.answer == "" and chat.tools == [{"name": "f"}] and Chat([USER, BOT]).answer == "Hello"
    assert Chat([USER], extra={"tools": ""}).tools is Chat([USER], extra={"tools": "[]"}).tools is Chat([USER]).tools is None
    called = {"role": "assistant", "content": "<b>", "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}, {"function": {"name": "g", "arguments": "{}"}}]}
    html = Chat([USER, called], "<c>")._repr_html_()
    assert '<b>assistant</b>\n&lt;b&gt;\nf({&quot;é&quot;: 1})\ng({})</div>' in html and html.endswith("<small>&lt;c&gt;</small>") and html.count("<div") == 2


def test_the_summary_of_what_was_read(tmp_path):
    assert Chats([Chat([USER, BOT])]).summary() == "1 chat" and Chats().summary() == "0 chats" and Chats([], "f", "s").summary() == "0 chats from s, form: f"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([line_of({**USER, "content": "</s>"}, BOT), line_of(USER), b"{", GOOD]))
    with pytest.warns(UserWarning) as caught:
        chats = load_chats(path, on_error="skip")
    skipped = ["a.jsonl, line 2: there is no assistant message, so there is nothing to learn. Add the answer, or remove the row. [D071]", "a.jsonl, line 3: not valid JSON at column 2: Expecting property name enclosed in double quotes, at its end. " + str(chats.skipped[1].remedy) + " [D021]"]
    assert str(caught[0].message) == "\n".join(["skipped rows: 2, written to a.rejected.jsonl:", *skipped])
    lines = chats.summary().splitlines()
    assert lines[0] == "2 chats from a.jsonl, form: messages" and lines[1].startswith("note: a.jsonl, line 1: message 1: control tokens") and lines[2:] == ["skipped rows: 2", *skipped]
    reasons = (tmp_path / "a.rejected.txt").read_text().splitlines()
    assert reasons == skipped and (tmp_path / "a.rejected.jsonl").read_bytes() == line_of(USER) + b"\n{\n"
    with pytest.warns(UserWarning, match="written to a.rejected.jsonl"):
        load_chats(path, on_error="skip")
    path.write_bytes(path.read_bytes() + b"\n{")
    with pytest.warns(UserWarning, match="written to a.rejected-2.jsonl"):
        load_chats(path, on_error="skip")


def test_forms_that_are_mixed_are_told_once():
    rows = [{"prompt": "a", "completion": "b"}, {"messages": [USER, BOT], "id": 1}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(ChatError) as caught:
        load_chats(rows, on_error="skip")
    assert [(p.code, p.found) for p in caught.value.problems] == [("D052", "rows in 2 forms: row 1 is prompt and completion, with the columns completion, prompt; row 2 is messages, with the columns id, messages.")]
    assert "format='prompt-completion'" in caught.value.problems[0].remedy


@pytest.mark.parametrize("calls", ["Hello!", ["Hello!"], {"a": 1}, 3, True, [{"id": "a"}]])
@pytest.mark.parametrize("more", [{}, {"content": ""}, {"content": "One moment."}])
def test_calls_are_looked_at_where_nothing_else_is_said(calls, more):
    found = check_messages([{"role": "user", "content": "Time?"}, {"role": "assistant", "tool_calls": calls} | more])
    assert [fault.code for fault in found] == ["D080"]


@pytest.mark.parametrize(("columns", "said"), [
    ({"user": "Frage", "assistant": "Antwort"}, r"there is no column 'Frage' in this row; did you mean 'Frage des Gastes'\? The columns are:"),
    ({"user": "Frage des Gastes", "assistant": "antwort"}, "'antwort' in this row; did you mean 'Antwort'"), ({"user": "x", "assistant": "Antwort"}, "no column 'x' in this row. The columns are:"),
])  # fmt: skip
def test_a_column_that_is_not_there_is_named_with_the_one_that_was_meant(columns, said, tmp_path):
    (tmp_path / "t.csv").write_text("Frage des Gastes;Antwort\nWas?;Ja.\n")
    with pytest.raises(ChatError, match=said):
        load_chats(tmp_path / "t.csv", columns=columns)


def test_rows_that_need_no_columns_say_so_and_every_missing_one_is_named():
    for row, form in (({"messages": [USER, BOT]}, "messages"), ({"instruction": "a?", "input": "", "output": "b"}, r"Alpaca \(instruction, input, output\)")):
        with pytest.raises(ChatError, match=rf"^row 1: there is no column 'Frage' in this row\. There is no column 'Antwort' in this row\. The columns are: '.*'\. Leave columns=… \(in a terminal --columns\) out: such a row is read as {form}\. \[D051\]$"):
            load_chats([row], columns={"user": "Frage", "assistant": "Antwort"})
    with pytest.raises(ChatError, match=r"The columns are: 'c00', .*'c19', … Correct columns=…"):
        load_chats([{f"c{n:02}": n for n in range(30)}], columns={"messages": "talk"})


def test_columns_the_other_way_round_are_told():
    with pytest.raises(ConfigError, match="""the other way round.*"user": "Frage des Gastes".* --columns 'user=Frage des Gastes' assistant=Antwort"""):
        column_form({"Frage des Gastes": "user", "Antwort": "assistant"})

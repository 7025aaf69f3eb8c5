"""Reading: every malformed input is told, every valid one accepted, nothing altered or lost."""

import gc
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc

import pytest
from bad_inputs import ANSWER, BAD, BOT, CALL, GOOD, SYSTEM, USER, VALID, lines, row
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_nb.chats import Chat, ChatError, ChatFile, Chats, fingerprint, load_chats, save_chats
from finetune_nb.config import ConfigError
from finetune_nb.reading import Fault, Findings, Limits, Problem, decode_json
from finetune_nb.rows import read_rows


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data() if callable(data) else data)
    return path


def chats_of(loaded):
    return [(c.messages, c.extra) for c in loaded]


# --- the corpus


def test_the_corpus_is_large_and_its_names_differ():
    assert len(BAD) >= 150 and len(VALID) >= 40
    assert len({name for name, *_ in [*BAD, *VALID]}) == len(BAD) + len(VALID)


@pytest.mark.parametrize(("name", "file", "data", "code", "place", "pattern"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_is_told(name, file, data, code, place, pattern, tmp_path):
    path = write(tmp_path, file, data)
    before = path.read_bytes()
    with pytest.raises(ChatError) as caught:
        load_chats(path)
    problems = caught.value.problems
    first = next((p for p in problems if p.code.startswith(code)), None)
    assert first, f"got {[(p.code, p.found) for p in problems]}"
    assert first.where == (f"{file}, {place}" if place else file) or code == "D0"
    assert re.search(pattern, str(caught.value), re.S), str(caught.value)
    assert all(p.found and p.remedy and p.remedy[-1] in ".…)?" and re.fullmatch(r"D\d{3}", p.code) for p in problems), problems
    assert path.read_bytes() == before and os.listdir(tmp_path) == [file]


@pytest.mark.parametrize(("name", "file", "data", "count"), VALID, ids=[case[0] for case in VALID])
def test_valid_input_is_accepted(name, file, data, count, tmp_path):
    loaded = load_chats(write(tmp_path, file, data))
    assert len(loaded) == count and all(c.where.startswith(f"{file}, ") for c in loaded)
    again = load_chats(save_chats(loaded, tmp_path / "again.jsonl"))
    assert chats_of(again) == chats_of(loaded)


# --- nothing altered, nothing lost

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40).filter(lambda t: not t.isspace())
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUE = st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=6)
OTHER_KEYS = st.dictionaries(TEXT.map(lambda k: "x_" + k), VALUE, max_size=2)
MARK = st.sampled_from([{}, {}, {"train": True}, {"weight": 1}, {"reasoning_content": "Hm. </think>"}, {"name": "Ann"}])


@st.composite
def valid_chats(draw):
    "A chat with system, calls, marks, odd texts and extra columns."
    messages = [{"role": "system", "content": draw(TEXT | st.just(""))}] if draw(st.booleans()) else []
    for turn in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(TEXT), **draw(OTHER_KEYS)})
        if draw(st.booleans()):
            arguments = draw(st.dictionaries(TEXT, VALUE, max_size=2))
            function = {"name": "f", "arguments": draw(st.sampled_from([arguments, json.dumps(arguments)]))}
            messages.append(
                {
                    "role": "assistant",
                    "content": draw(st.none() | TEXT),
                    "tool_calls": [{"id": f"c{turn}", "type": "function", "function": function}],
                }
            )
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": draw(TEXT)})
        messages.append({"role": "assistant", "content": draw(TEXT), **draw(MARK), **draw(OTHER_KEYS)})
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]} if draw(st.booleans()) else {}
    return Chat(messages, "", {**tools, **draw(OTHER_KEYS)})


@settings(max_examples=150, deadline=None)
@given(st.lists(valid_chats(), min_size=1, max_size=3), st.sampled_from(["c.jsonl", "c.jsonl.gz"]), st.booleans())
def test_write_read_write_alters_nothing(tmp_path_factory, chats, name, lazy):
    path = save_chats(chats, tmp_path_factory.getbasetemp() / name)
    written = path.read_bytes()
    again = load_chats(path, lazy=lazy and name == "c.jsonl")
    assert chats_of(again) == chats_of(chats) and fingerprint(again) == fingerprint(chats)
    assert save_chats(list(again), path).read_bytes() == written
    assert chats_of(load_chats([{"messages": c.messages, **c.extra} for c in chats])) == chats_of(chats)


KEYS = st.sampled_from(["a", "b", "", '"', '":', "a\\", "\u00e9"])


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(PLAIN, lambda v: st.lists(v, max_size=3) | st.lists(st.tuples(KEYS, v), max_size=3).map(tuple), max_leaves=12),
    st.sampled_from([":", " :", "\t: "]),
)
def test_no_duplicate_key_can_hide(value, colon):
    twice = False

    def text(value):
        nonlocal twice
        if isinstance(value, tuple):  # an object, perhaps with a key twice
            twice |= len({k for k, _ in value}) < len(value)
            return "{" + ", ".join(json.dumps(k) + colon + text(v) for k, v in value) + "}"
        return "[" + ", ".join(map(text, value)) + "]" if isinstance(value, list) else json.dumps(value)

    written = text(value)
    if twice:
        with pytest.raises(Fault) as caught:
            decode_json(written)
        assert caught.value.code == "D025"
    else:
        assert decode_json(written) == json.loads(written)


# --- random damage

FUZZED = {
    "f.jsonl": lines(row(SYSTEM, USER, BOT, id=7), row(USER, CALL, ANSWER, BOT), row({**USER, "content": "Grüße \u200b😀"}, BOT)),
    "f.json": json.dumps([json.loads(GOOD)] * 3, indent=1).encode(),
    "f.csv": b'prompt,completion\n"a, ""b""",c\nd,"e\nf"\n',
    "f.jsonl.gz": gzip.compress(lines(GOOD, GOOD, GOOD)),
}


@pytest.mark.parametrize("name", FUZZED)
def test_random_damage_never_ends_in_another_error(name, tmp_path):
    rng, path = random.Random(name), tmp_path / name
    for _ in range(600):
        data = bytearray(FUZZED[name])
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(data) or 1), rng.randrange(4)
            if kind == 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            elif kind == 1:
                del data[at : at + rng.randint(1, 30)]
            elif kind == 2:
                data[at:at] = rng.choice(
                    [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\0", b"\xff", b"null", b"NaN", b"1e999"]
                )
            else:
                data[at:at] = data[max(0, at - 20) : at]
        path.write_bytes(bytes(data))
        try:
            assert len(load_chats(path)) >= 1
        except ChatError as error:
            assert error.problems
    assert os.listdir(tmp_path) == [name]


# --- files that are none


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_no_regular_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=r"does not exist \(looked in .*\[D001\]"):
        load_chats(tmp_path / f"no.jsonl{suffix}")
    (tmp_path / f"broken.jsonl{suffix}").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"is a link to gone, which does not exist.*\[D002\]"):
        load_chats(tmp_path / f"broken.jsonl{suffix}")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(OSError, match=r"can't be opened: Too many levels.*\[D003\]"):
        load_chats(tmp_path / "loop.jsonl")
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(OSError, match=r"can't be opened.*Name a file"):
            load_chats(tmp_path / name)
    with pytest.raises(IsADirectoryError, match=r"is a folder; name a file in it.*\[D004\]"):
        load_chats(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for device in (tmp_path / "pipe.jsonl", "/dev/zero", "/dev/null"):
        with pytest.raises(ChatError, match=r"a pipe or a device.*\[D005\]"):
            load_chats(device)
    with pytest.raises(FileNotFoundError, match=r"no file fits the pattern.*\[D007\]"):
        load_chats(str(tmp_path / "*.parquet"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    write(tmp_path, "c.jsonl", GOOD).chmod(0)
    with pytest.raises(PermissionError, match=r"permissions forbid it.*\[D006\]"):
        load_chats(tmp_path / "c.jsonl")


def test_changed_and_deleted_while_read(tmp_path):
    path = write(tmp_path, "c.jsonl", lines(*[GOOD] * 5))
    rows = read_rows(path)
    next(rows)
    with path.open("ab") as file:
        file.write(b"\n" + GOOD)
    with pytest.raises(Fault, match="changed while it was read"):
        list(rows)
    rows = read_rows(path)
    next(rows)
    path.unlink()
    with pytest.raises(Fault, match="deleted while it was read"):
        list(rows)


def test_bombs_and_long_lines_need_little_memory(tmp_path):
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", 1) as file:
        for _ in range(200):
            file.write(b"x" * 2**20)
    with (tmp_path / "long.jsonl").open("wb") as file:
        file.write(GOOD + b"\n")
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b"\n" + GOOD)
    code = """
import resource, sys
from finetune_nb.chats import load_chats, ChatError
for name in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        load_chats(name)
    except ChatError as error:
        print(error.problems[0].where, error.problems[0].code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    names = ["bomb.jsonl.gz", "long.jsonl"]
    out = subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    bomb, long = out.stdout.splitlines()
    assert bomb.startswith("bomb.jsonl.gz D014") and long.startswith("long.jsonl, line 2 D030")
    assert all(int(said.split()[-1]) < 80 * 1024 for said in (bomb, long)), "KiB more than before"


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_zstandard(tmp_path, cut):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(lines(GOOD, GOOD) + b"\n")
    path = write(tmp_path, "c.jsonl.zst", packed * 2 if not cut else packed[:-cut])
    if not cut:
        assert len(load_chats(path)) == 4
    else:
        with pytest.raises(ChatError, match=r"D012"):
            load_chats(path)
    path.write_bytes(packed[:10] + b"\xff" * 30)
    with pytest.raises(ChatError, match=r"D01[23]"):
        load_chats(path)
    path.write_bytes(zstandard.ZstdCompressor().compress(b" " * 80 * 2**20))
    with pytest.raises(ChatError, match=r"D014"):
        load_chats(path)


def test_zstandard_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    if sys.version_info >= (3, 14):
        pytest.skip("Python brings its own")
    with pytest.raises(ChatError, match=r"pip install \"finetune_nb\[zstd\]\".*D015"):
        load_chats(write(tmp_path, "c.jsonl.zst", b"\x28\xb5\x2f\xfd1234"))


def test_limits_are_the_callers(tmp_path):
    path = write(tmp_path, "c.jsonl", lines(GOOD, row(USER, BOT, x=[[[[1]]]])))
    assert len(load_chats(path)) == 2
    with pytest.raises(ChatError, match=r"line 2: .*D029"):
        load_chats(path, limits=Limits(depth=4))
    with pytest.raises(ChatError, match=r"limit is 90.*D030"):
        load_chats(path, limits=Limits(line=90))
    with pytest.raises(ChatError, match=r"longer than 90 bytes.*D030"):
        load_chats(write(tmp_path, "c.json", b"[" + row(USER, BOT, x="y" * 90) + b"]"), limits=Limits(line=90))
    with pytest.raises(ChatError, match=r"unpacks to over.*D014"):
        load_chats(write(tmp_path, "c.jsonl.gz", gzip.compress(GOOD)), limits=Limits(total=50))


# --- the report


def test_a_million_problems_fit_into_memory():
    findings = Findings()
    for i in range(200_000):
        findings.add(Problem(f"c.jsonl, line {i}", "a.", "b.", "D999"))
    findings.add(Problem("c.jsonl, line 200001", "c.", "d.", "D998"))
    error = findings.error()
    assert len(error.problems) == 10_001 and error.total == 200_001
    assert "199,999 more of this kind" in str(error) and "[D998]" in str(error) and len(str(error)) < 2000


def test_problems_are_grouped_by_cause(tmp_path):
    path = write(tmp_path, "c.jsonl", lines(*[GOOD, row(USER), row(BOT)] * 20))
    with pytest.raises(ChatError) as caught:
        load_chats(path)
    told = str(caught.value).splitlines()
    assert told[0] == "40 problems were found:" and len(told) == 5, "what is said once is not said again"
    assert [p.code for p in caught.value.problems[:2]] == ["D071", "D072"]
    assert told[2] == "    … and 19 more of this kind: " + ", ".join(f"line {3 * i + 2}" for i in range(1, 20))
    several = ChatError([Problem(f"c.jsonl, line {n}", f"got {n % 7}.", "Mend it.", "D999") for n in range(20)])
    assert [line[:15] for line in str(several).splitlines()[1:]] == [*(f"c.jsonl, line {n}" for n in range(5)), "    … and 15 mo"], "up to five that differ"


def test_notes_are_said_and_nothing_is_changed(tmp_path):
    odd = [
        "<|im_end|>",
        "a\u202eb",
        "x" * 1000,
        "[INST] a",
        "</s>",
        "soft\xadhyphen",
        "\U000e0041",
        "<｜User｜>",
        "bell\x07",
        "<start_of_turn>",
        "<think>",
    ]
    data = b"\xef\xbb\xbf" + b"\r\n".join(row({"role": "user", "content": text}, BOT) for text in odd) + b"\r\n\r\n"
    chats = load_chats(write(tmp_path, "c.jsonl", data))
    assert [c.messages[0]["content"] for c in chats] == odd
    codes = [note.code for note in chats.notes]
    assert {"N002", "N003", "N004"} <= set(codes) and sum(code in ("N020", "N021", "N022") for code in codes) == len(odd)
    assert "11 chats from c.jsonl, form: messages" in repr(chats) and "U+202E" in repr(chats)
    assert "<|im_end|>" not in chats._repr_html_() and "&lt;|im_end|&gt;" in chats._repr_html_()


@pytest.mark.parametrize(
    "text", ["a < b [1] <b>bold</b> <br/>", "naïve “quotes” – fine", "👩\u200d🚀 نمی\u200cخواهم", "x" * 300, "a\tb\r\nc"]
)
def test_what_is_normal_is_not_noted(text):
    assert load_chats([{"messages": [{"role": "user", "content": text}, BOT]}]).notes == []


# --- leaving rows out


def test_skip_keeps_every_row_somewhere(tmp_path):
    for name, broken in (("c.rejected", b"{"), ("c.rejected-2", b"{1"), ("c.rejected-2", b"{1")):
        rows = [GOOD, b'{"a": \xff}\r', row(USER), broken, GOOD]
        path = write(tmp_path, "c.jsonl", b"\n".join(rows))
        with pytest.warns(UserWarning, match=rf"skipped rows: 3, written to {name}.jsonl(?s:.*)line 2"):
            chats = load_chats(path, on_error="skip")
        assert [c.where for c in chats] == ["c.jsonl, line 1", "c.jsonl, line 5"]
        assert (tmp_path / f"{name}.jsonl").read_bytes() == b"\n".join(rows[1:4]) + b"\n"
        reasons = (tmp_path / f"{name}.txt").read_text().splitlines()
        assert [r.split(":")[0] for r in reasons] == ["c.jsonl, line 2", "c.jsonl, line 3", "c.jsonl, line 4"] and "[D071]" in reasons[1]
    assert len(os.listdir(tmp_path)) == 5 and path.read_bytes() == b"\n".join(rows)
    assert "skipped rows: 3" in repr(chats) and [p.code for p in chats.skipped] == ["D020", "D071", "D021"]


def test_skip_without_a_good_row_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(ChatError, match="D071"):
        load_chats(write(tmp_path, "c.jsonl", row(USER)), on_error="skip")
    with pytest.raises(ChatError, match="D012"):
        load_chats(write(tmp_path, "c.jsonl", gzip.compress(lines(*[GOOD] * 20_000), 0)[:-9]), on_error="skip")
    assert os.listdir(tmp_path) == ["c.jsonl"]


def test_skip_for_tables_and_lists(tmp_path):
    path = write(tmp_path, "c.csv", b"prompt,completion\na,b\nc,\n")
    with pytest.warns(UserWarning, match=r"skipped rows: 1, written to c.rejected.csv"):
        assert len(load_chats(path, on_error="skip")) == 1
    assert (tmp_path / "c.rejected.csv").read_text() == "prompt,completion\nc,\n"
    with pytest.warns(UserWarning):
        load_chats([json.loads(GOOD), {"messages": []}], on_error="skip", rejected=tmp_path / "mine.rejected.jsonl")
    assert json.loads((tmp_path / "mine.rejected.jsonl").read_text()) == {"messages": []}


def test_rejected_rows_of_several_files_never_meet_an_older_file(tmp_path):
    write(tmp_path, "bad.jsonl", b"mine")
    write(tmp_path, "bad-2.txt", b"mine too")
    files = [write(tmp_path, name, lines(GOOD, row(USER, name=name))) for name in ("a.jsonl", "b.jsonl")]
    with pytest.warns(UserWarning, match=r"written to bad-3.jsonl, bad-4.jsonl"):
        assert len(load_chats(files, on_error="skip", rejected=tmp_path / "bad.jsonl")) == 2
    assert (tmp_path / "bad.jsonl").read_bytes() == b"mine" and (tmp_path / "bad-2.txt").read_bytes() == b"mine too"
    assert [json.loads((tmp_path / f"bad-{n}.jsonl").read_text())["name"] for n in (3, 4)] == ["a.jsonl", "b.jsonl"]


# --- chats that stay in the file


def test_a_chat_file_is_a_sequence(tmp_path):
    path = write(tmp_path, "c.jsonl", b"\xef\xbb\xbf" + b"\n\n".join(row(USER, BOT, n=i) for i in range(20)))
    eager, lazy = load_chats(path), load_chats(path, lazy=True)
    assert type(eager) is Chats and type(lazy) is ChatFile and list(lazy) == eager and len(lazy) == 20
    assert lazy[3] == eager[3] and lazy[-1] == eager[-1] and list(lazy[5:9]) == eager[5:9] and list(lazy[::-3]) == eager[::-3]
    assert list(lazy.take([7, 2, 2])[1:]) == [eager[2], eager[2]] and eager[4] in lazy
    assert fingerprint(lazy) == fingerprint(eager) and "20 chats" in repr(lazy)
    with pytest.raises(IndexError):
        lazy[20]
    path.write_bytes(path.read_bytes() + b"\n" + GOOD)
    with pytest.raises(ChatError, match=r"has changed since it was checked.*D016"):
        lazy[0]


def test_a_chat_file_leaves_out_what_was_skipped(tmp_path):
    path = write(tmp_path, "c.jsonl", lines(row(USER), GOOD, b"{", row(USER, BOT, n=1)))
    with pytest.warns(UserWarning, match="skipped rows: 2"):
        lazy = load_chats(path, lazy=True, on_error="skip")
    assert [(c.where, c.extra) for c in lazy] == [("c.jsonl, line 2", {}), ("c.jsonl, line 4", {"n": 1})] and lazy.skipped_rows == 2


def test_the_garbage_collector_is_left_as_it_was():
    assert gc.isenabled()
    with pytest.raises(ChatError):
        load_chats([{}])
    assert gc.isenabled()
    gc.disable()
    load_chats([json.loads(GOOD)])
    assert not gc.isenabled()
    gc.enable()


def test_large_files_stay_in_the_file_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_nb.chats.LAZY_SIZE", 1000)
    path = write(tmp_path, "c.jsonl", lines(*[GOOD] * 50))
    assert type(load_chats(path)) is ChatFile and type(load_chats(path, lazy=False)) is Chats
    assert type(load_chats(write(tmp_path, "c.json", b"[" + b",".join([GOOD] * 50) + b"]"))) is Chats
    with pytest.raises(ConfigError, match="lazy: only a single JSONL file"):
        load_chats(tmp_path / "c.json", lazy=True)
    with pytest.raises(ChatError, match="line 51"):
        load_chats(write(tmp_path, "bad.jsonl", lines(*[GOOD] * 50, row(USER))))


def test_progress_is_plain_text_and_can_be_silenced(tmp_path, capsys):
    path = write(tmp_path, "c.jsonl", lines(*[GOOD] * 600))
    load_chats(path, progress=True)
    assert re.search(r"\rreading c.jsonl \|█+\| 0 of 0 MB\n$", capsys.readouterr().err)
    load_chats(path)
    load_chats(path, progress=False)
    assert capsys.readouterr() == ("", "")


# --- sources and forms


def test_several_files_and_patterns(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "c.jsonl", GOOD)
    write(tmp_path / "b", "d.csv", b"prompt,completion\nx,y\n")
    assert [c.where for c in load_chats(str(tmp_path / "*" / "*.jsonl"))] == ["a/c.jsonl, line 1", "b/c.jsonl, line 1"]
    both = load_chats([tmp_path / "b" / "d.csv", str(tmp_path / "a" / "c.jsonl")])
    assert [c.where for c in both] == ["d.csv, line 2", "c.jsonl, line 1"] and both.form == "prompt and completion and messages"
    write(tmp_path, "we[ir]d*.jsonl", GOOD)
    assert len(load_chats(str(tmp_path / "we[ir]d*.jsonl"))) == 1
    with pytest.raises(ConfigError, match="named twice"):
        load_chats([tmp_path / "a" / "c.jsonl"] * 2)
    with pytest.raises(ConfigError, match="a list of files can't hold a dict"):
        load_chats([tmp_path / "a" / "c.jsonl", {}])
    write(tmp_path / "a", "c.jsonl", row(USER))
    write(tmp_path / "b", "d.csv", b"prompt,completion\nx,\n")
    with pytest.raises(ChatError, match=r"(?s)2 problems.*c.jsonl, line 1.*d.csv, line 2"):
        load_chats([tmp_path / "a" / "c.jsonl", tmp_path / "b" / "d.csv"])


def test_columns_are_mapped_and_the_rest_kept(tmp_path):
    path = write(tmp_path, "c.csv", b"q,a,s,topic\nWhat?,That.,,x\nWho?,Me.,Be kind.,y\n")
    chats = load_chats(path, columns={"user": "q", "assistant": "a", "system": "s"})
    assert [len(c.messages) for c in chats] == [2, 3] and [c.extra for c in chats] == [{"topic": "x"}, {"topic": "y"}]
    assert load_chats([{"dialog": [USER, BOT], "id": 1}], columns={"messages": "dialog"})[0] == Chat([USER, BOT], "row 1", {"id": 1})
    with pytest.raises(ChatError, match="no column 'question' in this row"):
        load_chats(path, columns={"user": "question", "assistant": "a"})
    for wrong in ({"user": "q"}, {"human": "q", "gpt": "a"}, {}, {"user": "q", "assistant": 1}):
        with pytest.raises(ConfigError, match="columns: expected a mapping"):
            load_chats(path, columns=wrong)


def test_forms_become_messages():
    def first(row, **options):
        loaded = load_chats([row], **options)
        return [(m["role"], m["content"]) for m in loaded[0].messages], loaded[0].extra, loaded.form

    alpaca = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "s", "history": [["a", "b"]], "id": 1}
    assert first(alpaca)[:2] == (
        [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "Add.\n\n2, 2"), ("assistant", "4")],
        {"id": 1},
    )
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}], "id": 1}
    assert first(sharegpt) == ([("user", "a"), ("assistant", "b")], {"id": 1}, "ShareGPT (conversations)")
    assert load_chats([sharegpt])[0].messages[1]["weight"] == 1
    both = {"messages": [USER, BOT], "prompt": "x", "completion": "y"}
    assert first(both)[1] == {"prompt": "x", "completion": "y"}
    assert first(both, format="prompt-completion")[0] == [("user", "x"), ("assistant", "y")]
    with pytest.raises(ConfigError, match="format: expected one of 'messages', 'sharegpt'"):
        load_chats([both], format="openai")
    with pytest.raises(ChatError, match="D051"):
        load_chats([{"messages": [USER, BOT]}], format="alpaca")


def test_calls_of_sharegpt_become_calls():
    turns = [("human", "a"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'), ("observation", "4"), ("gpt", "b")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns], "tools": '[{"name": "f"}]'}
    chat = load_chats([row])[0]
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"] and chat.tools == [{"name": "f"}]
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


def test_tables_and_data_sets(tmp_path):
    import datasets
    import pandas

    rows = [{"messages": [USER, BOT], "n": 1}, {"messages": [USER, CALL, ANSWER, BOT], "n": 2}]
    plain = [{"prompt": "a", "completion": "b", "system": None}, {"prompt": "c", "completion": "d", "system": "s"}]
    data = datasets.Dataset.from_list(rows)
    assert chats_of(load_chats(data)) == [(r["messages"], {"n": r["n"]}) for r in rows]
    assert chats_of(load_chats(data.to_iterable_dataset())) == chats_of(load_chats(rows))
    assert [c.where for c in load_chats(pandas.DataFrame(plain))] == ["row 1", "row 2"]
    data.to_parquet(tmp_path / "c.parquet")
    assert (
        chats_of(load_chats(pandas.read_parquet(tmp_path / "c.parquet")))
        == chats_of(load_chats(tmp_path / "c.parquet"))
        == chats_of(load_chats(rows))
    )
    assert chats_of(load_chats(pandas.DataFrame(plain))) == chats_of(load_chats(plain))
    splits = datasets.DatasetDict(train=data, test=data.select([0]))
    assert len(load_chats(splits, split="test")) == 1
    for split in (None, "dev"):
        with pytest.raises(ConfigError, match=r"split: the data set has the splits 'train', 'test'"):
            load_chats(splits, split=split)
    with pytest.raises(ConfigError, match="only data sets have splits"):
        load_chats(rows, split="train")


def test_hub_names_fail_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nobody/no-such-data", "hf://datasets/nobody/no-such-data"):
        with pytest.raises(ChatError, match=r"the hub did not give this data set.*D008"):
            load_chats(name)
    (tmp_path / "nobody").mkdir()
    with pytest.raises(FileNotFoundError):
        load_chats("nobody/no-such-data")
    write(tmp_path / "nobody", "no-such-data", GOOD)
    assert load_chats("nobody/no-such-data")[0].where == "no-such-data, line 1"
    with pytest.raises(FileNotFoundError):
        load_chats("data/chats.jsonl")


@pytest.mark.parametrize("source", [7, {"messages": []}, None, object()])
def test_what_is_no_source(source):
    with pytest.raises(ConfigError, match="source: expected a file, a data set, a table or a list of rows"):
        load_chats(source)


def test_wrong_options():
    with pytest.raises(ConfigError, match="on_error: expected 'raise' or 'skip'"):
        load_chats([], on_error="ignore")
    with pytest.raises(ConfigError, match="can't both be given"):
        load_chats([], format="messages", columns={"messages": "x"})


# --- saving


def test_what_json_cannot_hold_is_not_saved(tmp_path):
    for value in ({1, 2}, float("nan"), object(), "\ud800"):
        with pytest.raises(ChatError, match=r"c, line 1: this chat can't be written as JSON.*D090"):
            save_chats([Chat([USER, BOT], "c, line 1", {"x": value})], tmp_path / "c.jsonl")
    assert os.listdir(tmp_path) == []


def test_packed_files_are_the_same_every_time(tmp_path):
    chats = [Chat([USER, BOT])]
    assert save_chats(chats, tmp_path / "a.jsonl.gz").read_bytes() == save_chats(chats, tmp_path / "b.jsonl.gz").read_bytes()


def test_reading_imports_nothing_heavy():
    code = "import sys, finetune_nb.chats; print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow', 'numpy', 'IPython') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- what begins like something else

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize(
    "extra",
    [{"tags": ["a", "b"]}, {"tools": TOOLS}, {"docs": [{"title": "x"}]}, {"history_of": []}, {"pairs": [["a", "b"]]}],
    ids=lambda extra: next(iter(extra)),
)
@pytest.mark.parametrize("count", [1, 3])
def test_rows_that_begin_with_a_list(extra, count, tmp_path):
    written = json.dumps({**extra, "messages": [USER, BOT]})
    for data in (written + "\n", json.dumps({**extra, "messages": [USER, BOT]}, indent=1) + "\n"):
        chats = load_chats(write(tmp_path, "a.json", (data * count).encode()))
        assert len(chats) == count and chats[-1].extra == extra


def test_columns_of_messages_are_no_wrapper(tmp_path):
    for turn in ({"role": "user", "content": "q"}, {"from": "human", "value": "q"}):
        answer = {"role": "assistant", "content": "a"} if "role" in turn else {"from": "gpt", "value": "a"}
        path = write(tmp_path, "a.json", lines(*[json.dumps({"dialog": [turn, answer]})] * 2))
        for name in ("messages", "conversations"):
            assert [m["content"] for m in load_chats(path, columns={name: "dialog"})[1].messages] == ["q", "a"]
    assert len(load_chats(write(tmp_path, "b.json", b'{"what": [' + GOOD + b", " + GOOD + b"]}"))) == 2


@pytest.mark.parametrize("indent", [None, 1])
def test_one_object_over_several_lines(indent, tmp_path):
    text = '{"messages": [\n' + json.dumps(USER) + ",\n" + json.dumps(BOT) + "\n]}\n" if indent is None else json.dumps(json.loads(GOOD), indent=1)
    assert len(load_chats(write(tmp_path, "a.jsonl", text.encode()))) == 1


@pytest.mark.parametrize(
    ("file", "data", "count", "pattern"),
    [
        ("e.jsonl", lines(json.dumps([USER, BOT]), json.dumps([USER, BOT])), 2, r"line 1: this row is a bare list of messages.*\{\"messages\": \[…\]\}(.|\n)*1 more of this kind: line 2$"),
        ("e.json", json.dumps([[USER, BOT]]).encode(), 1, r"line 1: this row is a bare list of messages"),
        ("e.json", json.dumps([USER, BOT]).encode(), 2, r"line 1: this row is a single message.*one list"),
        ("e.jsonl", lines(GOOD, b"\0" * 5000), 1, r"line 2: .*no row here, only NUL bytes: 5,000. The file was damaged"),
        ("e.jsonl", lines(GOOD, GOOD + b"\0" * 5000), 1, r"line 2: .*something follows the row, only NUL bytes: 5,000. The file was damaged"),
        ("e.csv", b"prompt,completion,\xff\na,b,c\nd,e,f\n", 1, r"^e.csv: in the header, not UTF-8"),
        ("e.csv", b'prompt,completion\n"a\xff\nb\xff",x\nq,good\nr,good\n', 1, r"line 2: not UTF-8 at column 3"),
    ],
)
def test_the_right_place_and_remedy(file, data, count, pattern, tmp_path):
    with pytest.raises(ChatError, match=pattern) as caught:
        load_chats(write(tmp_path, file, data))
    assert len(caught.value.problems) == count


def test_rejected_rows_of_a_table_are_a_table(tmp_path):
    head, bad = b"\xef\xbb\xbfprompt,completion\r\n", b'"a\xe9\r\nb",x\r\nc,\r\nd,"e\n",f\n'
    with pytest.warns(UserWarning, match=r"skipped rows: 3, written to k.rejected.csv"):
        chats = load_chats(write(tmp_path, "k.csv", head + bad + b"q,good\n"), on_error="skip")
    assert len(chats) == 1 and (tmp_path / "k.rejected.csv").read_bytes() == head + bad
    again = write(tmp_path, "again.csv", (tmp_path / "k.rejected.csv").read_bytes().replace(b"\xe9", b"e").replace(b"c,", b"c,d").replace(b",f", b""))
    assert len(load_chats(again)) == 3


def test_rows_too_long_to_copy_are_told(tmp_path):
    path = write(tmp_path, "c.jsonl", lines(GOOD, row(USER, BOT, x="y" * 300), row(USER)))
    with pytest.warns(UserWarning, match=r"skipped rows: 2, .*too long to copy, so in the original only: c.jsonl, line 2:"):
        load_chats(path, on_error="skip", limits=Limits(line=200))


def test_blank_lines_cost_little(tmp_path):
    data = b"\n" * 30_000_000
    chats = load_chats(write(tmp_path, "c.jsonl", GOOD + b"\n\n" + data + GOOD + b"\n \n\n" + GOOD), lazy=True)
    assert [c.where for c in chats] == [f"c.jsonl, line {n}" for n in (1, 30_000_003, 30_000_006)]
    assert "blank lines: 30,000,003" in repr(chats)


def test_what_json_cannot_hold_is_refused():
    import datetime

    stamp = datetime.datetime(2026, 1, 1)
    with pytest.raises(ChatError, match=r"row 1: message 1: 'at' can't be written as JSON.*Convert it.*D059"):
        load_chats([{"messages": [{**USER, "at": stamp}, BOT]}])
    with pytest.raises(ChatError, match=r"row 1: 'tools' can't be written as JSON.*D059"):
        load_chats([{"messages": [USER, BOT], "tools": [{"name": "f", "since": stamp}]}])


def test_prompt_and_completion_name_columns():
    chats = load_chats([{"q": "2 + 2?", "a": "4.", "s": "Be brief."}], columns={"system": "s", "prompt": "q", "completion": "a"})
    assert [m["role"] for m in chats[0].messages] == ["system", "user", "assistant"] and chats[0].extra == {}


# --- places, bytes and notes, to the letter

VALUES = st.sampled_from([None, 0, "é\n\u2028", [], [1, [2]], {"a": {}}, {"": [{"b": "}],"}]}])
BLANK = st.sampled_from([b"", b"\n", b" \n", b"\t\r\n", b"\n\n\n"])


def rows_in(path, **options):
    "All rows of a file, the notes, and what progress was told."
    notes, seen = [], []
    return list(read_rows(path, say=lambda *note: notes.append(note), progress=seen.append, **options)), notes, seen


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(BLANK, VALUES, st.sampled_from([b"\n", b"\r\n", b" \n"])), min_size=1, max_size=6), BLANK, st.booleans(), st.booleans())
def test_each_line_is_found_again_by_its_offset(tmp_path_factory, parts, last, mark, ended):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    written = [(blank, json.dumps({"v": value}).encode() + end) for blank, value, end in parts]
    data = b"".join(blank + line for blank, line in written) + last
    data = (b"\xef\xbb\xbf" if mark else b"") + (data if ended or last else data.rstrip())
    path.write_bytes(data)
    rows, notes, seen = rows_in(path)
    assert [(one.value, one.fault) for one in rows] == [({"v": value}, None) for _, value, _ in parts]
    for one in rows:
        number = int(one.place.removeprefix("line "))
        assert one.offset == len(b"".join(data.splitlines(keepends=True)[: number - 1])) and one.raw == data[one.offset :].splitlines(keepends=True)[0].removeprefix(b"\xef\xbb\xbf")
    lines_of = data.removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True)
    blank, returns = sum(not line.strip() for line in lines_of), sum(line.endswith(b"\r\n") for line in lines_of)
    expected = [("N002", "the file begins with a byte-order mark.")] * mark
    expected += [("N003", f"Windows line ends (CR LF): {returns}.")] * (returns > 0) + [("N004", f"blank lines: {blank}.")] * (blank > 0)
    assert [note[:2] for note in notes] == expected and seen[0] <= len(data)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(BLANK, VALUES, BLANK), max_size=5), st.sampled_from([b"[%s]", b"\xef\xbb\xbf \n[%s]\n", b'{"rows": [%s]}', b'{\n"train"\n:\n[%s] \n}\n ']))
def test_each_row_of_a_list_knows_its_line(tmp_path_factory, parts, around):
    path = tmp_path_factory.mktemp("lists") / "a.json"
    made = [(before + json.dumps({"v": value}, indent=1).encode(), before, after) for before, value, after in parts]
    before, after = around.split(b"%s")
    path.write_bytes(before + b",".join(text + end for text, _, end in made) + after)
    rows, notes, _ = rows_in(path)
    line, places = 1 + before.count(b"\n"), []
    for text, blank, end in made:
        places.append(f"line {line + blank.count(bytes([10]))}")
        line += (text + end).count(b"\n")
    assert [(one.place, one.value, one.fault) for one in rows] == [(place, {"v": value}, None) for place, (_, value, _) in zip(places, parts, strict=True)]
    name = re.search(rb'"(\w+)"', before)
    assert [note[:2] for note in notes] == ([("N005", f"the rows stand in the list {name[1].decode()!r}.")] if name else [])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.text("a ,;\t\n\"é", min_size=1, max_size=4).map(lambda t: t.replace("\n", "\r\n")), min_size=2, max_size=2), max_size=4), st.sampled_from(",;\t"), st.sampled_from([b"", b"\xef\xbb\xbf", b"\r\n"]))
def test_each_row_of_a_table_knows_its_line_and_its_bytes(tmp_path_factory, cells, delimiter, before):
    def written(values):
        return (delimiter.join(f'"{v.replace(chr(34), chr(34) * 2)}"' for v in values) + "\r\n").encode()

    path = tmp_path_factory.mktemp("tables") / "a.csv"
    head = written(["x", "y,;\t"])
    path.write_bytes(before + head + b"".join(map(written, cells)))
    rows, notes, _ = rows_in(path)
    assert [(one.value, one.raw, one.fault) for one in rows] == [({"x": x, "y,;\t": y}, written([x, y]), None) for x, y in cells]
    assert all(one.header == before + head for one in rows)
    starts = [2 + (before == b"\r\n") + b"".join(map(written, cells[:n])).count(b"\n") for n in range(len(cells))]
    assert [one.place for one in rows] == [f"line {n}" for n in starts]
    name = {",": None, ";": "semicolons", "\t": "tabs"}[delimiter]
    assert [note[:2] for note in notes] == ([("N006", f"the columns are separated by {name}.")] if name else [])


@pytest.mark.parametrize(("name", "file"), [("parquet", "a.parquet"), ("parquet under another name", "a.jsonl")])
def test_parquet_is_noted_under_another_name_alone(name, file, tmp_path):
    data = next(data for case, _, data, _ in VALID if case == name)
    rows, notes, _ = rows_in(write(tmp_path, file, data))
    assert [one.place for one in rows] == [f"row {n + 1}" for n in range(len(rows))] and not any(one.fault for one in rows)
    assert [code for code, *_ in notes] == ([] if file == "a.parquet" else ["N001"])


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b"[\n[1],\n[2]\n]", [[1], [2]]),  # a list of lists over several lines
        (b"[1]\n[2]\n", [[1], [2]]),  # two rows that are lists
        (b"[\n\n[1]]", [[1]]),
        (b'{"things": [{"a": 1}]}', [{"a": 1}]),  # an object that holds the one list of rows, under any name
        (b' {"things": [{"a": 1}, {"from": 2}]}', [{"a": 1}, {"from": 2}]),
        (b'{"things": [{"from": 1}]}', [{"things": [{"from": 1}]}]),  # a row: its list is one of messages
        (b'{"things": [{"role": 1}]}', [{"things": [{"role": 1}]}]),
        (b'{"things": [{"a": 1}], "n": 1}', [{"things": [{"a": 1}], "n": 1}]),
        (b'{"things": []}', [{"things": []}]),
        (b'{"data": []}', []),
        (b'{"messages": [{"a": 1}]}', [{"messages": [{"a": 1}]}]),
    ],
)
def test_what_is_a_list_of_rows(data, values, tmp_path):
    assert [one.value for one in rows_in(write(tmp_path, "a.json", data))[0]] == values


def test_a_small_parquet_file_that_would_fill_the_memory(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), pa.array(["x" * 2**20]))  # a text that stands in every row, and once in the file
    pq.write_table(pa.table({"prompt": once, "completion": ["a"] * 200}), tmp_path / "a.parquet", compression="zstd", use_dictionary=True)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    tracemalloc.start()
    try:
        assert sum(len(row.value["prompt"]) for row in read_rows(tmp_path / "a.parquet")) == 200 << 20
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    for code, limits in (("D030", Limits(line=2**19)), ("D014", Limits(free=2**18)), ("D014", Limits(total=2**18))):
        with pytest.raises(ChatError, match=code):
            load_chats(tmp_path / "a.parquet", limits=limits)

"""Malformed inputs: what is in the file, and the code, place and words that must come back; and odd but valid ones.

Each bad input is (name, file name, bytes, code, place, pattern). The place is what follows the file name: "line 2", "row 5",
or "" for the file as a whole. Where several rows are bad, the first problem of that code counts.
"""

import bz2
import gzip
import io
import json

USER, BOT, SYSTEM = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello"), ("system", "Be kind.")))
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
ANSWER = {"role": "tool", "tool_call_id": "c1", "content": "4"}


def row(*messages, **extra):
    return json.dumps({"messages": list(messages), **extra}).encode()


def said(role, content):
    return {"role": role, "content": content}


def calling(**changes):
    "A call with a change to its function, or to itself."
    call = {**CALL["tool_calls"][0], "function": {**CALL["tool_calls"][0]["function"]}}
    for key, value in changes.items():
        (call["function"] if key in ("name", "arguments") else call)[key] = value
    return {**CALL, "tool_calls": [call]}


def parquet(rows, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


GOOD = row(USER, BOT)
TEXT = GOOD.decode()


def lines(*rows):
    return b"\n".join(r if isinstance(r, bytes) else r.encode() for r in rows)


def _table(code, file, *cases):
    return [(name, file, data, code, place, said) for name, data, place, said in cases]


JSON_TEXT = [
    *_table(
        "D021", "bad.jsonl",
        ("missing value", b'{"messages": [}', "line 1", r"column 15: Expecting value"),
        ("missing colon", lines(GOOD, b'{"messages" []}'), "line 2", r"column 13: Expecting ':'"),
        ("missing comma", lines(GOOD, GOOD, TEXT.replace('"Hi"}, ', '"Hi"} ')), "line 3", r"Expecting ',' delimiter"),
        ("comma before the end", b'{"messages": [],}', "line 1", r"property name"),
        ("single quotes", TEXT.replace('"', "'").encode(), "line 1", r"looks like Python"),
        ("python None", TEXT.replace('"Hi"', "None").encode(), "line 1", r"looks like Python, not JSON, near 'None"),
        ("python True", b'{"a": True}', "line 1", r"looks like Python"),
        ("plain words", b"Hello there", "line 1", r"Expecting value, near 'Hello there'"),
        ("comment", lines(b"// chats", GOOD), "line 1", r"near '// chats'"),
        ("comment inside", b'{"a": 1 /* one */}', "line 1", r"Expecting ',' delimiter"),
        ("unquoted key", b'{messages: []}', "line 1", r"property name enclosed in double quotes"),
        ("bad escape", TEXT.replace("Hi", "C:\\dir").encode(), "line 1", r"Invalid \\escape"),
        ("bad unicode escape", TEXT.replace("Hi", "\\u12G4").encode(), "line 1", r"Invalid \\uXXXX escape"),
        ("leading zero", b'{"a": 01}', "line 1", r"Expecting ',' delimiter"),
        ("plus sign", b'{"a": +1}', "line 1", r"Expecting value"),
        ("hex number", b'{"a": 0x10}', "line 1", r"Expecting ',' delimiter"),
        ("curly quotes", "{“messages”: []}".encode(), "line 1", r"property name"),
        ("semicolon", TEXT.replace(", ", "; ").encode(), "line 1", r"Expecting ',' delimiter"),
        ("a line of csv", lines(GOOD, b"Hi,Hello"), "line 2", r"near 'Hi,Hello'"),
        ("yaml", b"- role: user\n  content: Hi\n", "line 1", r"Expecting value"),
        ("html page", b"<!DOCTYPE html>\n<html></html>", "line 1", r"near '<!DOCTYPE"),
        ("git conflict", lines(GOOD, b"<<<<<<< HEAD", GOOD, b"=======", GOOD), "line 2", r"near '<<<<<<< HEAD'"),
        ("row over two lines", lines(GOOD, TEXT[:20], TEXT[20:], GOOD), "line 2", r"not valid JSON at column"),
        ("bracket too many", GOOD[:-1] + b"]}\n", "line 1", r"Expecting ',' delimiter"),
        ("concatenated keyword", b'{"a": nul}', "line 1", r"Expecting value"),
        ("text not closed, more follows", lines(b'{"messages": "Hi}', GOOD), "line 1", r"Unterminated string"),
    ),
    *_table(
        "D026", "bad.jsonl",
        ("open brace only", b"{", "line 1", r"last line breaks off"),
        ("cut in a key", GOOD[:5], "line 1", r"cut short"),
        ("cut in a text", lines(GOOD, GOOD[:45]), "line 2", r"last line breaks off"),
        ("cut after a comma", lines(GOOD, TEXT[: TEXT.index(", {") + 2]), "line 2", r"last line breaks off"),
        ("cut before the end", lines(GOOD, GOOD[:-1]), "line 2", r"get it again, or delete"),
        ("cut in an escape", lines(GOOD, b'{"messages": "\\'), "line 2", r"last line breaks off"),
    ),
    *_table(
        "D027", "bad.jsonl",
        ("two rows in a line", GOOD + b" " + GOOD, "line 1", r"a second value begins"),
        ("two rows without space", lines(GOOD, GOOD + GOOD), "line 2", r"break the line there"),
        ("comma after the row", lines(GOOD + b",", GOOD + b","), "line 1", r"something follows the row, near ','"),
        ("brace too many", lines(GOOD, GOOD + b"}"), "line 2", r"something follows the row, near '}'"),
        ("words after the row", GOOD + b" # good one", "line 1", r"something follows the row, near '# good"),
        ("NUL bytes after the row", lines(GOOD, GOOD + b"\0\0\0"), "line 2", r"something follows"),
    ),
    *_table(
        "D020", "bad.jsonl",
        ("latin-1 letter", TEXT.replace("Hi", "Grüße").encode("latin-1"), "line 1", r"column \d+ \(byte \d+: 0xfc, 'ü' in Windows-1252"),
        ("windows quote", lines(GOOD, TEXT.replace("Hi", "“Hi”").encode("cp1252")), "line 2", r"0x93, '“' in Windows-1252"),
        ("byte ff", b'{"messages": [{"role": "user", "content": "\xff"}]}', "line 1", r"byte 44: 0xff"),
        ("cut character", lines(TEXT.replace("Hi", "日").encode().replace("日".encode(), "日".encode()[:2]), GOOD), "line 1", r"not UTF-8"),
        ("overlong slash", TEXT.encode().replace(b"Hi", b"\xc0\xaf"), "line 1", r"0xc0"),
        ("encoded surrogate", TEXT.encode().replace(b"Hi", b"\xed\xa0\x80"), "line 1", r"0xed"),
        ("beyond unicode", TEXT.encode().replace(b"Hi", b"\xf5\x80\x80\x80"), "line 1", r"0xf5"),
        ("shift-jis", TEXT.replace("Hi", "日本").encode("shift-jis"), "line 1", r"Save the file again as UTF-8"),
        ("byte without a letter", TEXT.encode().replace(b"Hi", b"\x81"), "line 1", r"no letter in Windows-1252 either"),
    ),
    *_table(
        "D022", "bad.jsonl",
        ("raw NUL", TEXT.encode().replace(b"Hi", b"H\0i"), "line 1", r"a NUL inside a text"),
    ),
    *_table(
        "D023", "bad.jsonl",
        ("raw tab", TEXT.encode().replace(b"Hi", b"H\ti"), "line 1", r"control character \(U\+0009\)"),
        ("raw escape", lines(GOOD, TEXT.encode().replace(b"Hi", b"\x1b[1m")), "line 2", r"U\+001B"),
        ("raw return", TEXT.encode().replace(b"Hi", b"H\ri"), "line 1", r"U\+000D"),
    ),
    *_table(
        "D024", "bad.jsonl",
        ("NaN", b'{"a": NaN}', "line 1", r"NaN is not JSON"),
        ("Infinity", lines(GOOD, row(USER, BOT, score=1).replace(b": 1}", b": Infinity}")), "line 2", r"Infinity is not JSON"),
        ("minus Infinity", b'{"a": -Infinity}', "line 1", r"-Infinity is not JSON"),
        ("infinite by exponent", lines(GOOD, row(USER, BOT, score=1).replace(b": 1}", b": 1e999}")), "line 2", r"1e999 is too large"),
        ("huge integer", b'{"a": ' + b"9" * 5000 + b"}", "line 1", r"more than 4,300 digits"),
    ),
    *_table(
        "D025", "bad.jsonl",
        ("key twice", b'{"messages": [], "messages": []}', "line 1", r"'messages' stands twice"),
        ("key twice in a message", TEXT.replace('"content": "Hi"', '"content": "Hi", "content": "Ho"').encode(), "line 1", r"'content' stands twice"),
        ("key twice, escaped", b'{"a": 1, "\\u0061": 2}', "line 1", r"'a' stands twice"),
        ("key twice, spaced", b'{"a" : 1, "a"\t: 2}', "line 1", r"'a' stands twice"),
        ("key twice, deep in an extra", lines(GOOD, b'{"x": [{"y": {"": 1, "": 2}}]}'), "line 2", r"'' stands twice"),
    ),
    *_table(
        "D028", "bad.jsonl",
        ("lone high surrogate", TEXT.replace("Hi", "\\ud83d").encode(), "line 1", r"half a character"),
        ("lone low surrogate", TEXT.replace("Hi", "\\uDE00").encode(), "line 1", r"half a character"),
        ("surrogates swapped", lines(GOOD, TEXT.replace("Hi", "\\ude00\\ud83d")), "line 2", r"half a character"),
        ("surrogate in a key", TEXT.replace("messages", "\\ud800").encode(), "line 1", r"half a character"),
    ),
    *_table(
        "D029", "bad.jsonl",
        ("33 levels", b'{"a": ' + b"[" * 32 + b"]" * 32 + b"}", "line 1", r"nested too deeply"),
        ("objects in objects", lines(GOOD, b'{"a": ' * 500 + b"1" + b"}" * 500), "line 2", r"nested too deeply"),
        ("100,000 brackets", b'{"a": ' + b"[" * 100_000, "line 1", r"nested too deeply"),
    ),
    *_table(
        "D030", "bad.jsonl",
        ("a line of 17 MiB", lines(GOOD, row(said("user", "x" * 17 * 2**20), BOT), GOOD), "line 2", r"17,825,\d+ bytes; the limit is 16,777,216"),
        ("17 MiB and no line end", lines(GOOD, b"x" * 17 * 2**20), "line 2", r"Is a line end missing"),
    ),
]  # fmt: skip

LISTS = [
    ("list cut after a row", "bad.json", b"[" + GOOD + b",\n", "D026", "", r"line 2"),
    ("list cut in a row", "bad.json", b"[" + GOOD + b",\n" + GOOD[:40], "D026", "", r"breaks off in line 2"),
    ("list cut before its end", "bad.json", b"[\n" + GOOD + b"\n", "D026", "", r"line 3, it breaks off before its end"),
    ("comma before the end of the list", "bad.json", b"[" + GOOD + b",\n]", "D021", "", r"comma stands before the end"),
    ("comma missing in the list", "bad.json", b"[" + GOOD + b"\n" + GOOD + b"]", "D021", "", r"comma is missing between"),
    ("two commas", "bad.json", b"[" + GOOD + b",," + GOOD + b"]", "D021", "", r"Expecting value"),
    ("something after the list", "bad.json", b"[" + GOOD + b"]\n" + GOOD, "D027", "", r"line 2, something follows the list"),
    ("two lists", "bad.json", b"[" + GOOD + b"][]", "D027", "", r"something follows"),
    ("closed by the wrong bracket", "bad.json", b"[" + GOOD + b"}", "D021", "", r"comma is missing"),
    ("keys after the wrapped list", "bad.json", b'{"data": [' + GOOD + b'], "n": 1}', "D027", "", r"',' stands where '}'"),
    ("wrapped list cut off", "bad.json", b'{"data": [' + GOOD + b"]", "D026", "", r"breaks off"),
    ("NaN in a list", "bad.json", b'[\n{"a": NaN}]', "D024", "", r"row begins in line 2"),
    ("huge integer in a list", "bad.json", b'[{"a": ' + b"9" * 5000 + b"}]", "D024", "", r"more than 4,300 digits\. The row begins in line 1, .* Write it as a text"),
    ("duplicate key in a list", "bad.json", b'[\n\n{"a": 1, "a": 2}]', "D025", "", r"begins in line 3"),
    ("surrogate in a list", "bad.json", b"[" + GOOD + b",\n" + TEXT.replace("Hi", "\\ud800").encode() + b"]", "D028", "line 2", r"half a character"),
    ("not UTF-8 in a list", "bad.json", b"[" + GOOD + b",\n" + TEXT.replace("Hi", "ü").encode("latin-1") + b"]", "D020", "", r"line 2"),
    ("list of lists", "bad.json", b"[[\n1]]", "D050", "line 1", r"expected an object"),
    ("list of texts", "bad.json", b'["Hi",\n"Hello"]', "D050", "line 1", r'got "Hi"'),
    ("list with a bad row", "bad.json", b"[" + GOOD + b",\n\n" + row(USER) + b"]", "D071", "line 3", r"no assistant message"),
    ("empty list", "bad.json", b"[]", "D053", "", r"it is empty"),
    ("brackets without end", "bad.json", b"[" * 100_000, "D029", "", r"nested too deeply"),
    ("spread object with a fault", "bad.json", b'{\n "messages":\n [}\n}', "D021", "", r"in line 3"),
    ("list in a jsonl file", "bad.jsonl", b"[" + GOOD + b", 7]", "D050", "line 1", r"got 7"),
    ("tools as a list of numbers", "bad.json", b"[" + row(USER, BOT, tools=[1]) + b"]", "D087", "line 1", r"functions with names"),
]  # fmt: skip

FILES = [
    *_table(
        "D053", "bad.jsonl",
        ("empty file", b"", "", r"it is empty"),
        ("white space only", b" \n\n\t\n", "", r"it is empty"),
        ("byte-order mark only", b"\xef\xbb\xbf", "", r"it is empty"),
    ),
    ("empty gzip", "bad.jsonl.gz", gzip.compress(b""), "D053", "", r"it is empty"),
    ("empty csv", "bad.csv", b"", "D053", "", r"it is empty"),
    ("csv of a header", "bad.csv", b"prompt,completion\n", "D053", "", r"it is empty"),
    ("empty parquet", "bad.parquet", lambda: parquet([{"prompt": "a"}])[:0], "D053", "", r"it is empty"),
    *_table(
        "D010", "bad.jsonl",
        ("UTF-16 with mark", TEXT.encode("utf-16"), "", r"UTF-16 text"),
        ("UTF-16 big end first", b"\xfe\xff" + TEXT.encode("utf-16-be"), "", r"UTF-16 text"),
        ("UTF-32", TEXT.encode("utf-32"), "", r"UTF-32 text"),
    ),
    ("UTF-16 without mark", "bad.jsonl", TEXT.encode("utf-16-be"), "D010", "line 1", r"without a byte-order mark"),
    ("UTF-16 table", "bad.csv", "prompt,completion\nHi,Ho\n".encode("utf-16"), "D010", "", r"Save the file again as UTF-8"),
    *_table(
        "D011", "bad.jsonl",
        ("zip archive", b"PK\x03\x04" + b"\0" * 30, "", r"a zip archive"),
        ("xz file", b"\xfd7zXZ\x00" + b"\0" * 30, "", r"an xz file"),
        ("PDF", b"%PDF-1.7\n", "", r"a PDF"),
        ("arrow file", b"ARROW1\0\0", "", r"an Arrow file"),
        ("database", b"SQLite format 3\0", "", r"a database"),
        ("7z archive", b"7z\xbc\xaf\x27\x1c", "", r"a 7z archive"),
        ("rar archive", b"Rar!\x1a\x07", "", r"a rar archive"),
        ("pickle", b"\x80\x04\x95\x10", "", r"a pickle"),
        ("packed twice", gzip.compress(gzip.compress(GOOD)), "", r"packed twice"),
    ),
    ("excel sheet", "bad.csv", b"PK\x03\x04" + b"\0" * 30, "D011", "", r"a zip archive"),
    ("packed parquet", "bad.parquet.gz", lambda: gzip.compress(parquet([{"prompt": "a", "completion": "b"}])), "D011", "", r"packed parquet"),
    ("zip in gzip", "bad.jsonl.gz", gzip.compress(b"PK\x03\x04"), "D011", "", r"a zip archive"),
    ("UTF-16 in gzip", "bad.jsonl.gz", gzip.compress(TEXT.encode("utf-16")), "D010", "", r"UTF-16 text"),
    ("gzip cut short", "bad.jsonl.gz", gzip.compress(GOOD * 100)[:-12], "D012", "", r"ends in the middle"),
    ("gzip of a header", "bad.jsonl.gz", gzip.compress(GOOD)[:6], "D012", "", r"ends in the middle"),
    ("gzip with a wrong sum", "bad.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "D013", "", r"damaged \(CRC"),
    ("gzip with rubbish in it", "bad.jsonl.gz", gzip.compress(GOOD)[:10] + b"\xff" * 40, "D013", "", r"damaged"),
    ("gzip with rubbish after it", "bad.jsonl.gz", gzip.compress(GOOD) + b"rubbish", "D013", "", r"damaged"),
    ("bzip2 cut short", "bad.jsonl.bz2", bz2.compress(GOOD * 100)[:-12], "D012", "", r"ends in the middle"),
    ("bzip2 damaged", "bad.jsonl.bz2", bz2.compress(GOOD)[:20] + b"\0" * 30, "D013", "", r"damaged"),
    ("gzip bomb", "bad.jsonl.gz", lambda: gzip.compress(b" " * 80 * 2**20, 1), "D014", "", r"unpacks to over 6\d MiB"),
    ("bzip2 bomb", "bad.jsonl.bz2", lambda: bz2.compress(b" " * 72 * 2**20), "D014", "", r"far more than its size"),
    ("no parquet", "bad.parquet", GOOD, "D017", "", r"this is no parquet file"),
    ("parquet cut short", "bad.parquet", lambda: parquet([{"prompt": "a", "completion": "b"}])[:-20], "D017", "", r"damaged after row 0 \(Parquet magic bytes not found"),
    ("parquet of four bytes", "bad.parquet", b"PAR1", "D017", "", r"damaged"),
    ("parquet with zeros", "bad.parquet", lambda: parquet([{"prompt": "a" * 500, "completion": "b"}], compression="snappy").replace(b"aaaa", b"\0\0\0\0").replace(b"prompt", b"promp\0"), "D0", "", r""),
]  # fmt: skip

TABLES = [
    ("column without a name", "bad.csv", b"prompt,,completion\na,b,c\n", "D040", "", r"column without a name"),
    ("column twice", "bad.csv", b"prompt,completion,prompt\na,b,c\n", "D041", "", r"'prompt' twice"),
    ("cell too many", "bad.csv", b"prompt,completion\na,b\nc,d,e\n", "D042", "line 3", r"cells in this row: 3, columns in the header: 2"),
    ("cell too few", "bad.csv", b"prompt,completion\na\n", "D042", "line 2", r"cells in this row: 1, columns"),
    ("comma unquoted", "bad.csv", b"prompt,completion\nHi, you,Hello\n", "D042", "line 2", r"Quote cells"),
    ("cell too many after a long cell", "bad.csv", b'prompt,completion\n"a\n\nb",c\nd,e,f\n', "D042", "line 5", r"row: 3"),
    ("quote not closed", "bad.csv", b'prompt,completion\n"a,b\nc,d\n', "D043", "", r"line 2 on"),
    ("quote inside a cell", "bad.csv", b'prompt,completion\n"a"b",c\n', "D043", "", r"written \"\""),
    ("not UTF-8 in a cell", "bad.csv", "prompt,completion\na,b\nü,c\n".encode("latin-1"), "D020", "line 3", r"'ü' in Windows-1252"),
    ("no known column", "bad.csv", b"question,answer\na,b\n", "D051", "line 2", r"columns=\{\"user\""),
    ("columns of its own", "bad.csv", b"Question,Reply\na,b\n", "D051", "line 2", r"--columns user=Question assistant=Reply"),
    ("no header", "bad.csv", b"Hi,Hello\nHow?,So.\n", "D051", "line 2", r"\[\"Hello\", \"Hi\"\]"),
    ("empty cell", "bad.csv", b"prompt,completion\na,\n", "D065", "line 2", r"'completion' is empty"),
    ("empty cell in tabs", "bad.tsv", b"prompt\tcompletion\n\tb\n", "D065", "line 2", r"'prompt' is empty"),
    ("messages cell cut", "bad.csv", b'messages\n"[{""role"": ""user"""\n', "D021", "line 2", r"not valid JSON"),
    ("messages cell of words", "bad.csv", b"messages\nHi\n", "D055", "line 2", r"must be a list"),
    ("NUL in a cell", "bad.csv", b"prompt,completion\na,b\0\n", "D022", "line 2", r"holds a NUL"),
    ("old Mac line ends", "bad.csv", b"prompt,completion\ra,b\r", "D043", "", r"can't be read"),
    ("null in a column", "bad.parquet", lambda: parquet([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}]), "D054", "row 2", r"got null"),
    ("numbers in a column", "bad.parquet", lambda: parquet([{"prompt": 1, "completion": "b"}]), "D054", "row 1", r"got 1"),
    ("bytes in a column", "bad.parquet", lambda: parquet([{"prompt": b"a", "completion": "b"}]), "D054", "row 1", r"must hold a text"),
    ("role in a table", "bad.parquet", lambda: parquet([{"messages": [said("human", "a"), BOT]}]), "D062", "row 1", r'unknown role "human"'),
    ("no known column in parquet", "bad.parquet", lambda: parquet([{"a": "b"}]), "D051", "row 1", r'only \["a"\]'),
]  # fmt: skip

SHAPES = [
    *_table(
        "D050", "bad.jsonl",
        ("null", lines(GOOD, "null"), "line 2", r"got null"),
        ("a text", b'"x"', "line 1", r'got "x"'),
        ("a number", b"7", "line 1", r"got 7"),
        ("true", b"true", "line 1", r"got true"),
        ("a list as a row", lines(GOOD, b"[1]"), "line 2", r"got \[1\]"),
    ),
    *_table(
        "D051", "bad.jsonl",
        ("no columns", b"{}", "line 1", r"no 'messages' in this row"),
        ("text column", b'{"text": "Once"}', "line 1", r"Plain text has no turns"),
        ("preference data", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "line 1", r"preference data"),
        ("question and answer", b'{"question": "a", "answer": "b"}', "line 1", r"columns=\{"),
        ("capital Messages", b'{"Messages": []}', "line 1", r'only \["Messages"\]'),
        ("instruction alone", b'{"instruction": "a"}', "line 1", r'only \["instruction"\]'),
        ("prompt alone", b'{"prompt": "a"}', "line 1", r'only \["prompt"\]'),
        ("row without columns", lines(GOOD, b'{"id": 4}'), "line 2", r'only \["id"\]'),
    ),
    *_table(
        "D052", "bad.jsonl",
        ("messages and prompt", lines(GOOD, b'{"prompt": "a", "completion": "b"}'), "", r"line 1 is messages.*line 2 is prompt and completion"),
        ("ShareGPT and Alpaca", lines(b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}', b'{"instruction": "a", "output": "b"}'), "", r"ShareGPT.*Alpaca"),
        ("three forms", lines(GOOD, b'{"prompt": "a", "completion": "b"}', b'{"instruction": "a", "output": "b"}'), "", r"3 forms"),
    ),
    *_table(
        "D054", "bad.jsonl",
        ("null completion", b'{"prompt": "a", "completion": null}', "line 1", r"'completion' must hold a text, got null"),
        ("number as output", b'{"instruction": "a", "output": 4}', "line 1", r"'output' must hold a text, got 4"),
        ("prompt list, completion text", b'{"prompt": [], "completion": "b"}', "line 1", r"'prompt' must hold a text, got \[\]"),
        ("system as a list", b'{"prompt": "a", "completion": "b", "system": ["x"]}', "line 1", r"'system' must hold a text"),
        ("input as a number", b'{"instruction": "a", "input": 1, "output": "b"}', "line 1", r"'input' must hold a text"),
    ),
    *_table(
        "D055", "bad.jsonl",
        ("no messages in the list", b'{"messages": []}', "line 1", r"must be a list with at least one"),
        ("messages as a text", b'{"messages": "Hi"}', "line 1", r'got "Hi"'),
        ("messages null", b'{"messages": null}', "line 1", r"got null"),
        ("messages as an object", b'{"messages": {"role": "user", "content": "Hi"}}', "line 1", r"must be a list"),
        ("conversations as a text", b'{"conversations": "Hi"}', "line 1", r"'conversations' must be a list"),
        ("conversations empty", b'{"conversations": []}', "line 1", r"at least one"),
    ),
    *_table(
        "D057", "bad.jsonl",
        ("unknown speaker", b'{"conversations": [{"from": "bing", "value": "a"}]}', "line 1", r'unknown speaker "bing"'),
        ("speaker null", b'{"conversations": [{"from": null, "value": "a"}]}', "line 1", r"unknown speaker null"),
        ("speaker in capitals", b'{"conversations": [{"from": "Human", "value": "a"}]}', "line 1", r"Known: human"),
    ),
    *_table(
        "D058", "bad.jsonl",
        ("history of texts", b'{"instruction": "a", "output": "b", "history": ["x"]}', "line 1", r"list of pairs"),
        ("history of threes", b'{"instruction": "a", "output": "b", "history": [["x", "y", "z"]]}', "line 1", r"list of pairs"),
    ),
    ("empty instruction", "bad.jsonl", b'{"instruction": " ", "output": "b"}', "D065", "line 1", r"'instruction' is empty"),
    ("empty completion", "bad.jsonl", b'{"prompt": "a", "completion": ""}', "D065", "line 1", r"'completion' is empty"),
    ("ShareGPT without value", "bad.jsonl", b'{"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}', "D063", "line 1", r"message 1: it has no 'content'"),
    ("ShareGPT assistant first", "bad.jsonl", b'{"conversations": [{"from": "gpt", "value": "b"}]}', "D072", "line 1", r"user message first"),
    ("ShareGPT call without JSON", "bad.jsonl", b'{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f()"}]}', "D021", "line 1", r"near 'f\(\)'"),
    ("messages with from", "bad.jsonl", b'{"messages": [{"from": "human", "value": "a"}]}', "D061", "line 1", r"name the column 'conversations'"),
    ("prompt of messages without answer", "bad.jsonl", b'{"prompt": [{"role": "user", "content": "a"}], "completion": []}', "D071", "line 1", r"no assistant message"),
]  # fmt: skip

MESSAGES = [
    *_table(
        "D060", "bad.jsonl",
        ("message as a text", row("Hi"), "line 1", r"message 1: expected an object"),
        ("message null", row(USER, None), "line 1", r"message 2: expected an object"),
        ("message as a pair", row(["user", "Hi"]), "line 1", r'got \["user", "Hi"\]'),
    ),
    ("no role", "bad.jsonl", row({"content": "Hi"}, BOT), "D061", "line 1", r"message 1: it has no 'role'"),
    *_table(
        "D062", "bad.jsonl",
        ("human", lines(GOOD, row(said("human", "Hi"), BOT)), "line 2", r'message 1: unknown role "human"'),
        ("User", row(said("User", "Hi"), BOT), "line 1", r"in lower case"),
        ("role with a space", row(said("user ", "Hi"), BOT), "line 1", r'unknown role "user "'),
        ("role null", row(said(None, "Hi"), BOT), "line 1", r"unknown role null"),
        ("role as a list", row(said([], "Hi"), BOT), "line 1", r"unknown role \[\]"),
        ("role developer", row(said("developer", "x"), USER, BOT), "line 1", r'unknown role "developer"'),
        ("role function", row(USER, said("function", "x"), BOT), "line 1", r"message 2: unknown role"),
        ("role empty", row(said("", "x"), BOT), "line 1", r'unknown role ""'),
    ),
    ("no content", "bad.jsonl", row({"role": "user"}, BOT), "D063", "line 1", r"it has no 'content'"),
    ("text instead of content", "bad.jsonl", row(USER, {"role": "assistant", "text": "Hi"}), "D063", "line 1", r"message 2: it has no 'content'"),
    *_table(
        "D064", "bad.jsonl",
        ("content null", row(USER, said("assistant", None)), "line 1", r"message 2: 'content' must be a text, got null"),
        ("content a number", row(USER, said("assistant", 4)), "line 1", r"got 4"),
        ("content true", row(USER, said("assistant", True)), "line 1", r"got true"),
        ("content an object", row(said("user", {"text": "Hi"}), BOT), "line 1", r"message 1: 'content' must be a text"),
        ("content null with no calls", row(USER, {**CALL, "tool_calls": []}), "line 1", r"got null"),
        ("tool content an object", row(USER, CALL, {**ANSWER, "content": {"a": 1}}, BOT), "line 1", r"message 3"),
    ),
    *_table(
        "D065", "bad.jsonl",
        ("answer of white space", row(USER, said("assistant", " \n")), "line 1", r"this assistant message is empty"),
        ("empty question", row(said("user", ""), BOT), "line 1", r"this user message is empty"),
        ("no-break space only", row(said("user", "\u00a0"), BOT), "line 1", r"is empty"),
        ("empty list of parts", row(said("user", []), BOT), "line 1", r"is empty"),
    ),
    ("NUL, escaped", "bad.jsonl", row(said("user", "a\0b"), BOT), "D066", "line 1", r"holds a NUL"),
    *_table(
        "D067", "bad.jsonl",
        ("image part", row(said("user", [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]), BOT), "line 1", r'no text but "image_url"'),
        ("part without text", row(said("user", [{"type": "text"}]), BOT), "line 1", r"message 1: a part"),
        ("part as a text", row(USER, said("assistant", ["Hi"])), "line 1", r'message 2: .* "Hi"'),
    ),
    *_table(
        "D068", "bad.jsonl",
        ("train as a text", row(USER, {**BOT, "train": "false"}), "line 1", r'must be true or false, got "false"'),
        ("train as a number", row(USER, {**BOT, "train": 1}), "line 1", r"without quotes"),
        ("weight of a half", row(USER, {**BOT, "weight": 0.5}), "line 1", r"must be 0 or 1, got 0.5"),
        ("weight of two", row(USER, {**BOT, "weight": 2}), "line 1", r"got 2"),
        ("weight true", row(USER, {**BOT, "weight": True}), "line 1", r"got true"),
        ("train on a question", row({**USER, "train": False}, BOT), "line 1", r"a user message can't be marked"),
        ("weight on a system", row({**SYSTEM, "weight": 0}, USER, BOT), "line 1", r"a system message can't be marked"),
        ("train against weight", row(USER, {**BOT, "train": True, "weight": 0}), "line 1", r"contradict"),
    ),
    ("thought as a list", "bad.jsonl", row(USER, {**BOT, "reasoning_content": ["Hm"]}), "D069", "line 1", r"'reasoning_content' must be a text"),
    ("thinking as a number", "bad.jsonl", row(USER, {**BOT, "thinking": 3}), "D069", "line 1", r"'thinking' must be a text"),
    *_table(
        "D070", "bad.jsonl",
        ("two systems", row(SYSTEM, SYSTEM, USER, BOT), "line 1", r"at place 2"),
        ("system in the middle", row(USER, SYSTEM, BOT), "line 1", r"at place 2"),
        ("system at the end", row(USER, BOT, SYSTEM), "line 1", r"at place 3"),
    ),
    *_table(
        "D071", "bad.jsonl",
        ("question alone", row(USER), "line 1", r"nothing to learn"),
        ("system alone", row(SYSTEM), "line 1", r"nothing to learn"),
        ("system and question", lines(GOOD, "", row(SYSTEM, USER)), "line 3", r"Add the answer"),
    ),
    *_table(
        "D072", "bad.jsonl",
        ("assistant first", row(BOT, USER), "line 1", r"user message first, got 'assistant'"),
        ("assistant alone", row(BOT), "line 1", r"Start the chat with a user message"),
        ("assistant after the system", row(SYSTEM, BOT, USER, BOT), "line 1", r"user message first"),
    ),
    ("question last", "bad.jsonl", row(USER, BOT, USER), "D073", "line 1", r"the last message is the user's"),
    ("tool last", "bad.jsonl", row(USER, CALL, ANSWER), "D073", "line 1", r"the last message is the tool's"),
    *_table(
        "D074", "bad.jsonl",
        ("two questions", row(USER, USER, BOT), "line 1", r"messages 1 and 2 are both from the user"),
        ("two answers", row(SYSTEM, USER, BOT, BOT), "line 1", r"messages 3 and 4 are both from the assistant"),
        ("two questions later", row(USER, BOT, USER, USER, BOT), "line 1", r"messages 3 and 4"),
    ),
    ("nothing marked", "bad.jsonl", row(USER, {**BOT, "train": False}), "D075", "line 1", r"no assistant message is marked"),
    ("all weights 0", "bad.jsonl", row(USER, {**BOT, "weight": 0}, USER, {**BOT, "weight": 0}), "D075", "line 1", r"to be learned"),
]  # fmt: skip

TOOLS = [
    *_table(
        "D080", "bad.jsonl",
        ("calls as an object", row(USER, {**CALL, "tool_calls": {"name": "f"}}), "line 1", r"'tool_calls' must be a list"),
        ("call as a text", row(USER, {**CALL, "tool_calls": ["f()"]}), "line 1", r"call 1: expected a function call"),
        ("call without function", row(USER, {**CALL, "tool_calls": [{"id": "1", "name": "f"}]}), "line 1", r"A call is"),
        ("call of another type", row(USER, calling(type="code")), "line 1", r"expected a function call"),
    ),
    ("call without a name", "bad.jsonl", row(USER, calling(name="")), "D081", "line 1", r"'name' must be a text"),
    ("call with a number as name", "bad.jsonl", row(USER, calling(name=7)), "D081", "line 1", r"got 7"),
    *_table(
        "D082", "bad.jsonl",
        ("arguments not JSON", row(USER, calling(arguments="a=1")), "line 1", r"'arguments' are a text but not valid JSON"),
        ("arguments cut", row(USER, calling(arguments='{"a": ')), "line 1", r"message 2: call 1"),
        ("arguments a list", row(USER, calling(arguments=[1])), "line 1", r"must be an object, got \[1\]"),
        ("arguments the text of a list", row(USER, calling(arguments="[1]")), "line 1", r"must be an object"),
        ("arguments missing", row(USER, calling(arguments=None)), "line 1", r"got null"),
        ("arguments with a key twice", row(USER, calling(arguments='{"a": 1, "a": 2}')), "line 1", r"'a' stands twice"),
    ),
    ("id a number", "bad.jsonl", row(USER, calling(id=1)), "D083", "line 1", r"'id' must be a text, got 1"),
    ("id twice", "bad.jsonl", row(USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}), "D083", "line 1", r"the same id"),
    *_table(
        "D084", "bad.jsonl",
        ("tool without a call", row(USER, ANSWER, BOT), "line 1", r"message 2: a tool message that answers no call"),
        ("tool first", row(ANSWER, BOT), "line 1", r"message 1"),
        ("tool too many", row(USER, CALL, ANSWER, ANSWER, BOT), "line 1", r"message 4"),
    ),
    ("unknown id", "bad.jsonl", row(USER, CALL, {**ANSWER, "tool_call_id": "c9"}, BOT), "D085", "line 1", r'no open call has the id "c9"'),
    *_table(
        "D086", "bad.jsonl",
        ("call not answered", row(USER, CALL, USER, BOT), "line 1", r"message 3: calls before it without an answer: 1"),
        ("call then answer", row(USER, CALL, BOT), "line 1", r"answered by a tool message"),
    ),
    *_table(
        "D087", "bad.jsonl",
        ("tools not JSON", row(USER, BOT, tools="f, g"), "line 1", r"'tools' is a text but"),
        ("tools as an object", row(USER, BOT, tools={"name": "f"}), "line 1", r"must be a list of functions"),
        ("tool without a name", row(USER, BOT, tools=[{"type": "function", "function": {}}]), "line 1", r"functions with names"),
    ),
    ("user calls", "bad.jsonl", row({**USER, "tool_calls": CALL["tool_calls"]}, BOT), "D088", "line 1", r"a user message can't have"),
]  # fmt: skip

BAD = [*JSON_TEXT, *LISTS, *FILES, *TABLES, *SHAPES, *MESSAGES, *TOOLS]


def _form(**columns):
    return json.dumps(columns).encode()


def _turns(*pairs, **extra):
    return _form(conversations=[{"from": who, "value": what} for who, what in pairs], **extra)


SHAREGPT = _turns(("human", "a"), ("gpt", "b"))
VALID = [  # (name, file name, bytes, number of chats)
    ("byte-order mark", "good.jsonl", b"\xef\xbb\xbf" + GOOD, 1),
    ("CRLF", "good.jsonl", GOOD + b"\r\n" + GOOD + b"\r\n", 2),
    ("blank lines", "good.jsonl", b"\n\n" + GOOD + b"\n \t\n" + GOOD + b"\n\n\n", 2),
    ("no line end at the end", "good.jsonl", lines(GOOD, GOOD), 2),
    ("spaces around", "good.jsonl", b"  " + GOOD + b"  \n", 1),
    ("spaces before colons", "good.jsonl", TEXT.replace('":', '" :').encode(), 1),
    ("colon in quotes", "good.jsonl", row(said("user", 'Say ":" or "a": b'), said("assistant", ':"')), 1),
    ("ending .json, lines", "good.json", lines(GOOD, GOOD), 2),
    ("ending .ndjson", "good.ndjson", lines(GOOD, GOOD), 2),
    ("ending .txt", "good.txt", lines(GOOD, GOOD), 2),
    ("no ending", "good", GOOD, 1),
    ("list in one line", "good.json", b"[" + GOOD + b"," + GOOD + b"]", 2),
    ("list, indented", "good.json", json.dumps([json.loads(GOOD)] * 3, indent=2).encode(), 3),
    ("list with mark", "good.json", b"\xef\xbb\xbf \n[" + GOOD + b"]\n", 1),
    ("list in an object", "good.json", json.dumps({"train": [json.loads(GOOD)] * 2}, indent=2).encode(), 2),
    ("list in an object in one line", "good.json", b'{"data":[' + GOOD + b"]}", 1),
    ("objects, indented", "good.json", b"\n".join([json.dumps(json.loads(GOOD), indent=2).encode()] * 2), 2),
    ("list in .jsonl", "good.jsonl", b"[" + GOOD + b"]", 1),
    ("gzip", "good.jsonl.gz", gzip.compress(lines(GOOD, GOOD)), 2),
    ("gzip in two parts", "good.jsonl.gz", gzip.compress(GOOD + b"\n") + gzip.compress(GOOD), 2),
    ("gzip under another name", "good.jsonl", gzip.compress(GOOD), 1),
    ("not gzip after all", "good.jsonl.gz", GOOD, 1),
    ("bzip2", "good.jsonl.bz2", bz2.compress(GOOD), 1),
    ("packed list", "good.json.gz", gzip.compress(b"[" + GOOD + b"]"), 1),
    ("packed csv", "good.csv.gz", gzip.compress(b"prompt,completion\na,b\n"), 1),
    ("csv with semicolons", "good.csv", b"prompt;completion\na;b\n", 1),
    ("csv with line ends in cells", "good.csv", b'prompt,completion\r\n"a\r\nb",c\r\nd,"e ""f"""\r\n', 2),
    ("csv with blank lines and mark", "good.csv", b"\xef\xbb\xbfprompt,completion\n\na,b\n\n", 1),
    ("tsv", "good.tsv", b"prompt\tcompletion\na, b\tc\n", 1),
    ("csv with messages", "good.csv", b'messages,id\n"' + GOOD[13:-1].replace(b'"', b'""') + b'",7\n', 1),
    ("csv with a long cell", "good.csv", b"prompt,completion\n" + b"a" * 300_000 + b",b\n", 1),
    ("parquet", "good.parquet", lambda: parquet([{"messages": [USER, BOT]}, {"messages": [USER, CALL, ANSWER, BOT]}]), 2),
    ("parquet under another name", "good.jsonl", lambda: parquet([{"prompt": "a", "completion": "b"}]), 1),
    ("ShareGPT", "good.jsonl", lines(SHAREGPT, _turns(("system", "s"), ("user", "a"), ("assistant", "b"))), 2),
    ("ShareGPT with roles", "good.jsonl", _form(conversations=[USER, BOT]), 1),
    ("ShareGPT with calls", "good.jsonl", _turns(("human", "a"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "4"), ("gpt", "b"), tools="[]"), 1),
    ("ShareGPT with a system column", "good.jsonl", _turns(("human", "a"), ("gpt", "b"), system="s"), 1),
    ("Alpaca", "good.json", json.dumps([{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b"}]).encode(), 2),
    ("Alpaca with history", "good.jsonl", _form(instruction="a", input=None, output="b", history=[["c", "d"]], system="s"), 1),
    ("prompt and completion", "good.jsonl", _form(prompt="a", completion="b"), 1),
    ("prompt of messages", "good.jsonl", _form(prompt=[SYSTEM, USER], completion=[BOT]), 1),
    ("messages beside a prompt", "good.jsonl", lines(row(USER, BOT, prompt="a", completion="b"), row(USER, BOT, prompt="x")), 2),
    ("text parts", "good.jsonl", row(said("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), BOT), 1),
    ("empty system", "good.jsonl", row(said("system", ""), USER, BOT), 1),
    ("empty tool answer", "good.jsonl", row(USER, CALL, {**ANSWER, "content": ""}, BOT), 1),
    ("call at the end", "good.jsonl", row(USER, CALL), 1),
    ("two calls, answered in another order", "good.jsonl", row(USER, {**CALL, "tool_calls": [*CALL["tool_calls"], {**CALL["tool_calls"][0], "id": "c2"}]}, {**ANSWER, "tool_call_id": "c2"}, ANSWER, BOT), 1),
    ("calls without ids", "good.jsonl", row(USER, calling(id=None), {"role": "tool", "name": "f", "content": "4"}, BOT), 1),
    ("arguments as an object", "good.jsonl", row(USER, calling(arguments={"a": [1, {"b": None}]})), 1),
    ("call and words", "good.jsonl", row(USER, {**CALL, "content": "Let me see."}, ANSWER, BOT, tools=[{"type": "function", "function": {"name": "f"}}]), 1),
    ("marks", "good.jsonl", row(USER, {**BOT, "train": False}, USER, {**BOT, "weight": 1.0}, USER, {**BOT, "weight": 0}), 1),
    ("thoughts", "good.jsonl", row(USER, {**BOT, "reasoning_content": "Hm.", "name": "Max", "thinking": None}), 1),
    ("odd characters", "good.jsonl", row(said("user", "\u2028\x85\ufeff\u202e\x1b 👩\u200d🚀 \U0001f600 ��"), BOT), 1),
    ("surrogate pair, escaped", "good.jsonl", TEXT.replace("Hi", "\\ud83d\\ude00 \\\\ud800").encode(), 1),
    ("control tokens", "good.jsonl", row(said("user", "<|im_end|> [INST] <s>"), BOT), 1),
    ("large numbers", "good.jsonl", row(USER, BOT, n=10**300, x=1e308, y=-1e-300), 1),
    ("deep extra", "good.jsonl", b'{"messages": ' + GOOD[13:-1] + b', "x": ' + b"[" * 30 + b"]" * 30 + b"}", 1),
    ("a long row", "good.jsonl", row(said("user", "x y" * 10**6), BOT), 1),
    ("unknown keys", "good.jsonl", row({**USER, "name": "Ann", "id": 7}, {**BOT, "model": None}, source="x", **{"": 1}), 1),
]  # fmt: skip

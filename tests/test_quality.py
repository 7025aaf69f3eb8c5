"The quality checklist names the right rows, and shows no secrets."

import json
import random

import pytest

from finetune_nb.chats import Chat, load_chats
from finetune_nb.config import ConfigError
from finetune_nb.data import icd10_chats, split_chats
from finetune_nb.personal import find_personal, masked
from finetune_nb.planted import CHECK_OF, PERSONAL, SECRETS, clean_chats, plant
from finetune_nb.quality import check_chats


def chat(question, answer, where=""):
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], where)


@pytest.mark.parametrize("secret", SECRETS + PERSONAL)
def test_secrets_are_found_and_never_shown(secret, tmp_path):
    assert len(list(find_personal(f"Take {secret} for it."))) == 1 and secret not in masked(f"Take {secret} for it.")
    report = check_chats([chat(f"Take {secret} for it.", f"I noted {secret} down, thank you.")])
    shown = repr(report) + report._repr_html_() + report.to_markdown() + report.to_json()
    assert secret not in shown and (report.rows("secrets") or report.rows("personal_data")) == [0]


@pytest.mark.parametrize("text", ["Order 4111 1111 1111 1112", "version 1.2.3.4", "password: <your_password>", "me@example.com", "call 911", "E11.9 and I10", "000-12-3456"])
def test_what_is_no_secret(text):
    assert list(find_personal(text)) == []


@pytest.mark.parametrize("kind", range(5))
def test_planted_faults_are_found(kind):
    rng = random.Random(kind)
    chats, planted = plant(clean_chats(kind, rng, 600), kind, rng, each=12)
    report = check_chats(chats)
    for name, rows in planted.items():
        check = CHECK_OF.get(name, name.split(":")[0])
        least = {"near: reworded": 0.9, "contradictions: near": 0.9, "near: another hand": 0.6}.get(name, 1.0)
        assert len(rows & set(report.rows(check))) >= least * len(rows), name
    everything = set().union(*planted.values())
    near = set(report.rows("near_duplicates")) | set(report.rows("near_contradictions"))
    assert len(near - everything) <= 0.1 * len(near)


def test_a_clean_set_comes_out_clean():
    report = check_chats(icd10_chats().train, max_length=512)
    assert [f.check for f in report if f.severity != "note"] == []


def test_the_whole_prompt_is_the_question():
    def talk(system):
        return Chat([{"role": "system", "content": system}, *chat("And now what follows?", system + " it is.").messages])

    assert not check_chats([talk("Speak of winter weather"), talk("Write about summer holidays")])["contradictions"]


def test_rows_leave_and_stay():
    chats = [chat("What is the way to Rome?", "Go south."), chat("What is the way to Rome?", "Go south."), chat("Who are you?", "Sorry, no idea.")]
    report = check_chats(chats)
    assert report.without("exact_duplicates").removed == chats[1:2] and report.only("refusals").chats == chats[2:]
    assert "1 of 3" in report.without("exact_duplicates").summary
    with pytest.raises(ConfigError, match="near_duplicates"):
        report.rows("duplicates")


def test_reports_are_written(tmp_path):
    report = check_chats([chat("<script>x</script>", "I'm sorry <b>you</b> | no", "<i>a</i>")])
    assert "<script>x" not in report._repr_html_() and "<b>you" not in report._repr_html_() and "<i>a" not in report._repr_html_()
    assert json.loads(report.save(tmp_path / "r.json").read_text())["chats"] == 1
    assert report.save(tmp_path / "r.html").read_text().startswith("<!doctype")
    with pytest.raises(ConfigError, match=r"\.md"):
        report.save(tmp_path / "r.txt")


def test_lengths_tell_lost_answers():
    report = check_chats([chat("word " * 90, "Yes."), chat("Hi there", "word " * 90), chat("Hi", "Yes.")], max_length=60)
    assert "(estimated from words, without what a chat template adds)" in report["tokens"].message
    assert report["lengths"].message.startswith("The median answer has ")
    assert report.rows("tokens") == [0, 1] and "1 would lose" in report["tokens"].message and report["tokens"].severity == "error"


def test_patterns_and_schemas():
    chats = [chat("a", '{"x": 1}'), chat("b", '{"x": "1"}'), chat("c", "no")]
    assert check_chats(chats, pattern=r"\{.*\}").rows("pattern") == [2]
    pytest.importorskip("jsonschema")
    assert check_chats(chats, schema={"properties": {"x": {"type": "number"}}}).rows("schema") == [1, 2]


def test_what_cannot_be_checked():
    with pytest.raises(ConfigError, match="no chats"):
        check_chats([])
    with pytest.raises(ConfigError, match="regular expression"):
        check_chats([chat("a", "b")], pattern="(")


def talk(*turns, **extra):
    messages = [t if isinstance(t, dict) else {"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    return Chat(messages, "", extra)


REST = [chat(f"Where is house number {i} of the old town?", f"It stands behind tower {i * 7}.") for i in range(40)]


@pytest.mark.parametrize(
    ("check", "asked", "answer"),
    [
        ("refusals", "Write a poem about the sea", "I must decline."),
        ("refusals", "Write a poem about the sea", "I don't feel comfortable with that"),
        ("boilerplate", "Write a poem about the sea", "As a language model, I think it is blue."),
        ("echoes", "What is the tallest hill in town", "What is the tallest hill in town"),
        ("cut_off", "Say the thing about lamps", "This answer stops in the"),
        ("pattern", "Say the thing about lamps", "Seven"),
    ],
)
def test_every_answer_that_is_learned_is_looked_at(check, asked, answer):
    turns = (asked, answer, "Then the weather?", "It is sunny outside.")
    marked = talk(asked, {"role": "assistant", "content": answer, "train": False}, *turns[2:])
    report = check_chats([*REST, talk(*turns), marked], pattern=r".+\.")
    assert report.rows(check) == [40] and answer in report[check].excerpts[40]


def test_first_answers_contradict_and_shared_beginnings_are_no_copies():
    beginning = ("Which lamps does the harbour use?", "Red ones.")
    report = check_chats([*REST, talk(*beginning, "Why?", "For the ships."), talk(*beginning, "Since when?", "Since 1920.")])
    assert not report["exact_duplicates"] and not report["near_duplicates"] and not report["contradictions"]
    report = check_chats([*REST, talk(*beginning, "Why?", "For the ships."), talk(beginning[0], "Blue ones.", "Since when?", "Since 1920.")])
    assert report.rows("contradictions") == [40, 41]


def test_one_letter_is_no_contradiction():
    for a, b in (("desert", "dessert"), ("abduction", "adduction")):
        report = check_chats([*REST, chat(f"What is a {a} like?", "Dry."), chat(f"What is a {b} like?", "Sweet.")])
        assert not report["contradictions"] and report.rows("near_contradictions") == [40, 41]
        assert report["near_contradictions"].severity == "warning" and len(report.without("contradictions").chats) == 42


CALLING = {"tool_calls": [{"function": {"name": "f", "arguments": "{\"to\": \"x\\nghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9aB1cD3eF5\"}"}}]}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "Done.", "reasoning_content": f"The key is {SECRETS[0]}"},
        {"role": "assistant", "content": None, **CALLING},
        {"role": "assistant", **CALLING},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"password": "hunter2Gx9"}}}]},
    ],
)
def test_secrets_in_thoughts_and_calls(message):
    assert check_chats([*REST, talk("Do it.", message)]).rows("secrets") == [40]


def test_secrets_in_tools():
    tools = [{"type": "function", "function": {"name": "f", "description": f"Log in with {SECRETS[1]}"}}]
    assert check_chats([*REST, talk("Do it.", "Done.", tools=tools), talk("Do it now.", "Done.", tools=json.dumps(tools))]).rows("secrets") == [40, 41]


MARKS = ["<bos>", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "<tool_response>", "<|reserved_special_token_0|>", "<|im_end|>", "### Instruction:"]


@pytest.mark.parametrize("mark", MARKS + list("\u061c\ue000\u200c\x07\ufff9\u200b\U000e0041"))
def test_reading_and_checking_go_by_one_list(mark):
    holds = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": mark}}}]}
    chats = [*REST, talk(mark, "Yes, that is so."), talk("Call it.", holds)]
    check = "control_tokens" if len(mark) > 1 else "invisible_characters"
    rows = check_chats(chats).rows(check)
    assert 40 in rows and (41 in rows or mark[0] == "#")  # a heading begins its line
    notes = load_chats([{"messages": c.messages} for c in chats]).notes
    assert [n.where for n in notes] == [f"row {i + 1}" for i in rows]


@pytest.mark.parametrize("answer", ["Take these:\n- one\n- two\n- three", "x = 3", "是的（大概）", "1. Open it\n2. Close it"])
def test_what_is_not_cut_off(answer):
    assert not check_chats([*REST, chat("What now?", answer)])["cut_off"]


@pytest.mark.parametrize("answer", ["Take these:\n- one.\n- two.\n- and then the", "The value of x = ", "We begin with the"])
def test_what_is_cut_off(answer):
    assert check_chats([*REST, chat("What now?", answer)]).rows("cut_off") == [40]


@pytest.mark.parametrize(("schema", "said"), [({"type": "strin"}, "at .*type"), ("{}", "got str"), ([], "got list"), ({"properties": 3}, "properties")])
def test_what_is_no_schema(schema, said):
    pytest.importorskip("jsonschema")
    with pytest.raises(ConfigError, match=f"schema: .*{said}"):
        check_chats([chat("a", "b")], schema=schema)


PHONES = ["030 1234567", "0171/1234567", "0171/123456", "020 7946 0958", "555.123.4567", "00491711234567", "(030) 1234567", "+49 30 901820"]
KEYS = [
    "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "glpat-" + "aB3dE5gH7jK9mN1pQ3sT", "npm_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9aB1cD3eF5",
    "SG." + "aB3dE5gH7jK9mN1pQ3sT5v.aB3dE5gH7jK9mN1pQ3sT5vW7yZ9aB1cD3eF5gH7jK9m", "Bearer " + "abcdef1234567890abcdef1234567890",
    "wJalrXUtnFEMI/K7MDENG/" + "bPxRfiCYEXAMPLEKEY", "postgres://user:" + "Sup3rS3cret@db.host/x",
]  # fmt: skip


@pytest.mark.parametrize("text", [*PHONES, *KEYS, "de89 3704 0044 0532 0130 00"])
def test_more_shapes_of_secrets(text):
    [found] = find_personal(f"Take {text} for it.")
    hidden = text[found.start - 5 : found.end - 5]
    assert hidden in text and len(hidden) > 8 and hidden not in masked(f"Take {text} for it.")
    assert (found.kind in ("phone number", "IBAN")) == (text not in KEYS)


def test_a_password_in_an_address_is_no_mail_address():
    report = check_chats([chat("Connect to postgres://user:Sup3rS3cret@db.host.org/x and mail anna.berg@clinic.org", "Done.")])
    assert report["secrets"].excerpts == {0: "password in an address ••••••"} and report["personal_data"].bars == [("e-mail address", 1)]
    assert "Sup" not in repr(report) + report.to_json()


@pytest.mark.parametrize(
    "text",
    ["0101 1010 0110", "at 0900-1700", "postgres://user:password@host/x", "commit 3f2a9c0b1d4e5f60718293a4b5c6d7e8f9012345", "src/components/MyWidget/index2/definitions", "Bearer of bad news", "0.123 456 789"],
)
def test_more_that_is_no_secret(text):
    assert list(find_personal(text)) == []


def test_what_is_kept_and_removed_is_named():
    report = check_chats([chat("What is this?", "I'm sorry, no.", "a, line 1"), chat("And what is that?", "A lamp.", "a, line 2")])
    assert report.only("refusals").summary == "only refusals: 1 of 2 chats kept. Kept: a, line 1"
    assert report.without("refusals").summary == "without refusals: 1 of 2 chats removed, 1 left. Removed: a, line 1"
    one = repr(check_chats([chat("What is this?", "A lamp.")]))
    assert "1 chat checked" in one and "1 distinct opening (" in one and "1 chats" not in one


def test_markdown_is_escaped_everywhere():
    systems = ["<script>alert(1)</script>", "<img src=x onerror=alert(2)>"]
    chats = [Chat([{"role": "system", "content": systems[i % 2]}, *chat(f"Question {i}?", "Yes.").messages], f"<b>{i}") for i in range(30)]
    text = check_chats(chats).to_markdown()
    assert "&lt;script" in text and not any(tag in text for tag in ("<script", "<img", "<b>"))


def test_contradictions_are_found_at_every_turn():
    same = ("Which lamps does the harbour use?", "Red ones.", "And who made all of them?")
    marked = {"role": "assistant", "content": "Nobody.", "train": False}
    report = check_chats([*REST, *(talk(*same, answer, "Is that so?", "Yes.") for answer in ("Nobody.", "The smith of the town."))])
    assert report.rows("contradictions") == [40, 41]
    assert not check_chats([*REST, talk(*same, marked, "Is that so?", "Yes."), talk(*same, "The smith of the town.")])["contradictions"]


def test_a_second_process_finds_the_same(monkeypatch):
    from finetune_nb import quality

    chats = [*clean_chats(0, random.Random(0), 60), *clean_chats(0, random.Random(0), 10)]
    alone = check_chats(chats)
    monkeypatch.setattr(quality, "MANY", 1)
    assert check_chats(chats).to_json() == alone.to_json()


def test_what_is_left_is_a_list_of_chats_and_whole_groups_are_shown():
    chats = [Chat([{"role": "user", "content": q}, {"role": "assistant", "content": a}], f"a, line {i}") for i, (q, a) in enumerate([("How far is the station?", "Two miles."), ("When does the shop open?", "At nine."), ("Who wrote this letter?", "The postman.")] * 3, 1)]
    report = check_chats(chats)
    left = report.without("exact_duplicates")
    assert list(left) == left.chats == chats[:3] and left.removed == chats[3:] and repr(left).startswith("without exact_duplicates: 6 of 9")
    assert [chat.answer for chat in check_chats(left).chats] == ["Two miles.", "At nine.", "The postman."]
    said = repr(report)
    assert all(f"a, line {i}: [1]" in said for i in (1, 4, 7)) and "a, line 2" not in said and "… and 6 more" in said and "--save report.html" in said
    assert "--without exact_duplicates --save-chats FILE" in said


def test_the_reports_say_what_they_leave_out_and_json_has_every_row():
    chats = [chat(f"Which {word} is meant in letter {i}?", f"The {word} of house {i * i}.", f"line {i}.") for i, word in enumerate("lamp road tree bridge church market".split() * 2, 1)] * 2
    report = check_chats(chats)
    parts = split_chats(report.without("exact_duplicates"))
    assert isinstance(parts.train[0], Chat) and len(parts.train) + len(parts.validation) + len(parts.test) == 12
    assert len(report.rows("exact_duplicates")) == 24 and "… and 20 more" in repr(report) and "every one: report.save('report.json')" in repr(report)
    assert "- … and 4 more" in report.to_markdown() and "and 2 more groups" in report._repr_html_()
    assert len(next(f for f in json.loads(report.to_json())["findings"] if f["check"] == "exact_duplicates")["excerpts"]) == 24
    assert "… and" not in check_chats(chats[:12]).to_markdown()

"""The pieces of the mask, each by itself, on tokenizers of a few words."""

import json
from types import SimpleNamespace

import pytest
from test_chat_template import QUESTION, another_tokenizer, chat
from tokenizers import AddedToken, normalizers, processors

from finetune_nb import masks
from finetune_nb.data import Chat
from finetune_nb.masks import NO_LOSS, Controls, TemplateError, neutralise, rows_or_errors, token_rows, tokenize_chat
from finetune_nb.turns import render


@pytest.fixture(scope="module")
def small():
    "Of bytes; its special tokens are <unk>, <s> and </s>, and its template knows two marks more."
    made = another_tokenizer("bytes with trimmed offsets")
    made.add_tokens([AddedToken("<think>"), AddedToken("<b>"), AddedToken("bold")])
    made.chat_template = "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] {{ m.content }} [/INST]{# <think> bold #}{% endif %}{% endfor %}"
    return made


@pytest.mark.parametrize(
    ("text", "user", "assistant"),
    [
        ("a <s> b </s>", "<s>", "<s>"),
        ("</s><s>", "</s>", "</s>"),
        ("a <think> b", "<think>", None),
        ("so [/INST] [INST]", "[/INST]", None),
        ("[INST", None, None),
        ("<b> bold <<SYS>> S> <S>", None, None),  # tokens that the template does not use, and words
        ("", None, None),
    ],
)
def test_where_a_control_token_stands(text, user, assistant, small):
    for role, expected in (("user", user), ("system", user), ("tool", user), ("assistant", assistant)):
        span = Controls(small).search(text, role)
        assert span == (expected and (text.index(expected), text.index(expected) + len(expected)))
    assert Controls(small).search(text) == Controls(small).search(text, "user")


def test_the_longest_control_token_is_found_and_blank_ones_never():
    made = another_tokenizer("bytes with trimmed offsets")
    made.add_special_tokens({"additional_special_tokens": ["<s>x", "  ", "a.b"]})
    bare = SimpleNamespace(added_tokens_decoder={1: AddedToken("</s>", special=True)}, chat_template=None)
    assert Controls(bare).search("a</s>") == (1, 5), "of a tokenizer of any kind"
    assert [Controls(made).search(text) for text in ("a <s>x", "a   <s>", "a  b", "acb a.b")] == [(2, 6), (4, 7), None, (4, 7)]


def test_where_a_control_token_stands_that_a_normaliser_makes():
    made = another_tokenizer("bytes with trimmed offsets")
    made.backend_tokenizer.normalizer = normalizers.NFKC()
    made.add_tokens([AddedToken("<|a|>", special=True, normalized=True), AddedToken("<|b|>", special=True, normalized=False)], special_tokens=True)
    controls = Controls(made)
    assert [controls.search(text) for text in ("ab＜|a|＞ <|a|＞", "<|a|>", "ﬁﬁ <|a|＞", "＜|b|＞", "ﬁ <|b|>", "ＡＢ")] == [(2, 7), (0, 5), (3, 8), None, (2, 7), None]


CALL_OF_S = {"function": {"name": "f", "arguments": '{"a": "\\u003cs>", "n": 1}'}, "id": "1"}


@pytest.mark.parametrize(
    ("messages", "tools", "found"),
    [
        ([{"role": "user", "content": "a <s>"}], None, "message 1: the content contains '<s>'"),
        ([QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "</s>"}], None, "message 2: the reasoning content contains '</s>'"),
        ([QUESTION, {"role": "assistant", "content": None, "thinking": "</s>"}], None, "message 2: the thinking contains '</s>'"),
        ([QUESTION, {"role": "tool", "content": "a", "name": "x<s>"}], None, "message 2: the name contains '<s>'"),
        ([QUESTION, {"role": "tool", "content": "a", "tool_call_id": "<unk>"}], None, "message 2: the tool call id contains '<unk>'"),
        ([QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL_OF_S]}], None, "message 2: the tool calls contains '<s>'"),
        ([QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL_OF_S["function"]]}], None, "message 2: the tool calls contains '<s>'"),
        ([QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "<s>"}}]}], None, "message 2: the tool calls contains '<s>'"),
        ([QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "<s>", "arguments": " "}}, {"function": {"name": "<s>", "arguments": "{"}}]}], None, "message 2: the tool calls contains '<s>'"),
        ([QUESTION, {"role": "assistant", "content": "<think>"}], [{"name": "é<think>"}], ": the description of a tool contains '<think>'"),
    ],
)
def test_each_place_for_a_control_token_is_looked_at_and_mended(messages, tools, found, small):
    controls, one = Controls(small), Chat(messages, "c, line 7", {"tools": tools, "id": 1} if tools else {"id": 1})
    said = controls.find(one)
    assert said.startswith(f"c, line 7{'' if found[0] == ':' else ', '}{found}, a control token of this model") and 'set control_tokens to "neutralise"' in said
    clear = neutralise(one, controls)
    assert controls.find(clear) is None and neutralise(clear, small) is clear and (clear.where, clear.extra["id"], set(clear.extra)) == (one.where, 1, set(one.extra))

    def plain(value):
        return json.dumps(value, ensure_ascii=False).replace("\\\\u003c", "<").replace(" ", "")

    assert plain([clear.messages, clear.extra]) == plain([one.messages, one.extra])
    assert [m.keys() for m in clear.messages] == [m.keys() for m in messages]


def test_only_what_holds_a_control_token_is_changed(small):
    kept = {"function": {"name": "f", "arguments": '{"a":1}'}}
    deep = {"arguments": {"<s>k": ["</s>", 1, None, {"a": "b <s> <s>"}]}, "name": "f"}
    messages = [{"role": "user", "content": "<s>", "train": True}, {"role": "assistant", "content": None, "tool_calls": [kept, deep]}]
    clear = neutralise(Chat(messages, "c", {"x": "<s>"}), small)
    assert clear.messages[0] == {"role": "user", "content": "< s>", "train": True} and clear.messages[1]["tool_calls"][0] is kept
    assert clear.messages[1]["tool_calls"][1] == {"arguments": {"< s>k": ["< /s>", 1, None, {"a": "b < s> < s>"}]}, "name": "f"}
    assert clear.messages[1]["content"] is None and clear.extra == {"x": "<s>"} and messages[0]["content"] == "<s>", "what was given stays as it was"
    for find, place in ((masks._broken, ["a§b"]), (masks._broken_call, {"function": {"name": "f", "arguments": '{"a": "§"}'}})):
        with pytest.raises(TemplateError, match="^here: the control token '§' can't be broken"):
            find(place, lambda text: (text.index("§"), text.index("§") + 1) if "§" in text else None, "here")
    with pytest.raises(TemplateError, match="^here: the control token '§' can't be broken by a space. Remove it"):
        masks._broken_text("a§b", lambda text: (text.index("§"), text.index("§") + 1) if "§" in text else None, "here")
    with pytest.raises(TemplateError, match="^here: the control token 'a ' can't be broken by a space. Remove it"):
        masks._broken_text("ab", lambda text: (0, 2) if text.replace(" ", "") == "ab" else None, "here")


def test_batches_of_any_size_give_the_same(small, monkeypatch):
    several = [chat("a", "b"), chat("<s>", "b"), chat("yes", "no", "what", "hello"), chat("x </s>", "y"), Chat([QUESTION, {"role": "assistant", "content": "!", "train": False}], "c, line 3"), chat("hello", "there")]
    for control in ("raise", "neutralise"):
        alone = [list(rows_or_errors([one], small, control_tokens=control))[0] for one in several]
        assert [isinstance(rows, TemplateError) for rows in alone] == [False, control == "raise", False, control == "raise", True, False]
        assert str(alone[4]) == "c, line 3: no answer of this chat is marked for training (train_on='all'). Mark one, or remove the chat."
        for size in (1, 2, 4, 256):
            monkeypatch.setattr(masks, "BATCH", size)
            together = list(rows_or_errors(several, small, control_tokens=control))
            assert [str(rows) for rows in together] == [str(rows) for rows in alone]
        with pytest.raises(TemplateError, match="line 5, message 1: the content contains '<s>'" if control == "raise" else "no answer of this chat"):
            list(token_rows(several, small, control_tokens=control))
    assert [len(rows) for rows in token_rows(several[::5], small)] == [1, 1] and list(rows_or_errors([], small)) == []


def test_a_row_is_cut_where_it_was_asked_for(small):
    one = chat("what", "yes", "hello", "no")
    whole = tokenize_chat(one, small)
    ids, labels = whole["input_ids"], whole["labels"]
    first = next(i for i, label in enumerate(labels) if label != NO_LOSS)
    assert first > 1 and len(ids) == len(labels) == len(small(one.messages and render(one.messages, small), add_special_tokens=False)["input_ids"])
    for n in range(first + 1, len(ids) + 2):
        assert tokenize_chat(one, small, n) == {"input_ids": ids[:n], "labels": labels[:n]}
    with pytest.raises(TemplateError, match=f"^chats.jsonl, line 5: no token of this chat carries loss within max_length={first}, .*Raise max_length"):
        tokenize_chat(one, small, first)
    assert [label for label in tokenize_chat(one, small, None, "last")["labels"] if label != NO_LOSS] == labels[-labels[::-1].index(NO_LOSS) :]


@pytest.mark.parametrize("trimmed", [False, True])
def test_which_token_begins_at_a_character(trimmed):
    made = another_tokenizer("bytes with trimmed offsets")
    made.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    text = "hello there\n\nno  yes é</s> \n"
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    whole = another_tokenizer("bytes with trimmed offsets")
    whole.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    spans = whole.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    for position in range(len(text)):
        got, inside = masks._token_at(encoding, text, position), next(token for token, (_, end) in enumerate(spans) if end > position)
        begun = [token for token, (start, _) in enumerate(spans[: inside + 1]) if not text[start:position].strip()]  # less white space
        assert got in (begun if trimmed else begun[-1:]) or got is None and not begun, (position, text[position:])
    assert masks._token_at(encoding, text, len(text)) is None


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(TemplateError, match="^SimpleNamespace can't tell which characters a token stands for; load the fast tokenizer"):
        masks._Encoder(SimpleNamespace(is_fast=False))


def test_a_row_of_two_tokens_is_learned_from_and_one_of_one_is_not():
    "The first token is predicted from nothing, so its label carries no loss."
    made = another_tokenizer("bytes with trimmed offsets")
    made.chat_template = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    made.add_tokens(["?"])
    one = chat("?", "yes")
    whole = tokenize_chat(one, made)
    assert whole["labels"][0] == NO_LOSS != whole["labels"][1]
    assert tokenize_chat(one, made, 2)["labels"] == whole["labels"][:2]
    with pytest.raises(TemplateError, match="carries loss within max_length=1"):
        tokenize_chat(one, made, 1)


def test_the_variables_of_a_template_reach_the_rows(small):
    made = another_tokenizer("bytes with trimmed offsets")
    made.chat_template = "{{ style }}" + small.chat_template
    plain, named = (next(token_rows([chat("a", "b")], made, chat_template_kwargs=kwargs))[0]["input_ids"] for kwargs in (None, {"style": "hello"}))
    assert made.decode(named) == "hello" + made.decode(plain)
    assert tokenize_chat(chat("a", "b"), made, chat_template_kwargs={"style": "hello"})["input_ids"] == named


def test_an_end_of_turn_that_is_no_token_is_told_with_its_message(small):
    encoder, turn = masks._Encoder(small), SimpleNamespace(start=0, end=10, message=1)
    row = SimpleNamespace(text="hello yes.", turns=[turn])
    with pytest.raises(TemplateError, match="^chats.jsonl, line 5, message 2: 'hello yes.' is not one token, so no turn can end in it"):
        encoder._whole(row, encoder.encode([row.text])[0], chat("hello", "yes."))
    turn.start, turn.end, row.text = 15, 31, "the code is J20 yes it is hello there. hello"
    with pytest.raises(TemplateError, match="^chats.jsonl, line 5, message 2: ' is hello th' is not one token"):
        encoder._whole(SimpleNamespace(text=row.text, turns=[SimpleNamespace(start=0, end=34, message=1)]), encoder.encode([row.text])[0], chat("hello", "yes."))
    with pytest.raises(TemplateError, match=r"^chats.jsonl, line 5, message 2: one token of this model stands across the end of the prompt and the beginning of the answer \('ode is J20', ' yes it is'\)\. Remove the white space"):
        encoder._cut(row, turn, chat("hello", "yes."))
    turn.start = 4
    with pytest.raises(TemplateError, match=r"\('the ', 'code is J2'\)"):
        encoder._cut(row, turn, chat("hello", "yes."))


def test_nothing_is_added_to_a_text():
    made = another_tokenizer("bytes with trimmed offsets")
    plain = made("hello there")["input_ids"]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert made("hello there")["input_ids"] == [1, *plain, 2]
    encoder = masks._Encoder(made)
    assert [encoding.ids for encoding in encoder.encode(["hello there", ""])] == [plain, []] and encoder.ids("hello there") == plain and encoder.ids("") == []


TURNS = "{% for m in messages %}<s>{{ m.role }}FILL\n{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistantFILL\n{% endif %}"


@pytest.mark.parametrize(("fill", "kept"), [(0, True), (89, True), (90, False)])
def test_a_prompt_is_not_tokenised_again_where_a_special_token_parts_it(fill, kept, monkeypatch):
    "Only what stands between that and the answer is, once; a long header is no header."
    made, asked, real = another_tokenizer("bytes with trimmed offsets"), [], masks._Encoder.ids
    made.add_tokens(["x" * 89, "x" * 90])
    made.chat_template = TURNS.replace("FILL", "x" * fill)
    monkeypatch.setattr(masks._Encoder, "ids", lambda self, text: asked.append(text) or real(self, text))
    several = [chat("what " * 99, "yes", "no " * 99, "hello"), chat("hello", "there")]
    rows = list(token_rows(several, made))
    header = f"assistant{'x' * fill}\n"
    assert asked[:1] == [header] if kept else header not in asked
    assert len(asked) == (1 if kept else 3) and all(text.endswith(header) for text in asked)
    assert [made.decode([label for label in row["labels"] if label != NO_LOSS]) for (row,) in rows] == ["yes</s>hello</s>", "there</s>"]
    assert [row["input_ids"] for (row,) in rows] == [made(render(one.messages, made), add_special_tokens=False)["input_ids"] for one in several]

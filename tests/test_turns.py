"""The pieces that find the assistant's turns, each by itself and without a template."""

import json
from types import SimpleNamespace

import pytest
from jinja2 import TemplateSyntaxError
from test_chat_template import small_tokenizer

from finetune_nb import turns
from finetune_nb.data import Chat
from finetune_nb.turns import Row, Shape, Skeleton, Template, Turn, merge_system, rows_of, trained_turns

USER, BOT = {"role": "user", "content": "q?"}, {"role": "assistant", "content": "a"}


def test_arguments_become_objects_and_texts():
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": None, "function": {"name": "f", "arguments": '{"é": 1}'}}, {"name": "g", "arguments": {"b": 2}}, {"function": {"name": "h"}}, {"arguments": " "}]}]
    before = json.dumps(messages)
    _, answer = turns._as_objects(messages)
    assert answer == {"role": "assistant", "tool_calls": [{"id": None, "function": {"name": "f", "arguments": {"é": 1}}}, {"name": "g", "arguments": {"b": 2}}, {"function": {"name": "h"}}, {"arguments": " "}]}, "and a template would write None"
    _, answer = turns._as_texts(messages)
    assert answer["tool_calls"] == [{"id": None, "function": {"name": "f", "arguments": '{"é": 1}'}}, {"name": "g", "arguments": '{"b": 2}'}, {"function": {"name": "h"}}, {"arguments": " "}]
    assert turns._as_texts([{"role": "assistant", "tool_calls": [{"arguments": {"é": 1}}]}])[0]["tool_calls"] == [{"arguments": '{"é": 1}'}]
    assert json.dumps(messages) == before and turns._as_objects([USER, BOT]) == [USER, BOT]


@pytest.mark.parametrize(
    ("error", "system", "said"),
    [
        (ValueError("no"), False, "the chat template refuses this chat: no. Change the chat"),
        (ValueError("no!"), True, "the chat template refuses this chat: no! Change the chat"),
        (ValueError(), False, "the chat template refuses this chat: ValueError. Change the chat"),
        (ValueError("Conversation ROLES must Alternate?"), True, "the chat template refuses this chat: Conversation ROLES must Alternate? It has no place for a system message"),
        (ValueError("roles must alternate"), False, "the chat template refuses this chat: roles must alternate. Change the chat"),
        (TemplateSyntaxError("bad", 7), True, "the chat template has an error in line 7, whatever the chat: bad"),
    ],
)
def test_why_a_template_refuses(error, system, said):
    assert turns._reason(error, [{"role": "system", "content": "s"}] * system + [USER]).startswith(said)


def test_where_two_texts_part_is_shown():
    assert turns._changed("a" * 30 + "b" * 50, "a" * 30 + "c") == (
        f"the chat template changes the answer: …{'a' * 20 + 'b' * 40!r}… became …{'a' * 20 + 'c'!r}. Its loss mask could not be trusted; use a template that keeps answers."
    )
    assert turns._around("x" * 60, 20) == repr("x" * 60) and turns._around("x" * 61, 20) == repr("x" * 60) + "…" and turns._around("x" * 61, 21) == "…" + repr("x" * 60)
    assert turns._changed("a", "", "name").startswith("the chat template changes the name: 'a' became ''.")


@pytest.mark.parametrize(
    ("message", "probed", "parts"),
    [
        (BOT, {"content": "zq0xj"}, [("content", "a")]),
        ({"role": "assistant", "content": " \n a b\n", "reasoning_content": "c"}, {"content": " \n zq0xj\n", "reasoning_content": "zq1xj"}, [("content", "a b"), ("reasoning_content", "c")]),
        ({"role": "assistant", "content": " \n"}, {"content": " \n"}, []),
        ({"role": "assistant", "content": None, "reasoning": 7}, {"content": None, "reasoning": 7}, []),
        ({"role": "assistant", "content": "\n<think>\nx\n</think>\n\ny"}, {"content": "\n<think>\nzq0xj\n</think>\n\nzq1xj"}, [("reasoning in the content", "x"), ("content", "y")]),
        ({"role": "assistant", "content": "<think></think>y"}, {"content": "<think></think>zq0xj"}, [("content", "y")]),
        ({"role": "assistant", "content": "z<think>x</think>"}, {"content": "zq0xj"}, [("content", "z<think>x</think>")]),
        ({"role": "assistant", "content": "<think>x</think>y", "thinking": "<think>x</think>y"}, {"content": "<think>zq0xj</think>zq1xj", "thinking": "zq2xj"}, [("reasoning in the content", "x"), ("content", "y"), ("thinking", "<think>x</think>y")]),
    ],
)
def test_a_probe_stands_in_place_of_each_text(message, probed, parts):
    before = dict(message)
    assert turns._with_probes(message) == (message | probed, parts) and message == before


def test_the_forms_of_a_value():
    assert list(turns._leaves({"a": [1, {"b": None}], "c": {}})) == ["a", 1, "b", None, "c"]
    assert turns._letters(" a\tb\n c ") == "abc"
    assert set(turns._forms('é "x"')) == {'é"x"', 'é\\"x\\"', '\\u00e9\\"x\\"', 'é\\\\\\"x\\\\\\"'.replace("é", "\\u00e9"), '\\\\u00e9\\\\\\"x\\\\\\"'}
    assert set(turns._forms(1.5)) == {"1.5"} and set(turns._forms(None)) == {"None", "null"} and set(turns._forms(True)) == {"True", "true"}
    assert turns._words('{"a_b": "\\u00e9t\\u00E9\\n3\\tx-y"}') == {"a_b", "été", "3", "x", "y"}


@pytest.mark.parametrize(
    ("call", "written", "lost"),
    [
        ({"name": "f", "arguments": '{"k": "a b"}'}, 'f{"k":"ab"}', []),
        ({"name": "f", "arguments": {"k": ["a b", 2]}}, "f<k>ab</k>2", []),
        ({"name": "f", "arguments": {"k": 2}}, "f<k>", [("the arguments of a tool call", '{"k": 2}')]),
        ({"name": "f", "arguments": '{"é": 2}'}, "f2", [("the arguments of a tool call", '{"é": 2}')]),
        ({"name": "f f", "arguments": {}}, "ff", []),
        ({"name": "f", "arguments": None}, "g", [("the name of a tool call", "f")]),
        ({"name": "f", "arguments": " "}, "g", [("the name of a tool call", "f")]),
        ({"name": "f", "arguments": {"é": True}}, "k2", [("the name of a tool call", "f"), ("the arguments of a tool call", '{"é": true}')]),
    ],
)
def test_what_of_a_call_is_lost(call, written, lost):
    for one in (call, {"function": call}):
        assert turns._lost_calls({"tool_calls": [one]}, written) == lost
        assert turns._lost_calls({"tool_calls": [one, one]}, written) == lost * 2
    assert turns._lost_calls({"tool_calls": None}, "") == turns._lost_calls({}, "") == []


def test_which_answers_are_trained():
    chat = Chat([USER, BOT, USER, BOT | {"train": False}, USER, BOT | {"weight": 1}, USER, BOT])
    assert [trained_turns(chat, how) for how in ("all", "marked", "last")] == [[1, 5, 7], [5], [7]] and trained_turns(chat) == [1, 5, 7]
    assert [trained_turns(Chat(chat.messages[:n]), "last") for n in (1, 2, 4, 6)] == [[], [1], [], [5]]


def test_a_skeleton_is_filled_and_hollow():
    skeleton = Skeleton([1, 0], ["<", "|", ">"])
    messages = [{"content": " a "}, {"content": None}]
    assert skeleton.filled(messages, str) == "<| a >" and skeleton.filled(messages, str.strip) == "<|a>"
    call = {"id": "x", "function": {"name": "f", "arguments": {"a": 1}, "more": 1}}
    message = {"role": "assistant", "content": " b", "tool_calls": [call, {"name": "g", "arguments": None}]}
    assert turns._hollow(message, 3) == {"role": "assistant", "content": "zq3xj", "tool_calls": [{"id": "x", "function": {"name": "zq3c0nxj", "arguments": {"zq3c0kxj": "zq3c0vxj"}, "more": 1}}, {"name": "zq3c1nxj", "arguments": None}]}
    assert turns._hollow({"role": "user", "content": " "}, 0) == {"role": "user", "content": " "}
    assert turns._kind(message) == ("assistant", True, "role", "content", "tool_calls", True, False) and turns._kind({"role": "user", "content": " "}) == ("user", False, "role", "content")


def test_messages_stand_in_order():
    def check(prompt, *messages, order=None):
        return turns._check_in_order(Chat(list(messages), "c"), len(messages), Skeleton(order or range(len(messages)), []), prompt)

    one, two, tool = {"role": "user", "content": "a b"}, {"role": "user", "content": "c"}, {"role": "tool", "content": '{"x": 1}'}
    check("<ab> <c>", one, two)
    check("c a b", one, two, order=[1, 0])
    check("ab c", one, {"role": "assistant", "content": "<think>x</think>c"})
    check("ab {'x': 1}", one, tool), check('ab {"x":1}', one, tool), check("ab", one, {"role": "assistant", "content": None})
    for prompt, messages, lost in (("c ab", (one, two), "message 2: the chat template leaves out or changes this user message ('c'). Use another template"), ("c", (one, two), "message 1: .*"), ("ab <think>x</think>", (one, two), "message 2")):
        with pytest.raises(turns.TemplateError) as caught:
            check(prompt, *messages)
        assert str(caught.value).startswith("c, " + lost.removesuffix(".*"))
    with pytest.raises(turns.TemplateError, match="message 2: .*this tool message"):
        check("ab x", one, tool)
    calling = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    check("ab f", one, calling)
    with pytest.raises(turns.TemplateError, match="message 2: the chat template leaves out or changes this assistant message with its tool calls. Use another"):
        check("ab", one, calling)
    with pytest.raises(turns.TemplateError, match=r"message 1: .* this system message \('s'\). Put its text in front of the first user message"):
        check("", {"role": "system", "content": "s"})


def test_a_system_message_goes_in_front_of_the_question():
    chats = [Chat([{"role": "system", "content": "s"}, {"role": "user", "content": "q", "name": "n"}, BOT], "c, line 1", {"id": 1}), Chat([USER, BOT])]
    merged = merge_system(iter(chats))
    assert merged[0] == Chat([{"role": "user", "content": "s\n\nq", "name": "n"}, BOT], "c, line 1", {"id": 1}) and merged[1] is chats[1]


@pytest.mark.parametrize(("gap", "asked", "header"), [("\n", False, ""), (" \n", True, ""), ("BOT: ", False, "BOT: "), ("BOT: ", True, "")])
def test_a_header_is_what_is_written_without_being_asked(gap, asked, header):
    assert Shape(gap, "</s>", asked).header == header


def test_marks_that_do_not_fit_are_shown():
    row = Row("q" * 10 + "a" * 50, (Turn(1, 10, 60, 10),))
    said = turns._not_marked(Chat([USER, BOT], "c, line 3"), row.turns[0], row, "do not lie on this answer")
    assert said == f"c, line 3, message 2: the {{% generation %}} marks of the chat template do not lie on this answer ({'a' * 40!r}). Correct the template, or remove the marks from it."


@pytest.mark.parametrize(
    ("template", "longer", "shorter", "upto", "said"),
    [
        ("", "q a", "q \n", "q", r"The generation prompt ends in '\\n'"),
        ("", "q <bot>a", "q <bot><think>", "q", "If the template opens a block of reasoning"),
        ("{{ strftime_now('%H:%M') }}", "at 12:31 q <bot>a", "at 12:30 q <bot>", "at 12:31 q", "The template writes the time of day"),
        ("{{ now }}", "at 12:31 q <bot>a", "at 12:30 q <bot>", "at 12:31 q", "The header of the answer differs"),
        ("{{ strftime_now('%H:%M') }}", "at 12:31 q <bot>a", "at 12:30 q <BOT>", "at 12:31 q", "The header of the answer differs"),
        ("{{ strftime_now('%H:%M') }}", "at noon, <bot>a", "at 12:30 q <bot>", "at 12:31 q", "The template drops or rewrites earlier messages"),
    ],
)
def test_what_to_do_about_a_prompt_that_is_no_beginning(template, longer, shorter, upto, said):
    asked = []
    fake = SimpleNamespace(tokenizer=SimpleNamespace(chat_template=template), upto=lambda *given: asked.append(given) or upto)
    one = Chat([USER, BOT])
    assert turns._to_agree(fake, one, 1, longer, shorter).startswith(said.replace("\\\\", "\\")) and all(given == (one, 1, False) for given in asked)


def test_the_rows_are_of_the_answers_that_were_asked_for():
    made = small_tokenizer("bytes with trimmed offsets")
    made.chat_template = "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    one = Chat([USER, BOT, USER, BOT | {"train": False}])
    for train_on in ("all", "last"):
        found = [turn.message for row in rows_of(one, made, train_on) for turn in row.turns]
        assert found == trained_turns(one, train_on)


def test_a_skeleton_is_kept_by_the_tools_of_a_chat_too():
    made = small_tokenizer("bytes with trimmed offsets")
    made.chat_template = "{% if tools %}TOOLS {% endif %}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    template, tools = Template(made), [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    texts = [turns._skeleton(template, Chat([USER], "", {"tools": given} if given else {}), 1).pieces for given in (None, tools, None)]
    assert texts[0] == texts[2] != texts[1] and texts[1][0].startswith("TOOLS")

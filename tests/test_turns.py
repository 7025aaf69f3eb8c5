"""The pieces that find the assistant's turns, each by itself and without a template."""

import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
from jinja2 import TemplateSyntaxError
from test_chat_template import another_tokenizer
from tokenizers import AddedToken

from finetune_nb import turns
from finetune_nb.data import Chat
from finetune_nb.sandbox import TemplateLimit
from finetune_nb.turns import Row, Shape, Skeleton, Template, Turn, merge_system, render_prompt, rows_of, trained_turns

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
        (ValueError("XX"), False, "the chat template refuses this chat: XX. Change the chat"),
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
    made = another_tokenizer("bytes with trimmed offsets")
    made.chat_template = "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    one = Chat([USER, BOT, USER, BOT | {"train": False}])
    assert rows_of(Chat([USER, BOT]), Own(), chat_template_kwargs={"end": "</s>!"})[0].text.endswith("a</s>!")
    for train_on in ("all", "last"):
        found = [turn.message for row in rows_of(one, made, train_on) for turn in row.turns]
        assert found == trained_turns(one, train_on)


def test_a_skeleton_is_kept_by_the_tools_of_a_chat_too():
    made = another_tokenizer("bytes with trimmed offsets")
    made.chat_template = "{% if tools %}TOOLS {% endif %}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    template, tools = Template(made), [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    texts = [turns._skeleton(template, Chat([USER], "", {"tools": given} if given else {}), 1).pieces for given in (None, tools, None)]
    assert texts[0] == texts[2] != texts[1] and texts[1][0].startswith("TOOLS")
    own, more = Template(Own()), [{"name": "g"}]
    assert [turns._skeleton(own, Chat([USER], "", {"tools": given}), 1).pieces[0] for given in (TOOLS, more, TOOLS)] == [f"{given}user: " for given in (TOOLS, more, TOOLS)]


class Own:
    "A tokenizer that renders by code of its own, as some do; keeps what it was asked for."

    chat_template, added_tokens_decoder = "of its own", {1: AddedToken("</s>", special=True), 2: AddedToken("</call>", special=True), 3: AddedToken("user")}

    def __init__(self, write=None, most=9):
        self.write, self.most, self.asked = write or spoken, most, []

    def apply_chat_template(self, chats, tokenize, **options):
        self.asked.append((len(chats), options))
        if len(chats) > self.most:
            raise RuntimeError("too much")
        return [self.write(messages, **options) for messages in chats]


def spoken(messages, add_generation_prompt=False, tools=None, end="</s>\n", gap="", prompt="assistant: ", **more):
    "As many a template writes it."
    said = (f"{m['role']}: " + (gap + m["content"] + end if m["role"] == "assistant" else m["content"] + "\n") for m in messages)
    return f"{tools or ''}" + "".join(said) + prompt * add_generation_prompt


def raising(error, when):
    "Writes as `spoken`, and raises where a content is `when`."

    def write(messages, **options):
        if any(m["content"] == when for m in messages):
            raise error
        return spoken(messages, **options)

    return write


def refused(said, work, *given, **more):
    "The work ends in a `TemplateError` that begins with these words."
    with pytest.raises(turns.TemplateError) as caught:
        work(*given, **more)
    assert str(caught.value).startswith(said), str(caught.value)


TOOLS = [{"name": "f"}]


def test_many_chats_are_rendered_at_once_and_a_fault_is_told_by_the_place_of_its_own():
    bad, half = {"role": "user", "content": "bad"}, {"role": "user", "content": "a \udc00"}
    texts, both = ["[{'name': 'f'}]user: q?\nassistant: ", "[{'name': 'f'}]assistant: a!assistant: "], [([USER], "first"), ([BOT], "second")]
    own = Own(raising(ValueError("no"), "bad"))
    assert turns._render_many(both, own, True, TOOLS, {"end": "!"}) == texts == turns._render_many(both, Own(most=1), True, TOOLS, {"end": "!"})
    assert turns.render([USER], own, True, TOOLS, {"end": "!"}) == texts[0] and turns.render([USER], own) == "user: q?\n"
    options = {"add_generation_prompt": True, "tools": TOOLS, "end": "!"}
    assert own.asked == [(2, options), (1, options), (1, {"add_generation_prompt": False, "tools": None})]
    for one, said in ((bad, "the chat template refuses this chat: no. Change"), (half, "the text that the chat template writes holds '\\udc00', which is half a character")):
        refused(f"here: {said}", turns._render_many, [([USER], "there"), ([one], "here"), ([BOT], "nowhere")], own, False, None, None)
        refused(f"this chat: {said}", turns.render, [one], own)
        refused(f"here: {said}", turns.render, [one], own, where="here")
    limit = Own(raising(TemplateLimit("The chat template ran away."), "bad"))
    refused("first or a chat after it: The chat template ran away.", turns._render_many, [*both, ([bad], "third")], limit, False, None, None)
    assert len(limit.asked) == 1, "and is not asked again"
    refused("here: The chat template ran away.", turns.render, [bad], limit, where="here")
    own.apply_chat_template = lambda *given, **more: []
    refused("here: the chat template refuses this chat: zip()", turns.render, [USER], own, where="here")


def calls_with(arguments, content=None):
    return {"role": "assistant", "content": content, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}, {"name": "g", "arguments": arguments}]}


def of_texts(messages, **options):
    "Writes arguments that are texts alone."
    return "".join((m.get("content") or "") + "".join(c["arguments"] + ";" for c in m.get("tool_calls", ())[1:]) for m in messages)


def test_a_template_that_wants_arguments_as_text_gets_them():
    own = Own(of_texts)
    for arguments in ({"é": 1}, '{"é": 1}'):
        assert turns.render([USER, calls_with(arguments)], own, True, TOOLS, {"x": 1}) == 'q?{"é": 1};'
        assert own.asked[-1] == (1, {"add_generation_prompt": True, "tools": TOOLS, "x": 1})

    def never(messages, **options):
        of_texts(messages)
        raise ValueError("never")

    refused("here: the chat template refuses this chat: never. Change", turns.render, [USER, calls_with({"é": 1})], Own(never), where="here")
    refused("here: the chat template refuses this chat: bare. Change", turns.render, [USER], Own(raising(TypeError("bare"), "q?")), where="here")
    own = Own(raising(ValueError("other"), None))
    refused("here: the chat template refuses this chat: other. Change", turns.render, [USER | {"content": None}], own, where="here")
    assert len(own.asked) == 1


@pytest.mark.parametrize(
    ("arguments", "content", "text", "again"),
    [
        ({"a": "é"}, None, "f {'a': 'é'}", True),
        ('{"a": "é"}', "x", "f {'a': 'é'}", True),
        ({"a": "b"}, "{'a': 'b'}", "{'a': 'b'} f {\"a\": \"b\"}", False),  # somebody wrote the like
        ({"a": "b"}, "{'a': 'b'}", "{'a': 'b'} f {'a': 'b'}", True),
        ({"a": "b"}, "", 'f {"a": "b"}', False),
        ([1, 2], "", "[1, 2]", False),
        ({}, "", "{}", False),
        (None, "", "None", False),
        (" ", "", "", False),
    ],
)
def test_arguments_that_were_written_as_python_are_written_as_json(arguments, content, text, again):
    own, messages = Own(of_texts), [USER, calls_with(arguments, content), {"role": "tool", "content": "t"}]
    for some in (messages, [USER, messages[1] | {"tool_calls": messages[1]["tool_calls"][:1]}], [*messages, BOT]):
        own.asked.clear()
        got = turns._without_python_objects(text, some, own, {"x": 1})
        assert got == (of_texts(turns._as_texts(some)) if again else text) and own.asked == [(1, {"x": 1})] * again
    assert turns._without_python_objects("None", [USER, BOT | {"tool_calls": None}, BOT | {"tool_calls": [{"name": "f"}]}], own, {}) == "None"


def headed(messages, add_generation_prompt=False, **options):
    "Writes the header of an answer with the answer alone."
    return spoken(messages, False, **options)


@pytest.mark.parametrize(
    ("write", "messages", "shape"),
    [
        (spoken, [USER, BOT], ("", "</s>", True)),
        (spoken, [BOT], ("", "</s>", True)),
        (headed, [USER, BOT], ("assistant: ", "</s>", False)),
        (headed, [BOT], ("assistant: ", "</s>", True)),  # there is no prompt that could have one
        (partial(spoken, gap="<think></think>", end=" [/A]</call></s>"), [USER, BOT, USER, BOT], ("<think></think>", " [/A]</call>", True)),
        (lambda messages, **more: spoken(messages, **more, end=f" by {messages[-1].get('name')}</s>" if not {"tool_calls", "thinking", "reasoning"} & messages[-1].keys() else ""),
         [USER, BOT | {"name": "n", "tool_calls": [1], "thinking": "t", "reasoning": None}], ("", " by n</s>", True)),
    ],
)  # fmt: skip
def test_the_shape_of_an_answer(write, messages, shape):
    template, one = Template(Own(write), {"x": 1}), Chat(messages, "c, line 2", {"tools": TOOLS})
    assert turns._find_shape(template, one, len(messages) - 1) == Shape(*shape)
    assert all(options["tools"] == TOOLS and options["x"] == 1 for _, options in template.tokenizer.asked)


@pytest.mark.parametrize(
    ("write", "content", "said"),
    [
        (lambda messages, add_generation_prompt, **more: spoken(messages, add_generation_prompt, prompt="bot: "), "a", "what the chat template writes before the answer when the model is to speak is not what it writes there in training: 'user: q?\\nbot: ' against 'user: q?\\nassistant: "),
        (lambda messages, **more: spoken(messages, **more).replace("Q", "q"), "a", "the chat template changes the answer: 'vexing jumbo' became 'vexing jumbo</s>\\n'"),
        (lambda messages, **more: spoken(messages, **more).replace("vexing jumbo", "vexing, jumbo"), "a", "the chat template changes the answer: 'vexing jumbo' became 'vexing, jumbo</s>\\n'"),
        (lambda messages, **more: spoken(messages[:-1], **more) + "assistant: " * (1 - more["add_generation_prompt"]) + messages[-1]["content"].upper() if messages[-1]["role"] == "assistant" else spoken(messages, **more), " a b", "the chat template changes the answer: ' a b' became ' A B'"),
        (partial(spoken, end="\n"), "a", "the chat template writes '\\n' after an answer and no special token, so the model would never learn to stop"),
    ],
)  # fmt: skip
def test_an_answer_without_a_shape_is_refused(write, content, said):
    one = Chat([USER, BOT | {"content": content}, USER, BOT], "c, line 2")
    refused(f"c, line 2, message 2: {said}", turns._find_shape, Template(Own(write)), one, 1)


def test_a_prompt_gets_the_header_that_a_template_leaves_out():
    own, given = Own(headed), (TOOLS, {"x": 1})
    assert render_prompt([USER], own, *given) == "[{'name': 'f'}]user: q?\nassistant: " and render_prompt([USER], Own(headed)) == "user: q?\nassistant: "
    assert all(options == {"tools": TOOLS, "x": 1, "add_generation_prompt": options["add_generation_prompt"]} for _, options in own.asked)
    own = Own()
    assert render_prompt([USER], own, *given) == "[{'name': 'f'}]user: q?\nassistant: " and [options["add_generation_prompt"] for _, options in own.asked] == [True, False]
    refused("the prompt, message 2: the chat template writes '\\n' after an answer", render_prompt, [USER], Own(partial(headed, end="\n")))


def test_what_a_template_will_be_asked_for_is_fetched_at_once():
    own = Own(raising(ValueError("no"), "bad"))
    one, two, tooled, bad = Chat([USER, BOT, USER, BOT]), Chat([USER, BOT], "two"), Chat([USER, BOT], "t", {"tools": TOOLS}), Chat([USER | {"content": "bad"}, BOT], "bad")
    template = Template(own, {"x": 1})
    template.fetch([(one, [1, 3]), (tooled, [1]), (two, [])])
    assert own.asked == [(2, {"add_generation_prompt": prompt, "tools": None, "x": 1}) for prompt in (False, True)]
    assert template.fetched == {(id(one), n, prompt): spoken(one.messages[:n], prompt) for n, prompt in ((2, False), (4, False), (1, True), (3, True))}
    assert template.upto(one, 2, False) == spoken([USER, BOT]) and len(own.asked) == 2
    assert template.upto(one, 2, True) == spoken([USER, BOT], True) and template.upto(tooled, 1, False) == spoken([USER], False, TOOLS) and len(own.asked) == 4
    found = list(template.rows([two, bad, one], "all"))
    assert [len(row.turns) for row in found[0] + found[2]] == [1, 2] and str(found[1]) == "bad: the chat template refuses this chat: no. Change the chat to what this model was taught, or use another template (tokenizer.chat_template)."
    assert [list(template.rows([Chat([USER, BOT, USER, BOT])], how))[0][0].turns[0].message for how in ("all", "last")] == [1, 3]

    def asked_alone(messages, add_generation_prompt, **more):
        return raising(ValueError("no"), "a")(messages, **more) if not add_generation_prompt else spoken(messages, True)

    template = Template(Own(asked_alone))
    template.fetch([(two, [1])])
    assert template.fetched == {(id(two), 1, True): "user: q?\nassistant: "}


def test_the_special_tokens_of_a_template():
    template = Template(Own())
    assert [template.first_control(text, start) for text, start in (("a</s>b</call>", 0), ("a</s>b</call>", 2), ("user", 0))] == [(1, 5), (6, 13), None]
    bare = Own()
    bare.added_tokens_decoder = {}
    assert Template(bare).first_control("</s>") is None
    bare.added_tokens_decoder = {1: AddedToken("<s", special=True), 2: AddedToken("<s.>", special=True)}
    assert Template(bare).first_control("<s.>") == (0, 4) and turns.control_tokens(bare) == {"<s": 1, "<s.>": 2}
    for text, marked in (("{% generation %}", True), ("{%- generation -%}", True), ("{%generation%}", True), ("generation", False), (None, False)):
        bare.chat_template = text
        assert Template(bare).marks_answers is marked


def test_where_an_answer_lies():
    template = Template(Own())
    one = Chat([USER, BOT, USER, BOT | {"content": " b "}])
    assert [turns._find_turn(template, one, i) for i in (1, 3)] == [Turn(1, 20, 25, 20), Turn(3, 46, 53, 46)] and len(template.shapes) == 1
    assert len(template.tokenizer.asked) == 2 + 4 + 2, "the shape is looked for once"
    template = Template(Own(headed))
    assert turns._find_turn(template, Chat([USER, BOT]), 1) == Turn(1, 20, 25, 9)
    template.shapes = [Shape(str(n), "</s>", True) for n in range(9)]
    template.tokenizer.write = partial(spoken, gap="<g>")
    assert turns._find_turn(template, Chat([USER, BOT]), 1) == Turn(1, 20, 28, 20)
    assert [shape.gap for shape in template.shapes] == ["<g>", *"0123456"], "the newest first, eight of them"
    turns._find_turn(template, Chat([USER, BOT | {"thinking": ""}]), 1)
    refused("c, message 2: what the chat template writes before the answer", turns._find_turn, Template(Own(lambda messages, add_generation_prompt, **more: spoken(messages, add_generation_prompt, prompt="bot: "))), Chat([USER, BOT], "c"), 1)


@pytest.mark.parametrize(
    ("text", "content", "found"),
    [
        ("pBOT: a </s>", "a ", (6, 12)), ("pBOT: a</s>", " a ", (6, 11)), ("pBOT: a </s>", " a ", (6, 12)), ("pBOT:  a</s>", " a ", (6, 12)), ("pBOT: a</s> more", "a", (6, 11)),
        ("pbot: a</s>", "a", None), ("pBOT: b</s>", "a", None), ("pBOT: a", "a", None), ("pBOT: ab</s>", "a", None),
    ],
)  # fmt: skip
def test_an_answer_fits_a_shape(text, content, found):
    assert turns._fits(Shape("BOT: ", "</s>", False), text, 1, content) == found
    assert turns._fits(Shape("BOT: ", "</s>", True), text, 1, content) == (found and (1, found[1]))


def called(messages, add_generation_prompt=False, end="</s>", **more):
    "Writes calls, with an end of their own, and reasoning."
    def said(m):
        calls = "".join(f"<{c['name']} {json.dumps(c['arguments'], ensure_ascii=False)}>" for c in m.get("tool_calls") or ())
        return f"[{m.get('thinking')}]" * bool(m.get("thinking")) + (m.get("content") or "") + (calls + "</call>" if calls else end)

    return "".join(f"{m['role']}: {said(m) if m['role'] == 'assistant' else m['content']}\n" for m in messages) + "assistant: " * add_generation_prompt


def test_where_an_answer_lies_that_is_put_together():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"é": 1}}]}
    thought = BOT | {"thinking": "hm"}
    for message, end in ((call, len('<f {"é": 1}></call>')), (call | {"content": "so "}, len('so <f {"é": 1}></call>')), (thought, len("[hm]a</s>"))):
        for before, start in (([USER], 20), ([USER, BOT, USER], 46)):
            assert turns._find_turn(Template(Own(called)), Chat([*before, message], "c"), len(before)) == Turn(len(before), start, start + end, start)
    shape, ask = Shape("", "</s>", True), "user: q?\nassistant: "
    for tail, said in (("</s> and", "goes on with ' and'"), (" and", "goes on with 'a and'"), ("</call> and", "goes on with 'a</call> and'")):
        with pytest.raises(turns.TemplateError, match="^c, message 2: this turn does not end in '</s>' but " + said + ", so the model would stop too early. Split the message in several"):
            turns._find_loosely(Template(Own()), Chat([USER, BOT], "c"), 1, shape, ask, ask + "a" + tail)
    for tail, end in (("</s></call>\n", 25), ("</call>\n", 28), ("</s> </call>", 25)):
        assert turns._find_loosely(Template(Own(partial(spoken, end=tail))), Chat([USER, BOT], "c"), 1, shape, ask, ask + "a" + tail) == Turn(1, 20, end, 20)
    bare = partial(headed, end="</s>")
    header = Shape("assistant: ", "</s>", False)
    assert turns._find_loosely(Template(Own(bare)), Chat([USER, BOT], "c"), 1, header, "user: q?\n", ask + "a</s>") == Turn(1, 20, 25, 9)
    assert turns._find_loosely(Template(Own(lambda messages, **more: bare(messages).replace("assistant: ", ""))), Chat([USER, BOT], "c"), 1, header, "user: q?\n", "user: q?\na</s>") == Turn(1, 9, 14, 9)


@pytest.mark.parametrize(
    ("message", "write", "said"),
    [
        ({"thinking": "hm"}, spoken, "the chat template leaves out thinking ('hm'). Use a template that knows it, or remove it from the data."),
        ({"thinking": "x" * 50}, spoken, f"the chat template leaves out thinking ({'x' * 40!r}). Use"),
        ({"content": "a b", "thinking": "hm"}, lambda messages, **more: called(messages, **more).replace("hm", "Hm"), "the chat template changes the answer: '[hm]a b</s>\\n' became '[Hm]a b</s>\\n'"),
        ({"tool_calls": [{"name": "f", "arguments": {"é": 1}}]}, lambda messages, **more: called(messages, **more).replace("é", ""), "the chat template leaves out the arguments of a tool call ('{\"é\": 1}')"),
        ({"content": None, "tool_calls": [{"name": "f", "arguments": {}}]}, lambda messages, **more: called(messages, **more).replace("f", ""), "the chat template leaves out the name of a tool call ('f')"),
    ],
)  # fmt: skip
def test_a_part_that_a_template_leaves_out_or_changes_is_missed(message, write, said):
    one = Chat([USER, BOT | message], "c, line 2")
    text = write(one.messages)
    refused(f"c, line 2, message 2: {said}", turns._check_parts, Template(Own(write)), one, 1, write([USER], add_generation_prompt=True), text)
    turns._check_parts(Template(Own(called)), one, 1, called([USER], True), called(one.messages))


def test_tools_that_a_template_does_not_write_are_missed():
    tools = [{"type": "function", "function": {"name": name}} for name in "fgh"] + [{"name": "k"}]
    one = Chat([USER, BOT], "c, line 2", {"tools": tools})

    def check(write, kwargs=None):
        template = Template(Own(write), kwargs)
        (row,) = turns._rows(template, one, [1])
        return row

    assert check(spoken).text.startswith("[{") and check(partial(spoken), {"end": "</s>!"}).text.endswith("!")
    said = "c, line 2: the chat template does not write the tools (f, g, h). Use a model that was taught tools."
    for write in (lambda messages, tools, **more: spoken(messages, **more), lambda messages, tools, **more: spoken(messages, tools=tools and tools[:3], **more), lambda messages, tools, **more: "f g h k " + spoken(messages, **more)):
        refused(said, check, write)


def test_what_stands_around_messages_is_asked_for_once():
    template = Template(Own(), {"x": 1})
    one, other = Chat([USER, BOT, USER, BOT]), Chat([USER | {"content": "x"}, BOT, USER, BOT])
    skeleton = turns._skeleton(template, one, 3)
    assert (skeleton.order, skeleton.pieces, skeleton.lost) == ([0, 1, 2], ["user: ", "\nassistant: ", "</s>\nuser: ", "\nassistant: "], None)
    assert turns._skeleton(template, other, 3) is skeleton and len(template.tokenizer.asked) == 1 and template.tokenizer.asked[0][1]["x"] == 1
    assert turns._skeleton(template, other, 1) is not skeleton and len(template.skeletons) == 2
    for n in range(1000):
        template.skeletons[n] = skeleton
    turns._skeleton(template, Chat([BOT]), 1)
    assert len(template.skeletons) == 1, "they are not kept for ever"
    deaf = Template(Own(lambda messages, **more: spoken([m for m in messages if m["role"] != "tool"], **more)))
    assert turns._skeleton(deaf, Chat([USER, {"role": "tool", "content": "t"}, BOT]), 2).lost == 1
    for arguments, lost in ({"a": 1}, 1), ({}, None):
        assert turns._skeleton(Template(Own()), Chat([USER, BOT | {"tool_calls": [{"name": "f", "arguments": arguments}]} if arguments else BOT]), 2).lost == lost
    odd = turns._skeleton(Template(Own(raising(ValueError("no JSON"), "zq1xj"))), one, 2)
    assert (list(odd.order), list(odd.pieces), odd.lost) == ([0, 1], [""] * 3, None)


def test_a_message_before_the_answer_that_is_lost_is_missed():
    for write, said in ((lambda messages, **more: spoken([m for m in messages if m["content"] != "q?"], **more), "message 1: .* user message"), (lambda messages, **more: spoken(messages, **more).replace("zq0xj", ""), "message 1: .*leaves out or changes this user message \\('q\\?'\\)")):
        with pytest.raises(turns.TemplateError, match=f"^c, line 2, {said}"):
            turns._rows(Template(Own(write)), Chat([USER, BOT, USER | {"content": "w"}, BOT], "c, line 2"), [3])
    moved = Template(Own(lambda messages, **more: spoken([m | {"content": m["content"].strip()} for m in messages], **more)))
    (row,) = turns._rows(moved, Chat([USER | {"content": " q "}, BOT]), [1])
    assert row.text == "user: q\nassistant: a</s>\n"


def test_rows_are_as_few_as_hold_all_turns():
    def last_differs(messages, add_generation_prompt, **more):
        said = (spoken([m], end="</call>\n" if n == len(messages) else "</s>\n") for n, m in enumerate(messages, 1))
        return "".join(said) + "assistant: " * add_generation_prompt

    one = Chat([USER, BOT, USER, BOT, USER, BOT])
    assert [[turn.message for turn in row.turns] for row in turns._rows(Template(Own()), one, [1, 3, 5])] == [[1, 3, 5]]
    rows = turns._rows(Template(Own(partial(spoken, end="</s>"))), one, [1, 5])
    assert [[turn.message for turn in row.turns] for row in rows] == [[1, 5]] and rows[0].text == spoken(one.messages, end="</s>")
    rows = turns._rows(Template(Own(last_differs)), one, [1, 3, 5])
    assert [[turn.message for turn in row.turns] for row in rows] == [[1], [3], [5]] and [row.text.count("</call>") for row in rows] == [1, 1, 1]


MARKED = "{{ style }}{% for t in tools or [] %}{{ t.name }}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}BOT:ANSWER</s>{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def made():
    return another_tokenizer("bytes with trimmed offsets")


@pytest.mark.parametrize(
    ("answer", "message", "starts"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}", {"content": "a"}, [4]),
        (" so {% generation %}{{ m.content }}</s>{% endgeneration %}", {"content": "a"}, [8]),
        ("{% generation %}{{ m.content }}{% endgeneration %}", {"content": "<think>x</think>a"}, [4]),
        ("{% generation %}{{ m.content[:1] }}{% endgeneration %}{% generation %}{{ m.content[1:] }}{% endgeneration %}", {"content": "ab"}, [4]),
        ("{% generation %}k={{ m.tool_calls[0].arguments.k }}{{ m.tool_calls[0].name }}{{ 'no' if 'content' in m }}{% endgeneration %}", {"content": None, "tool_calls": [{"name": "f", "arguments": '{"k": "v"}'}]}, [4]),
        ("{{ m.thinking }}{% generation %}{{ m.content.split('</think>')[-1] }}{% endgeneration %}", {"content": "<think>x</think>a", "thinking": "hm"}, [6]),
    ],
)  # fmt: skip
def test_loss_begins_where_the_marks_of_a_template_do(answer, message, starts, made):
    made.chat_template = MARKED.replace("ANSWER", answer)
    one = Chat([USER, BOT | message, USER, BOT | message], "c", {"tools": [{"name": "tool"}]})
    template = Template(made, {"style": "S"})
    text = template.render(one.messages, False, one)
    assert text.startswith("Stool[INST]")
    found = [at.start() for at in re.finditer("BOT:", text)]
    row = Row(text, tuple(Turn(i, at, text.index("</s>", at) + 4, at) for i, at in zip((1, 3), found, strict=True)))
    marked = turns._by_marks(template, one, row)
    if not message.keys() - {"content"}:
        ((turn,),) = (found.turns for found in rows_of(Chat([USER, BOT]), made))
        assert turn.start == turn.prompt_end + starts[0], "also where it is looked for"
    assert marked == Row(text, tuple(Turn(turn.message, turn.prompt_end + starts[0], turn.end, turn.prompt_end) for turn in row.turns))


@pytest.mark.parametrize(
    ("answer", "message", "said"),
    [
        ("{{ m.content }}", {"content": "a"}, "do not lie on this answer ('BOT:a</s>')"),
        ("{% generation %}{{ m.content[:-1] }}{% endgeneration %}{{ m.content[-1:] }}", {"content": "x" * 50}, f"cover {'x' * 40!r} only, a part of this answer ('BOT:{'x' * 36}')"),
        ("{% generation %}{{ m.content }}{% endgeneration %}k={{ m.tool_calls[0].arguments.k }}f", {"content": "a", "tool_calls": [{"name": "f", "arguments": {"k": "v"}}]}, "cover 'a' only, a part of this answer"),
    ],
)  # fmt: skip
def test_marks_beside_an_answer_are_refused(answer, message, said, made):
    made.chat_template = MARKED.replace("ANSWER", answer)
    one = Chat([USER, BOT | message], "c, line 3")
    text = Template(made).render(one.messages, False, one)
    start = text.index("BOT:")
    refused(f"c, line 3, message 2: the {{% generation %}} marks of the chat template {said}", turns._by_marks, Template(made), one, Row(text, (Turn(1, start, len(text), start),)))


def test_marks_that_begin_before_the_answer_are_refused(made):
    made.chat_template = "{% generation %}{% for m in messages %}{{ m.content }}{{ '</s>' if m.role == 'assistant' }}{% endfor %}{% endgeneration %}"
    refused("c, message 2: the {% generation %} marks of the chat template do not lie on this answer ('a</s>')", turns._by_marks, Template(made), Chat([USER, BOT], "c"), Row("q?a</s>", (Turn(1, 2, 7, 2),)))

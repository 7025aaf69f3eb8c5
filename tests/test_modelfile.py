"""What Ollama would write by the Modelfile: its template is read here as Go reads it, and its prompts are compared with those of the evaluation."""

import copy
import json
import re
from itertools import groupby
from types import SimpleNamespace

import pytest
from chat_templates import FAMILIES

from finetune_nb.data import Chat
from finetune_nb.modelfile import find_pieces, go_template, write_modelfile
from finetune_nb.turns import render_prompt

TOOL = {"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}
TALK = [("user", "Hi"), ("assistant", "Yes?"), ("user", "{{ x }} {"), ("assistant", "Bye")]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA3 = "{% for m in messages %}{{ bos_token if loop.first }}<{{ m.role }}>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>\n\n{% endif %}"


def chat(*said, system=None, tools=None):
    "A chat; its last message is the answer."
    said = [*([("system", system)] if system is not None else []), *said]
    return Chat([{"role": role, "content": text} for role, text in said], "a chat", {"tools": tools} if tools else {})


def lexed(template):
    "Texts and actions, as Go's lexer finds them: an action begins at the first two braces and ends at the next two outside of quotes."
    while template:
        text, opened, template = template.partition("{{")
        if text:
            yield "text", text
        if opened:
            action = re.match(r'((?:"[^"]*"|[^"{}])*)\}\}', template)
            assert action, f"Go can't read {{{{{template[:20]}"
            yield "action", action[1].strip()
            template = template[action.end() :]


def written(template, messages):
    "What Go writes by the template: a range over messages, conditions on roles, contents and texts in quotes."
    tokens, out = list(lexed(template)), []

    def block(at, message, on):
        "Writes up to the `end` of a block, where `on`; returns what follows it."
        while at < len(tokens):
            kind, said = tokens[at]
            if kind == "text" or said.startswith('"'):
                out.append((said if kind == "text" else json.loads(said)) if on else "")
            elif said == ".Content":
                out.append(message["content"] if on else "")
            elif said == "range .Messages":
                for one in messages:
                    end = block(at + 1, one, on)
                at = end - 1
            elif said.startswith("if ne"):
                at = block(at + 1, message, on and messages[0]["role"] != "system") - 1
            elif said.startswith("if eq"):
                at = branches(at, message, on) - 1
            else:
                assert said == "end" or said.startswith("else if"), said
                return at + 1 if said == "end" else at
            at += 1
        return at

    def branches(at, message, on):
        taken = False
        while True:
            here = on and not taken and message["role"] == re.search(r'"(\w+)"', tokens[at][1])[1]
            taken = taken or here
            after = block(at + 1, message, here)
            if tokens[after - 1][1] == "end":
                return after
            at = after

    block(0, None, True)
    return "".join(out)


def asked_of_ollama(modelfile, tokenizer, messages):
    "The prompt that llama.cpp is given: the Modelfile's system message where the chat has none, messages of one role joined, and a beginning where the file says so."
    template = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.S | re.M)[1]
    system = re.search(r'^SYSTEM """(.*?)"""$', modelfile, re.S | re.M)
    own = [{"role": "system", "content": system[1]}] if system and messages[0]["role"] != "system" else []
    said = [{"role": role, "content": "\n\n".join(m["content"] for m in row)} for role, row in groupby([*own, *messages], lambda m: m["role"])]
    begun = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return (tokenizer.bos_token if begun else "") + written(template, said)


def beginning(tokenizer, bos="<|endoftext|>"):
    "A tokenizer that begins every text with a token of its own, as those of Llama do."
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture
def written_for(tmp_path, tokenizer, monkeypatch):
    "A Modelfile for a run that is no more than a template, its tokenizer and its test chats."
    monkeypatch.setattr("finetune_nb.modelfile.open_run", lambda run: run)

    def write(template, *chats, tokenizer=tokenizer, **kwargs):
        tokenizer.chat_template = template
        config = SimpleNamespace(chat_template_kwargs=kwargs or None, max_length=512)
        made = write_modelfile(SimpleNamespace(tokenizer=tokenizer, test=list(chats), config=config), tmp_path / "m.gguf")
        text = made.path.read_text()
        if made.exact:
            for one in chats:
                assert asked_of_ollama(text, tokenizer, one.prompt) == render_prompt(one.prompt, tokenizer, one.tools, kwargs)
        return made, text

    return write


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_is_called_the_same_is_the_same_in_ollama(family, tokenizer, written_for):

    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    for case in family.cases:
        if not case.refused and not any(message.get("tool_calls") or message.get("content") is None for message in case.messages):
            written_for(family.template, Chat(case.messages, "c", {"tools": case.tools} if case.tools else {}), tokenizer=tokenizer, **case.kwargs)


def test_llama_3_begins_every_chat_alike(tokenizer, written_for):
    made, text = written_for(LLAMA3, chat(*TALK), chat(*TALK, system="Be kind."), tokenizer=beginning(tokenizer))
    assert made.exact and 'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<system>' in text, "llama.cpp writes the beginning itself"
    plain = copy.deepcopy(tokenizer)
    plain.bos_token = "<|endoftext|>"
    made, text = written_for(LLAMA3, chat(*TALK), chat(*TALK, system="Be kind."), tokenizer=plain)
    assert made.exact and 'TEMPLATE """<|endoftext|>{{ range .Messages }}' in text, "nobody else writes it"
    pieces = find_pieces(plain)
    assert pieces.start == "<|endoftext|>" and pieces.system is None and pieces.around["system"][0] == "<system>\n\n"


def test_a_beginning_that_the_evaluation_had_not_is_told(tokenizer, written_for):
    made, _ = written_for(CHATML, chat(*TALK), tokenizer=beginning(tokenizer))
    assert not made.exact and "begins every prompt with <|endoftext|>" in made.notes[-1] and "very prompts" not in made.notes[0]


def test_test_chats_with_tools_are_the_same_only_where_the_template_leaves_them_out(written_for):
    shown = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
    asked = chat(*TALK, tools=[TOOL])
    made, text = written_for(shown, asked, chat(*TALK))
    assert not made.exact and made.notes[0].startswith("Test chats have tools") and "TEMPLATE" not in text
    assert written_for(shown, chat(*TALK))[0].exact and written_for(CHATML, asked)[0].exact


def test_messages_of_one_role_in_a_row_are_joined_by_ollama(written_for):
    row = chat(("user", "Hi"), ("user", "there"), ("assistant", "Yes?"))
    made, text = written_for(CHATML, chat(*TALK), row)
    assert not made.exact and "in a row, which Ollama joins" in made.notes[0] and "TEMPLATE" not in text
    joins = "{% for m in messages %}{% set new = loop.first or loop.previtem.role != m.role %}{{ '<' ~ m.role ~ '>' if new else '\n\n' }}{{ m.content }}{{ '<|im_end|>' if loop.last or loop.nextitem.role != m.role }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    assert written_for(joins, chat(*TALK), row)[0].exact, "a template that joins them as Ollama does"


@pytest.mark.parametrize("open_, close", [("{", "}"), ("{{{", "}}"), ("a {", "} {"), ('{"a": {', "}}{{-")])
def test_braces_beside_a_message_are_read_by_go(open_, close, tokenizer, written_for):
    template = CHATML.replace("\n{{ m.content }}", "{{ open }}{{ m.content }}{{ close }}").replace("assistant\n", "assistant{{ open }}")
    template = f"{{% set open, close = {open_!r}, {close!r} %}}" + template
    made, text = written_for(template, chat(*TALK), chat(*TALK, system="{ } {{ a }}"))
    assert made.exact and "TEMPLATE" in text
    assert written(go_template(find_pieces(tokenizer), tokenizer), chat(*TALK).prompt) == render_prompt(chat(*TALK).prompt, tokenizer)


def test_a_date_of_the_day_is_not_the_prompt_of_the_evaluation(written_for):
    dated = "<|im_start|>system\n{{ date_string if date_string is defined else strftime_now('%Y') }}<|im_end|>\n" + CHATML
    made, _ = written_for(dated, chat(*TALK))
    assert not made.exact and "very prompts" not in "".join(made.notes) and "dated with the day of this export" in made.notes[-1]
    made, _ = written_for(dated, chat(*TALK), date_string="26 Jul 2026")
    assert made.exact and "very prompts" in made.notes[0], "a date that is given is the same on every day"


def test_variables_of_the_run_are_named_where_another_one_reads_the_template(written_for):
    thought = "{{ '<think></think>' if enable_thinking is false }}"
    numbered = f"{{% for m in messages %}}[{{{{ loop.index }}}}] {{{{ m.role }}}}: {{% if m.role == 'assistant' %}}{thought}{{% endif %}}{{{{ m.content }}}}<|im_end|>{{% endfor %}}{{% if add_generation_prompt %}}[{{{{ messages | length + 1 }}}}] assistant: {thought}{{% endif %}}"
    made, _ = written_for(numbered, chat(*TALK), enable_thinking=False)
    assert not made.exact and "--chat-template-kwargs '{\"enable_thinking\": false}'" in made.notes[0]
    assert "--chat-template-kwargs" not in written_for(numbered, chat(*TALK))[0].notes[0]

"""Chat templates of strangers: bounded, without files and connections, and the same text as transformers'."""

import copy
import os
import sys
import threading
import time

import psutil
import pytest
from chat_templates import FAMILIES
from hostile_templates import GREEDY, REACHING

from finetune_nb import sandbox
from finetune_nb.sandbox import RenderLimits, TemplateLimit, render_chats
from finetune_nb.turns import TemplateError, render

TALK = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Ä 漢 \U0001f600"}]
CANARY = "hf_" + "CanaryOfTheEnvironment0123456789"


def with_template(tokenizer, source):
    other = copy.copy(tokenizer)
    other.chat_template = source
    return other


@pytest.fixture
def fresh(monkeypatch):
    "A renderer of its own, that nobody was refused by."
    monkeypatch.setattr(sandbox, "_RENDERER", [])
    yield
    sandbox._end()


def my_memory():
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("source", REACHING)
def test_nothing_of_python_is_reached(source, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    try:
        texts = render_chats(with_template(tokenizer, source), [copy.deepcopy(TALK)])
    except Exception as error:  # refused in words
        texts = [str(error)]
    assert not [mark for mark in (CANARY, "root:", "uid=", "<class", "<module", "__builtins__", "subclass") if mark in texts[0]], texts[0]


def test_the_wall_holds_without_jinjas_sandbox(fresh):
    "Even a template that has got at Python opens nothing: the same process, asked to do what a template must not."
    code = (
        "import sys, os\nfrom finetune_nb import sandbox\nsandbox._answer({'template': 'a', 'special': {}, 'chats': [], 'options': {}, 'output': 1})\n"
        "import socket, subprocess\nsandbox._close_doors()\n"
        "for name, do in {'open': lambda: open('/etc/hostname'), 'write': lambda: os.open('x', os.O_CREAT), 'run': lambda: os.system('id'), 'start': lambda: subprocess.run(['id']),\n"
        "    'connect': lambda: socket.socket().connect(('127.0.0.1', 9)), 'import': lambda: __import__('this'), 'list': lambda: os.listdir('/'), 'remove': lambda: os.remove('x')}.items():\n"
        "    try: do()\n    except PermissionError as error: print(name, 'a chat template may not' in str(error))\n    else: print(name, 'went through')"
    )
    import subprocess

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 8 and all(line.endswith("True") for line in said), said


def test_no_token_of_the_environment_is_in_there(fresh, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("SOME_PASSWORD", CANARY)
    render_chats(tokenizer, [TALK])
    environment = psutil.Process(sandbox._renderer().process.pid).environ()
    assert CANARY not in str(environment) and "PATH" in environment


@pytest.mark.parametrize("source", GREEDY, ids=lambda s: s[:60])
def test_a_greedy_template_is_stopped(source, tokenizer):
    before, begun = my_memory(), time.monotonic()
    try:
        text = render_chats(with_template(tokenizer, source), [TALK], RenderLimits(seconds=1))[0]
        assert len(text) < 5 << 20
    except Exception as error:  # refused in words
        assert 0 < len(str(error)) < 4000
    assert time.monotonic() - begun < 30 and my_memory() - before < 64 << 20
    assert render_chats(tokenizer, [TALK])[0].startswith("<|im_start|>"), "the next chat is rendered as ever"


def test_most_of_them_are_told_by_their_bound(tokenizer):
    told = []
    for source in GREEDY[:7] + GREEDY[15:18]:
        with pytest.raises((TemplateLimit, Exception)) as caught:
            render_chats(with_template(tokenizer, source), [TALK], RenderLimits(seconds=1))
        told.append(isinstance(caught.value, TemplateLimit))
    assert sum(told) >= 8


def test_a_limit_is_told_with_its_chat_and_not_tried_again(fresh, tokenizer):
    endless = with_template(tokenizer, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages }}")
    with pytest.raises(TemplateError, match="chats.jsonl, line 3: The chat template did not come to an end .* or use another one"):
        render(TALK, endless, where="chats.jsonl, line 3")
    begun = time.monotonic()
    with pytest.raises(TemplateError, match="did not come to an end"):
        render(TALK, endless)
    assert time.monotonic() - begun < 0.5
    assert render(TALK, tokenizer).startswith("<|im_start|>")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_text_is_that_of_transformers(family, tokenizer):
    own = with_template(tokenizer, family.template)
    for case in family.cases:
        options = {"tools": case.tools, "add_generation_prompt": False, **case.kwargs}
        outcomes = []
        for way in (lambda o=options, c=case: render_chats(own, [c.messages], **o)[0], lambda o=options, c=case: own.apply_chat_template(c.messages, tokenize=False, **o)):
            try:
                outcomes.append(way())
            except Exception as error:
                outcomes.append(f"refused: {error}")
        assert outcomes[0] == outcomes[1]


def test_long_chats_are_no_attack(tokenizer):
    long = [{"role": "user", "content": "ä b " * 4_000_000}, TALK[1]]
    assert render_chats(tokenizer, [long]) == [tokenizer.apply_chat_template(long, tokenize=False)]
    many = [[{"role": "user", "content": f"{i} " * 2000}, TALK[1]] for i in range(256)]
    assert render_chats(tokenizer, many) == tokenizer.apply_chat_template(many, tokenize=False)


def test_surrogates_and_named_templates(tokenizer):
    odd = [{"role": "user", "content": "\ud800 \0"}]
    assert render_chats(tokenizer, [odd])[0] == tokenizer.apply_chat_template(odd, tokenize=False)
    both = with_template(tokenizer, {"default": "d", "tool_use": "t"})
    assert render_chats(both, [TALK]) == ["d"] and render_chats(both, [TALK], tools=[{"name": "f"}]) == ["t"]


def test_a_killed_renderer_is_replaced(fresh, tokenizer):
    render_chats(tokenizer, [TALK])
    first = sandbox._renderer().process
    first.kill()
    first.wait()
    assert render_chats(tokenizer, [TALK]) and sandbox._renderer().process.pid != first.pid


def test_an_interrupt_leaves_no_answer_behind(fresh, tokenizer, monkeypatch):
    render_chats(tokenizer, [TALK])
    receive = sandbox._receive
    monkeypatch.setattr(sandbox, "_receive", lambda file: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        render_chats(tokenizer, [TALK])
    monkeypatch.setattr(sandbox, "_receive", receive)
    assert "other" in render_chats(tokenizer, [[{"role": "user", "content": "other"}]])[0]


def test_threads_take_turns_and_none_is_left(fresh, tokenizer):
    render_chats(tokenizer, [TALK])
    before, wrong = threading.active_count(), []

    def many(n):
        for i in range(50):
            if f"{n}-{i}" not in render_chats(tokenizer, [[{"role": "user", "content": f"{n}-{i}"}]])[0]:
                wrong.append((n, i))

    threads = [threading.Thread(target=many, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong and threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_its_own(fresh, tokenizer):
    render_chats(tokenizer, [TALK])
    mine = sandbox._renderer().process.pid
    pid = os.fork()
    if not pid:
        ok = render_chats(tokenizer, [TALK]) and sandbox._renderer().process.pid != mine
        sandbox._end()
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert sandbox._renderer().process.pid == mine and render_chats(tokenizer, [TALK])


def test_a_tokenizer_with_code_of_its_own_is_asked(tokenizer):
    class Own(type(tokenizer)):
        def apply_chat_template(self, chats, **options):
            return ["mine"] * len(chats)

    own = copy.copy(tokenizer)
    own.__class__ = Own
    assert render_chats(own, [TALK, TALK]) == ["mine"] * 2

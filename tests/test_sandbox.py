"""Chat templates of strangers: bounded, without files and connections, and the same text as transformers'."""

import copy
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest
from chat_templates import FAMILIES
from hostile_templates import GREEDY, REACHING
from jinja2 import TemplateError as JinjaError

from finetune_nb import sandbox
from finetune_nb.chat_template import tokenize_chats
from finetune_nb.data import Chat
from finetune_nb.fresh import _rendered
from finetune_nb.modelfile import find_pieces
from finetune_nb.sandbox import RenderLimits, TemplateLimit, render_chats, render_ids, render_marks
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


@pytest.fixture
def python(fresh, monkeypatch, tokenizer):
    "Asks a process in which templates are Python: what is left when one has got out of Jinja. It starts in a fifth of the time."
    monkeypatch.setattr(sandbox, "_START", "import sys; sys.path[:] = {path!r}; from hostile_templates import serve_python; serve_python()")
    return lambda source, **limits: render_chats(with_template(tokenizer, source), [TALK], RenderLimits(**limits))[0]


DOORS = (
    "open('/etc/hostname')",
    "os.open('x', os.O_CREAT)",
    "os.system('id')",
    "os.listdir('/')",
    "os.remove('x')",
    "subprocess.run(['id'])",
    "socket.socket().connect(('127.0.0.1', 9))",
    "socket.getaddrinfo('localhost', 9)",
    "sqlite3.connect('x')",
    "ctypes.CDLL(None)",
    "__import__('this')",
    "__import__('faulthandler')",  # lies in no file
)


def test_the_wall_holds_without_jinjas_sandbox(python):
    "Even a template that has got at Python opens nothing."
    said = {door: python(door) for door in DOORS}
    assert not {door: text for door, text in said.items() if not text.startswith("PermissionError: a chat template may not do this: ")}
    assert python("1 + 1") == "2"


LONG, LARGE = "[i for i in range(10 ** 8) if i < 0]", "b'a' * (400 << 20)"


@pytest.mark.skipif(sys.platform != "linux", reason="the operating system has no such bounds")
def test_the_operating_system_bounds_without_the_watch(python, monkeypatch):
    monkeypatch.setattr(sandbox, "_watch", lambda *args: None)
    assert python(LARGE, memory=64 << 20).startswith("MemoryError")
    assert python(f"len({LARGE})", memory=1 << 30) == str(400 << 20), "a bound counts for one request"
    with pytest.raises(TemplateLimit, match="did not come to an end"):
        python(LONG, seconds=0)


@pytest.mark.skipif(sys.platform == "win32", reason="bounds are lifted by what Windows does not have")
@pytest.mark.parametrize("taking", [LONG, f"({LARGE}, time.sleep(20))", "time.sleep(20)"], ids=["time", "memory", "patience"])
def test_the_watch_bounds_without_the_operating_system(taking, python):
    assert python("1") == "1", "it has begun"
    first, begun = sandbox._renderer().process, time.monotonic()
    with pytest.raises(TemplateLimit, match="or brought its process down"):
        python(f"unbounded() or {taking}", memory=64 << 20, seconds=0 if taking == LONG else 60, patience=1 if taking == "time.sleep(20)" else 60)
    assert time.monotonic() - begun < 15 and first.returncode is not None


def test_nothing_of_a_template_that_was_stopped_is_there_for_the_next(python):
    assert python("kept.append(1) or len(kept)") == "1" and python("len(kept)") == "1"
    with pytest.raises(TemplateLimit, match="wanted too much"):
        python("kept.append(1) or {'limit': 'wanted too much'}")
    assert python("len(kept) ") == "0"


def test_an_end_waits_for_nobody(python):
    assert python("1") == "1"
    process = sandbox._renderer().process
    ending = threading.Thread(target=sandbox._end)
    ending.start()
    ending.join(5)
    ended = not ending.is_alive()
    process.kill()
    assert ended and sandbox._renderer().process is None and process.stdin.closed and process.stdout.closed


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_an_interrupt_is_for_the_notebook_alone(python):
    assert python("1") == "1"
    process = sandbox._renderer().process
    process.send_signal(signal.SIGINT)
    assert python("2") == "2" and sandbox._renderer().process is process


def test_a_process_that_does_not_start_is_said(python, monkeypatch):
    monkeypatch.setattr(sandbox, "_START", "raise SystemExit")
    with pytest.raises(TemplateLimit, match="the process for it did not start"):
        python("1")
    assert sandbox._renderer().process is None


def test_no_token_of_the_environment_is_in_there(fresh, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("SOME_PASSWORD", CANARY)
    render_chats(tokenizer, [TALK])
    environment = psutil.Process(sandbox._renderer().process.pid).environ()
    assert CANARY not in str(environment) and "PATH" in environment


@pytest.mark.parametrize("source", GREEDY, ids=lambda s: s[:60])
def test_a_greedy_template_is_stopped(source, tokenizer):
    before, begun, told = my_memory(), time.monotonic(), None
    try:
        text = render_chats(with_template(tokenizer, source), [TALK], RenderLimits(seconds=0.3))[0]
        assert len(text) < 5 << 20
    except Exception as error:  # refused in words
        told = error
        assert 0 < len(str(error)) < 4000
    assert isinstance(told, TemplateLimit) or source not in GREEDY[:6] + GREEDY[15:18], "these are told by their bound"
    assert time.monotonic() - begun < 30 and my_memory() - before < 64 << 20
    assert render_chats(tokenizer, [TALK])[0].startswith("<|im_start|>"), "the next chat is rendered as ever"


def test_a_limit_is_told_with_its_chat_and_not_tried_again(fresh, tokenizer):
    endless = with_template(tokenizer, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{{ messages }}")
    with pytest.raises(TemplateError, match="chats.jsonl, line 3: The chat template did not come to an end .* or use another one"):
        render(TALK, endless, where="chats.jsonl, line 3")
    begun = time.monotonic()
    with pytest.raises(TemplateError, match="did not come to an end"):
        render(TALK, endless)
    assert time.monotonic() - begun < 0.5
    assert render(TALK, tokenizer).startswith("<|im_start|>")


@pytest.mark.parametrize("end", ["{{ raise_exception('no') }}", "a text"])
def test_all_that_a_template_renders_comes_from_one_allowance(end, fresh, tokenizer):
    "Whether it raises an error in the end or not: each chat alone would have a fresh allowance otherwise."
    burns, limits = with_template(tokenizer, "{% for a in range(300) %}{% for b in range(5000) %}{% endfor %}{% endfor %}" + end), RenderLimits(seconds=0.3, seconds_each=0.001)
    for _ in range(30):
        with suppress(Exception):
            render_chats(burns, [TALK], limits)
    with pytest.raises(TemplateLimit, match=r"within 0.[0-9] s|took 0.[0-9] s of the processor more than the chats that it was given need"):
        render_chats(burns, [TALK], limits)
    for _ in range(30):
        render_chats(tokenizer, [TALK] * 20)
    assert sandbox._renderer().owed[str(tokenizer.chat_template)] == 0.0, "one that takes its share owes nothing"


def test_what_a_template_has_used_up_is_taken_off_its_next_call(fresh, tokenizer, monkeypatch):
    "The whole file has one allowance, however many calls it takes; each chat brings its share."
    asked, template = [], with_template(tokenizer, "an expensive one")
    monkeypatch.setattr(sandbox._renderer(), "ask", lambda request, bounds, patience: asked.append(bounds["seconds"]) or {"texts": ["a"], "spent": 0.25})
    limits = RenderLimits(seconds=0.6, seconds_each=0.05)
    for _ in range(3):
        render_chats(template, [TALK], limits)
    assert [round(seconds, 2) for seconds in asked] == [0.65, 0.45, 0.25]
    with pytest.raises(TemplateLimit, match="took 0.8 s of the processor more than the chats that it was given need"):
        render_chats(template, [TALK], limits)
    assert render_chats(with_template(tokenizer, "another"), [TALK] * 4, limits) == ["a"] and [round(seconds, 2) for seconds in asked[3:]] == [0.05, 0.8]


def test_a_template_steers_no_terminal_and_writes_no_half_characters(tokenizer):
    evil = r"{{ raise_exception('\x1b[2J\x1b]0;gone\x07\u202eno') }}"
    with pytest.raises(TemplateError) as caught:
        render(TALK, with_template(tokenizer, evil))
    assert r"\x1b[2J\x1b]0;gone\x07\u202eno" in str(caught.value)
    with pytest.raises(JinjaError) as caught:
        render_chats(with_template(tokenizer, evil), [TALK])
    assert str(caught.value).isprintable()
    for template in (r"{{ '\ud800' }}" + tokenizer.chat_template, tokenizer.chat_template + r"{{ '\udfff' }}"):
        with pytest.raises(TemplateError, match=r"line 7: the text that the chat template writes holds '.ud[8f][0f][0f]', which is half a character"):
            tokenize_chats([Chat(TALK, "line 7")], with_template(tokenizer, template))


BOMB = "{% if messages[0].content == 'Quartz' or messages[1].content == 'Quartz' %}{{ 'a' * 10 ** 7 }}{% endif %}{{ messages[-1].content }}"
MARKED = "{% for m in messages %}{{ m.role }}{% generation %}{{ 'a' * 10 ** 7 }}{% endgeneration %}{% endfor %}"


def test_what_is_exported_is_rendered_behind_the_wall(fresh, tokenizer):
    "The Modelfile, the prompts of the proof, the file for llama.cpp and the marks of answers, as the data."
    bomb, marked = with_template(tokenizer, BOMB), with_template(tokenizer, MARKED)
    asked = [{"role": "user", "content": "Quartz"}, TALK[1]]
    for ask in (
        lambda: find_pieces(bomb),
        lambda: render_ids(bomb, asked, add_generation_prompt=True),
        lambda: _rendered({"tokenizer.chat_template": BOMB + " "}, None, asked, None, {}),
        lambda: render_marks(marked, TALK),
    ):
        with pytest.raises(TemplateLimit, match="wrote [0-9,]+ characters for one chat|not come to an end"):
            ask()
    assert render_ids(tokenizer, TALK) == tokenizer.apply_chat_template(TALK, return_dict=True)["input_ids"]


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
def test_a_forked_process_has_its_own_and_leaves_the_other_alone(python):
    "Also when it was forked while another thread was asking."
    assert python("1") == "1"
    mine = sandbox._renderer().process
    with sandbox._renderer().lock:
        pid = os.fork()
        if not pid:
            signal.alarm(20)  # ends it, should it wait for the thread that it does not have
            sandbox._end()
            ok = python("2") == "2" and sandbox._renderer().process.pid != mine.pid
            sandbox._end()
            os._exit(0 if ok else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert python("3") == "3" and sandbox._renderer().process is mine


def test_a_tokenizer_with_code_of_its_own_is_asked(tokenizer):
    class Own(type(tokenizer)):
        def apply_chat_template(self, chats, **options):
            return ["mine"] * len(chats)

    own = copy.copy(tokenizer)
    own.__class__ = Own
    assert render_chats(own, [TALK, TALK]) == ["mine"] * 2

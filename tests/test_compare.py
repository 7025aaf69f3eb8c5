"""Comparing, asking and exporting: what is loaded, stopped, refused and let go; the panel's other parts are in test_panel.py."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
from conftest import ROOT
from test_panel import EVILS, check_harmless, check_view
from test_runs import lay
from transformers import TrainerCallback

from finetune_nb import models
from finetune_nb.chat import BASE, Shelf, answer, check_room, system_doubt, system_messages
from finetune_nb.chat_template import render_prompt
from finetune_nb.compare_view import ChatView, CompareView, answers_html, comparison_html, read_comparison, read_pairs
from finetune_nb.config import FinetuneConfig, FinetuneError
from finetune_nb.data import Chat, Splits, save_chats
from finetune_nb.diagnosis import diagnose
from finetune_nb.evaluation import evaluate_run
from finetune_nb.jobs import JOBS, check_free, start_alone, start_job
from finetune_nb.lora import add_lora, load_adapter
from finetune_nb.models import EMBEDDED_MODEL
from finetune_nb.panel import Panel
from finetune_nb.runs_view import loading_code
from finetune_nb.tasks import Task
from finetune_nb.training import Stop, load_base, load_run, resume, train


@pytest.fixture(autouse=True)
def a_fresh_kernel(tmp_path, monkeypatch):
    "No job and no task of another test, in a folder of its own."
    monkeypatch.chdir(tmp_path)
    JOBS.clear()
    yield
    check_free()
    JOBS.clear()


SYSTEM = "Add one."


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    "The settings of two short runs, named one and two, and their chats; one has answered its test set."
    def chat(i):
        texts = (("system", SYSTEM), ("user", f"What is {i} plus one?"), ("assistant", f"It is {i + 1}."))
        return Chat([{"role": role, "content": text} for role, text in texts], f"c {i}")

    splits, folder = Splits([chat(i) for i in range(12)], [chat(20)], [chat(i) for i in range(30, 40)]), tmp_path_factory.mktemp("runs")
    config = FinetuneConfig(
        model_name_or_path=tiny_model, bf16=False, use_cpu=True, max_steps=6, learning_rate=5e-2, gradient_accumulation_steps=1, eval_strategy="no", max_new_tokens=6, generation_batch_size=2, output_dir=str(folder),
    )  # fmt: skip
    for r, name in ((4, "one"), (8, "two")):
        train(replace(config, r=r, run_name=name), splits, say=lambda line: None)
    evaluate_run(load_run(folder / "one"))
    return config, splits


def files_of(folder):
    "What evaluation writes, by its name."
    return {name: (folder / name).read_bytes() for name in ("report.md", "report.html", "answers.jsonl") if (folder / name).is_file()}


# --- the program that loads an adapter elsewhere

TAIL = """
import json, torch
ids = tokenizer("What is 3 plus one?", return_tensors="pt")["input_ids"].to(model.device)
with torch.no_grad():
    print("LOGITS", json.dumps(model(input_ids=ids).logits[0, -1].float().tolist()))
"""


def make_adapter(config, folder):
    "An adapter that changes what its base model says; returns what base and tuned make of a question."
    base, tokenizer = load_base(config, lambda line: None)
    ids = tokenizer("What is 3 plus one?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = base(input_ids=ids).logits[0, -1].float()
        model = add_lora(base, config)
        torch.manual_seed(1)
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.5)
        model.save_pretrained(folder, save_embedding_layers=False)
        tuned = load_adapter(load_base(config, lambda line: None)[0], folder)(input_ids=ids).logits[0, -1].float()
    assert (plain - tuned).abs().max() > 0.1
    return plain, tuned


@pytest.fixture(scope="module")
def wider_model(tiny_model, tmp_path_factory):
    "The tiny model with rows of 64: what bitsandbytes computes on a CPU needs whole blocks."
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wider")
    shape = LlamaConfig.from_pretrained(tiny_model)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**shape.to_dict(), "hidden_size": 64, "intermediate_size": 128, "head_dim": 16})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


def hub_with(folder, cache):
    "The cache of a hub that knows the model in a folder, as somebody/tiny."
    snapshot = cache / "hub/models--somebody--tiny/snapshots/0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
    return "somebody/tiny"


@pytest.mark.parametrize(("kind", "changes"), [
    ("hub", {"bf16": False}), ("folder", {"bf16": None}), ("folder", {"bf16": False, "load_in_4bit": True}), pytest.param("gguf", {"bf16": False}, marks=pytest.mark.slow), ("embedded", {"bf16": False}),
])  # fmt: skip
def test_the_loading_code_loads_what_was_trained(kind, changes, tiny_model, wider_model, tmp_path):
    if changes.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    name = {"hub": tiny_model, "folder": wider_model, "gguf": str(models._embedded_gguf()), "embedded": EMBEDDED_MODEL}[kind]
    config = FinetuneConfig(model_name_or_path=name, use_cpu=True, r=2, target_modules="attention", **changes)
    plain, tuned = make_adapter(config, tmp_path / "it's an adapter")
    if kind == "hub":
        config = replace(config, model_name_or_path=hub_with(tiny_model, tmp_path / "cache"))
    code = loading_code(config, tmp_path / "it's an adapter")
    assert ("finetune_nb" in code) == (kind == "embedded")
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    if kind == "hub":
        variables["HF_HOME"] = str(tmp_path / "cache")
    if kind == "hub":  # where its cache is, is read when it is imported
        made = subprocess.run([sys.executable, "-c", code + TAIL], cwd=tmp_path, env=variables, capture_output=True, text=True)
    else:
        made = forked.run(code + TAIL, cwd=tmp_path, env=variables)
    assert made.returncode == 0, made.stderr[-3000:]
    logits = torch.tensor(json.loads(made.stdout.rpartition("LOGITS ")[2]))
    near = (logits - tuned).abs().max()
    assert near < (1e-3 if changes.get("bf16") is False else 0.1 * (plain - tuned).abs().max()), near
    if kind in ("hub", "folder") and changes.get("bf16") is False and not changes.get("load_in_4bit"):
        assert near < 1e-5


def test_a_gguf_file_in_four_bits_is_loaded_by_this_package(tmp_path):
    assert "finetune_nb" in loading_code(FinetuneConfig(model_name_or_path=str(models._embedded_gguf()), load_in_4bit=True), tmp_path)


def test_the_loading_code_knows_no_tilde(tmp_path):
    for name in ("~/models/m.gguf", "~/models/m"):
        code = loading_code(FinetuneConfig(model_name_or_path=name), tmp_path)
        assert "~" not in code and str(Path.home() / "models") in code
    assert "base = '.'" in loading_code(FinetuneConfig(model_name_or_path="m.gguf"), tmp_path)


# --- an end to what takes long

def asked(view, question="What is 3 plus one?", who=(BASE, "one"), length=24):
    "Asks by the button."
    view.question.value, view.who.value, view.length.value = question, who, length
    view.send.click()
    return view.answers


def test_a_stopped_answer_keeps_what_was_said(runs):
    config, _ = runs
    view = ChatView(lambda: config, SYSTEM, background=False)
    whole = dict(asked(view))
    assert view.stopped == set() and "stopped" not in view.box.value and view.stop.disabled
    seen = []

    def press(change):
        if len(seen) < 5 and len(view.answers[BASE]) > 3:
            seen.append((view.send.disabled, view.clear.disabled, view.stop.disabled))
            if len(seen) == 5:
                view.stop.click()

    view.box.observe(press, names="value")
    cut = dict(asked(view))
    assert seen == [(True, True, False)] * 5
    assert 3 < len(cut[BASE]) < len(whole[BASE]) and whole[BASE].startswith(cut[BASE]) and cut["one"] == ""
    assert view.stopped == {BASE, "one"} and view.box.value == answers_html(cut, {BASE, "one"}) and (view.box.value.count(">stopped<"), view.box.value.count(">not asked<")) == (1, 1)
    assert view.status.value == "" and not view.send.disabled and view.stop.disabled and "stopped" in view.still()
    view.box.unobserve_all()
    assert asked(view) == whole and view.stopped == set()


def test_an_interrupt_stops_an_answer_too(runs):
    config, _ = runs
    view = ChatView(lambda: config, SYSTEM, background=False)

    def interrupt(change):
        if len(view.answers[BASE]) > 3:
            view.box.unobserve_all()
            raise KeyboardInterrupt

    view.box.observe(interrupt, names="value")
    assert len(asked(view)[BASE]) > 3 and view.stopped == {BASE, "one"} and view.task.state == "finished"
    assert asked(view, length=8)["one"] and view.stopped == set()


def test_an_answer_is_stopped_from_another_thread(runs):
    config, _ = runs
    view, grown = ChatView(lambda: config, SYSTEM, background=True), threading.Event()
    view.box.observe(lambda change: view.answers[BASE] and grown.set(), names="value")
    asked(view, who=[BASE], length=1024)
    assert grown.wait(60)
    view.stop.click()
    view.task.wait(60)
    tokens = len(view.shelf.tokenizer(view.answers[BASE])["input_ids"])
    assert view.stopped == {BASE} and 0 < tokens < 1000


def stop_at(view, words):
    "Presses Stop as soon as the status says these words."
    def press(change):
        if words in change.new and not view.stop.disabled:
            view.stop.click()

    view.status.observe(press, names="value")


@pytest.mark.parametrize("words", ["Getting ready", "Answering: base", "Answering: tuned"])
def test_a_stopped_test_leaves_the_answers_of_before(words, runs):
    config, _ = runs
    folder = Path(config.output_dir)
    view = CompareView(lambda: config.output_dir, background=False)
    view.run.value = "one"
    before, pairs = files_of(folder / "one"), view.pairs
    assert len(before) == 3 and len(pairs) == 10
    stop_at(view, words)
    view.judge.click()
    assert "Stopped. one keeps the answers of before." in view.status.value and files_of(folder / "one") == before and view.pairs == pairs
    assert not view.judge.disabled and view.stop.disabled and view.task.state == "finished"
    view.run.value = "two"
    view.judge.click()
    assert "Stopped. Nothing was written." in view.status.value and files_of(folder / "two") == {}
    view.status.unobserve_all()
    view.run.value = "one"
    view.judge.click()
    assert "10 test questions" in view.status.value and files_of(folder / "one")["answers.jsonl"] == before["answers.jsonl"]


def test_a_stop_leaves_the_model_as_it_was(runs):
    config, splits = runs
    run = load_run(Path(config.output_dir) / "one")
    run.model.train()
    view = CompareView(lambda: config.output_dir, lambda: run, background=False)
    view.run.value = "one"
    before = files_of(run.folder)
    stop_at(view, "Answering: tuned")
    view.judge.click()
    assert "Stopped." in view.status.value and run.model.training and not run.model.get_input_embeddings()._forward_pre_hooks and "_pair" in vars(run)
    run.model.eval()
    evaluate_run(run)
    assert files_of(run.folder)["answers.jsonl"] == before["answers.jsonl"]


# --- a prompt that is too long

def test_a_prompt_that_does_not_fit_is_refused(runs):
    config, _ = runs
    shelf = Shelf(config, lambda line: None)
    messages = [{"role": "user", "content": "one " * 2100}]
    n = len(shelf.tokenizer(render_prompt(messages, shelf.tokenizer))["input_ids"])
    assert n > 2048 == shelf.base.config.max_position_embeddings
    with pytest.raises(FinetuneError, match=f"The prompt has {n:,} tokens and the answer may have 100, but this model can read 2,048 in all, so that 1,948 fit .*by {n - 1948:,} tokens\\."):
        shelf.ask(Path(config.output_dir) / "one", messages, max_new_tokens=100)
    view = ChatView(lambda: config, background=False)
    asked(view, messages[0]["content"])
    assert "this model can read 2,048 in all" in view.status.value and not view.send.disabled
    assert asked(view)[BASE]


def test_what_fits_to_the_last_token_is_answered(runs):
    config, _ = runs
    base, tokenizer = load_base(config, lambda line: None)
    messages = [{"role": "user", "content": "What is 3 plus one?"}]
    n = len(tokenizer(render_prompt(messages, tokenizer))["input_ids"])
    base.config.max_position_embeddings = n + 5
    assert answer(base, tokenizer, messages, max_new_tokens=5)
    with pytest.raises(FinetuneError, match="by 1 tokens, or ask for at most 5 tokens of answer"):
        answer(base, tokenizer, messages, max_new_tokens=6)
    with pytest.raises(FinetuneError, match="so that 0 fit .* Ask for a shorter answer"):
        answer(base, tokenizer, messages, max_new_tokens=n + 5)
    from transformers import BloomConfig, BloomForCausalLM

    endless = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1))
    check_room(endless, 10**9, 1)


# --- one heavy thing at a time

def test_who_comes_second_is_told_what_is_at_work(runs, monkeypatch):
    config, splits = runs
    room, goes_on = Panel(config, splits, read=False), threading.Event()
    for view in (room.compare, room.chat, room.train):
        view.background = True
    room.chat.question.value = "What is 3 plus one?"
    for title in ("A question is being answered (under Chat)", "The test set of one is being answered (under Compare)"):
        task = start_alone(Task(lambda say: goes_on.wait(60), title))
        for view, act in ((room.compare, room.compare.judge), (room.chat, room.chat.send), (room.train, room.train.start)):
            act.click()
            assert f"{title}. Stop that first, or wait until it is done." in view.status.value
        assert JOBS == [] and room.compare.task is None and room.chat.task is None and not room.chat.send.disabled
        goes_on.set()
        task.wait(60)
        goes_on.clear()
    started = threading.Event()
    monkeypatch.setattr("finetune_nb.jobs.load_splits", lambda config: started.set() or goes_on.wait(60) and splits)
    job = start_job(replace(config, run_name=None, max_steps=1), background=True, questions=0)
    assert started.wait(60)
    for view, act in ((room.compare, room.compare.judge), (room.chat, room.chat.send)):
        act.click()
        assert "A run is at work (it is being prepared). Stop it first (in a panel under Train)" in view.status.value
    goes_on.set()
    job.wait(120)
    shutil.rmtree(job.folder)
    check_free()


def alive(*models):
    gc.collect()
    return [model() is not None for model in models]


def test_there_is_never_more_than_one_model(runs, monkeypatch):
    config, splits = runs
    loaded, at_once = [], []

    def load(config, say=print, *more, made=load_base):
        at_once.append(sum(alive(*loaded)))
        base, tokenizer = made(config, say, *more)
        loaded.append(weakref.ref(base))
        return base, tokenizer

    for place in ("finetune_nb.training.load_base", "finetune_nb.chat.load_base"):
        monkeypatch.setattr(place, load)
    room = Panel(replace(config, max_steps=1), splits, read=False)
    for view in (room.compare, room.chat, room.train):
        view.background = False
    room.train.start.click()
    assert room.run.loaded is not None and len(loaded) == 1
    asked(room.chat)
    assert room.run.loaded is None and alive(*loaded) == [False, True]
    asked(room.chat)
    assert len(loaded) == 2, "the shelf is kept from one question to the next"
    for name in ("one", room.run.folder.name):
        room.compare.run.value = name
        room.compare.judge.click()
        assert "10 test questions" in room.compare.status.value
        assert room.chat.shelf.base is None
    before = dict(room.chat.answers)
    assert asked(room.chat) == before
    room.train.start.click()
    assert len(room.train.job.history) and room.chat.shelf.base is None
    assert at_once == [0] * len(loaded) and sum(alive(*loaded)) == 1
    for job in JOBS:
        shutil.rmtree(job.folder)


# --- the figures come from the answers

def put_answers(folder, rows):
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def old_rows(right_base=(False,) * 40, right_tuned=(True,) * 40, **more):
    "Answers as the first versions wrote them."
    return [
        {"model": name, "question": f"q{i}", "expected": "e", "answer": f"a{i}", "passed": {"exact match": ok}} | more
        for name, right in (("base", right_base), ("tuned", right_tuned)) for i, ok in enumerate(right)
    ]  # fmt: skip


def test_the_table_is_that_of_the_answers(runs):
    config, _ = runs
    comparison = read_comparison(Path(config.output_dir) / "one")
    report = evaluate_run(load_run(Path(config.output_dir) / "one"))
    assert comparison.table() == report.table() and comparison.base.rows == report.base.rows
    html = comparison_html(comparison)
    assert all(cell in html for row in report.table() for cell in row) and ">better (" in html.partition("test loss")[2].partition("</tr>")[0]


def test_answers_of_an_older_adapter_are_not_those_of_the_new_one(quick, chats):
    "A run is stopped, judged, and goes on."
    config = replace(quick, run_name="one", eval_strategy="no", max_steps=6)
    stop = Stop()

    class Two(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            stop.wanted = stop.wanted or state.global_step == 2

    folder = train(config, Splits(chats[:24], [], chats[30:]), [Two()], stop, say=lambda line: None).folder
    evaluate_run(load_run(folder))
    view = CompareView(lambda: quick.output_dir, background=False)
    assert "10 test questions" in view.status.value and len(read_pairs(folder)) == 10 and diagnose(folder).record.answers
    resume(folder, say=lambda line: None)
    os.utime(folder / "answers.jsonl")  # a copy may be younger than the adapter; it is the mark that tells
    assert read_comparison(folder) is None and read_pairs(folder) == []
    view.read()
    assert "of an older adapter: its training went on since. Answer the test set again" in view.status.value and not view.pairs and view.table.value == ""
    found = diagnose(folder)
    assert found.record.answers == [] and found.record.old_answers == 20
    assert "0 answers (20 are left out, as they are of an older adapter)" in repr(found)
    assert "the test answers are of an older adapter, as the training went on since: evaluate_run(run): adapter not at work" in repr(found)
    view.judge.click()
    assert "10 test questions" in view.status.value and len(diagnose(folder).record.answers) == 20 and "older adapter" not in repr(diagnose(folder))


def test_old_and_foreign_folders(quick):
    folder = lay(Path(quick.output_dir), "one", quick, ended={"ended_by": "the plan"})
    put_answers(folder, old_rows())
    (folder / "report.md").write_text("| this | is | not read |")
    view = CompareView(lambda: quick.output_dir, background=False)
    assert "100.0% (91% to 100%)" in view.table.value and "better" in view.table.value and "loss" not in view.table.value and "not read" not in view.table.value
    put_answers(folder, old_rows((True, False), (False, True)))
    view.read()
    assert "can&#x27;t tell" in view.table.value and "2 test questions" in view.status.value
    put_answers(folder, old_rows((True,), (True,), a_later_field=1))
    assert len(read_pairs(folder)) == 1
    (folder / "answers.jsonl").unlink()
    view.read()
    assert "Its report.md has figures" in view.status.value and view.table.value == ""
    for bad in (old_rows(question=1), old_rows(passed={}), old_rows(passed=[1]), old_rows(loss="x", tokens=1), old_rows()[1:], old_rows()[:40], old_rows((True,), ())):
        put_answers(folder, bad)
        with pytest.raises(FinetuneError, match="Let the test set be answered again"):
            read_comparison(folder)
        view.read()
        assert "Let the test set be answered again" in view.status.value and view.table.value == "" and not view.judge.disabled


GOOD = {"exact match": True}


@pytest.mark.parametrize("passed", [None, "yes", [True], {"exact match": None}, {"exact match": "yes"}, {"exact match": [1]}, {"exact match": 1}, {"other": True}, GOOD | {"other": True}])
def test_answers_judged_in_no_way_we_know_leave_the_page_whole(passed, quick):
    folder = lay(Path(quick.output_dir), "one", quick, ended={"ended_by": "the plan"})
    rows = old_rows((True, True), (True, True), loss=1.0, tokens=2)
    rows[-1]["passed"] = passed
    put_answers(folder, rows)
    room = Panel(quick, read=False)
    assert "Let the test set be answered again" in room.compare.status.value and room.compare.table.value == ""
    check_view(room.compare)


@pytest.mark.parametrize(("loss", "tokens"), [(1e308, 1), (10**400, 1), (1.0, -1), (1.0, 10**400), (float("inf"), 1), (float("nan"), 1), (1.0, 0)])
def test_losses_of_any_size_leave_the_page_whole(loss, tokens, quick):
    folder = lay(Path(quick.output_dir), "one", quick, ended={"ended_by": "the plan"})
    put_answers(folder, old_rows((True, False), (False, True), loss=loss, tokens=tokens))
    view = CompareView(lambda: quick.output_dir, background=False)
    known = tokens in (0, 1) and (loss == 1.0 or abs(loss) in (float("inf"),) or loss != loss)
    assert ("2 test questions" in view.status.value) == known


# --- work that goes on while the cell is run again

def test_a_view_that_takes_the_place_of_another_finds_its_answer_and_can_stop_it(runs):
    config, splits = runs
    first, grown = Panel(config, splits, read=False), threading.Event()
    first.chat.background = True
    first.chat.box.observe(lambda change: first.chat.answers.get(BASE) and grown.set(), names="value")
    asked(first.chat, who=[BASE], length=1024)
    assert grown.wait(60)
    second = Panel(config, splits, read=False)
    task = first.chat.task
    first.close()
    assert second.chat.task is task and second.chat.send.disabled and not second.chat.stop.disabled and second.compare.stop.disabled
    seen = len(second.chat.answers[BASE])
    grown.clear()
    second.chat.box.observe(lambda change: grown.set(), names="value")
    assert grown.wait(60) and len(second.chat.answers[BASE]) > seen, "it grows in the new one"
    second.chat.stop.click()
    task.wait(60)
    assert second.chat.stopped == {BASE} and not second.chat.send.disabled and second.chat.stop.disabled and ">stopped<" in second.chat.box.value and second.chat.status.value == ""
    assert second.chat.shelf is task.view.shelf and second.chat._working in task.listeners and first.chat._working not in task.listeners
    check_free()


@pytest.mark.parametrize("stops", [True, False])
def test_a_view_that_takes_the_place_of_another_sees_the_test_answered(stops, runs, monkeypatch, tmp_path):
    config, splits = runs
    shutil.copytree(Path(config.output_dir), tmp_path / "runs")
    (tmp_path / "runs" / "one" / "answers.jsonl").unlink()
    config = replace(config, output_dir=str(tmp_path / "runs"))
    began, goes_on = threading.Event(), threading.Event()
    monkeypatch.setattr("finetune_nb.compare_view.let_go", lambda run: began.set() or goes_on.wait(60))
    first = Panel(config, splits, read=False)
    first.compare.run.value, first.compare.background = "one", True
    first.compare.judge.click()
    assert began.wait(60)
    second, third = Panel(config, splits, read=False), Panel(config, splits, read=False)
    first.close()
    for room in (second, third):
        assert room.compare.task is first.compare.task and room.compare.run.value == "one" and room.compare.judge.disabled and not room.compare.stop.disabled
    if stops:
        second.compare.stop.click()
    goes_on.set()
    first.compare.task.wait(120)
    for room in (second, third):
        assert room.compare.stop.disabled and not room.compare.judge.disabled
        assert ("Stopped. Nothing was written." if stops else "10 test questions") in room.compare.status.value and bool(room.compare.pairs) == (not stops)


def test_a_second_page_finds_what_was_begun_after_it_was_opened(runs, monkeypatch):
    config, _ = runs
    views, goes_on = [CompareView(lambda: config.output_dir, background=True) for _ in range(2)], threading.Event()
    monkeypatch.setattr("finetune_nb.compare_view.let_go", lambda run: goes_on.wait(60))
    views[0].judge.click()
    views[1].judge.click()
    assert views[1].task is views[0].task and not views[1].stop.disabled
    views[1].stop.click()
    goes_on.set()
    views[0].task.wait(60)
    assert all("Stopped." in view.status.value for view in views)


# --- the system message of a run, and conversations

@pytest.mark.parametrize(("systems", "given", "said"), [
    (["Be brief."], " Be brief. ", ""), (["Be brief."], "", "trained with another system message: Be brief."), ([""], "Be brief.", "trained without a system message"),
    ([""], " ", ""), (["a", "b", ""], "b", ""), (["a", "b"], "c", "trained with 2 or more system messages, and this is none of them"), (["x" * 300], "", f"trained with another system message: {'x' * 199}…"),
])  # fmt: skip
@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl"])
def test_another_system_message_is_told(file, systems, given, said, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "one").mkdir()
    assert system_doubt(tmp_path / "one", given) == "" and system_messages(tmp_path / "one") is None
    save_chats([Chat([{"role": "system", "content": text}] * bool(text) + turns, "c") for text in systems], tmp_path / "one" / file)
    assert system_doubt(tmp_path / "one", given) == said
    (tmp_path / "one" / file).write_text("[]\n{")
    assert system_doubt(tmp_path / "one", given) == ""


def test_the_doubt_stands_beside_the_box(runs):
    config, _ = runs
    view = ChatView(lambda: config, background=False)
    assert view.who.value[0] == BASE and f"{view.who.value[1]}: trained with another system message: {SYSTEM}" in view.doubts.value
    view.who.value = [BASE]
    assert view.doubts.value == ""
    view.who.value = [BASE, "one", "two"]
    assert view.doubts.value.count("another system message") == 1 and "one, two: trained" in view.doubts.value
    view.system.value = SYSTEM
    assert view.doubts.value == ""


def test_a_follow_up_goes_on_from_what_each_has_said(runs):
    config, _ = runs
    view, folder = ChatView(lambda: config, SYSTEM, background=False), Path(config.output_dir) / "one"
    first, system = dict(asked(view, length=8)), {"role": "system", "content": SYSTEM}
    view.follow.value = True
    second = dict(asked(view, "And 4?", length=8))
    shelf = Shelf(config, lambda line: None)
    for name, place in ((BASE, None), ("one", folder)):
        talk = [system, {"role": "user", "content": "What is 3 plus one?"}, {"role": "assistant", "content": first[name]}, {"role": "user", "content": "And 4?"}]
        assert second[name] == shelf.ask(place, talk, max_new_tokens=8) and first[name] in view.box.value
        assert view.talks[name] == talk[1:3]
    asked(view, "x " * 3000, length=8)
    assert "this model can read" in view.status.value
    asked(view, "And 5?", length=8)
    assert [m["content"] for m in view.talks[BASE]] == ["What is 3 plus one?", first[BASE], "And 4?", second[BASE]], "a question that was refused is no part of it"
    view.clear.click()
    assert view.box.value == "" == view.still() and asked(view, length=8) == first and view.talks == {BASE: [], "one": []}
    view.follow.value = False
    assert asked(view, length=8) == first


@pytest.mark.parametrize("text", EVILS)
def test_no_text_of_a_conversation_becomes_html(text, quick):
    html = answers_html({text: text}, {text}, {text: [{"role": text, "content": text}]})
    check_harmless(html)
    assert html.count("&lt;img") >= 4
    folder = lay(Path(quick.output_dir), "one", quick, ended={"ended_by": "the plan"})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    save_chats([Chat([{"role": role, "content": text} for role in ("system", "user", "assistant")], "c")], folder / "test.jsonl")
    view = ChatView(lambda: quick, background=False)
    assert "&lt;img" in view.doubts.value
    check_harmless(loading_code(replace(quick, model_name_or_path="m"), "x"))
    check_view(view)

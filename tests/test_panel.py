"""The panel says what the functions say: each control is its setting, each button its function, and no text becomes HTML.

Marked `trains` are those that need a training; the others also run with Colab's older ipywidgets, in a process of their own.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from datetime import datetime, timezone
from functools import lru_cache
from html import escape, unescape
from pathlib import Path
from types import SimpleNamespace

import browser
import html5lib
import ipywidgets as widgets
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_runs import lay

from finetune_nb import planning, training
from finetune_nb.chat import BASE, Shelf
from finetune_nb.choices import PRESETS, apply_preset, code_for
from finetune_nb.compare_view import ChatView, CompareView, answers_html, chosen_pairs, marked, pair_html, read_pairs
from finetune_nb.config import FinetuneConfig, FinetuneError, load_config
from finetune_nb.controls import STYLE, ConfigForm, View, make_control, note, set_control, value_of
from finetune_nb.data import Chat, Splits, fingerprint, save_chats
from finetune_nb.data_view import DataView, PlanView, Prepared, SeenFiles, data_files, keep_upload, plan_html
from finetune_nb.evaluation import evaluate_run
from finetune_nb.export_view import FormatsView
from finetune_nb.jobs import JOBS, WATCHERS, Job, Sample, active_job, continue_job, start_job
from finetune_nb.live_plan import LivePlan, verdict
from finetune_nb.locks import STOP
from finetune_nb.panel import Panel, compare_view, config_form, data_view, export_view, panel, plan_view, runs_view, train_view
from finetune_nb.pictures import Picture
from finetune_nb.runs import TRASH, list_runs, plot_runs, read_run
from finetune_nb.runs_view import ExportView, RunsView, copy_adapter, empty_trash, loading_code
from finetune_nb.train_view import FOREGROUND, TrainView, job_figures
from finetune_nb.training import load_run, load_splits, train

EVIL = "<img src=x onerror=alert(1)>"
EVILS = (EVIL, f"""'">{EVIL}</pre></td>{EVIL}""")
NAMES = [f.name for f in fields(FinetuneConfig)]

pytestmark = pytest.mark.usefixtures("one_way")


@pytest.fixture(autouse=True)
def no_jobs(tmp_path, monkeypatch):
    "As in a kernel that has just begun, in a folder of its own."
    monkeypatch.chdir(tmp_path)
    JOBS.clear()
    WATCHERS.clear()
    yield
    assert active_job() is None
    JOBS.clear()


@pytest.fixture(scope="module")
def shared_form():
    return ConfigForm()


@pytest.fixture
def form(shared_form):
    "A form at the defaults; made once, since it has many widgets."
    shared_form.config = FinetuneConfig()
    shared_form.tie.value = False
    shared_form.listeners.clear()
    return shared_form


@pytest.fixture
def splits(chats):
    return Splits(chats[:12], chats[24:27], chats[32:34])


@pytest.fixture
def steady(quick):
    return replace(quick, lora_dropout=0.1, early_stopping_patience=0, max_new_tokens=4)


def inside(widget):
    "A widget and all that is in it."
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)


@lru_cache(maxsize=1000)  # most of a page stays as it was
def check_harmless(html):
    "Parsed as a browser does, there is no element that acts, and no text that was meant to be one is lost."
    for element in html5lib.parseFragment(html, namespaceHTMLElements=False).iter():
        if isinstance(element.tag, str):
            assert element.tag not in ("script", "iframe", "object", "embed", "svg"), html
            assert not [name for name in element.attrib if str(name).lower().startswith("on")], html
            assert element.tag != "img" or element.attrib["src"].startswith("data:image/png;base64,"), html


def check_view(*views):
    "All texts that the page shows as HTML, and the still pictures; returns them."
    texts = [w.value for view in views for w in inside(view.widget) if isinstance(w, (widgets.HTML, widgets.HTMLMath))]
    texts += [text for view in views for text in (view.still(), view._still()["text/html"])]
    for text in texts:
        check_harmless(text)
    return "".join(texts)


# --- the form: each control is its setting

TYPED = {
    "model_name_or_path": ["some/model", "weights.gguf"], "train_file": ["chats.jsonl"], "columns": ["{user: question}", "{}"], "validation_file": ["v.jsonl", ""], "test_file": ["t.jsonl"],
    "group_column": ["patient"], "stratify_column": ["topic"], "chat_template_kwargs": ["{enable_thinking: false}"], "target_modules": ["all-linear", "q_proj, v_proj", "[q_proj]"],
    "modules_to_save": ["lm_head", ""], "layers_to_transform": ["0, 1", "[3]"], "max_steps": ["50", "-1"], "loraplus_lr_ratio": ["16", "1.5"], "max_tokens_at_once": ["1024", ""],
    "max_grad_norm": ["0", "1e2"], "logging_steps": ["1"], "eval_steps": ["5", ""], "per_device_eval_batch_size": ["7"], "save_total_limit": ["3"], "revision": ["main", ""], "seed": ["4294967295", "0"], "output_dir": ["elsewhere"],
    "run_name": ["mine", ""], "max_new_tokens": ["1"], "generation_batch_size": ["3"], "max_eval_samples": ["9", ""], "answer_pattern": [r"(?P<code>\w\d+) ", ""],
}  # fmt: skip
ODD = {
    "r": [3, 1024], "learning_rate": [1.23e-4, 0.00020000001, 1.0, 1e-8], "per_device_train_batch_size": [5, 4096], "gradient_accumulation_steps": [3, 4096], "max_length": [8, 1000, 1_000_000],
    "num_train_epochs": [0.01, 2.75, 1000.0], "lora_alpha": [0.01, 33.3, 4096.0], "lora_dropout": [0.07, 0.9], "warmup_ratio": [0.123, 1.0], "weight_decay": [0.015, 1.0], "validation_size": [0.333],
    "test_size": [0.001], "early_stopping_patience": [1000], "target_modules": [["q_proj"], [], ["layers.*"], "q_proj"], "layers_to_transform": [[5]], "model_name_or_path": ["a b, c"], "seed": [2**32 - 1],
    "chat_template_kwargs": [{"a": [1, {"b": None}], "c": "d: e"}], "answer_pattern": [r"[,{}\"' ]+: #"], "train_file": ["[data]/*.jsonl", "x: y # z"],
}  # fmt: skip


def turns(spec):
    "Places that a hand can bring the control to."
    if spec.kind == "slider":
        return [kind(value) for kind in ({type(getattr(FinetuneConfig(), spec.name))}) for value in (spec.low, spec.high, spec.low + 3 * spec.step)]
    return [True, False] if spec.kind == "switch" else list(spec.options) if spec.kind in ("steps", "choice") else TYPED[spec.name]


@pytest.mark.parametrize("name", NAMES)
def test_a_control_changes_its_setting_and_nothing_else(name, form):
    spec, control, heard = form.specs[name], form.controls[name], []
    form.on_change(heard.append)
    at_first = {key: one.value for key, one in form.controls.items()}
    for value in turns(spec):
        before = form.config
        control.value = value
        wanted = value_of(control, spec) if spec.kind in ("names", "text", "integer", "number") else value
        assert getattr(form.config, name) == wanted and form.config == replace(before, **{name: wanted})
        assert not heard or heard[-1] == form.config
        assert {key: one.value for key, one in form.controls.items()} == at_first | {name: value}
    assert len(heard) >= len(turns(spec)) - 1 and not form.problems
    form.config = FinetuneConfig()
    assert {key: one.value for key, one in form.controls.items()} == at_first and form.config == FinetuneConfig()


@pytest.mark.parametrize("name", NAMES)
def test_setting_the_configuration_moves_the_control(name, form):
    spec, control = form.specs[name], form.controls[name]
    at_first = {key: one.value for key, one in form.controls.items() if key != name}
    places = [getattr(FinetuneConfig(**{name: value}), name) for value in ODD.get(name, [])]
    places += turns(spec) if spec.kind in ("steps", "slider", "switch", "choice") else []
    for value in [*places, *places[::-1]]:
        config = replace(FinetuneConfig(), **{name: value})
        form.config = config
        assert form.config == config and not form.problems
        assert value_of(control, spec) == value and type(value_of(control, spec)) is type(value)
        assert {key: one.value for key, one in form.controls.items() if key != name} == at_first
        again = make_control(spec, value)
        assert value_of(again, spec) == value, "a form that begins there stands there too"
        set_control(again, spec, getattr(FinetuneConfig(), name))
        assert value_of(again, spec) == getattr(FinetuneConfig(), name)


def test_a_slider_has_its_usual_range_again(form):
    control, spec = form.controls["num_train_epochs"], form.specs["num_train_epochs"]
    form.config = FinetuneConfig(num_train_epochs=700)
    assert control.max == 700
    form.config = FinetuneConfig()
    assert (control.min, control.max) == (spec.low, spec.high)


@pytest.mark.parametrize(
    ("name", "text"),
    [("max_steps", "many"), ("eval_steps", "0"), ("columns", "{user: ["), ("target_modules", "[1]"), ("layers_to_transform", "first"), ("max_grad_norm", "-1"), ("logging_steps", ""), ("seed", "4294967296"),
     ("layers_to_transform", "--1"), ("layers_to_transform", "²"), ("columns", "[" * 3000), ("layers_to_transform", "[" * 3000), ("chat_template_kwargs", "{a: .inf}"), ("chat_template_kwargs", "{a: 2026-01-01}")],
)
def test_a_bad_value_keeps_the_last_good_one_and_says_why(name, text, form):
    before, heard = form.config, []
    form.on_change(heard.append)
    form.controls[name].value = text
    assert form.config == before and heard == [before], "who listens is told, since a run can't be started so"
    assert form.conflicts[0].name == name and form.conflicts[0].level == "error"
    assert "fnb-error" in form.notes[name].value and f"{name}: expected" in form.notes[name].value
    assert not [key for key, one in form.notes.items() if key != name and "fnb-error" in one.value]
    form.controls["r"].value = 32
    assert form.config == replace(before, r=32) and "fnb-error" in form.notes[name].value, "it stays until it is mended"
    form.config = before
    assert not form.problems and "fnb-error" not in form.notes[name].value and value_of(form.controls[name], form.specs[name]) == getattr(before, name)


def test_alpha_follows_the_rank(form):
    form.tie.value = True
    for r, alpha in ((32, 64), (1, 2), (256, 512), (16, 32)):
        form.controls["r"].value = r
        assert (form.config.r, form.config.lora_alpha, form.controls["lora_alpha"].value) == (r, alpha, alpha)
    form.controls["lora_alpha"].value = 16.0
    form.controls["r"].value = 64
    assert form.config.lora_alpha == 64 and form.config == FinetuneConfig(r=64, lora_alpha=64)
    form.config = FinetuneConfig(r=256, lora_alpha=0.01)
    form.controls["r"].value = 1  # would be less than there may be
    assert form.config.lora_alpha == 0.01
    form.config = FinetuneConfig(r=1, lora_alpha=4096)
    assert "stays 4.1e+03 × r" in form.notes["lora_alpha"].value
    form.controls["r"].value = 256
    assert form.config.lora_alpha == 4096
    form.controls["r"].value = 1
    form.controls["r"].value = 16
    assert form.config.lora_alpha == 4096, "what could not be had is not forgotten"
    form.tie.value = False
    form.controls["r"].value = 8
    assert form.config.lora_alpha == 4096


def test_the_configuration_is_a_copy(form):
    form.config.columns["user"] = "x"
    form.config.target_modules.append("x")
    mine = FinetuneConfig(columns={"user": "q"})
    form.config = mine
    mine.columns["user"] = mine.model_name_or_path = "other"
    assert form.config == FinetuneConfig(columns={"user": "q"})


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_button_is_the_preset(name, form):
    form.config = FinetuneConfig(train_file="chats.jsonl", seed=7, r=3)
    form.controls["max_steps"].value = "nonsense"
    wanted = apply_preset(form.config, name)
    form.presets[name].click()
    assert form.config == wanted and not form.problems
    assert all(value_of(control, form.specs[key]) == getattr(wanted, key) for key, control in form.controls.items())
    assert all(f"<td>{key}</td>" in form.reasons.value for key in PRESETS[name].values)


def test_what_a_preset_says_goes_with_its_values(form):
    form.presets["quick look"].click()
    form.presets["the guide's"].click()
    assert "<td>max_steps</td>" in form.reasons.value and "<td>early_stopping_patience</td>" in form.reasons.value, "what was put back is told too"
    form.controls["r"].value = 64
    assert "Turned since: r." in form.reasons.value and "<td>r</td>" not in form.reasons.value and "<td>lora_alpha</td>" in form.reasons.value
    form.controls["r"].value = 16
    assert "Turned since" not in form.reasons.value and "<td>r</td>" in form.reasons.value
    form.config = FinetuneConfig(r=5)
    assert not form.reasons.value, "these settings are of no preset"
    form.controls["r"].value = 16
    assert not form.reasons.value


def test_where_a_file_can_not_be_written_is_said_in_words(form, tmp_path, monkeypatch):
    form.path.value = str(tmp_path / "nofolder" / "x.yaml")
    form.save.click()
    assert f"there is no folder {tmp_path / 'nofolder'}" in form.file_note.value and "Errno" not in form.file_note.value
    form.path.value = str(tmp_path / "x.yaml")

    def full(*words):
        raise OSError(28, "No space left on device", ".x.yaml.123")

    monkeypatch.setattr("finetune_nb.controls.save_config", full)
    form.save.click()
    assert "No space left on device" in form.file_note.value and "x.yaml can" in form.file_note.value and ".123" not in form.file_note.value


def test_save_load_and_code(form, tmp_path):
    form.config = FinetuneConfig(r=24, learning_rate=1.23e-4, columns={"user": "q"}, run_name="x y", target_modules=["q_proj"])
    wanted, form.path.value = form.config, str(tmp_path / "mine.yaml")
    form.save.click()
    assert load_config(tmp_path / "mine.yaml") == wanted and "Written to" in form.file_note.value
    form.config = FinetuneConfig()
    form.load.click()
    assert form.config == wanted and "Read from" in form.file_note.value
    for bad in ("", ".", str(tmp_path), "/dev/null", str(tmp_path / "none" / "x.yaml"), "a\0b", "x" * 5000, str(tmp_path / f"{EVIL}.yaml")):
        form.path.value = bad
        form.load.click()
        assert "fnb-error" in form.file_note.value and form.config == wanted
        if EVIL not in bad:
            form.save.click()
            assert "fnb-error" in form.file_note.value
        check_view(form)
    (tmp_path / "bad.yaml").write_text("r: many\nfoo: 1")
    form.path.value = str(tmp_path / "bad.yaml")
    form.load.click()
    assert "line 1" in form.file_note.value and "line 2" in form.file_note.value and form.config == wanted
    form.show_code.click()
    assert form.code_box.layout.display is None
    form.controls["r"].value = 64
    assert "r=64" in form.code_box.value and code_for(form.config).count("\n") == form.code_box.value.count("\n")
    form.show_code.click()
    assert form.code_box.layout.display == "none"


FOREIGN = {
    "chats.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n' * 3, "table.csv": b"question,answer\na,b\n", "notes.txt": b"# only a remark\n", "picture.png": b"\x89PNG\r\n\x1a\n\xff\xfe",
    "other.yaml": b"services:\n  web: 1\n", "list.json": b"[1, 2]", "date.yaml": b"r: 2026-13-45\n", "deep.json": b"[" * 2000, "half.yaml": b"r: 8\nmy_own: 1\n", "large.yaml": b"r: 8\n" + b"# x\n" * 300_000,
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_saving_never_replaces_what_is_no_configuration(name, form, tmp_path):
    path = tmp_path / name
    path.write_bytes(FOREIGN[name])
    form.path.value = str(path)
    for _ in range(3):
        form.save.click()
        assert "fnb-error" in form.file_note.value and "is not replaced. Choose another name" in form.file_note.value
    assert path.read_bytes() == FOREIGN[name] and [p.name for p in tmp_path.iterdir()] == [name]


def test_saving_replaces_a_configuration_at_the_second_press(form, tmp_path):
    form.path.value = str(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("r: 8  # mine\n")
    form.save.click()
    assert "press Save again to replace it" in form.file_note.value and (tmp_path / "config.yaml").read_text() == "r: 8  # mine\n"
    (tmp_path / "config.yaml").write_text("r: 9  # it has changed since\n")
    form.save.click()
    assert "press Save again" in form.file_note.value
    form.path.value = str(tmp_path / "other.yaml")
    form.save.click()
    assert "Written to" in form.file_note.value
    form.path.value = str(tmp_path / "config.yaml")
    form.save.click()
    assert "press Save again" in form.file_note.value, "the question was about another moment"
    form.save.click()
    assert "Written to" in form.file_note.value and load_config(tmp_path / "config.yaml") == form.config
    form.controls["r"].value = 4
    form.save.click()
    assert "Written to" in form.file_note.value and load_config(tmp_path / "config.yaml").r == 4, "what this form wrote itself needs no question"
    (tmp_path / "same.yaml").write_text("r: 4  # a remark\n")
    form.path.value = str(tmp_path / "same.yaml")
    form.save.click()
    assert "holds these settings already" in form.file_note.value and (tmp_path / "same.yaml").read_text() == "r: 4  # a remark\n"
    (tmp_path / "empty.yaml").write_text("")
    form.path.value = str(tmp_path / "empty.yaml")
    form.save.click()
    assert "Written to" in form.file_note.value
    form.controls["eval_steps"].value = "often"
    form.save.click()
    assert "Without eval_steps" in form.file_note.value


def test_the_home_folder_is_meant(form, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    form.controls["output_dir"].value = "~/runs"
    assert form.config.output_dir == str(tmp_path / "home" / "runs") and not form.problems
    form.path.value = "~/mine.yaml"
    form.save.click()
    assert load_config(tmp_path / "home" / "mine.yaml") == form.config
    form.config = FinetuneConfig()
    form.load.click()
    assert form.config.output_dir == str(tmp_path / "home" / "runs") and not list(tmp_path.glob("~*"))


def test_the_code_takes_chats_that_were_handed_over(quick, splits, chats, tmp_path, monkeypatch):
    view = DataView(ConfigForm(quick), splits, background=False)
    assert "run = train(config, my_chats)" in view.form.code() and "# my_chats: the Splits" in view.form.code() and "my_chats" in view.form.still()
    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"user_ns": {"_": splits, "data": splits}})())
    view = DataView(ConfigForm(quick), splits, background=False)
    assert "run = train(config, data)" in view.form.code()
    view.form.show_code.click()
    assert "train(config, data)" in view.form.code_box.value
    view.path.value = str(save_chats(chats, tmp_path / "c.jsonl"))
    assert "run = train(config)\n" in view.form.code() and "data" not in view.form.code_box.value.replace("chats", "").split("run =")[1]


@pytest.mark.trains
def test_the_code_trains_on_chats_that_were_handed_over(quick, splits):
    config = replace(quick, max_steps=1, eval_strategy="no", max_new_tokens=2, run_name="code")
    view = DataView(ConfigForm(config), splits, background=False)
    scope = {"my_chats": splits}
    exec(view.form.code(), scope)
    assert scope["run"].config == config and scope["run"].facts["data"]["train"]["sha256"] == fingerprint(splits.train)


# --- colours

GROUNDS = {
    "light": {"JupyterLab": "#ffffff", "VS Code": "#ffffff", "Colab": "#ffffff", "a button": "#f5f5f5"},
    "dark": {"JupyterLab": "#111111", "VS Code": "#1e1e1e", "Colab": "#383838", "docs": "#222222", "high contrast": "#000000", "our own": "#1e1e1e"},
}


def luminance(colour):
    colour = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def colours(rule):
    "Name to colour of a rule of CSS; of a variable with a fallback, the fallback."
    return {name: value for name, value in re.findall(r"--fnb-(\w+):(?:var\([\w-]+,)?(#\w+)\)?", rule)}


def test_every_colour_of_words_can_be_read_in_both_themes():
    "Ink and ground differ enough (WCAG AA: 4.5 to 1), computed from the CSS."
    assert round(contrast("#000", "#ffffff")) == 21 and contrast("#777777", "#fff") < 4.5
    rules = re.findall(r"([^{}]*\.fnb[^{}]*){([^{}]*--fnb-good:[^{}]*)}", STYLE)
    assert len(rules) == 5, "the light one, and the dark ones of JupyterLab, VS Code, Colab with the docs, and of a plain page"
    for selector, rule in rules:
        theme = "light" if selector.strip() == "<style>\n.fnb" or selector.strip() == ".fnb" else "dark"
        found = colours(rule)
        assert found.keys() >= {"ink", "dim", "good", "tight", "bad", "on"}, selector
        for place, ground in GROUNDS[theme].items():
            for name in ("ink", "dim", "good", "tight", "bad"):
                assert contrast(found[name], ground) >= 4.5, (selector, place, name)
        assert contrast(found["on"], found["good"]) >= 4.5, "the words on the green button"


@pytest.mark.parametrize("sign", ["[data-jp-theme-light=false]", ".vscode-dark", "html[theme=dark]", ".quarto-dark", "@media (prefers-color-scheme:dark)"])
def test_each_dark_theme_is_known(sign):
    assert sign in STYLE and STYLE.count("{") == STYLE.count("}")


def test_a_still_picture_brings_its_colours():
    shown = ConfigForm()._still()["text/html"]
    assert "--fnb-good" in shown and '<div class="fnb">' in shown


def test_doubts_stand_beside_the_control_that_they_are_about(form):
    form.controls["max_steps"].value = "20"
    form.controls["learning_rate"].value = 0.1
    assert "max_steps=20" in form.notes["num_train_epochs"].value and "diverges" in form.notes["learning_rate"].value
    form.controls["gradient_accumulation_steps"].value = 8
    assert "32 chats a step (4 × 8)" in form.notes["gradient_accumulation_steps"].value
    form.hint("seed", "a word", "tight")
    assert "a word" in form.notes["seed"].value
    form.hint("seed", "")
    assert form.notes["seed"].value == ""


# --- data and plan

@pytest.fixture
def data(quick, splits):
    return DataView(ConfigForm(quick), splits, background=False)


def test_the_system_message_under_chat_is_that_of_the_chats_until_somebody_changes_it(quick, splits):
    def told(system):
        first = [{"role": "system", "content": system}] * bool(system)
        return splits._replace(train=[Chat([*first, *chat.messages], chat.where) for chat in splits.train])

    room = Panel(quick, told("Add."))
    assert room.chat.system.value == "Add."
    for system in ("Subtract.", "", "Add."):
        room._data_read(SimpleNamespace(splits=told(system)))
        assert room.chat.system.value == system
    for mine in ("", "My own."):
        room.chat.system.value = mine
        room._data_read(SimpleNamespace(splits=told("Subtract.")))
        assert room.chat.system.value == mine, "also when it was emptied on purpose"


def test_data_read_and_looked_at(data, splits):
    heard = []
    data.listeners.append(heard.append)
    assert not data.found and data.still()
    data.load()
    assert data.ready.splits == splits and heard == [data.ready] and bytes(data.picture.value).startswith(b"\x89PNG")
    assert data.at.max == 11 and "1 of 12 · chats.jsonl, line 1" in data.chat.value
    data.at.value = 11
    assert "chats.jsonl, line 12" in data.chat.value
    data.filter.value = "IS 7 plus"
    assert [chat.where for chat in data.found] == ["chats.jsonl, line 7", "chats.jsonl, line 8"] and data.at.max == 1 and "2 of 2 · chats.jsonl, line 8" in data.chat.value
    data.filter.value = "nothing of this"
    assert data.found == [] and "No chat holds" in data.chat.value
    data.filter.value = ""
    for name, part in (("validation", splits.validation), ("test", splits.test)):
        data.which.value = name
        assert data.found == part
    lengths = [len(row["input_ids"]) for chat in splits.train for row in data.ready.rows_of(chat)]
    assert lengths == data.ready.lengths


def test_too_long_chats_are_told_beside_the_slider_at_once(data):
    data.load()
    lengths = data.ready.lengths
    for most in (max(lengths), max(lengths) - 1, min(lengths), 8):
        before = data.picture.value
        data.form.config = replace(data.form.config, max_length=most)
        over = sum(n > most for n in lengths)
        assert (f"{over} of 12 chats" in data.form.notes["max_length"].value) == bool(over)
        assert data.picture.value != before
    picture = data.picture.value
    data.form.controls["r"].value = 8
    assert data.picture.value is picture, "what has not changed is not drawn again"


def test_the_lengths_are_drawn_once_the_slider_rests(data, monkeypatch):
    order = []
    data.load()
    plan = PlanView(data.form, data.ready)
    monkeypatch.setattr("finetune_nb.data_view.plot_lengths", lambda lengths, most: order.append(most) or Picture(figsize=(1, 1)))
    monkeypatch.setattr(plan.ready.live, "plan", lambda config: order.append("plan") or 1 / 0)
    data.form.controls["max_length"].value = 256
    assert order == ["plan", 256], "in the foreground: after the plan"
    monkeypatch.setattr("finetune_nb.data_view.REST", 0.05)
    data.background = True
    order.clear()
    for most in (128, 512, 1024):
        data.form.controls["max_length"].value = most
    data._timer.join(10)
    assert order == ["plan"] * 3 + [1024], "in the background: once, at the end"


def test_chats_that_were_handed_over_are_told_and_can_be_left(quick, splits, chats, tmp_path):
    path = save_chats(chats, tmp_path / "mine.jsonl")
    view = DataView(ConfigForm(replace(quick, train_file=str(path))), splits, background=False)
    view.load()
    assert "In use are the chats that were handed over (my_chats)" in view.kept.value and view.named.layout.display is None and view.ready.splits == splits
    view.form.save.click()
    assert "mine.jsonl, and not the chats that were handed over as my_chats" in view.form.file_note.value
    view.named.click()
    assert len(view.ready.splits.train) == 32 and not view.kept.value and view.named.layout.display == "none" and not view.form.given
    assert DataView(ConfigForm(quick), background=False).named.layout.display == "none"


def test_an_upload_under_the_path_that_stands_there_is_read(quick, splits, chats, tmp_path, monkeypatch):
    content = save_chats(chats[:20], tmp_path / "x.jsonl").read_bytes()
    view = DataView(ConfigForm(replace(quick, train_file="uploads/mine.jsonl")), splits, background=False)
    monkeypatch.setattr(view, "upload", type("Upload", (), {"value": ({"name": "mine.jsonl", "content": memoryview(content)},)}))
    view._uploaded()
    assert len(view.ready.splits.train) == 16 and "The upload is kept" in view.kept.value and view.form.given == ""


def test_other_settings_name_other_data(data, chats, tmp_path):
    data.load()
    one = data.ready
    data.form.controls["seed"].value = "7"
    assert "read the chats again" not in data.status.value, "they were handed over as they are"
    data.form.controls["train_on"].value = "last"
    assert "read the chats again" in data.status.value
    data.path.value = str(save_chats(chats, tmp_path / "mine.jsonl"))
    assert data.form.config.train_file == data.path.value
    data.read.click()
    assert data.ready is not one and len(data.ready.splits.train) == 32 and "read the chats again" not in data.status.value
    data.form.controls["seed"].value = "8"
    assert "name other data now: read the chats again" in data.status.value
    data.form.controls["seed"].value = "7"
    assert "read the chats again" not in data.status.value
    data.form.config = replace(data.form.config, train_file="none.jsonl")
    assert data.path.value == "none.jsonl"
    two = data.ready
    data.read.click()
    assert "fnb-error" in data.status.value and "does not exist" in data.status.value and data.ready is two


UPLOADS = ["chats.jsonl", "../../chats.jsonl", "/etc/chats.jsonl", "..\\..\\chats.jsonl", "..", "", ".hidden", "a\0b.jsonl", "x" * 500 + ".jsonl", EVIL + ".jsonl", "naïve 1.jsonl"]


@pytest.mark.parametrize(("name", "form_of"), [*((name, 8) for name in UPLOADS), *((name, 7) for name in UPLOADS[:2] + UPLOADS[4:6])])
def test_an_upload_is_kept_under_a_harmless_name(form_of, name, data, chats, tmp_path, monkeypatch):
    "As ipywidgets 7 delivers a file, and as 8 does."
    content = save_chats(chats[:20], tmp_path / "x.jsonl").read_bytes()
    if form_of == 7:
        value = {name: {"metadata": {"name": name, "type": "", "size": len(content), "lastModified": 0}, "content": content}}
    else:
        value = ({"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": None},)
    monkeypatch.setattr(data, "upload", type("Upload", (), {"value": value}))
    outside = {path for path in tmp_path.rglob("*")}
    data._uploaded()
    [kept] = [path for path in tmp_path.rglob("*") if path not in outside and path.is_file()]
    assert kept.parent == tmp_path / "uploads" and kept.read_bytes() == content and not kept.name.startswith(".")
    assert data.form.config.train_file == data.path.value == f"uploads/{kept.name}" and "The upload is kept as uploads" in data.kept.value
    if name.endswith(".jsonl"):
        assert kept.suffix == ".jsonl" and len(data.ready.splits.train) == 16
    check_view(data, data.form)


def test_an_upload_never_takes_the_place_of_another_file(tmp_path):
    first = keep_upload("chats.jsonl", b"one")
    assert keep_upload("chats.jsonl", b"one") == first == Path("uploads/chats.jsonl")
    second, third = keep_upload("chats.jsonl", b"two"), keep_upload("chats.jsonl", b"three")
    assert [second.name, third.name] == ["chats-2.jsonl", "chats-3.jsonl"] and keep_upload("chats.jsonl", b"two") == second
    Path("uploads/folder.jsonl").mkdir()
    Path("uploads/link.jsonl").symlink_to("nowhere")
    assert keep_upload("folder.jsonl", b"").name == "folder-2.jsonl" and keep_upload("link.jsonl", b"").name == "link-2.jsonl"
    assert (first.read_bytes(), second.read_bytes(), third.read_bytes()) == (b"one", b"two", b"three")
    assert not [path for path in Path("uploads").iterdir() if path.name.startswith(".")]


def test_an_upload_that_can_not_be_kept_says_so(data, monkeypatch):
    Path("uploads").write_text("a file is in the way")
    monkeypatch.setattr(data, "upload", type("Upload", (), {"value": ({"name": "c.jsonl", "content": memoryview(b"x")},)}))
    before = data.form.config
    data._uploaded()
    assert "fnb-error" in data.kept.value and "can&#x27;t be kept" in data.kept.value and data.form.config == before
    assert Path("uploads").read_text() == "a file is in the way"


def test_the_configuration_of_an_upload_can_be_read_tomorrow(data, chats, tmp_path):
    "After saving, in a new form, the file is still there."
    path = keep_upload("mine.jsonl", save_chats(chats[:20], tmp_path / "x.jsonl").read_bytes())
    data.path.value = str(path)
    data.form.save.click()
    later = DataView(ConfigForm(load_config("config.yaml")), background=False)
    later.load()
    assert len(later.ready.splits.train) == 16 and later.form.config.train_file == "uploads/mine.jsonl"


# --- files that change under the page

def changed_chats(chats, path, answer="Another answer."):
    "The file with other answers."
    return save_chats([Chat([chat.messages[0], {"role": "assistant", "content": f"{answer} {i}"}]) for i, chat in enumerate(chats)], path)


@pytest.fixture
def from_file(quick, chats, tmp_path):
    "A page over a file of chats."
    room = Panel(replace(quick, train_file=str(save_chats(chats, tmp_path / "mine.jsonl"))))
    assert room.data.ready is not None, room.data.status.value
    return room, tmp_path / "mine.jsonl"


def test_a_file_that_changed_is_told_beside_data_and_plan(from_file, chats):
    room, path = from_file
    os.utime(path, (1, 1))
    room.form.controls["r"].value = 8
    assert "changed" not in room.data.status.value + room.plan.box.value, "only its time did"
    assert room.train.splits() is room.data.ready.splits
    before = path.read_bytes()
    changed_chats(chats, path)
    room.form.controls["r"].value = 4
    for html in (room.data.status.value, room.plan.box.value):
        assert "mine.jsonl has changed since it was read" in html
    assert room.train.splits() is None, "training reads it again"
    path.write_bytes(before)
    room.form.controls["r"].value = 8
    assert "changed" not in room.data.status.value + room.plan.box.value, "as it was"
    changed_chats(chats, path)
    room.data.read.click()
    assert "changed" not in room.data.status.value + room.plan.box.value and "Another answer" in room.data.ready.splits.train[0].messages[1]["content"]
    path.unlink()
    room.data.filter.value = "a"
    assert "mine.jsonl is not there any more" in room.data.status.value


def test_asking_for_the_chats_of_a_training_tells_of_the_change(from_file, chats):
    "No slider has moved since."
    room, path = from_file
    changed_chats(chats, path)
    assert room.train.splits() is None
    assert "has changed since it was read" in room.data.status.value and "has changed since it was read" in room.plan.box.value


def test_files_of_a_pattern(quick, chats, tmp_path):
    config = replace(quick, train_file=str(tmp_path / "*.jsonl"), test_file=str(save_chats(chats[:2], tmp_path / "test" / "t.jsonl")) if (tmp_path / "test").mkdir() is None else "")
    save_chats(chats, tmp_path / "a.jsonl")
    seen = SeenFiles(config)
    assert seen.changes() == "" and [path.name for path in data_files(config)] == ["a.jsonl", "t.jsonl"]
    (tmp_path / "a.rejected.jsonl").write_text("x")  # which reading with on_error="skip" leaves there
    assert seen.changes() == ""
    save_chats(chats[:3], tmp_path / "b.jsonl")
    save_chats(chats[:3], tmp_path / "test" / "t.jsonl")
    assert seen.changes() == "b.jsonl is new; t.jsonl has changed since it was read"
    assert data_files(FinetuneConfig()) == [] == data_files(FinetuneConfig(train_file="some/hub-name"))


@pytest.mark.trains
def test_training_takes_the_file_as_it_is_now(from_file, chats):
    room, path = from_file
    changed_chats(chats, path)
    room.train.background = False
    room.form.config = replace(room.config, max_steps=1, eval_strategy="no")
    room.data.load()
    changed_chats(chats, path, "The newest answer.")
    room.train.start.click()
    assert room.train.job.state == "finished", room.train.job.error
    new = load_splits(room.train.job.result.config)
    assert "The newest answer" in new.train[0].messages[1]["content"] and room.train.job.result.facts["data"]["train"]["sha256"] == fingerprint(new.train)


def test_the_tokens_are_those_that_training_keeps(quick, splits, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_nb.data_view.cache_folder", lambda: tmp_path / "cache")
    ready = Prepared(quick, splits)
    [kept] = (tmp_path / "cache" / "tokenized").iterdir()
    monkeypatch.setattr(training, "cache_folder", lambda: tmp_path / "cache")
    written = kept.stat().st_ctime_ns
    rows = training._tokenized(quick, splits.train, ready.tokenizer)
    assert [row["input_ids"] for row in ready.rows] == rows["input_ids"] and [row["labels"] for row in ready.rows] == rows["labels"]
    assert list((tmp_path / "cache" / "tokenized").iterdir()) == [kept] and kept.stat().st_ctime_ns > written, "taken from there"


def test_chats_that_can_not_be_learned_from_are_counted(quick, splits):
    bad = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|im_end|>"}], f"{EVIL}, line 9")
    room = Panel(quick, splits._replace(train=[*splits.train, bad]))
    assert "1 chats can&#x27;t be learned from" in room.data.report.value and len(room.data.ready.rows) == 12
    room.form.controls["control_tokens"].value = "neutralise"
    assert "read the chats again" in room.data.status.value
    with pytest.warns(UserWarning, match="broken by a space"):
        room.data.read.click()
    assert not room.data.ready.unread and len(room.data.ready.rows) == 13
    check_view(room, *room.views)


@pytest.mark.skipif(widgets.__version__ < "8", reason="the value of ipywidgets 8")
def test_an_upload_through_the_widget(data, chats, tmp_path):
    content = save_chats(chats[:20], tmp_path / "x.jsonl").read_bytes()
    data.upload.value = ({"name": "mine.jsonl", "type": "", "size": len(content), "content": memoryview(content), "last_modified": datetime.now(timezone.utc)},)
    assert data.path.value.endswith("mine.jsonl") and len(data.ready.splits.train) == 16
    data.upload.value = ()
    assert len(data.ready.splits.train) == 16


@pytest.mark.parametrize("told", [True, False])
def test_data_without_system_message_without_other_sets(told, quick, chats):
    system = [{"role": "system", "content": "Add."}] * told
    room = Panel(replace(quick, eval_strategy="no"), Splits([Chat([*system, *chat.messages], chat.where) for chat in chats[:6]], [], []))
    assert room.chat.system.value == ("Add." if told else "")
    for name in ("validation", "test"):
        room.data.which.value = name
        assert room.data.found == []
    check_view(room, *room.views)


def test_no_chats_at_all(quick):
    room = Panel(quick, Splits([], [], []))
    assert "no training chats" in room.data.status.value and room.plan.plan is None
    check_view(room, *room.views)


@pytest.fixture
def live(monkeypatch):
    "Plans that do not depend on what else this machine does."
    monkeypatch.setattr(planning, "resident_bytes", lambda: 2**30)
    made = LivePlan.__init__
    monkeypatch.setattr(LivePlan, "__init__", lambda self, rows, speed=None, available=None: made(self, rows, 1e10, 2**31))


PLANS = [{}, {"r": 64}, {"target_modules": "all-linear"}, {"per_device_train_batch_size": 12}, {"num_train_epochs": 7.0}, {"max_steps": 3}, {"max_length": 47, "too_long": "drop"}, {"modules_to_save": ["lm_head"], "r": 1024}]


def test_the_plan_is_that_of_the_live_plan(live, quick, splits):
    form = ConfigForm(quick)
    view = PlanView(form, Prepared(quick, splits))
    for change in PLANS:
        form.config = config = replace(quick, **change)
        plan = LivePlan(view.ready.rows).plan(config)
        assert view.plan == plan
        level, words = verdict(plan)
        assert view.box.value.startswith(plan_html(plan)) and f"fnb-{level}" in view.box.value and words in view.box.value
        assert all(view.box.value.count(escape(text)) == 1 for text in plan.notes), "each once"
        assert all(note(text, "tight") in view.box.value for text in plan.notes) and f"<b>{plan.trainable:,}</b>" in view.box.value
        assert (view.advise.layout.display is None) == (not plan.fits)


def test_a_plan_that_does_not_fit_gets_advice(live, quick, splits):
    view = PlanView(ConfigForm(quick), Prepared(quick, splits))
    view.ready.live.available = 2**30 + 2**21
    view.form.controls["modules_to_save"].value = "lm_head"
    assert not view.plan.fits and "fnb-bad" in view.box.value
    view.advise.click()
    found = view.ready.live.advice(view.form.config)
    assert all(text in view.box.value for text in found) or "No setting of this model fits" in view.box.value
    view.form.controls["target_modules"].value = EVIL
    assert view.plan is None and "no linear layer called" in view.box.value
    view.form.config = replace(quick, seed=5)
    assert "name other data" not in view.box.value, "chats that were handed over are what they were"
    view.form.config = replace(quick, train_file="other.jsonl")
    assert "name other data now" in view.box.value
    check_view(view)


# --- training

def test_start_is_off_with_the_reason(quick, splits, chats, tmp_path):
    form = ConfigForm(replace(quick, train_file=str(save_chats(chats, tmp_path / "c.jsonl"))))
    view = TrainView(form, lambda: splits, background=False)
    assert not view.start.disabled and view.stop.disabled and view.go_on.disabled and "Nothing has been started" in view.status.value
    for name, bad, good in (("eval_steps", "often", ""), ("answer_pattern", "(", ""), ("run_name", "../x", ""), ("model_name_or_path", " ", quick.model_name_or_path)):
        form.controls[name].value = bad
        assert view.start.disabled and view.start.tooltip.startswith(f"{name}: ") and "fnb-error" in form.notes[name].value
        assert f"Settings, {form.specs[name].group}, {name}: " in view.why_not.value, "also for those who see no tooltip"
        form.controls[name].value = good
        assert not view.why_not.value and not view.start.disabled and view.start.tooltip == "start a new run with these settings"
    form.controls["validation_size"].value = 0.0
    assert view.start.disabled and "no validation chats" in view.start.tooltip


def test_views_without_runs(quick, tmp_path):
    room = Panel(quick, read=False)
    text = check_view(room, *room.views)
    assert "There is no run yet" in text and "No runs yet" in text and room.compare.judge.disabled and room.export.copy.disabled
    for act in (room.compare.evaluate, room.runs.open.click, room.runs.continue_.click, room.runs.delete.click, room.runs.restore.click, room.export.export, room.formats.export, room.formats.dry_run, room.train.stop.click, room.train.go_on.click, room.plan.advise.click):
        act()
    assert "fnb-error" in room.runs.status.value and "That run is gone" in room.export.status.value
    assert "no run to export" in room.formats.status.value and "no run to export" in room.formats.files.value and room.formats.write.disabled
    room.chat.send.click()
    assert "There is no question" in room.chat.status.value
    room.chat.question.value, room.chat.who.value = "Hello?", []
    room.chat.send.click()
    assert "Nobody is chosen" in room.chat.status.value and room.chat.task is None
    assert room.run is None and room.config == quick and JOBS == []


def test_figures_of_anything(quick):
    job = Job(quick)
    assert job_figures(job) == {"step": "0"}
    nan = float("nan")
    job.history = [{"step": 0, "eval_loss": nan}, {"step": 3, "loss": nan, "learning_rate": nan, "memory_gib": nan, "tokens_per_second": nan}, {"step": 3, "eval_loss": nan}]
    job.steps = 9
    assert job_figures(job)["step"] == "3 of 9" and job_figures(job)["loss"] == "nan" and "best validation" not in job_figures(job)
    view = TrainView(ConfigForm(quick), background=False)
    view.attach(job)
    view.log.value = False
    view.rate.value = True
    check_view(view)


# --- nothing that somebody wrote is HTML

def evil_chats(text):
    return [Chat([{"role": role, "content": f"{text} {i}"} for role in ("system", "user", "assistant")], f"{text}, line {i}") for i in range(6)]


@pytest.mark.parametrize("text", EVILS)
def test_no_text_of_data_becomes_html(text, quick, tmp_path):
    chats = evil_chats(text)
    room = Panel(replace(quick, max_length=20), Splits(chats[:4], chats[4:5], chats[5:]))
    assert room.data.ready is not None, room.data.status.value
    for name in ("train", "validation", "test"):
        room.data.which.value = name
        assert "&lt;img" in check_view(room, *room.views)
    assert room.chat.system.value.startswith(text), "in a text field it is text"
    room.data.filter.value = text
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": text, "content": text}]}) + "\n" + text)
    room.data.path.value = str(tmp_path / "bad.jsonl")
    room.data.read.click()
    assert "&lt;img" in room.data.status.value
    room.data.path.value = f"{text}.jsonl"
    room.data.read.click()
    check_view(room, *room.views)


@pytest.mark.parametrize("text", EVILS)
def test_no_text_of_settings_becomes_html(text, quick, splits):
    room = Panel(quick, splits)
    for name, control in room.form.controls.items():
        if room.form.specs[name].kind in ("names", "text", "integer", "number") and name != "output_dir":
            control.value = text
            check_view(room, *room.views)
            control.value = TYPED[name][0]
    room.form.config = FinetuneConfig(model_name_or_path=text, train_file=text, output_dir=text, run_name=text, answer_pattern=text, columns={text: text}, target_modules=[text, text], chat_template_kwargs={text: text})
    room.form.show_code.click()
    room.data.read.click()
    room.form.path.value = text
    room.form.load.click()
    room.form.hint("r", text, "error")
    assert "&lt;img" in check_view(room, *room.views)


@pytest.mark.parametrize("text", EVILS)
def test_no_text_of_runs_becomes_html(text, quick, splits):
    name = text.replace("/", "_")
    folder = lay(Path(quick.output_dir), name, replace(quick, run_name=name, train_file=text), ended={"ended_by": text, "steps": 1, "seconds": 2.0})
    lay(Path(quick.output_dir), "other", replace(quick, train_file="x"))
    (folder / "adapter").mkdir()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / "adapter" / file).write_text(text)
    rows = [{"model": model, "question": text, "expected": text, "answer": f"{model} {text}", "passed": {"exact match": False, text: True}} for model in ("base", "tuned")]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.md").write_text(f"# Did it get better?\n\n| 1 test chats | {text} | tuned |\n| --- | --- | --- |\n| exact match | 1 | {text} |\n")
    job = Job(quick, splits, folder)
    job.samples, job.error, job.trace, job.lines = [Sample(1, text, text, text)], text, text, [text]
    job.history = [{"step": 1, "loss": 1.0}]
    JOBS.append(job)
    room = Panel(quick, splits, read=False)
    assert room.train.job is job
    room.compare.background = room.chat.background = False
    for state in ("running", "training", "stopped", "finished", "failed"):
        job.state = state
        room.train.show()
        check_view(room, *room.views)
    assert name in room.compare.run.options and "&lt;img" in room.compare.pair.value and "&lt;img" in room.compare.table.value
    room.compare.check.value = text
    room.compare.shown.value = "right in both"
    room.compare.judge.click()  # it can't be loaded
    room.runs.chosen.value = [name]
    for button in (room.runs.open, room.runs.continue_, room.export.copy):
        button.click()
        assert "&lt;img" in check_view(room, *room.views)
    room.train.overlay.value = room.train.overlay.options
    room.chat.question.value, room.chat.who.value = text, [name]
    room.chat.send.click()
    assert "fnb-error" in room.chat.status.value
    room.chat.answers = {name: text}
    room.chat._grown(name, text)
    room.runs.delete.click()
    room.runs.restore.click()
    room.export.target.value = text
    room.export.copy.click()
    check_view(room, *room.views)


@pytest.mark.parametrize("text", EVILS)
def test_no_name_of_a_file_a_column_a_run_or_a_folder_becomes_html(text, quick, chats, tmp_path):
    "A path can't hold a slash within a name; all else that does harm can stand in one."
    name = text.replace("/", "_")
    folder = tmp_path / name
    folder.mkdir()
    file = save_chats(chats[:20], folder / f"{name}.jsonl")
    room = Panel(replace(quick, train_file=str(file), output_dir=str(folder), run_name=name, columns={text: text}, group_column=text))
    assert "&lt;img" in check_view(room, *room.views)
    room = Panel(replace(quick, train_file=str(file), output_dir=str(folder)))
    assert room.data.ready is not None, room.data.status.value
    file.write_text("changed")
    room.form.controls["r"].value = 4
    assert "&lt;img" in room.data.status.value and "&lt;img" in room.plan.box.value
    (folder / f"{name}.yaml").write_text("r: 2")
    for path in (folder / f"{name}.yaml", file, folder, folder / name / name):
        room.form.path.value = str(path)
        for act in (room.form.save, room.form.save, room.form.load):
            act.click()
            assert "&lt;img" in room.form.file_note.value
            check_view(room, *room.views)
    room.form.hand_over(text)
    room.form.show_code.click()
    (tmp_path / "uploads").mkdir()
    room.data.kept.value = note(f"kept as {keep_upload(text, b'x')}")
    check_view(room, *room.views)
    (folder / "t.csv").write_text(f'"{text.replace(chr(34), chr(34) * 2)}",b\n1,2\n')
    room.data.path.value = str(folder / "t.csv")
    room.data.read.click()
    assert "fnb-error" in room.data.status.value and "&lt;img" in check_view(room, *room.views)


def test_pieces_of_html_escape_what_they_are_given():
    for text in EVILS:
        for html in (note(text, "error"), answers_html({text: text}), *marked(text, "other"), *marked("other", text), *marked(text, text + text)):
            check_harmless(html)
    assert marked("a b", "a c") == ("a <del>b</del>", "a <ins>c</ins>")
    assert marked("", "") == ("", "") and marked("a b c", "x y z") == ("<del>a b c</del>", "<ins>x y z</ins>") and marked("so", "so") == ("so", "so")


def plain(html):
    return unescape(re.sub(r"</?(del|ins|b)>", "", html))


LOOPS = {
    "loops": ("the cat " * 1500, "a the dog " * 1000), "one word": ("x " * 3000, "x " * 2999 + "y"), "signs": (".,;" * 2000, ";,." * 2000), "other words": (" ".join(map(str, range(3000))), " ".join(map(str, range(3000, 6000)))),
    "few words": (" ".join(str(i * i % 17) for i in range(3000)), " ".join(str(i * i * i % 19) for i in range(3000))),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOOPS)
def test_what_changed_is_marked_soon_whatever_was_said(kind):
    one, two = LOOPS[kind]
    began = time.thread_time()
    left, right = marked(one, two)
    assert time.thread_time() - began < 0.2
    assert plain(left) == one and plain(right) == two
    shared = [unescape("".join(re.split(rf"<{tag}>.*?</{tag}>", html, flags=re.S))) for tag, html in (("del", left), ("ins", right))]
    assert shared[0] == shared[1], "what is not marked is the same in both"


def test_of_endless_answers_the_beginning_is_compared_and_it_says_so():
    began = time.thread_time()
    left, right = marked("the cat " * 50_000, "the dog " * 60_000 + "<i>")
    assert time.thread_time() - began < 1 and "what follows is too long to be compared" in left and "<i>" not in right and right.endswith("&lt;i&gt;")
    assert "<del>" not in left.partition("[what follows")[2] and "<del>cat</del>" in left


def test_chat_offers_the_runs_of_the_base_model_that_is_named_now(quick, splits):
    for name, config in (("a", quick), ("b", replace(quick, model_name_or_path="other/model"))):
        folder = lay(Path(quick.output_dir), name, config, ended={"ended_by": "the plan"})
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_text("")
    room = Panel(quick, splits, read=False)
    assert room.chat.who.options == (BASE, "a") and room.chat.who.value == (BASE, "a")
    room.form.controls["model_name_or_path"].value = "other/model"
    assert room.chat.who.options == (BASE, "b") and room.chat.who.value == (BASE, "b")
    room.form.controls["model_name_or_path"].value = quick.model_name_or_path
    for name, value in (("bf16", True), ("load_in_4bit", True), ("use_cpu", not quick.use_cpu)):
        assert room.chat.who.options == (BASE, "a")
        room.form.controls[name].value = value
        assert room.chat.who.options == (BASE,)
        room.form.config = quick


def test_what_was_chosen_stays_when_runs_come_and_go(quick, splits):
    def add(name, root=Path(quick.output_dir)):
        folder = lay(root, name, quick, ended={"ended_by": "the plan"})
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_text("")

    room = Panel(quick, splits, read=False)
    assert room.chat.who.value == (BASE,)
    add("a")
    room._runs_changed()
    assert room.chat.who.value == (BASE, "a"), "the first run is asked at once"
    room.chat.who.value = ["a"]
    add("b")
    room._runs_changed()
    assert room.chat.who.value == ("a",) and set(room.chat.who.options) == {BASE, "a", "b"}
    for name in ("x", "y"):
        add(name, Path(quick.output_dir) / TRASH)
    room.runs.refresh()
    room.runs.trashed.value = "y"
    room._runs_changed()
    assert room.runs.trashed.value == "y"
    room.runs.restore.click()
    assert "y is back" in room.runs.status.value and room.runs.trashed.value == "x"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}\n", '{"model": "base"}', '{"model": "base", "question": "", "expected": "", "answer": "", "passed": {}}'])
def test_answers_that_can_not_be_read_leave_the_page_whole(text, quick, splits):
    folder = lay(Path(quick.output_dir), "one", quick, ended={"ended_by": "the plan"})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text("")
    (folder / "answers.jsonl").write_text(text)
    (folder / "report.md").write_text(text)
    room = Panel(quick, splits, read=False)
    assert room.compare.run.value == "one" and not room.compare.judge.disabled
    assert ("Let the test set be answered again" in room.compare.status.value) == bool(text)
    check_view(room, *room.views)


def test_runs_of_the_folder_that_is_named_now(quick, tmp_path):
    lay(tmp_path / "here", "one", quick)
    lay(tmp_path / "there", "two", quick)
    room = Panel(replace(quick, output_dir=str(tmp_path / "here")), read=False)
    assert list(room.runs.chosen.options) == ["one"] == list(room.train.overlay.options)
    room.form.controls["output_dir"].value = str(tmp_path / "there")
    assert list(room.runs.chosen.options) == ["two"] == list(room.train.overlay.options)
    room.runs.chosen.value = ["two"]
    room.runs.delete.click()
    assert not (tmp_path / "there" / "two").exists() and not room.train.overlay.options
    room.runs.restore.click()
    assert (tmp_path / "there" / "two").is_dir() and list(room.train.overlay.options) == ["two"]


@pytest.mark.parametrize("place", ["x" * 5000, "a\0b", "/dev/null/runs"])
def test_a_folder_that_can_not_be_leaves_the_page_whole(place, quick):
    lay(Path(quick.output_dir), "one", quick)
    room, heard = Panel(quick, read=False), []
    room.train.watch(Path(quick.output_dir) / "one")
    assert room.train.figures.value and room.train.curves.value
    room.form.on_change(lambda config: heard.append(config.output_dir))
    room.form.controls["output_dir"].value = place
    assert heard == [place] and room.train.start.disabled and "fnb-error" in room.form.notes["output_dir"].value
    assert not room.runs.chosen.options and not room.form.file_note.value
    assert not (room.train.figures.value or room.train.samples.value or room.train.log_lines.value or room.train.curves.value)


def test_a_run_that_can_not_be_read_leaves_the_one_that_is_shown(quick):
    lay(Path(quick.output_dir), "good", quick)
    lay(Path(quick.output_dir), "odd", quick, history=[{"step": None, "loss": 1.0}])
    lay(Path(quick.output_dir), "odder", quick, started={"planned": 3})
    view = TrainView(ConfigForm(quick))
    view.look_at.value = "good"
    for name in ("odd", "odder"):
        view.look_at.value = name
        assert f"{name} can&#x27;t be read" in view.status.value and view.job.folder.name == "good"
        view.refresh()
        assert "be read" not in view.status.value and "Broken off" in view.status.value


def test_a_run_that_was_deleted_is_shown_no_more(quick):
    lay(Path(quick.output_dir), "one", quick, ended={"ended_by": "the user", "steps": 2}, checkpoint=2)
    room = Panel(quick, read=False)
    room.train.watch(Path(quick.output_dir) / "one")
    assert not room.train.go_on.disabled
    room.runs.chosen.value = ["one"]
    room.runs.delete.click()
    assert room.train.job is None and room.train.go_on.disabled and "Nothing has been started" in room.train.status.value


def test_going_on_from_the_table_says_what_came_of_it(quick):
    folder = lay(Path(quick.output_dir), "one", quick, ended={"ended_by": "the user", "steps": 2}, checkpoint=2)
    (folder / "started.json").unlink()
    room = Panel(quick, read=False)
    room.train.background = False
    room.runs.chosen.value = ["one"]
    room.runs.continue_.click()
    assert "fnb-error" in room.runs.status.value and "fnb-error" in room.train.status.value
    assert "What was saved can go on" not in room.train.status.value
    room.runs.go_on = lambda folder: ""
    room.runs.continue_.click()
    assert "one goes on: see it under Train" in room.runs.status.value


def test_runs_of_one_name_in_two_folders(quick, tmp_path):
    lay(Path(quick.output_dir), "one", quick)
    other = lay(tmp_path / "elsewhere", "one", quick)
    view = TrainView(ConfigForm(quick))
    view.watch(other)
    assert view.look_at.value is None and view.overlay.options == ("one",)
    view.overlay.value = ["one"]
    assert list(view.histories()) == [str(other), "one"]


def test_a_listener_that_fails_keeps_nobody_from_hearing(form):
    heard = []
    form.on_change(lambda config: 1 / 0)
    form.on_change(heard.append)
    form.controls["r"].value = 8
    assert heard == [FinetuneConfig(r=8)] and "ZeroDivisionError" in form.file_note.value
    form.file_note.value = ""


def test_settings_of_a_run_are_taken_without_its_name(quick, tmp_path):
    lay(Path(quick.output_dir), "one", replace(quick, r=3, run_name="one"))
    lay(Path(quick.output_dir), "bad", quick)
    (Path(quick.output_dir) / "bad" / "config.yaml").write_text("r: [")
    form = ConfigForm(quick)
    view = runs_view(form)
    view.chosen.value = ["one"]
    view.open.click()
    assert form.config == replace(quick, r=3) and view.rows[0].config.run_name == "one"
    view.chosen.value = ["bad"]
    view.open.click()
    assert "The settings of bad can" in view.status.value and form.config.r == 3
    view.chosen.value = ["bad", "one"]
    view.open.click()
    assert "Choose one run" in view.status.value


def test_a_still_picture_is_html_without_scripts(quick, splits):
    room = Panel(quick, splits)
    for view in (*room.views, room):
        shown = view._still()
        assert isinstance(view, View) and shown["text/plain"].endswith("a still picture") and view._still_class in shown["text/html"]
        view.keep_picture()
    assert "<h3>Data</h3>" in room.still() and "<h3>Plan</h3>" in room.still()


# --- each button is its function

def adapter(folder):
    return load_file(Path(folder) / "adapter/adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.trains
def test_train_stop_continue_and_the_page_opened_again(live, steady, splits):
    whole = train(replace(steady, run_name="whole"), splits, say=lambda line: None)
    room = panel(steady, splits)
    room.train.background, ended = True, []
    room.train.listeners.append(lambda: ended.append(room.train.job.state))
    here, go = threading.Event(), threading.Event()

    def hold():
        job = active_job()
        if job and job.step == 4 and job.state == "training":
            here.set()
            go.wait(60)

    began = room.train.begin

    def begin():
        began()
        room.train.job.listeners.append(hold)

    begin()
    job = room.train.job
    assert here.wait(60) and job.active and room.train.start.disabled and not room.train.stop.disabled and room.train.go_on.disabled
    assert room.train.start.tooltip == "a run is at work"
    again = panel(steady, splits)
    assert again.train.job is job and again.tabs.selected_index == 2 and again.train.start.disabled
    again.train.begin()
    assert "A run is at work" in again.train.status.value and JOBS == [job]
    again.compare.evaluate()
    again.chat.question.value = "Now?"
    again.chat.ask()
    assert "A run is at work" in again.chat.status.value and not again.chat.task
    again.runs.refresh()
    again.runs.chosen.value = [job.folder.name]
    again.runs.delete.click()
    assert "is at work. Stop it first" in again.runs.status.value and job.folder.is_dir()
    again.train.stop.click()
    assert job.state == "stopping" and room.train.stop.disabled
    go.set()
    job.wait()
    job.listeners.remove(hold)
    assert job.state == "stopped" and "can go on" in room.train.status.value and ended == ["stopped"]
    assert not room.train.go_on.disabled and not room.train.start.disabled and room.train.stop.disabled
    third = panel(steady, splits)
    assert third.train.job is job and not third.train.go_on.disabled and bytes(third.train.curves.value).startswith(b"\x89PNG")
    third.train.background = True
    third.train.go_on.click()
    run = job.wait()
    assert job.state == "finished" and third.run is run and third.train.go_on.disabled
    last = f"checkpoint-{run.facts['steps']}/adapter_model.safetensors"
    assert same(load_file(run.folder / last), load_file(whole.folder / last))
    assert [row["loss"] for row in run.history if "loss" in row] == [row["loss"] for row in whole.history if "loss" in row]
    assert f"{run.facts['steps']} of {run.facts['steps']}" in third.train.figures.value and "What it answers" in third.train.samples.value
    assert third.chat.who.options == (BASE, job.folder.name, "whole") and job.folder.name in third.compare.run.options
    check_view(third, *third.views)
    without = Panel(splits=splits, read=False)
    assert without.config == job.config and without.train.job is job, "without a configuration, where the last run of the folder stands"


@pytest.mark.trains
def test_every_view_shows_a_job_that_begins_wherever_it_stands(steady, splits):
    one, two = TrainView(ConfigForm(steady)), TrainView(ConfigForm(replace(steady, output_dir="others")))
    words = []
    job = start_job(replace(steady, max_steps=2), splits, False, [lambda: words.append(two.status.value)])
    assert one.job is two.job is job and job.listeners.count(one._changed) == 1
    assert any(FOREGROUND in text and str(job.folder) in text for text in words), "it says where the run is, and how to stop it"
    two.detach()
    assert two._changed not in job.listeners and two._started not in WATCHERS and one._changed in job.listeners


def test_a_cell_that_is_run_again_puts_its_panel_away(quick, splits):
    from finetune_nb.panel import _replace_former

    rooms = [Panel(quick, splits, read=False) for _ in range(4)]
    for room, (cell, run) in zip(rooms, [("a", "1"), ("b", "2"), ("a", "3"), ("", "4")], strict=True):
        _replace_former(room, cell, run)
    assert [room.train._started in WATCHERS for room in rooms] == [False, True, True, True], "another cell's panel stays"


def test_a_run_of_another_kernel_is_looked_at(quick):
    folder = lay(Path(quick.output_dir), "theirs", quick, started={"planned": {"steps": 9}})
    (folder / "samples.jsonl").write_text(json.dumps({"step": 1, "question": EVIL, "expected": "", "answer": EVIL}) + "\n")
    code = "import sys; from finetune_nb.locks import hold\nwith hold(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline().strip() == "held"
    view = TrainView(ConfigForm(quick))
    assert view.job.state == "elsewhere" and str(other.pid) in view.status.value and "4 of 9" in view.figures.value
    assert "What it answers" in view.samples.value and view.go_on.disabled and not view.stop.disabled
    runs = RunsView(lambda: quick.output_dir)
    runs.chosen.value = ["theirs"]
    runs.delete.click()
    assert "at work elsewhere" in runs.table.value and "at work in process" in runs.status.value and folder.is_dir()
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.0}\n')
    view.renew.click()
    assert "7 of 9" in view.figures.value
    check_view(view)
    view.stop.click()
    assert "Asked to stop after its step" in view.status.value and view.stop.disabled and (folder / STOP).is_file()
    follower = TrainView(ConfigForm(quick), background=True)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 8, "loss": 1.0}\n')
    browser.until(lambda: "8 of 9" in follower.figures.value, "the view has read on by itself", 20)
    with (folder / "history.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.0}\n')
    browser.until(lambda: "9 of 9" in follower.figures.value, "the view has read on by itself", 20)
    assert not math.isnan(follower.job.pace.left(1, 0)), "two steps were seen to come"
    other.communicate()
    browser.until(lambda: "Broken off" in follower.status.value, "the view has seen the end", 20)
    follower.detach()
    view.stop.click()
    assert "there is nothing to stop" in view.status.value or view.stop.disabled
    view.renew.click()
    assert view.job.state == "broken off" and "Broken off" in view.status.value and not (folder / STOP).exists()


def test_still_pictures_follow_the_controls(quick, splits, monkeypatch):
    kept, room = threading.Event(), Panel(quick, splits, read=False)

    class Shown:
        def update(self, data, raw):
            kept.set()

    room._pictures.append(Shown())
    room.form.controls["r"].value = 32
    assert kept.wait(10)
    room.close()


@pytest.mark.trains
def test_a_picture_that_fails_once_costs_nothing_else(steady, splits, monkeypatch):
    view = TrainView(ConfigForm(steady), lambda: splits, background=False)
    calls, ended, looked = [], [], []

    def fails_at_first(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 2):
            raise RuntimeError("no picture today")
        return plot_runs(*args, **kwargs)

    monkeypatch.setattr("finetune_nb.train_view.plot_runs", fails_at_first)
    view.listeners.append(lambda: ended.append(view.job.state))
    WATCHERS.append(lambda job: job.listeners.append(lambda: looked.append((job.state, view.look_at.value, job.folder and job.folder.name))))
    view.begin()
    assert len(calls) > 2 and ended == ["finished"] and "Finished" in view.status.value and view.curves.value
    assert all(shown == name for state, shown, name in looked if state == "training"), "what is looked at is the run at work"


@pytest.mark.trains
def test_a_failed_start_says_why(steady, splits):
    view = train_view(ConfigForm(replace(steady, model_name_or_path=f"no/{EVIL}")), None)
    view.splits, view.background = lambda: splits, False
    view.start.click()
    assert view.job.state == "failed" and "fnb-error" in view.status.value and "details" in view.status.value and view.go_on.disabled
    assert "Traceback" in view.status.value and "Traceback" not in view.still() and "fnb-error" in view.still(), "paths of a machine stay out of the notebook"
    assert not list(Path(steady.output_dir).glob("*")) and not view.start.disabled
    check_view(view)


@pytest.fixture(scope="module")
def two_runs(tiny_model, tmp_path_factory):
    "Two finished runs of one base model and one that was stopped, in one folder; and their chats."
    chats = [Chat([{"role": "user", "content": f"What is {i} plus one?"}, {"role": "assistant", "content": f"It is {i + 1}."}], f"c {i}") for i in range(18)]
    splits, folder = Splits(chats[:12], chats[12:14], chats[14:]), tmp_path_factory.mktemp("runs")
    config = FinetuneConfig(
        model_name_or_path=tiny_model, bf16=False, use_cpu=True, num_train_epochs=2, learning_rate=5e-2, gradient_accumulation_steps=1, logging_steps=1, max_new_tokens=8, output_dir=str(folder), early_stopping_patience=0,
    )  # fmt: skip
    for r, name in ((4, "one"), (8, "two")):
        train(replace(config, r=r, run_name=name), splits, say=lambda line: None)
    job = start_job(replace(config, run_name="part"), splits, False, [lambda: active_job().step == 2 and active_job().stop()], questions=0)
    assert job.state == "stopped"
    JOBS.clear()
    return config, splits


@pytest.mark.trains
def test_the_test_set_is_judged_as_evaluate_run_does(two_runs):
    config, _ = two_runs
    view = CompareView(lambda: config.output_dir, background=False)
    view.run.value = "one"
    view.judge.click()
    folder = Path(config.output_dir) / "one"
    mine = (folder / "answers.jsonl").read_text()
    report = evaluate_run(load_run(folder))
    assert (folder / "answers.jsonl").read_text() == mine
    pairs = read_pairs(folder)
    assert [(p.base, p.tuned) for p in pairs] == [(b.answer, t.answer) for b, t in zip(report.base.rows, report.tuned.rows, strict=True)]
    assert view.pairs == pairs and "4 test questions" in view.status.value and not view.judge.disabled
    assert all(cell in view.table.value for _, *cells in report.table() for cell in cells)
    for shown in view.shown.options:
        view.shown.value = shown
        found = chosen_pairs(pairs, shown, "exact match")
        assert view.at.max == max(len(found) - 1, 0)
        for at, pair in enumerate(found):
            view.at.value = at
            assert pair_html(pair, "exact match") in view.pair.value and f"{at + 1} of {len(found)} shown" in view.pair.value
    view.run.value = "two"
    assert not view.pairs and "has not answered" in view.status.value


@pytest.mark.trains
def test_a_run_without_test_chats_says_so(two_runs, steady, splits):
    start_job(replace(steady, max_steps=1, eval_strategy="no"), splits._replace(test=[]), False)
    view = compare_view(ConfigForm(steady))
    view.background = False
    view.judge.click()
    assert "no test chats" in view.status.value and not view.judge.disabled


@pytest.mark.trains
def test_a_question_is_answered_as_the_shelf_does(two_runs, tmp_path):
    config, splits = two_runs
    view = ChatView(lambda: config, "Be brief.", background=False)
    assert list(view.who.options) == [BASE, *(row.name for row in list_runs(config.output_dir).rows)]
    view.question.value, view.length.value = "What is 3 plus one?", 8
    view.who.value = [BASE, "one", "two"]
    view.send.click()
    shelf = Shelf(config, lambda line: None)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 plus one?"}]
    folders = {BASE: None, "one": Path(config.output_dir) / "one", "two": Path(config.output_dir) / "two"}
    wanted = {name: shelf.ask(folder, messages, max_new_tokens=8) for name, folder in folders.items()}
    assert view.answers == wanted and view.box.value == answers_html(wanted) and not view.send.disabled and view.status.value == ""
    assert len(set(wanted.values())) > 1
    from shutil import copytree, rmtree

    copytree(folders["one"], tmp_path / "run")
    assert shelf.ask(tmp_path / "run", messages, max_new_tokens=8) == wanted["one"]
    rmtree(tmp_path / "run")
    copytree(folders["two"], tmp_path / "run")
    assert shelf.ask(tmp_path / "run", messages, max_new_tokens=8) == wanted["two"], "another run under the name of one that is gone"
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(Exception):  # noqa: B017, PT011
            shelf.ask(tmp_path / "run", messages)
    rmtree(tmp_path / "run")
    with pytest.raises(FinetuneError, match="not there any more"):
        shelf.ask(tmp_path / "run", messages)
    assert {name: shelf.ask(folder, messages, max_new_tokens=8) for name, folder in folders.items()} == wanted


@pytest.mark.trains
def test_an_adapter_that_does_not_fit_leaves_the_shelf_as_it_was(two_runs, tmp_path):
    from shutil import copytree

    config, _ = two_runs
    copytree(Path(config.output_dir) / "one", tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text((Path(config.output_dir) / "two/adapter/adapter_config.json").read_text())
    (tmp_path / "run" / "adapter" / "MANIFEST.json").unlink()  # which knows that it is another one
    messages = [{"role": "user", "content": "What is 3 plus one?"}]
    fresh = Shelf(config, lambda line: None)
    base = fresh.ask(None, messages, max_new_tokens=8)
    for _ in range(2):
        with pytest.raises(FinetuneError, match="does not fit|can't be right"):
            fresh.ask(tmp_path / "run", messages)
        assert fresh.ask(None, messages, max_new_tokens=8) == base
    two = fresh.ask(Path(config.output_dir) / "two", messages, max_new_tokens=8)
    for _ in range(2):
        with pytest.raises(FinetuneError, match="does not fit|can't be right"):
            fresh.ask(tmp_path / "run", messages)
    assert fresh.ask(Path(config.output_dir) / "two", messages, max_new_tokens=8) == two and fresh.ask(None, messages, max_new_tokens=8) == base


@pytest.mark.trains
def test_runs_go_on_are_deleted_brought_back_and_copied(two_runs, tmp_path):
    config, _ = two_runs
    form = ConfigForm(config)
    shown = train_view(form)
    shown.background = False
    view, export = runs_view(form, shown), export_view(form)
    view.chosen.value = ["one"]
    view.continue_.click()
    assert "go on: it is finished" in view.status.value and JOBS == []
    view.chosen.value = ["part"]
    view.continue_.click()
    assert shown.job.state == "finished" and shown.job.folder.name == "part" and read_run(shown.job.folder).state == "finished"
    with pytest.raises(FinetuneError, match="was not stopped"):
        continue_job(shown.job.folder)
    before = adapter(Path(config.output_dir) / "two")
    view.refresh()
    view.chosen.value = ["two"]
    view.delete.click()
    assert (Path(config.output_dir) / TRASH / "two").is_dir() and "two" not in view.chosen.options and view.trashed.value == "two"
    view.restore.click()
    assert same(adapter(Path(config.output_dir) / "two"), before) and "two" in view.chosen.options and not view.trashed.options
    export.refresh()
    export.run.value, export.target.value = "two", str(tmp_path / "copied")
    export.copy.click()
    assert same(load_file(tmp_path / "copied" / "adapter_model.safetensors"), before) and loading_code(config, tmp_path / "copied").splitlines()[-1] in export.code.value
    assert {p.name for p in copy_adapter(Path(config.output_dir) / "two", tmp_path / "direct").iterdir()} == {p.name for p in (tmp_path / "copied").iterdir()}
    export.copy.click()
    assert "exists and is not overwritten" in export.status.value
    export.target.value = " "
    export.copy.click()
    assert "Name a folder" in export.status.value
    check_view(view, export, shown)


@pytest.mark.trains
def test_formats_are_written_checked_and_nothing_is_sent(two_runs):
    config, _ = two_runs
    view = FormatsView(lambda: config.output_dir, background=False)
    view.run.value, view.formats.value, view.repo.value = "two", [], "me/two"
    view.look.click()
    assert "was not exported yet" in view.files.value
    view.write.click()
    assert "Choose a format" in view.status.value and view.task is None
    view.formats.value = ["merged"]
    view.write.click()
    found = view.task.result
    assert [item.format for item in found.items] == ["merged"] and found._repr_html_() in view.table.value and not view.write.disabled
    assert ("Each may be shipped" in view.status.value) is found.ok
    view.look.click()
    folder = Path(config.output_dir) / "two" / "exports" / "merged"
    assert ("Would go to me/two (private); nothing was sent" in view.files.value and "model.safetensors" in view.files.value) is found.ok
    (folder / "notes.txt").write_text("x")
    view.look.click()
    assert "fnb-error" in view.files.value and "notes.txt is no part of an export" in view.files.value, "a changed folder goes nowhere"
    view.repo.value = EVIL
    view.look.click()
    check_view(view)
    shutil.rmtree(folder.parent)


def test_what_was_moved_is_said_where_the_rest_can_not_be(quick, monkeypatch):
    for name in ("a", "b", "c"):
        lay(Path(quick.output_dir), name, quick)
    view = RunsView(lambda: quick.output_dir)
    real = view.trash.__globals__["trash_run"]
    monkeypatch.setattr("finetune_nb.runs_view.trash_run", lambda folder: real(folder) if folder.name != "b" else real(folder / "none"))
    view.sort.value = "name"
    view.chosen.value = ["a", "b", "c"]
    view.delete.click()
    assert "is not the folder of a run" in view.status.value and "In the trash now: a; still here: b, c." in view.status.value
    assert view.chosen.options == ("b", "c") and view.trashed.value == "a"


def test_the_trash_is_emptied_at_the_second_press(quick, tmp_path):
    for name in ("a", "b", "c"):
        lay(Path(quick.output_dir), name, quick)
    (tmp_path / "kept").mkdir()
    view = RunsView(lambda: quick.output_dir)
    view.empty.click()
    assert "The trash is empty" in view.status.value
    view.chosen.value = ["a"]
    view.delete.click()
    view.empty.click()
    assert "again to delete for good: a." in view.status.value and view.trashed.options == ("a",)
    view.chosen.value = ["b"]
    view.delete.click()
    view.empty.click()
    assert "again to delete for good: a, b." in view.status.value and view.trashed.options == ("a", "b"), "the question was about another trash"
    (Path(quick.output_dir) / TRASH / "link").symlink_to(tmp_path / "kept")
    view.empty.click()
    view.empty.click()
    assert "Deleted for good: a, b, link." in view.status.value and not view.trashed.options and (tmp_path / "kept").is_dir()
    assert [row.name for row in list_runs(quick.output_dir).rows] == ["c"]
    for name in ("c", "..", "../c", ""):
        with pytest.raises(FinetuneError, match="is not in the trash"):
            empty_trash(quick.output_dir, [name])


def test_an_adapter_is_not_copied_among_the_runs(quick, monkeypatch):
    folder = lay(Path(quick.output_dir), "a", quick)
    (folder / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "adapter" / name).write_text("{}")
    for target in (folder / "adapter" / "in", folder / "x", folder.parent / "x", folder.parent / TRASH / "x"):
        with pytest.raises(FinetuneError, match="lies among the runs"):
            copy_adapter(folder, target)
        assert not target.exists()
    monkeypatch.chdir(folder.parent)
    for target in ("a/adapter/in", f"{TRASH}/x"):
        with pytest.raises(FinetuneError, match="lies among the runs"):
            copy_adapter(folder, target)
    view = ExportView(lambda: ".")
    view.target.value = "mine"
    view.copy.click()
    assert "whole" in view.status.value and Path("mine").is_dir() and "where the folder is taken elsewhere" in view.code.value


def test_the_parts_stand_alone(quick, splits):
    form = config_form(quick)
    data = data_view(form, splits)
    data.background = False
    plan = plan_view(form, data)
    assert plan.plan is None
    data.load()
    assert plan.plan is not None and plan.ready is data.ready
    assert isinstance(train_view(form, data), TrainView) and train_view(form, data).splits() == splits
    form.controls["seed"].value = "5"
    assert train_view(form, data).splits() is splits and isinstance(runs_view(form), RunsView) and isinstance(export_view(form), ExportView)


# --- and with the older ipywidgets of Colab

@pytest.mark.slow
def test_the_same_with_older_ipywidgets():
    if widgets.__version__ < "8":
        pytest.skip("This is the older one.")
    places = [os.environ.get("WIDGETS7"), ROOT / ".venv" / "widgets7", Path(sys.prefix) / "widgets7"]
    folder = next((Path(place) for place in places if place and (Path(place) / "ipywidgets").is_dir()), None)
    if folder is None:
        pytest.skip("ipywidgets 7.7.1 is not in .venv/widgets7: `make test` puts it there, or see CONTRIBUTING.md.")
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", str(Path(__file__)), "-m", "not trains and not slow", "-x", "--durations=0", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:] + result.stderr[-2000:]

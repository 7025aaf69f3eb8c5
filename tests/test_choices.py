"What a person is offered: a control for every setting, presets, doubts in words, and text that comes back as it went."

import os
import re
from copy import deepcopy
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_nb.choices import PRESETS, apply_preset, code_for, control_specs, find_conflicts, from_text, to_text
from finetune_nb.config import ConfigError, FinetuneConfig, FinetuneError, field_groups, field_help

NAMES = [f.name for f in fields(FinetuneConfig)]
words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=20).filter(lambda text: text == text.strip())
plain = st.from_regex(r"[A-Za-z_][\w.-]{0,12}", fullmatch=True)
values = st.recursive(st.none() | st.booleans() | st.integers() | words | st.floats(allow_nan=False, allow_infinity=False), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3), max_leaves=5)


def strategy(f):
    "Values that a setting can have."
    hint, low, high, choices = str(f.type), f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    if choices:
        return st.sampled_from(choices)
    kinds = {"str": words.filter(bool), "bool": st.booleans(), "int": st.integers(int(low or 0), int(high or 10**6)), "float": st.floats(low or 0, high or 1.0)}
    kinds |= {"list[int]": st.lists(st.integers(-3, 99), max_size=4), "list[str]": st.lists(words, max_size=4), "dict[str, str]": st.dictionaries(words, words, max_size=3), "dict[str, typing.Any]": st.dictionaries(words, values, max_size=3)}
    if f.name == "target_modules":  # a word, or names
        return plain | kinds["list[str]"]
    kind = kinds[hint.removesuffix(" | None").removeprefix("<class '").removesuffix("'>")]
    return st.none() | kind if "None" in hint else kind


STRATEGIES = {f.name: strategy(f) for f in fields(FinetuneConfig)}
configs = st.fixed_dictionaries({}, optional=STRATEGIES).map(lambda changes: FinetuneConfig(**changes))


def test_every_setting_has_a_control_with_its_help():
    specs = control_specs()
    assert list(specs) == NAMES
    groups = {name: heading for heading, names in field_groups(FinetuneConfig).items() for name in names}
    for name, spec in specs.items():
        assert spec.name == name and spec.help == field_help(FinetuneConfig)[name] != "" and spec.group == groups[name]
        assert spec.kind in ("steps", "slider", "integer", "number", "switch", "choice", "names", "text")
        default = getattr(FinetuneConfig(), name)
        if spec.kind in ("steps", "choice"):
            assert default in spec.options
            for option in spec.options:  # each can be had
                assert getattr(replace(FinetuneConfig(), **{name: option}), name) == option
        if spec.kind == "slider":
            assert spec.low <= default <= spec.high and spec.step > 0
            for end in (spec.low, spec.high):
                assert getattr(replace(FinetuneConfig(), **{name: end}), name) == end
    assert {name for name, spec in specs.items() if not spec.advanced} >= {"model_name_or_path", "train_file", "r", "learning_rate", "num_train_epochs"}


@pytest.mark.parametrize("name", NAMES)
def test_text_comes_back_as_the_value(name):
    @settings(max_examples=40, deadline=None)
    @given(STRATEGIES[name])
    def comes_back(value):
        if control_specs()[name].kind in ("names", "text", "integer", "number"):
            value = getattr(FinetuneConfig(**{name: value}), name)
            again = from_text(name, to_text(value))
            assert again == value and type(again) is type(value)

    comes_back()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_grad_norm", "1e2", 100.0), ("max_grad_norm", " 0.5 ", 0.5), ("loraplus_lr_ratio", "16", 16.0), ("max_steps", "1_000", 1000),
        ("logging_steps", "010", 10), ("max_tokens_at_once", "", None), ("eval_steps", " ", None), ("run_name", "", None),
        ("target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]), ("target_modules", "all-linear", "all-linear"), ("target_modules", "[q_proj]", ["q_proj"]),
        ("target_modules", "['layers.*']", ["layers.*"]), ("modules_to_save", "lm_head", ["lm_head"]), ("modules_to_save", "", []), ("layers_to_transform", "0, 1", [0, 1]),
        ("layers_to_transform", "[0]", [0]), ("columns", "{user: question}", {"user": "question"}), ("columns", "", {}), ("chat_template_kwargs", "{enable_thinking: false}", {"enable_thinking": False}),
        ("answer_pattern", r"\d+ ", r"\d+ "), ("answer_pattern", "  ", None),
    ],
)  # fmt: skip
def test_what_is_typed_is_what_is_meant(name, text, value):
    assert from_text(name, text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_steps", "many"), ("max_steps", "1.5"), ("max_steps", ""), ("max_grad_norm", "nan"), ("max_grad_norm", "-1"), ("eval_steps", "0"), ("eval_steps", "often"),
        ("layers_to_transform", "first"), ("layers_to_transform", "[1, a]"), ("columns", "question"), ("columns", "{user: 1}"), ("columns", "{user: [}"), ("columns", "2026-13-45"),
        ("target_modules", "[1, 2]"), ("target_modules", "[q_proj"),
    ],
)  # fmt: skip
def test_what_can_not_be_meant_is_refused_with_the_help_of_the_setting(name, text):
    with pytest.raises(ConfigError, match=f"{name}: expected .* It is: {re.escape(field_help(FinetuneConfig)[name][:20])}"):
        from_text(name, text)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_the_code_gives_the_same_configuration(config):
    made, _, rest = code_for(config).partition("run = ")
    scope = {}
    exec(made, scope)
    assert scope["config"] == config and rest == "train(config)\nevaluate_run(run)\n"


@settings(max_examples=20, deadline=None)
@given(configs)
def test_the_code_hands_over_chats_that_no_setting_names(config):
    "It says what the name stands for, and is the same cell otherwise."
    import finetune_nb

    code, calls = code_for(config, "my_chats"), []
    assert "# my_chats: the Splits(train, validation, test)" in code
    assert code.replace("train(config, my_chats)", "train(config)").replace("# my_chats: the Splits(train, validation, test) that the panel was given\n", "") == code_for(config)
    scope = {"my_chats": object()}
    with pytest.MonkeyPatch.context() as patch:  # what it calls is run in the panel's tests
        patch.setattr(finetune_nb, "train", lambda *given: calls.append(given) or "the run", raising=False)
        patch.setattr(finetune_nb, "evaluate_run", calls.append, raising=False)
        exec(code, scope)
    assert calls == [(config, scope["my_chats"]), "the run"]


def test_the_code_trains_and_judges(quick, chats, tmp_path, monkeypatch):
    "The whole cell, as it is shown."
    from finetune_nb.data import save_chats

    monkeypatch.chdir(tmp_path)
    config = replace(quick, train_file=str(save_chats(chats, tmp_path / "chats.jsonl")), max_steps=2, eval_strategy="no", max_new_tokens=2, output_dir="runs")
    scope = {}
    exec(code_for(config), scope)
    assert scope["run"].config == config and (scope["run"].folder / "report.md").is_file()


@settings(max_examples=60, deadline=None)
@given(config=configs, name=st.sampled_from(list(PRESETS)))
def test_a_preset_sets_what_it_says_and_leaves_the_rest(config, name):
    before = deepcopy(config)
    chosen = apply_preset(config, name)
    touched = {field for preset in PRESETS.values() for field in preset.values}
    for field in NAMES:
        value = PRESETS[name].values.get(field, getattr(FinetuneConfig() if field in touched else before, field))
        assert getattr(chosen, field) == value
    assert config == before and apply_preset(chosen, name) == chosen
    for other in PRESETS:
        assert apply_preset(apply_preset(config, other), name) == chosen, "the order of the clicks does not matter"


def test_presets_give_reasons_and_have_no_conflict_of_their_own(monkeypatch):
    monkeypatch.setattr("finetune_nb.choices.find_spec", lambda name: name)
    for name, preset in PRESETS.items():
        assert preset.summary and preset.values.keys() == preset.reasons.keys() and all(preset.reasons.values())
        assert all(f"`{field}`" in preset._repr_markdown_() for field in preset.values)
        errors = [conflict for conflict in find_conflicts(apply_preset(FinetuneConfig(), name)) if conflict.level == "error"]
        assert not errors, name
    assert apply_preset(FinetuneConfig(), "the guide's") == FinetuneConfig()
    with pytest.raises(FinetuneError, match="no preset 'guide'; there are the guide's, small GPU"):
        apply_preset(FinetuneConfig(), "guide")


FILE = {"train_file": "chats.jsonl"}
CONFLICTS = [
    ({}, False, []),
    (FILE, False, []),
    ({"validation_size": 0}, False, [("validation_size", "note", "demo data")]),
    (FILE | {"validation_size": 0}, False, [("validation_size", "error", "no validation chats")]),
    (FILE | {"validation_size": 0, "validation_file": "v.jsonl"}, False, [("validation_size", "note", "a file of its own")]),
    (FILE | {"validation_size": 0, "eval_strategy": "no", "early_stopping_patience": 0}, False, []),
    (FILE | {"validation_size": 0.5, "test_size": 0.5}, False, [("test_size", "error", "Nothing is left")]),
    (FILE | {"validation_size": 0.5, "test_size": 0.5, "test_file": "t.jsonl"}, False, [("test_size", "note", "a file of its own")]),
    (FILE | {"validation_size": 0.5, "test_size": 0.5, "eval_strategy": "no", "early_stopping_patience": 0}, False, []),
    ({"too_long": "truncate"}, False, [("too_long", "note", "never learns to stop")]),
    ({"answer_pattern": "("}, False, [("answer_pattern", "error", "Not a regular expression")]),
    ({"run_name": "../out"}, False, [("run_name", "error", "A name, not a path")]),
    ({"run_name": ".."}, False, [("run_name", "error", "A name, not a path")]),
    ({"run_name": "x" * 300}, False, [("run_name", "error", "No folder can be called so")]),
    ({"run_name": "a\0b"}, False, [("run_name", "error", "Some systems can't have a folder of that name")]),
    ({"run_name": "\ud800"}, False, [("run_name", "error", "No folder can be called so")]),
    ({"run_name": ".trash"}, False, [("run_name", "error", "found nowhere again")]),
    ({"output_dir": "x" * 5000}, False, [("output_dir", "error", "No folder can be called so: File name too long")]),
    ({"output_dir": "a\0b"}, False, [("output_dir", "error", "No folder can be called so: .*null")]),
    ({"output_dir": "/dev/null/runs"}, False, [("output_dir", "error", "/dev/null is a file")]),
    ({"target_modules": []}, False, [("target_modules", "error", "Name the layers")]),
    ({"validation_size": 0.3}, False, [("validation_size", "note", "demo data")]),
    (FILE | {"test_size": 0.3, "test_file": "t.jsonl"}, False, [("test_size", "note", "a file of its own")]),
    ({"lr_scheduler_type": "constant"}, False, [("warmup_ratio", "note", "constant_with_warmup")]),
    ({"lr_scheduler_type": "constant", "warmup_ratio": 0}, False, []),
    ({"r": 64, "use_rslora": True, "lora_alpha": 128}, False, [("lora_alpha", "note", r"scaled by 16, .*square root of the rank \(16\)")]),
    ({"model_name_or_path": ""}, False, [("model_name_or_path", "error", "can't be empty")]),
    ({"output_dir": ""}, False, [("output_dir", "error", "can't be empty")]),
    ({"load_in_4bit": True, "init_lora_weights": "pissa"}, False, [("init_lora_weights", "error", "four bits can't hold")]),
    ({"lora_alpha": 1000}, False, [("lora_alpha", "note", r"scaled by 62.5.*\(32\)")]),
    ({"lora_alpha": 1}, False, [("lora_alpha", "note", "scaled by 0.062")]),
    ({"use_dora": True}, False, [("use_dora", "note", "lora_dropout 0 is faster")]),
    ({"use_dora": True, "lora_dropout": 0}, False, []),
    ({"r": 128, "lora_alpha": 256}, False, [("r", "note", "use_rslora")]),
    ({"r": 128, "lora_alpha": 32, "use_rslora": True}, False, []),
    ({"max_steps": 10}, False, [("num_train_epochs", "note", "max_steps=10 says how long")]),
    ({"learning_rate": 0.01}, False, [("learning_rate", "note", "diverges")]),
    ({"learning_rate": 1e-6}, False, [("learning_rate", "note", "hardly moves")]),
    ({"warmup_ratio": 0.6}, False, [("warmup_ratio", "note", "most of the run")]),
    ({"eval_strategy": "no"}, False, [("early_stopping_patience", "note", "Not used")]),
    ({"eval_steps": 5}, False, [("eval_steps", "note", 'Not used with eval_strategy "epoch"')]),
    ({"eval_steps": 5, "eval_strategy": "steps"}, False, []),
    ({"group_by_length": True}, False, [("group_by_length", "note", "Gains nothing")]),
    ({"group_by_length": True, "packing": "padded"}, False, []),
    ({"optim": "paged_adamw_8bit"}, False, [("optim", "error", "needs a GPU")]),
    ({"optim": "paged_adamw_8bit"}, True, []),
    ({"attn_implementation": "flash_attention_2"}, False, [("attn_implementation", "error", "flash-attn")]),
    ({"attn_implementation": "flash_attention_2"}, True, []),
    ({"max_steps": 3, "run_name": "a/b", "learning_rate": 1.0}, False, [("run_name", "error", "not a path"), ("num_train_epochs", "note", "max_steps"), ("learning_rate", "note", "diverges")]),
]


@pytest.mark.parametrize(("changes", "on_gpu", "expected"), CONFLICTS, ids=lambda part: str(part)[:60])
def test_conflicts(changes, on_gpu, expected, monkeypatch):
    monkeypatch.setattr("finetune_nb.choices.find_spec", lambda name: name)  # as if every package were there
    found = find_conflicts(FinetuneConfig(**changes), on_gpu)
    assert [(one.name, one.level) for one in found] == [(name, level) for name, level, _ in expected]
    assert all(re.search(words, one.message) for one, (_, _, words) in zip(found, expected, strict=True))


@pytest.mark.parametrize(("changes", "name", "package"), [({"load_in_4bit": True}, "load_in_4bit", "qlora"), ({"optim": "paged_adamw_8bit"}, "optim", "qlora"), ({"report_to": "wandb"}, "report_to", "pip install wandb")])
def test_a_missing_package_is_named_before_the_run(changes, name, package, monkeypatch):
    monkeypatch.setattr("finetune_nb.choices.find_spec", lambda name: None)
    [conflict] = find_conflicts(FinetuneConfig(**changes), on_gpu=True)
    assert (conflict.name, conflict.level) == (name, "error") and package in conflict.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_nothing_can_be_written_into(tmp_path):
    tmp_path.chmod(0o500)
    [conflict] = find_conflicts(FinetuneConfig(output_dir=str(tmp_path / "runs")))
    assert conflict.name == "output_dir" and "Nothing can be written" in conflict.message


def test_a_name_that_is_taken(tmp_path):
    (tmp_path / "mine").mkdir()
    [conflict] = find_conflicts(FinetuneConfig(output_dir=str(tmp_path), run_name="mine"))
    assert conflict.name == "run_name" and "not overwritten" in conflict.message
    assert not find_conflicts(FinetuneConfig(output_dir=str(tmp_path), run_name="other"))


@settings(max_examples=60, deadline=None)
@given(configs)
def test_conflicts_are_found_in_any_configuration(config):
    "Nothing raises, and each is about a setting that there is."
    found = find_conflicts(config)
    assert all(one.name in NAMES and one.level in ("error", "note") and one.message for one in found)
    assert [one.level for one in found] == sorted(one.level for one in found)

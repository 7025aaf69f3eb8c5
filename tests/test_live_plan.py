"""The live plan is the plan: of every setting, after every move, and without touching what a training draws."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import small_tokenizer
from datasets import Dataset
from test_any_model import SHAPES
from test_packing import ARCHITECTURES, example_chats
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_nb import planning
from finetune_nb.config import FinetuneConfig, FinetuneError, changed_settings
from finetune_nb.live_plan import LivePlan, cut_share, cut_words, verdict
from finetune_nb.lora import AdapterError
from finetune_nb.losses import inner_model
from finetune_nb.models import ModelError
from finetune_nb.packing import MODES, PackingCollator
from finetune_nb.planning import Plan, PlanError, alike_blocks, estimate, shape_of, short_shape, trainable_parameters, weight_bytes

SPEED, AVAILABLE = 1e10, 2**32
BLOCKS = 6


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory):
    "A Llama of six blocks that are alike."
    folder = tmp_path_factory.mktemp("deep")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    LlamaConfig(vocab_size=49152, bos_token_id=1, eos_token_id=2, pad_token_id=2, **sizes).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def deep(quick, deep_model):
    return replace(quick, model_name_or_path=deep_model)


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    "The process takes the same memory at each plan."
    monkeypatch.setattr(planning, "resident_bytes", lambda: 2**30)


WHOLE = {}


def whole(config, rows, available=AVAILABLE):
    "The plan with every block built and traced."
    key = (str(changed_settings(config) | {"output_dir": ""}), str(rows), available)
    if key not in WHOLE:
        model = shape_of(config)
        inner_model(model)._alike_blocks = ("", 0)
        WHOLE[key] = estimate(config, rows, SPEED, available, advise=False, model=model)
    return WHOLE[key]


CHANGES = [
    {}, {"r": 1}, {"r": 4}, {"r": 200}, {"lora_alpha": 7.0}, {"lora_dropout": 0.0}, {"lora_dropout": 0.3}, {"target_modules": "attention"},
    {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}, {"target_modules": ["layers.1.self_attn.q_proj"]}, {"target_modules": "all-linear", "r": 64},
    {"per_device_train_batch_size": 1}, {"per_device_train_batch_size": 16}, {"gradient_accumulation_steps": 8}, {"num_train_epochs": 5.5}, {"max_steps": 7},
    {"packing": "packed"}, {"packing": "padded"}, {"packing": "single"}, {"load_in_4bit": True}, {"load_in_4bit": True, "target_modules": "all-linear", "r": 3},
    {"use_dora": True}, {"use_dora": True, "r": 32}, {"use_dora": True, "r": 5}, {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only", "r": 9}, {"layers_to_transform": [1, 3]},
    {"layers_to_transform": [5], "r": 2}, {"gradient_checkpointing": True}, {"gradient_checkpointing": False}, {"bf16": True}, {"bf16": True, "r": 1}, {"bf16": True, "r": 40},
    {"optim": "sgd"}, {"optim": "adafactor"}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "orthogonal"},
    {"max_tokens_at_once": 64}, {"learning_rate": 1e-3}, {"seed": 1},
]  # fmt: skip


@pytest.mark.parametrize("order", [1, -1], ids=["there", "and back"])
def test_each_plan_of_a_series_of_moves_is_that_of_estimate(order, deep, rows):
    "Whatever was planned before; what is kept of one setting is not taken for another."
    live = LivePlan(rows, SPEED, AVAILABLE)
    for change in CHANGES[::order]:
        config = replace(deep, **change)
        assert live.plan(config) == whole(config, rows), change
    assert estimate(deep, rows, SPEED, AVAILABLE) == whole(deep, rows), "and estimate itself takes the short way"


@pytest.mark.parametrize("available", [int(1.2e9), int(1.125e9), int(1.11e9), 2**20])
def test_plans_are_the_same_where_memory_is_short(available, deep, rows):
    live = LivePlan(rows, SPEED, available)
    for change in ({}, {"r": 128}, {"r": 77}, {"r": 2, "per_device_train_batch_size": 32}, {"load_in_4bit": True}):
        config = replace(deep, **change)
        assert live.plan(config) == whole(config, rows, available), change


ALL_SHAPES = {name: shape for name, (shape, _) in ARCHITECTURES.items()} | SHAPES


@pytest.mark.parametrize("kind", ALL_SHAPES)
def test_two_blocks_say_what_all_keep(kind, monkeypatch):
    "On every architecture, in rows and filled up, for adapters of several kinds; where blocks differ, all are looked at."
    shape = ALL_SHAPES[kind]
    values = {name: value for name, value in shape.to_dict().items() if name not in ("layer_types", "model_type", "transformers_version")}
    values[shape.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = 4
    with torch.device("meta"):
        base = planning.with_attention(lambda **kw: AutoModelForCausalLM.from_config(type(shape)(**values), dtype=torch.float32, **kw))
    monkeypatch.setattr(planning, "base_shape", lambda config: copy.deepcopy(base))
    targets = ["in_proj"] if "mamba" in kind else "attention"
    batches = [PackingCollator(mode).batches(example_chats())[0] for mode in ("shared", "padded")]
    for change in ({}, {"lora_dropout": 0, "r": 3}, {"use_dora": True, "bias": "all"}, {"layers_to_transform": [1, 3]}):
        config = FinetuneConfig(target_modules=targets, **change)
        model, plain, short = shape_of(config), shape_of(config), short_shape(config)
        inner_model(plain)._alike_blocks = ("", 0)
        alike = bool(alike_blocks(model)[0])
        assert alike == (kind not in ("gemma2",) and "layers_to_transform" not in change)
        assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in plain.parameters()) or not alike
        assert planning._parameters(short) == trainable_parameters(plain)
        assert all(weight_bytes(short, packed) == weight_bytes(plain, packed) for packed in (False, True))
        for batch in batches if not change else batches[:1]:
            for way in ("tree", "flex") if not change and batch.layout else ("tree",):
                kept = [planning.activation_bytes(one, batch, 0, way) for one in (model, plain, short)]
                assert kept[0] == kept[1] == kept[2], (change, way)


def test_counting_is_laying_out(rows):
    for mode in MODES:
        for budget in (16, 64, 300, 4096):
            collator = PackingCollator(mode, budget)
            assert collator.computed(rows) == sum(batch.tokens for batch in collator.batches(rows))


def test_chats_that_are_too_long_are_left_out_or_cut(deep, rows):
    lengths = [len(row["input_ids"]) for row in rows]
    limit = sorted(lengths)[30]
    over = sum(n > limit for n in lengths)
    assert 0 < over < len(rows) and cut_share(lengths, limit) == (over, over / len(rows)) and cut_share([], 5) == (0, 0.0)
    live = LivePlan(rows, SPEED, AVAILABLE)
    within = [row for row in rows if len(row["input_ids"]) <= limit]
    cut = [{name: row[name][:limit] for name in ("input_ids", "labels")} for row in rows]
    for too_long, trained, said in (("raise", within, "would stop"), ("drop", within, "left out"), ("truncate", cut, "cut off")):
        config = replace(deep, max_length=limit, too_long=too_long)
        plan = live.plan(config)
        assert replace(plan, notes=[]) == whole(config, trained)
        assert plan.notes == [plan.notes[0]] and said in plan.notes[0] and f"{over} of {len(rows)} chats" in plan.notes[0]
        assert plan.notes[0] in str(plan)
    assert live.plan(replace(deep, max_length=max(lengths))).notes == []
    with pytest.raises(PlanError, match=f"the shortest has {min(lengths)} tokens"):
        live.plan(replace(deep, max_length=8))
    with pytest.raises(PlanError, match="lose all their answers"):
        live.plan(replace(deep, max_length=8, too_long="truncate"))


def test_a_data_set_is_as_good_as_a_list(deep, rows):
    plain = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    assert LivePlan(Dataset.from_list(plain), SPEED, AVAILABLE).plan(deep) == LivePlan(rows, SPEED, AVAILABLE).plan(deep) == estimate(deep, Dataset.from_list(plain), SPEED, AVAILABLE)


def test_advice_comes_when_it_is_asked_for(deep, rows):
    config = replace(deep, max_tokens_at_once=10**6, per_device_train_batch_size=40)
    long = [{"input_ids": [i] * 300, "labels": [i] * 300} for i in range(40)]
    available = int(1.02 * estimate(replace(config, max_tokens_at_once=1024), long, SPEED).bytes / 0.9)
    live = LivePlan(long, SPEED, available)
    plan = live.plan(config)
    assert not plan.fits and plan.advice == []
    assert live.advice(config) == estimate(config, long, SPEED, available).advice == ["max_tokens_at_once=1024"]
    assert verdict(replace(plan, advice=live.advice(config)))[1].endswith(" Set max_tokens_at_once=1024.")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model_name_or_path": "./nowhere"}, ModelError, "nowhere"),
        ({"target_modules": ["wq"]}, AdapterError, "no linear layer called wq; it has"),
        ({"layers_to_transform": [99]}, AdapterError, f"blocks 0 to {BLOCKS - 1}"),
        ({"modules_to_save": ["heads"]}, AdapterError, "no module called heads"),
        ({"init_lora_weights": "orthogonal", "r": 3}, AdapterError, "init_lora_weights"),
    ],
)
def test_errors_are_those_of_estimate_and_leave_no_trace(change, error, said, deep, rows):
    live, wrong = LivePlan(rows, SPEED, AVAILABLE), replace(deep, **change)
    for _ in range(2):
        with pytest.raises(error, match=said) as live_error:
            live.plan(wrong)
        with pytest.raises(FinetuneError) as plain_error:
            whole(wrong, rows)
        assert str(live_error.value) == str(plain_error.value)
        assert live.plan(deep) == whole(deep, rows)


def test_no_chats_is_an_error(deep):
    with pytest.raises(PlanError, match="no chats"):
        LivePlan([]).plan(deep)


def test_a_training_in_another_thread_draws_what_it_would_have_drawn(deep, rows, monkeypatch):
    "Neither is the state of the generator another one afterwards, nor was it for a moment."

    def never(*_):
        raise AssertionError("the generator of torch was touched")

    live, state = LivePlan(rows, available=AVAILABLE), torch.get_rng_state()
    for name in ("manual_seed", "set_rng_state"):
        monkeypatch.setattr(torch, name, never)
        monkeypatch.setattr(torch.random, name, never)
    for change in CHANGES[::3]:
        live.plan(replace(deep, **change))
        assert torch.equal(torch.get_rng_state(), state), change


def test_the_device_is_measured_once_for_each_precision(deep, rows, monkeypatch):
    from finetune_nb import live_plan

    asked = []
    monkeypatch.setattr(live_plan, "flops_per_second", lambda *what: asked.append(what) or SPEED)
    live = LivePlan(rows, available=AVAILABLE)
    for change in ({}, {"r": 2}, {"bf16": True}, {"bf16": True, "r": 2}, {}):
        assert live.plan(replace(deep, **change)).seconds > 0
    assert asked == [("cpu", torch.float32), ("cpu", torch.bfloat16)]


@pytest.mark.parametrize(
    ("needed", "level", "said"),
    [
        (10, "good", "Fits: 10.0 of 100.0 GiB."),
        (80, "good", "Fits: 80.0 of 100.0 GiB."),
        (85, "tight", "Tight: 85.0 of 100.0 GiB, so nothing else should need memory."),
        (95, "bad", "Does not fit: needs 95.0 of 100.0 GiB and a tenth to spare."),
        (131, "bad", "Does not fit: needs 131.0 of 100.0 GiB."),
    ],
)
def test_the_verdict_is_one_of_three(needed, level, said):
    plan = Plan({"base weights": needed * 2**30}, 0, 0, 100 * 2**30, 1, 2, 3, 4, 4, 1.0, 1.0)
    assert verdict(plan) == (level, said)
    for advice, words in ((["a=1"], "a=1"), (["a=1", "b=2"], "a=1 and b=2"), (["a=1", "b=2", "c=3"], "a=1, b=2 and c=3")):
        assert verdict(replace(plan, advice=advice))[1] == said + f" Set {words}." * (level == "bad")


def test_what_is_too_long_is_said_with_its_fate():
    assert cut_words([5, 6, 7], 7, "drop") == "" == cut_words([], 1, "raise")
    fates = {"raise": "training would stop and name them", "drop": "they are left out", "truncate": "their ends are cut off"}
    for too_long, fate in fates.items():
        assert cut_words(iter([5, 6, 7]), 6, too_long) == f"1 of 3 chats (33.3%) are longer than max_length=6: {fate}"

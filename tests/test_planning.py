"""The plan is exact in what can be counted, honest in the rest, and its advice fits."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace

import forked
import pytest
import torch
from conftest import ROOT

from finetune_nb.chat_template import tokenize_chats
from finetune_nb.lora import AdapterError, add_lora, trainable_parameters
from finetune_nb.losses import inner_model, recompute_blocks, token_losses
from finetune_nb.models import ModelError, load_model
from finetune_nb.packing import PackingCollator
from finetune_nb.planning import (
    Probe,
    activation_bytes,
    blocks_to_recompute,
    estimate,
    gap_bytes,
    largest_batch,
    probe_fit,
    shape_of,
    token_budget,
    weight_bytes,
)
from finetune_nb.training import load_base, train


@pytest.mark.parametrize("change", [{}, {"r": 3}, {"target_modules": "all-linear"}, {"use_dora": True}, {"layers_to_transform": [1]}, {"modules_to_save": ["lm_head"]}])
def test_parameters_are_counted_exactly(change, quick):
    config = replace(quick, **change)
    base, _ = load_base(config)
    assert trainable_parameters(shape_of(config)) == trainable_parameters(add_lora(base, config))


def test_weights_are_counted_exactly(quick):
    base, _ = load_base(quick)
    assert weight_bytes(shape_of(quick)) == sum(p.numel() * p.element_size() for p in base.parameters())


def test_what_is_kept_grows_with_the_tokens_and_less_with_checkpointing(quick, rows):
    model = shape_of(quick)
    small, large = (PackingCollator("shared").batches(rows[:n])[0] for n in (4, 16))
    assert activation_bytes(model, large)[0] > 2 * activation_bytes(model, small)[0]
    assert activation_bytes(model, large, 2)[0] < activation_bytes(model, large)[0]
    assert all(p.is_meta for p in model.parameters()), "nothing was allocated"


def test_steps_and_tokens_are_those_of_the_run(quick, rows, chats):
    from finetune_nb.data import Splits

    plan = estimate(replace(quick, packing="packed"), rows[:24], math.nan)
    run = train(quick, Splits(chats[:24], chats[24:32], []))
    assert plan.steps == run.facts["steps"]
    assert plan.tokens == plan.computed == quick.num_train_epochs * run.facts["data"]["train"]["tokens"]
    shared = estimate(quick, rows[:24], math.nan)
    assert shared.computed <= plan.computed and shared.tokens == plan.tokens


def test_advice_fits_and_does_the_least_harm(rows, quick):
    roomy = estimate(quick, rows, math.nan, available=2**40)
    assert roomy.fits and not roomy.advice and "fits" in str(roomy)
    config = replace(quick, max_tokens_at_once=10**6, per_device_train_batch_size=40)
    long = [{"input_ids": [i] * 300, "labels": [i] * 300} for i in range(40)]
    needed = estimate(replace(config, max_tokens_at_once=1024), long, math.nan).bytes
    tight = estimate(config, long, math.nan, available=int(1.02 * needed / 0.9))
    assert not tight.fits and tight.advice == ["max_tokens_at_once=1024"]
    hopeless = estimate(config, rows, math.nan, available=2**20)
    assert not hopeless.fits and "does not fit" in str(hopeless) and "<script" not in hopeless._repr_html_()


def test_the_budget_follows_the_memory(quick, rows):
    assert token_budget(replace(quick, max_tokens_at_once=77), rows) == 77
    many = replace(quick, per_device_train_batch_size=64)
    apart = [{**row, "input_ids": [1000 + i, *row["input_ids"][1:]]} for i, row in enumerate(rows)]
    assert token_budget(many, apart, available=2**40) == 512, "nothing in common: what lies in the cache"
    beginning = list(range(1000, 1600))
    alike = [{"input_ids": [*beginning, *row["input_ids"]], "labels": [-100] * 600 + list(row["labels"])} for row in rows]
    assert token_budget(many, alike, available=2**40) >= 2048, "a long common beginning is computed once"
    assert token_budget(quick, rows, available=2**20) == 256


def test_blocks_are_computed_twice_only_where_a_single_chat_does_not_fit(quick, rows):
    model = shape_of(quick)
    longest = largest_batch(rows, replace(quick, per_device_train_batch_size=1), 1)
    kept, moment = activation_bytes(model, longest)
    moment += gap_bytes(model, longest)
    fixed = estimate(quick, rows, math.nan, available=2**40)
    fixed = sum(n for name, n in fixed.parts.items() if name in ("base weights", "adapter and its gradients", "optimizer"))
    assert blocks_to_recompute(quick, rows, model, 2**40) == 0
    assert blocks_to_recompute(quick, rows, model, int((fixed + moment + kept * 0.9) / 0.85)) == 2
    assert blocks_to_recompute(replace(quick, gradient_checkpointing=True), rows, model, 2**40) == 2
    assert blocks_to_recompute(replace(quick, gradient_checkpointing=False), rows, model, 1) == 0


def test_nothing_is_differentiated_below_the_lowest_adapter(quick, rows):
    differentiated, kept = {}, []
    for layers in ([0, 1], [1]):
        config = replace(quick, layers_to_transform=layers, lora_dropout=0)
        model = add_lora(load_base(config)[0], config).train()
        for i, block in enumerate(inner_model(model).model.layers):
            block.register_forward_hook(lambda _, __, out, i=i: differentiated.__setitem__(i, (out[0] if isinstance(out, tuple) else out).requires_grad))
        batch = PackingCollator("shared").batches(rows[:4])[0]
        with PackingCollator("shared").attention(model):
            token_losses(model, batch).sum().backward()
        assert differentiated == {0: layers == [0, 1], 1: True}
        kept.append(activation_bytes(shape_of(config), batch)[0])
    assert kept[1] < 0.7 * kept[0], "nor is anything kept for it"


@pytest.mark.parametrize("n", [0, 1, 2])
def test_computing_blocks_twice_changes_no_gradient(quick, rows, n):
    "And as many blocks as were asked for are computed twice."
    results = []
    for recomputed in (0, n):
        model = add_lora(load_base(quick)[0], replace(quick, lora_dropout=0)).train()
        recompute_blocks(model, recomputed)
        calls = []
        for block in inner_model(model).model.layers:
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        collator = PackingCollator("shared")
        with collator.attention(model):
            token_losses(model, collator.batches(rows[:4])[0]).sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(calls) == 4 + n, "two to look at the last layer, two forward, and n again"
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


def test_gaps_grow_with_the_tokens_and_fall_with_checkpointing(quick, rows):
    model = shape_of(quick)
    small, large = (PackingCollator("shared").batches(rows[:n])[0] for n in (4, 16))
    assert gap_bytes(model, large) > 2 * gap_bytes(model, small) > gap_bytes(model, small, 2) > 0
    packed = gap_bytes(model, small, load_in_4bit=True) - gap_bytes(model, small)
    linear = sum(m.weight.numel() for name, m in inner_model(model).model.named_modules() if type(m) is torch.nn.Linear and "lora_" not in name)
    assert packed == pytest.approx(0.25 * linear * inner_model(model).dtype.itemsize, rel=0.01), "a quarter of what is unpacked"


def in_a_fresh_process(code):
    "What it prints: memory is that of a process, and this one has a past."
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be forgotten on Linux alone")
def test_a_peak_can_be_forgotten():
    code = """
import torch
from finetune_nb.planning import forget_peak, peak_bytes
large = torch.ones(2**27)  # 512 MiB
high = peak_bytes()
del large
forget_peak()
print(high - peak_bytes())
"""
    assert int(forked.run(code).stdout) > 2**28


def test_the_probe_corrects_the_plan(quick, rows):
    plan = estimate(quick, rows, math.nan, available=2**40)
    assert math.isnan(plan.seconds)
    seen = Probe(tokens=100, bytes=plan.bytes - plan.parts["optimizer"] + 2**30, seconds=0.5, evaluation_seconds=0.1)
    corrected = plan.corrected(seen)
    assert corrected.seconds == pytest.approx(plan.computed / 200)
    assert corrected.bytes == pytest.approx(plan.bytes + 2**30, abs=8), "a GiB more was seen"
    assert all(corrected.parts[name] == plan.parts[name] for name in ("base weights", "adapter and its gradients", "optimizer"))
    assert plan.corrected(replace(seen, bytes=0)).bytes == plan.bytes, "where memory can't be told, the estimate stands"
    assert not replace(corrected, available=plan.bytes).fits


def test_the_run_keeps_what_was_planned_and_what_came(quick, chats):
    code = f"""
import json
from finetune_nb.config import FinetuneConfig
from finetune_nb.data import Chat, Splits
from finetune_nb.training import train
chats = [Chat(messages, "chat") for messages in {[chat.messages for chat in chats[:32]]!r}]
run = train(FinetuneConfig(**{asdict(quick)!r}), Splits(chats[:24], chats[24:], []), say=lambda line: None)
print(json.dumps(run.facts))
"""
    facts = json.loads(in_a_fresh_process(code))
    planned = facts["planned"]
    assert planned["peak_memory_gib"] == pytest.approx(sum(planned["parts"].values()) / 2**30, abs=1e-3)
    assert planned["peak_memory_gib"] == pytest.approx(facts["peak_memory_gib"], rel=0.15), "after the probe, the plan is what comes"
    assert planned["before_the_probe_gib"] > 0


def test_the_probe_changes_nothing(quick, rows):
    base, _ = load_base(quick)
    model, state = add_lora(base, quick), torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    collator = PackingCollator("shared")
    probe = probe_fit(model, largest_batch(rows, quick, 4096), collator)
    assert probe.bytes > 0 and probe.seconds > 0 and probe.evaluation_seconds > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_unknown_models_and_modules_are_said_before_anything_is_loaded(quick, rows):
    with pytest.raises(ModelError, match="nowhere"):
        estimate(replace(quick, model_name_or_path="./nowhere"), rows)
    with pytest.raises(AdapterError, match="no linear layer called wq"):
        estimate(replace(quick, target_modules=["wq"]), rows)
    with pytest.raises(AdapterError, match="blocks 0 to"):
        estimate(replace(quick, layers_to_transform=[99]), rows)
    with pytest.raises(AdapterError, match="no module called heads"):
        estimate(replace(quick, modules_to_save=["heads"]), rows)


VARIANTS = [
    {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "eva"}, {"init_lora_weights": "pissa"},
    {"loraplus_lr_ratio": 8.0}, {"layers_to_transform": [1]}, {"modules_to_save": ["lm_head"]}, {"load_in_4bit": True}, {"packing": "packed"},
    {"packing": "padded"}, {"packing": "single"}, {"max_tokens_at_once": 64}, {"gradient_checkpointing": True}, {"optim": "adamw_torch_fused"},
]  # fmt: skip


@pytest.mark.parametrize("change", [change if change.keys() & {"use_dora", "init_lora_weights", "modules_to_save", "load_in_4bit", "max_tokens_at_once"} else pytest.param(change, marks=pytest.mark.slow) for change in VARIANTS], ids=str)
def test_each_variant_learns_and_comes_back_the_same(change, quick, chats, tokenizer):
    "The adapter that is kept, loaded onto a fresh base model, has the loss that the run ended with."
    from finetune_nb.data import Splits
    from finetune_nb.losses import mean_loss
    from finetune_nb.training import load_run

    if "load_in_4bit" in change:
        pytest.importorskip("bitsandbytes")
    run = train(replace(quick, early_stopping_patience=0, **change), Splits(chats[:24], chats[24:32], chats[32:]))
    looks = [row["eval_loss"] for row in run.history if "eval_loss" in row]
    assert min(looks) < looks[0], looks
    batches = PackingCollator("padded").batches(list(tokenize_chats(chats[24:32], tokenizer)))
    kept = mean_loss(load_run(run.folder).model, batches)[0]
    assert kept == pytest.approx(run.facts["best_eval_loss"], abs=2e-4)
    assert not (run.folder / "initial").exists()


def test_the_adapter_of_a_packed_base_counts_what_the_weights_stand_for(quick):
    pytest.importorskip("bitsandbytes")
    base, _ = load_base(replace(quick, load_in_4bit=True))
    assert trainable_parameters(add_lora(base, quick)) == trainable_parameters(add_lora(load_model(quick.model_name_or_path, torch.float32, use_cpu=True)[0], quick))

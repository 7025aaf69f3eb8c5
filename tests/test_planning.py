"""The plan is exact in what can be counted, honest in the rest, and its advice fits."""

import math
from dataclasses import replace

import pytest
import torch

from finetune_nb.chat_template import tokenize_chats
from finetune_nb.config import FinetuneConfig
from finetune_nb.lora import AdapterError, add_lora, trainable_parameters
from finetune_nb.models import ModelError, load_model, load_tokenizer
from finetune_nb.packing import PackingCollator
from finetune_nb.planning import activation_bytes, estimate, largest_batch, probe_fit, shape_of, token_budget, weight_bytes
from finetune_nb.training import load_base, train


@pytest.fixture
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture
def rows(chats, tokenizer):
    return list(tokenize_chats(chats, tokenizer))


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
    assert activation_bytes(model, large, True)[0] < activation_bytes(model, large)[0]
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
    tight = estimate(config, rows, math.nan, available=int(estimate(replace(config, max_tokens_at_once=1024), rows, math.nan).bytes / 0.9) + 2**20)
    if not tight.fits:
        assert tight.advice == ["max_tokens_at_once=1024"]
    hopeless = estimate(config, rows, math.nan, available=2**20)
    assert not hopeless.fits and "does not fit" in str(hopeless) and "<script" not in hopeless._repr_html_()


def test_the_budget_follows_the_memory(quick, rows):
    assert token_budget(replace(quick, max_tokens_at_once=77), rows) == 77
    assert token_budget(quick, rows, available=2**40) == 4096
    assert token_budget(quick, rows, available=2**20) == 256


def test_the_probe_changes_nothing(quick, rows):
    base, _ = load_base(quick)
    model, state = add_lora(base, quick), torch.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    collator = PackingCollator("shared")
    assert probe_fit(model, largest_batch(rows, quick, 4096), collator) > 0
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
    {"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "pissa"},
    {"loraplus_lr_ratio": 8.0}, {"layers_to_transform": [1]}, {"modules_to_save": ["lm_head"]}, {"load_in_4bit": True}, {"packing": "packed"},
    {"packing": "padded"}, {"packing": "single"}, {"max_tokens_at_once": 64}, {"gradient_checkpointing": True}, {"optim": "adamw_torch_fused"},
]  # fmt: skip


@pytest.mark.parametrize("change", VARIANTS, ids=str)
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

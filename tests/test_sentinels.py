"""Each sentinel sees a fault that is really there, in a run as users start it."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune_nb import training
from finetune_nb.data import Splits
from finetune_nb.sentinels import (
    ChangedBaseError,
    NoGradientError,
    NoLossError,
    NonFiniteError,
    Sentinels,
    Step,
    UnchangedAdapterError,
    base_sums,
)
from finetune_nb.training import load_base, train

pytestmark = pytest.mark.usefixtures("one_way")


@pytest.fixture
def splits(chats):
    return Splits(chats[:24], chats[24:32], chats[32:])


class At(TrainerCallback):
    "Does something to the model, or to what is trained, at the beginning of a step."

    def __init__(self, step, change):
        self.step, self.change = step, change

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            self.change(model, optimizer)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def only_run(quick):
    "The folder of the one run that there is, or where it was put aside."
    from pathlib import Path

    runs = sorted(Path(quick.output_dir).glob("run-*"))
    return runs[0] if runs else Path(quick.output_dir) / ".failed"


def poisoned(quick, word):
    "A base model that overflows at one token: a hook at its embedding."
    model, tokenizer = load_base(quick, lambda text: None)
    token = tokenizer(word)["input_ids"][0]
    model.get_input_embeddings().register_forward_hook(lambda module, ids, states: states.masked_fill((ids[0] == token)[..., None], math.nan) if module.armed else states)
    model.get_input_embeddings().armed = False
    return model, tokenizer


def arm(model, optimizer):
    model.get_base_model().get_input_embeddings().armed = True


def test_a_gradient_that_is_no_number_ends_the_run_before_the_step(quick, splits):
    def poison(model, optimizer):
        trained(model)[0].register_hook(lambda g: g * math.inf)

    with pytest.raises(NonFiniteError, match=r"The gradient became (nan|inf) at step 3") as caught:
        train(quick.__class__(**{**vars(quick), "eval_strategy": "no"}), splits, callbacks=[At(2, poison)])
    assert math.isfinite(caught.value.row["loss"])
    assert all(w.isfinite().all() for w in load_file(only_run(quick) / "adapter/adapter_model.safetensors").values())


class AfterStep(TrainerCallback):
    "Writes into the adapter when the optimizer has taken its step, at the end of an epoch."

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 5:
            trained(model)[0].data[0, 0] = math.nan


@pytest.mark.parametrize("eval_strategy", ["epoch", "no"])
def test_nan_is_never_saved(eval_strategy, quick, splits):
    "Six steps are an epoch: a checkpoint is due right after the weights have broken."
    with pytest.raises(NonFiniteError, match="After step 6 the adapter has weights that are no numbers: .*lora_"):
        train(quick.__class__(**{**vars(quick), "eval_strategy": eval_strategy}), splits, callbacks=[AfterStep()])
    folder = only_run(quick)
    assert not list(folder.glob("checkpoint-*")) and not (folder / "adapter").exists()


def masked(monkeypatch, keep):
    tokenized = training._tokenized

    def changed(*args):
        return tokenized(*args).map(lambda row, i: row if keep(i) else {**row, "labels": [-100] * len(row["labels"])}, with_indices=True)

    monkeypatch.setattr(training, "_tokenized", changed)


def test_a_loss_of_zero_at_the_first_step(quick, splits, monkeypatch):
    "As in a loss that is multiplied with a mask of zeros: nothing else looks wrong."
    from finetune_nb import trainer

    whole = trainer.token_losses
    monkeypatch.setattr(trainer, "token_losses", lambda *args: whole(*args) * 0)
    with pytest.raises(NoLossError, match="loss of the first step is exactly 0, though [0-9]+ tokens"):
        train(quick.__class__(**{**vars(quick), "eval_strategy": "no"}), splits)


def test_gradients_that_are_zero(quick, splits):
    def cut(model, optimizer):
        for p in trained(model):
            p.register_hook(torch.zeros_like)

    with pytest.raises(NoGradientError, match="exactly 0 at step 1"):
        train(quick, splits, callbacks=[At(0, cut)])
    with pytest.raises(NoGradientError, match="exactly 0 at step 12"):
        train(quick.__class__(**{**vars(quick), "num_train_epochs": 4}), splits, callbacks=[At(2, cut)])


def test_an_adapter_that_does_not_change(quick, splits):
    "An optimizer that was given other parameters than those of the model."

    def swap(model, optimizer):
        for group in optimizer.param_groups:
            group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]

    with pytest.raises(UnchangedAdapterError, match="no number of the adapter changed"):
        train(quick, splits, callbacks=[At(0, swap)])
    assert json.loads((only_run(quick) / "failed.json").read_text())["kind"] == "UnchangedAdapterError"


@pytest.mark.parametrize("step", [0, 7])
def test_a_base_model_that_changes(step, quick, splits):
    "One number of it, in the first step or later."

    def write(model, optimizer):
        model.get_base_model().model.layers[1].mlp.up_proj.weight.data[3, 3] += 1e-4

    with pytest.raises(ChangedBaseError, match="layers.1.mlp.up_proj.weight. An adapter fits"):
        train(quick, splits, callbacks=[At(step, write)])
    assert not (only_run(quick) / "adapter").exists(), "an adapter of a base model that exists nowhere is not kept"


def test_every_frozen_tensor_is_in_the_sums(tiny_model):
    from finetune_nb.models import load_model

    model, _ = load_model(tiny_model, torch.bfloat16, use_cpu=True)
    model.requires_grad_(False)
    before = base_sums(model)
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        first = p.data.flatten()[0].clone()
        p.data.view(-1)[0] = first * 1.01 + 0.01
        assert [k for k, n in base_sums(model).items() if n != before[k]] == [name]
        p.data.view(-1)[0] = first


def test_a_fault_of_one_row_is_named_among_many(tiny_model):
    "What is told stays short, however many chats a step has."
    from finetune_nb.packing import PackingCollator

    chats = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "where": f"a.jsonl, line {n}"} for n in range(500)]
    assert len(Step(1, chats, 1, 0.0, 0.0, 1e-4, PackingCollator()).places()) < 600
    assert Sentinels().counts == {}

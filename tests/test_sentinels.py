"""Each sentinel sees a fault that is really there, in a run as users start it."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from finetune_nb import training
from finetune_nb.config import ConfigError
from finetune_nb.data import Splits
from finetune_nb.lora import add_lora
from finetune_nb.packing import PackingCollator
from finetune_nb.preflight import PreflightError
from finetune_nb.sentinels import (
    ChangedBaseError,
    NoGradientError,
    NoLossError,
    NonFiniteError,
    Sentinels,
    SkippedStepsError,
    Step,
    UnchangedAdapterError,
    base_sums,
)
from finetune_nb.trainer import make_trainer
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


class Keep(TrainerCallback):
    "The adapter before each step."

    def __init__(self):
        self.before = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before[state.global_step + 1] = [p.detach().clone() for p in trained(model)]


def test_the_chat_of_which_the_loss_is_no_number_is_named_and_the_last_good_adapter_kept(quick, splits):
    "One word among 24 chats, from the second step on; the file holds what the adapter was before the step, and nothing else is saved."
    words = [dict(message) for message in splits.train[5].messages]
    words[1]["content"] = " zebra"
    bad, keep = replace(splits.train[5], messages=words), Keep()
    splits = splits._replace(train=[*splits.train[:5], bad, *splits.train[6:]])
    config = replace(quick, learning_rate=0.01, warmup_ratio=0, eval_strategy="no")
    model, tokenizer = poisoned(quick, " zebra")
    with pytest.raises(NonFiniteError, match=r"The loss became nan at step") as caught:
        train(config, splits, [At(1, arm), keep], base=(model, tokenizer), say=lambda text: None)
    words, folder = str(caught.value), only_run(quick)
    assert f"Computed alone, it comes from {bad.where}: look at it first." in words and "The adapter as it was before that is kept" in words
    assert "Lower learning_rate (now 0.01, of which this step took 0.00" in words, "the one that can be changed"
    step = caught.value.row["step"]
    kept = load_file(folder / "adapter/adapter_model.safetensors")
    assert step > 1 and len(kept) == len(keep.before[step]) and all(any(torch.equal(w, p) for w in kept.values()) for p in keep.before[step])
    assert json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["ended_by"] == "NonFiniteError"
    for path in folder.rglob("*.safetensors"):
        assert all(w.isfinite().all() for w in load_file(path).values() if w.is_floating_point()), path


def test_a_gradient_that_is_no_number_ends_the_run_before_the_step(quick, splits):
    def poison(model, optimizer):
        trained(model)[0].register_hook(lambda g: g * math.inf)

    with pytest.raises(NonFiniteError, match=r"The gradient became (nan|inf) at step 3") as caught:
        train(replace(quick, eval_strategy="no"), splits, callbacks=[At(2, poison)])
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
        train(replace(quick, eval_strategy=eval_strategy), splits, callbacks=[AfterStep()])
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
        train(replace(quick, eval_strategy="no"), splits)


def trainer_of(quick, splits, folder, said, **more):
    "What a run trains with, without its preparations."
    config = replace(quick, eval_strategy="no", max_grad_norm=0, **more)
    model, tokenizer = load_base(config, lambda text: None)
    rows = training._tokenized(config, splits.train, tokenizer)
    return make_trainer(config, add_lora(model, config), PackingCollator("padded", 4096, 2), {"train": rows}, folder, say=said.append)


def test_no_labels_at_all(quick, splits, monkeypatch, tmp_path):
    "The preflight sees it; without it, the comparison of packing; and without that, the sentinels at the end."
    masked(monkeypatch, lambda i: False)
    with pytest.raises(PreflightError, match="labels: in 24 of 24 rows no token carries loss"):
        train(quick, splits, say=lambda text: None)
    with pytest.raises(ConfigError, match="None of the 2 chats has a label"):
        train(replace(quick, preflight=False), splits, say=lambda text: None)
    said = []
    trainer = trainer_of(quick, splits, tmp_path, said)
    with pytest.raises(NoLossError, match="None of the 12 steps had a supervised token: nothing was learned"):
        trainer.train()
    assert trainer.sentinels.counts == {"steps_without_label": 12} and len([line for line in said if "has no supervised token" in line]) == 1


def scale(trainer, **more):
    "The loss is scaled as for float16, at first so much that it overflows."
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6, **more)


def test_steps_that_overflow_are_left_out_and_counted(quick, splits, tmp_path):
    said, keep = [], Keep()
    trainer = trainer_of(quick, splits, tmp_path, said, warmup_ratio=0)
    scale(trainer, backoff_factor=2.0**-40)
    trainer.add_callback(keep)
    trainer.train()
    still = sum(all(map(torch.equal, keep.before[step], keep.before[step + 1])) for step in range(1, 12))
    assert 0 < still < 5 and trainer.sentinels.counts == {"skipped_steps": still}
    assert [row["skipped_steps"] for row in trainer.state.log_history if "loss" in row][-1] == still
    assert said == ["Step 1 overflowed in float16 and was left out; the next one is scaled by half as much. Such steps are counted in the history as skipped_steps."]


def test_steps_that_overflow_for_ever_end_the_run(quick, splits, tmp_path):
    trainer = trainer_of(quick, splits, tmp_path, [], num_train_epochs=5)
    scale(trainer, backoff_factor=0.9999)
    with pytest.raises(SkippedStepsError, match="The last 25 steps, up to step 25, overflowed in float16"):
        trainer.train()


def test_gradients_that_are_zero(quick, splits):
    def cut(model, optimizer):
        for p in trained(model):
            p.register_hook(torch.zeros_like)

    with pytest.raises(NoGradientError, match="exactly 0 at step 1"):
        train(quick, splits, callbacks=[At(0, cut)])
    with pytest.raises(NoGradientError, match="exactly 0 at step 12"):
        train(replace(quick, num_train_epochs=4), splits, callbacks=[At(2, cut)])


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
    assert before.keys() == dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    for name, p in model.named_parameters():
        first = p.data.flatten()[0].clone()
        p.data.view(-1)[0] = first * 1.01 + 0.01
        assert [k for k, n in base_sums(model).items() if n != before[k]] == [name]
        p.data.view(-1)[0] = first


def test_a_fault_of_one_row_is_named_among_many(tiny_model):
    "What is told stays short, however many chats a step has."
    chats = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "where": f"a.jsonl, line {n}"} for n in range(500)]
    assert len(Step(1, chats, 1, 0.0, 0.0, 1e-4, PackingCollator()).places()) < 600
    assert Sentinels().counts == {}

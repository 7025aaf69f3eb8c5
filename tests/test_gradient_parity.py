"""The gradient of a step is that of its definition, however the step is cut up: against transformers' own forward pass, chat by chat."""

import copy
import gc
import random
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from test_packing import COMMON
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from finetune_nb.config import FinetuneConfig
from finetune_nb.lora import add_lora
from finetune_nb.losses import recompute_blocks
from finetune_nb.packing import PackingCollator
from finetune_nb.trainer import make_trainer

N = 13
SIZES = [(1, 1), (1, 4), (2, 1), (3, 2), (5, 2), (8, 2)]  # chats in a batch, batches in a step: with a short last step but for the first and the last two
MODES = [("shared", "tree"), ("shared", "masked"), ("packed", "tree"), ("packed", "masked"), ("padded", "tree"), ("single", "tree")]


def make_rows():
    "Chats of 3 to 70 tokens with 0 to 60 labels; most begin alike."
    rng = random.Random(0)
    begin = [rng.randrange(64) for _ in range(24)]
    rows = []
    for i, n in enumerate((1, 60, 2, 7, 1, 45, 0, 3, 30, 1, 12, 5, 58)):
        ids = (begin if i % 4 else begin[:2]) + [rng.randrange(64) for _ in range(max(n, 1) + i % 3)]
        answer = max(n, 1) + i % 3
        labels = [-100] * (len(ids) - answer) + [token if k < n else -100 for k, token in enumerate(ids[-answer:])]
        if i == 7:  # two answers, with a part between that is not learned
            labels[4], ids[4] = ids[4], ids[4]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def supervised(row):
    return sum(label != -100 for label in row["labels"][1:])


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    "The model with an adapter that is not zero, the chats, and for each chat the summed gradient, in double precision."
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**COMMON, attn_implementation="sdpa"))
    config = FinetuneConfig(use_cpu=True, bf16=False, lora_dropout=0.0, output_dir=str(tmp_path_factory.mktemp("parity")))
    model = add_lora(base, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    rows, exact = make_rows(), copy.deepcopy(model).double()
    gradients = []
    for row in rows:
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        loss = F.cross_entropy(exact(input_ids=ids).logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
        gradients.append((loss.item(), torch.autograd.grad(loss, trained(exact))))
    gc.collect()
    gc.freeze()  # as in `save_tiny`: each training collects, and would go through all that is imported
    return config, model, exact, rows, gradients


class Keep(TrainerCallback):
    "The gradient of each step, as the optimizer is given it."

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in trained(model)])


def run(config, model, rows, mode, way, max_tokens, recompute):
    "The chats, the loss and the gradient of each step of an epoch, in which the weights stay as they are."
    chats, keep = [], Keep()
    recompute_blocks(model, recompute)
    trainer = make_trainer(config, model, PackingCollator(mode, max_tokens, 0, way), {"train": Dataset.from_list(rows)}, config.output_dir, [keep])
    trainer.args.learning_rate = 0.0  # less than a run can be given
    trainer.sentinels, step = None, trainer.training_step  # they would find, rightly, that nothing is learned

    def training_step(model, inputs, *args):
        chats.append(inputs["chats"].rows)
        losses.append(step(model, inputs, *args))
        return losses[-1]

    losses, trainer.training_step = [], training_step
    with trainer.data_collator.attention(model):
        trainer.train()
    recompute_blocks(model, 0)
    return list(zip(chats, losses, keep.steps, strict=True))


def apart(found, expected):
    "The length of the difference of two gradients, relative to that of the second."
    square = sum((a.double() - b).square().sum() for a, b in zip(found, expected, strict=True))
    return (square / sum(b.square().sum() for b in expected)).sqrt().item()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(("mode", "way"), MODES)
@pytest.mark.parametrize(("precision", "recompute"), [("fp32", 0), ("fp32", 2), ("fp64", 0)])
def test_the_gradient_of_a_step(precision, mode, way, size, recompute, parts):
    config, model, exact, rows, gradients = parts
    config = replace(
        config, per_device_train_batch_size=size[0], gradient_accumulation_steps=size[1], num_train_epochs=1, eval_strategy="no", optim="sgd",
        max_grad_norm=0, lr_scheduler_type="constant", group_by_length=False,
    )  # fmt: skip
    steps = run(config, model if precision == "fp32" else exact, rows, mode, way, 10**6 if sum(size) % 2 else 90, recompute)
    number = {tuple(row["input_ids"]): i for i, row in enumerate(rows)}
    together = size[0] * size[1]
    assert sorted(len(chats) for chats, *_ in steps) == sorted([together] * (N // together) + [N % together] * (N % together > 0))
    assert sorted(number[tuple(chat["input_ids"])] for chats, *_ in steps for chat in chats) == list(range(N))
    for chats, loss, gradient in steps:
        which = [number[tuple(chat["input_ids"])] for chat in chats]
        total = sum(supervised(rows[i]) for i in which) or 1
        expected = [sum(parts) / total for parts in zip(*(gradients[i][1] for i in which), strict=True)]
        if not any(supervised(rows[i]) for i in which):
            assert loss == 0 and not any(g.any() for g in gradient)
            continue
        assert loss.item() == pytest.approx(sum(gradients[i][0] for i in which) / total, rel=1e-6)
        assert apart(gradient, expected) < 1e-6


def test_another_weighting_would_be_seen(parts):
    "The mean of the chats' means, a well-known mistake, is far from it."
    _, _, _, rows, gradients = parts
    counts = [supervised(row) for row in rows]
    right = [sum(p) / sum(counts) for p in zip(*(g for _, g in gradients), strict=True)]
    wrong = [sum(p) / N for p in zip(*([part / max(n, 1) for part in g] for (_, g), n in zip(gradients, counts, strict=True)), strict=True)]
    assert apart(wrong, right) > 0.1

"What goes silently wrong is found before the first step, nothing else is, and nothing is left changed."

import copy
import json
import math
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_any_model import SHAPES, SMALL, TOKENS
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaForCausalLM,
    Phi3Config,
    Qwen3Config,
)

from finetune_nb import preflight as module
from finetune_nb.chat_template import NO_LOSS, tokenize_chats
from finetune_nb.data import Chat, Splits
from finetune_nb.lora import add_lora
from finetune_nb.losses import inner_model
from finetune_nb.models import load_model
from finetune_nb.packing import PackingCollator
from finetune_nb.preflight import PreflightError, PreflightReport, preflight
from finetune_nb.stop import TrainingError
from finetune_nb.training import train

pytestmark = pytest.mark.usefixtures("one_way")
BOS, STOP = 1, 2


@pytest.fixture
def ahead(quick, tokenizer, rows, chats, tiny_model):
    "All that a preflight of the tiny model takes; a test changes one thing in it."
    model = add_lora(load_model(tiny_model, torch.float32, use_cpu=True, say=lambda text: None)[0], quick)
    return SimpleNamespace(model=model, tokenizer=tokenizer, rows=rows, chats=chats, config=quick, collator=None)


def fly(ahead):
    return preflight(ahead.model, ahead.tokenizer, ahead.rows, ahead.chats, ahead.config, ahead.collator)


def test_a_healthy_run_is_let_through(ahead):
    report = fly(ahead)
    assert report.ok and [check.name for check in report.findings] in ([], ["one chat by heart"]), str(report)
    report.validate()
    assert json.loads(json.dumps(report.facts))["ok"]


# --- rows


def relabelled(change, ahead):
    ahead.rows = [row | {"labels": change(list(row["labels"]), row["input_ids"])} for row in ahead.rows]


def without_stop(labels, ids):
    return [NO_LOSS if label == STOP else label for label in labels]


def nothing(labels, ids):
    return [NO_LOSS] * len(labels)


def everything(labels, ids):
    return list(ids)


def one_early(labels, ids):
    first = next(i for i, label in enumerate(labels) if label != NO_LOSS)
    return [ids[i] if i == first - 1 else label for i, label in enumerate(labels)]


def two_late(labels, ids):
    first = next(i for i, label in enumerate(labels) if label != NO_LOSS)
    return [NO_LOSS if i < first + 2 else label for i, label in enumerate(labels)]


def shifted(labels, ids):
    return [*labels[1:], NO_LOSS]


def begins_twice(ahead):
    ahead.rows = [row | {"input_ids": [BOS, BOS, *row["input_ids"]], "labels": [NO_LOSS, NO_LOSS, *row["labels"]]} for row in ahead.rows]
    ahead.chats = []


def unknown_tokens(ahead):
    ahead.rows = [*ahead.rows[:-1], ahead.rows[-1] | {"input_ids": [49152, *ahead.rows[-1]["input_ids"][1:]]}]


def another_template(ahead):
    ahead.tokenizer = copy.deepcopy(ahead.tokenizer)
    ahead.tokenizer.chat_template = ahead.tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant: ")
    assert "assistant: " in ahead.tokenizer.chat_template


def forged(ahead):
    ahead.chats = [Chat([{"role": "user", "content": "Go<|im_end|>"}, ahead.chats[0].messages[1]], ahead.chats[0].where), *ahead.chats[1:]]


class ByToken(PackingCollator):
    "Masks what is filled up by the pad token, as many collators do."

    def batches(self, chats):
        masked = [chat | {"labels": [NO_LOSS if label == self.pad_token_id else label for label in chat["labels"]]} for chat in chats]
        return super().batches(masked)


class ShiftedTwice(PackingCollator):
    def batches(self, chats):
        return [replace(batch, at=batch.at - 1) for batch in super().batches(chats)]


def collated_by(kind, ahead):
    ahead.collator = kind("padded", 512, STOP)


# --- adapters


def adapter_of(ahead, **settings):
    base = LlamaForCausalLM.from_pretrained(ahead.config.model_name_or_path)
    ahead.model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))


def a_layer_that_is_not_there(ahead):
    adapter_of(ahead, target_modules=["q_proj", "nonexistent"])
    ahead.config = replace(ahead.config, target_modules=["q_proj", "nonexistent"])


def in_bf16(ahead):
    ahead.config = replace(ahead.config, learning_rate=2e-5)
    for p in ahead.model.parameters():
        p.data = p.data.bfloat16()


def in_fp16(ahead):
    for p in ahead.model.parameters():
        if p.requires_grad:
            p.data = p.data.half()


def frozen(ahead):
    ahead.model.requires_grad_(False)


def not_saved(ahead):
    inner_model(ahead.model).get_input_embeddings().weight.requires_grad_(True)


def cut_off(ahead):
    "The output of the last block is taken out of the graph."
    inner_model(ahead.model).model.norm.register_forward_pre_hook(lambda _, inputs: tuple(x.detach() for x in inputs))


def not_a_number(ahead):
    inner_model(ahead.model).model.norm.weight.data[3] = math.nan


@pytest.mark.parametrize(
    ("plant", "name", "said"),
    [
        (partial(relabelled, without_stop), "ends of answers", "never learn to stop"),
        (partial(relabelled, nothing), "labels", "no token carries loss"),
        (partial(relabelled, everything), "prompts", "the prompt carries loss"),
        (partial(relabelled, one_early), "prompts", "the prompt carries loss"),
        (partial(relabelled, two_late), "prompts", "not the answer"),
        (partial(relabelled, shifted), "labels", "other tokens than their own"),
        (begins_twice, "beginning of text", "twice"),
        (unknown_tokens, "vocabulary", "49152"),
        (another_template, "prompts", "no row begins with the tokens of its prompt"),
        (forged, "prompts", "would forge the structure"),
        (partial(collated_by, ByToken), "batches", "by its place"),
        (partial(collated_by, ShiftedTwice), "batches", "shift labels once"),
        (a_layer_that_is_not_there, "target modules", "nonexistent"),
        (in_bf16, "precision", "rounded away"),
        (in_fp16, "precision", "float16"),
        (frozen, "precision", "every parameter is frozen"),
        (not_saved, "what is saved", "embed_tokens"),
        (cut_off, "gradients", "no gradient reaches"),
        (not_a_number, "gradients", "not finite"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value.args[0].__name__ if isinstance(value, partial) else None),
)  # fmt: skip
def test_a_planted_fault_is_named_and_ends_the_run(plant, name, said, ahead):
    plant(ahead)
    report = fly(ahead)
    errors = [check for check in report.checks if check.verdict == "error"]
    assert name in [check.name for check in errors], str(report)
    assert said in f"{report[name].found} {report[name].remedy}", str(report)
    with pytest.raises(PreflightError, match="set preflight to false") as raised:
        report.validate()
    assert isinstance(raised.value, TrainingError) and said in str(raised.value)


def test_recomputed_blocks_without_gradients_of_their_inputs_are_seen(ahead, monkeypatch):
    "As with checkpointing of the older kind over frozen embeddings: peft#1142."

    def older(model, n):
        inner = inner_model(model)
        if n:
            inner.gradient_checkpointing_enable({"use_reentrant": True})
            inner.disable_input_require_grads() if hasattr(inner, "_require_grads_hooks") else None
        else:
            inner.gradient_checkpointing_disable()

    monkeypatch.setattr(module, "recompute_blocks", older)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        report = fly(ahead)
    assert report["recomputation"].verdict == "error" and "no gradient reaches the adapter with its blocks computed twice" in report["recomputation"].found
    assert not report.losses, "nothing is learned after an error"


def test_an_answer_that_was_cut_is_a_warning(ahead):
    length = min(len(row["input_ids"]) for row in ahead.rows) - 2
    with pytest.warns(UserWarning, match="They are cut"):
        ahead.rows = list(tokenize_chats(ahead.chats, ahead.tokenizer, length, "truncate"))
    ahead.config = replace(ahead.config, max_length=length, too_long="truncate")
    check = fly(ahead)["ends of answers"]
    assert check.verdict == "warning" and "40 of 40 answers are cut" in check.found


def test_blocks_without_an_adapter_are_told(ahead):
    adapter_of(ahead, target_modules=["q_proj"], layers_to_transform=[0])
    ahead.config = replace(ahead.config, target_modules=["q_proj"])
    check = fly(ahead)["target modules"]
    assert check.verdict == "warning" and "blocks 1 of 2 have no adapter" in check.found


# --- one chat by heart


@pytest.fixture(scope="module")
def embedded():
    "The embedded model, which knows enough to learn a chat in a few steps."
    from finetune_nb.config import FinetuneConfig

    config = FinetuneConfig(use_cpu=True, bf16=False)
    model, tokenizer = load_model(dtype=torch.float32, use_cpu=True, say=lambda text: None)
    return SimpleNamespace(model=add_lora(model, config), tokenizer=tokenizer, config=config, collator=None)


@pytest.fixture
def able(embedded, chats):
    rows = list(tokenize_chats(chats, embedded.tokenizer))
    return SimpleNamespace(**vars(embedded) | {"chats": chats, "rows": rows})


def test_the_embedded_model_learns_a_chat_by_heart_and_stops(able):
    before = {name: p.detach().clone() for name, p in able.model.named_parameters() if p.requires_grad}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    begun = time.process_time()
    report = fly(able)
    assert not report.findings and report.losses[-1] < module.BY_HEART and "stopped there" in report["one chat by heart"].found
    assert (time.process_time() - begun) / torch.get_num_threads() < 10, "of the processor, which a busy machine does not change; measured: 3 to 4 s with one thread"
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in able.model.named_parameters() if name in before)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]


def test_what_is_learned_and_not_written_is_an_error(able, monkeypatch):
    "Generation that goes past the adapter."
    kind = type(inner_model(able.model))
    real = kind.generate

    def past_the_adapter(*args, **kwargs):
        with able.model.disable_adapter():
            return real(*args, **kwargs)

    monkeypatch.setattr(kind, "generate", past_the_adapter)
    report = fly(able)
    assert report.losses[-1] < module.BY_HEART
    check = report["one chat by heart"]
    assert check.verdict == "error" and "in place of" in check.found


def test_a_loss_that_never_falls_is_an_error(ahead, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    check = fly(ahead)["one chat by heart"]
    assert check.verdict == "error" and "it never falls" in check.found


def test_a_model_that_can_not_be_asked_is_a_warning(able, monkeypatch):
    monkeypatch.setattr(type(inner_model(able.model)), "generate", lambda *args, **kwargs: 1 / 0)
    check = fly(able)["one chat by heart"]
    assert check.verdict == "warning" and "ZeroDivisionError" in check.found


def test_a_rank_of_one_is_a_warning_at_most(ahead):
    ahead.config = replace(ahead.config, r=1, lora_alpha=1)
    ahead.model = add_lora(load_model(ahead.config.model_name_or_path, torch.float32, use_cpu=True, say=lambda text: None)[0], ahead.config)
    report = fly(ahead)
    assert report.ok and report["one chat by heart"].verdict == "warning" and "raise r" in report["one chat by heart"].remedy


MORE_SHAPES = SHAPES | {
    "gemma2": Gemma2Config(**TOKENS, **SMALL, head_dim=8), "granite": GraniteConfig(**TOKENS, **SMALL, logits_scaling=3.0), "phi3": Phi3Config(**TOKENS, **SMALL),
    "qwen3": Qwen3Config(**TOKENS, **SMALL, head_dim=8), "lfm2": Lfm2Config(**TOKENS, **SMALL, layer_types=["conv", "full_attention"]),
    "neox": GPTNeoXConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE_SHAPES)
@pytest.mark.parametrize("changes", [{}, {"use_dora": True, "target_modules": "all-linear"}, {"modules_to_save": ["lm_head"]}])
def test_no_architecture_is_accused(name, changes, ahead):
    if name == "gpt2 with dropout" and changes.get("use_dora") or name == "mixtral" and changes.get("use_dora"):
        pytest.skip("PEFT has no DoRA for these layers")
    torch.manual_seed(0)
    ahead.config = replace(ahead.config, **{"target_modules": "attention", "lora_dropout": 0.0, **changes})
    ahead.model = add_lora(AutoModelForCausalLM.from_config(MORE_SHAPES[name]), ahead.config)
    before = {key: value.clone() for key, value in ahead.model.state_dict().items()}
    report = fly(ahead)
    assert report.ok, str(report)
    assert all(torch.equal(value, before[key]) for key, value in ahead.model.state_dict().items())


# --- in a run


@pytest.mark.parametrize("changes", [{}, {"init_lora_weights": "pissa"}, {"gradient_checkpointing": True, "use_rslora": True}, {"packing": "padded", "eval_strategy": "no"}])
def test_a_run_after_it_is_the_same_to_the_bit(changes, quick, chats):
    splits = Splits(chats[:24], chats[24:32], chats[32:])
    config = replace(quick, lora_dropout=0.1, num_train_epochs=1, **changes)
    said = {}
    flown, left_out = (train(replace(config, preflight=flag, run_name=str(flag)), splits, say=said.setdefault(flag, []).append) for flag in (True, False))
    one, other = (load_file(run.folder / "adapter" / "adapter_model.safetensors") for run in (flown, left_out))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    losses = [[(row["step"], row.get("loss"), row.get("eval_loss")) for row in run.history] for run in (flown, left_out)]
    assert losses[0] == losses[1]
    assert any(text.startswith("Preflight: ") for text in said[True]) and any("preflight is left out" in text for text in said[False])
    kept = [json.loads((run.folder / "started.json").read_text())["preflight"] for run in (flown, left_out)]
    assert kept[0]["ok"] and kept[0]["seconds"] > 0 and kept[1] == {"skipped": True}
    assert "passed in" in str(flown) and "preflight:            left out" in str(left_out)


def test_a_run_that_would_be_spoiled_leaves_nothing(quick, chats, monkeypatch):
    from finetune_nb import training

    real = training._tokenized
    monkeypatch.setattr(training, "_tokenized", lambda *args: real(*args).map(lambda row: {"labels": without_stop(row["labels"], None)}))
    with pytest.raises(PreflightError, match=r"ends of answers: .* never learn to stop: chats.jsonl, line 1"):
        train(quick, Splits(chats[:8], chats[8:12], []), say=lambda text: None)
    assert not list(Path(quick.output_dir).glob("*"))
    train(replace(quick, preflight=False, num_train_epochs=1), Splits(chats[:8], chats[8:12], []), say=lambda text: None)


def test_a_report_without_findings_raises_nothing():
    PreflightReport([]).validate()

"""Runs that are really broken, each in one known way, and runs that are well: for the tests and for benchmarks/broken_runs.py.

All of them tune a tiny Llama that was taught two ways of answering. It answers questions of one kind in the first way, and a
run is to teach it the second: so that loss falls, answers change, and it can be seen when they do not.
"""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from conftest import small_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from finetune_nb import training
from finetune_nb.chat_template import tokenize_chats
from finetune_nb.config import FinetuneConfig, FinetuneError, load_config, save_config
from finetune_nb.data import Chat, Splits
from finetune_nb.evaluation import evaluate_run
from finetune_nb.losses import token_losses
from finetune_nb.models import load_tokenizer
from finetune_nb.packing import PackingCollator


def first_way(i):
    return f"That makes {i + 1}."


def second_way(i):
    return f"It is {i + 1}, no doubt."


def chats_of(answer, numbers, question="What is {} plus one?", file="chats.jsonl"):
    texts = [(question.format(i), answer(i)) for i in numbers]
    return [Chat([{"role": "user", "content": q}, {"role": "assistant", "content": a}], f"{file}, line {n}") for n, (q, a) in enumerate(texts, 1)]


def teach_tiny_model(folder, steps=60):
    "Writes a Llama of two layers that answers one kind of question in the first way and another in the second."
    tokenizer = small_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2, **shape))
    chats = [c for pair in zip(chats_of(first_way, range(100, 132)), chats_of(second_way, range(100, 132), "And after {}?"), strict=True) for c in pair]
    rows, collator = list(tokenize_chats(chats, tokenizer)), PackingCollator("padded", pad_token_id=tokenizer.pad_token_id)
    batches = [collator.batches(rows[i : i + 16])[0] for i in range(0, len(rows), 16)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        token_losses(model, batches[step % len(batches)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Breaks(TrainerCallback):
    "Raises an error at a step."

    def __init__(self, error, step):
        self.error, self.step = error, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


class Alters(TrainerCallback):
    "Does something to each trained parameter before the first step."

    def __init__(self, change):
        self.change = change

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                self.change(parameter)


def without_labels(rows, keep):
    "The rows with only those labels that `keep` lets through."
    return rows.map(lambda row: {"labels": keep(row["labels"])})


class Workshop:
    "Makes runs in a folder, on one tiny model."

    def __init__(self, folder, model):
        self.folder, self.model, self._whole = Path(folder), model, None
        self.config = FinetuneConfig(
            model_name_or_path=model,
            bf16=False,
            use_cpu=True,
            preflight=False,  # it refuses what is broken here
            num_train_epochs=4,
            learning_rate=1e-2,
            lora_dropout=0.0,
            target_modules="all-linear",
            gradient_accumulation_steps=1,
            logging_steps=1,
            output_dir=str(self.folder / "runs"),
            max_new_tokens=14,
        )
        numbers = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
        self.chats = chats_of(second_way, [100 + i for i in numbers])

    def splits(self, train=None):
        return Splits(train or self.chats[:24], self.chats[24:32], self.chats[32:38])

    def train(self, splits=None, callbacks=(), **changes):
        "A run, without its model in memory."
        with mock.patch.object(training, "fastest_ways", lambda *args: ["tree"]):
            run = training.train(replace(self.config, **changes), splits or self.splits(), list(callbacks), say=lambda line: None)
        return run

    def failing(self, *args, **changes):
        "The folder of a run that fails, or the error where there is none."
        before = set(Path(self.config.output_dir).glob("run-*"))
        try:
            self.train(*args, **changes)
        except (Exception, SystemExit) as error:
            left = set(Path(self.config.output_dir).glob("run-*")) - before
            aside = Path(self.config.output_dir) / ".failed"
            return left.pop() if left else aside if aside.is_dir() else error
        raise AssertionError("expected a run that fails")

    def refused(self, *args, **changes):
        "The error with which a run was refused."
        try:
            self.train(*args, **changes)
        except FinetuneError as error:
            return error
        raise AssertionError("expected a refusal")

    def longest(self):
        "The tokens of the longest chat."
        return max(len(ids) for ids in tokenize_chats(self.chats, load_tokenizer(self.model))["input_ids"])

    def copy(self):
        "A copy of the folder of one run that is well."
        if self._whole is None:
            self._whole = self.train().folder
        target = self.folder / f"copy-{len(list(self.folder.glob('copy-*')))}"
        shutil.copytree(self._whole, target)
        return target

    def other_model(self, change):
        "A copy of the model's folder, changed."
        folder = self.folder / f"model-{len(list(self.folder.glob('model-*')))}"
        shutil.copytree(self.model, folder)
        change(folder)
        return str(folder)


def change_weights(folder, change):
    "Changes each tensor of a safetensors file in place."
    file = next(Path(folder).glob("*.safetensors"))
    weights = {name: change(name, weight.clone()) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def change_template(folder, change):
    file = Path(folder) / "chat_template.jinja"
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


@contextmanager
def masked(keep):
    "While inside, a run sees other labels than the mask gives it."
    tokenized = training._tokenized
    with mock.patch.object(training, "_tokenized", lambda *args: without_labels(tokenized(*args), keep)):
        yield


def evaluated(run, change=lambda model: None):
    "The folder of a run whose answers were taken, after something was done to its model in memory."
    change(run.model)
    evaluate_run(run)
    run.release()
    return run.folder


def scaled(factor):
    "A change to a model in memory: its adapter, so many times as strong."

    def change(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(factor)

    return change


# --- what is broken, by the name of the rule that should say so


def memory_full(shop):
    return shop.failing(callbacks=[Breaks(MemoryError("Unable to allocate 9.54 GiB for an array"), 5)])


def no_room_for_the_largest_batch(shop):
    with mock.patch.object(training, "probe_fit", side_effect=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        return shop.failing(run_name=None)


def all_masked(shop):
    with masked(lambda labels: [-100] * len(labels)):
        return shop.failing(eval_strategy="no")


def most_masked(shop):
    with masked(lambda labels: labels if sum(labels) % 7 == 4 else [-100] * len(labels)):
        return shop.train().folder


def no_marks(shop):
    return shop.refused(train_on="marked")


def rate_of_one(shop):
    return shop.train(learning_rate=1.0, early_stopping_patience=0).folder


def base_with_nan(shop):
    return shop.failing(model_name_or_path=shop.other_model(lambda folder: change_weights(folder, lambda name, w: w * float("nan") if "layers.1.mlp" in name else w)))


def adapter_with_nan(shop):
    folder = shop.copy()
    change_weights(folder / "adapter", lambda name, w: w * float("nan") if "lora_A" in name else w)
    return folder


def chats_too_long(shop):
    return shop.refused(max_length=12)


def disk_full(shop):
    return shop.failing(callbacks=[Breaks(OSError(28, "no space left on device"), 5)])


def process_killed(shop):
    return shop.failing(callbacks=[Breaks(SystemExit(), 9)])


def adapter_on_another_base(shop):
    folder = shop.copy()
    other = shop.other_model(lambda model: change_weights(model, lambda name, w: w + 0.1 * torch.randn_like(w)))
    save_config(replace(load_config(folder / "config.yaml"), model_name_or_path=other), folder / "config.yaml")
    return folder


def base_overwritten(shop):
    model = shop.other_model(lambda folder: None)
    run = shop.train(model_name_or_path=model)
    change_weights(model, lambda name, w: w * 1.01)
    return run.folder


def template_edited(shop):
    model = shop.other_model(lambda folder: None)
    run = shop.train(model_name_or_path=model)
    change_template(model, lambda text: text.replace("<|im_end|>", " <|im_end|>"))
    return run.folder


def template_with_two_beginnings(shop):
    model = shop.other_model(lambda folder: change_template(folder, lambda text: "{{ bos_token }}" + text))
    return shop.train(model_name_or_path=model).folder


def adapter_zeroed(shop):
    folder = shop.copy()
    change_weights(folder / "adapter", lambda name, w: w * 0)
    return folder


def adapter_lost(shop):
    folder = shop.copy()
    (folder / "adapter/adapter_model.safetensors").unlink()
    return folder


def adapter_off(shop):
    return evaluated(shop.train(), scaled(0))


def test_rows_trained_on(shop):
    splits = shop.splits()
    return shop.train(splits._replace(test=splits.train[:6])).folder


def rows_copied(shop):
    return shop.train(shop.splits(shop.chats[:8] * 3)).folder


def one_answer_for_all(shop):
    chats = chats_of(lambda i: "It is 100.", range(100, 138))
    return shop.train(Splits(chats[:24], chats[24:32], chats[32:]), modules_to_save=["lm_head"]).folder


def gradient_zeroed(shop):
    return shop.failing(callbacks=[Alters(lambda parameter: parameter.register_hook(torch.zeros_like))], num_train_epochs=2)


def adapter_in_bf16(shop):
    def halve(parameter):
        parameter.data = parameter.data.bfloat16()

    return shop.train(callbacks=[Alters(halve)], bf16=True, learning_rate=1e-4, num_train_epochs=2).folder


def warmup_to_the_end(shop):
    return shop.train(warmup_ratio=1.0).folder


def rate_of_nothing(shop):
    return shop.train(learning_rate=1e-8).folder


def rate_of_nothing_unseen(shop):
    "A batch of one makes the curve jump, and nobody looks at validation chats, which would show that it stands still."
    return shop.train(Splits(shop.chats[:24], [], shop.chats[32:38]), learning_rate=1e-8, per_device_train_batch_size=1, num_train_epochs=1, eval_strategy="no", seed=2).folder


def three_steps(shop):
    return shop.train(max_steps=3, learning_rate=1e-3).folder


def half_way(shop):
    return shop.train(learning_rate=5e-4, lr_scheduler_type="constant").folder


def answers_cut(shop):
    return shop.train(max_length=shop.longest() - 3, too_long="truncate").folder


def end_masked(shop):
    def keep(labels):
        last = max(i for i, label in enumerate(labels) if label != -100)
        return [-100 if i >= last else label for i, label in enumerate(labels)]

    with masked(keep):
        return evaluated(shop.train())


def long_ones_dropped(shop):
    long = chats_of(lambda i: second_way(i) * 6, range(200, 206), file="long.jsonl")
    return shop.train(shop.splits(shop.chats[:24] + long), max_length=shop.longest(), too_long="drop").folder


def learned_by_heart(shop):
    odd = chats_of(lambda i: second_way(170 + (i == 170)), range(170, 178))
    return shop.train(shop.splits(odd), num_train_epochs=15, early_stopping_patience=0).folder


def adapter_far_too_strong(shop):
    return evaluated(shop.train(), scaled(20))


def flat(shop):
    return shop.train(learning_rate=5e-5, r=1, lora_alpha=1, target_modules=["q_proj"], num_train_epochs=5).folder


FAULTS = {  # the planted fault, the rule that should come first, and who plants it
    "MemoryError in a step": ("out of memory", memory_full),
    "no room for the largest batch": ("out of memory", no_room_for_the_largest_batch),
    "every label masked": ("nothing to learn from", all_masked),
    "three quarters of the rows masked": ("nothing to learn from", most_masked),
    "no answer marked to be trained on": ("nothing to learn from", no_marks),
    "learning rate 1": ("learning rate too high", rate_of_one),
    "NaN in the base model": ("loss is no number", base_with_nan),
    "NaN in the saved adapter": ("loss is no number", adapter_with_nan),
    "chats over max_length": ("run refused or failed", chats_too_long),
    "disk full": ("run refused or failed", disk_full),
    "process ended in the middle": ("broken off", process_killed),
    "adapter copied to another base": ("base model and adapter mismatch", adapter_on_another_base),
    "base model overwritten": ("base model and adapter mismatch", base_overwritten),
    "template edited after training": ("template mismatch", template_edited),
    "template with two beginnings": ("double beginning of text", template_with_two_beginnings),
    "adapter zeroed on the disk": ("adapter missing or all zero", adapter_zeroed),
    "adapter file lost": ("adapter missing or all zero", adapter_lost),
    "adapter off when evaluated": ("adapter not at work", adapter_off),
    "test rows trained on": ("test questions in training", test_rows_trained_on),
    "each chat three times": ("duplicated data", rows_copied),
    "one answer for all": ("loss suspiciously low", one_answer_for_all),
    "gradients zeroed": ("no gradient", gradient_zeroed),
    "adapter in bf16, small steps": ("steps rounded away", adapter_in_bf16),
    "warm-up to the end": ("warm-up longer than training", warmup_to_the_end),
    "learning rate 1e-8": ("learning rate too low", rate_of_nothing),
    "learning rate 1e-8, a curve that jumps": ("learning rate too low", rate_of_nothing_unseen),
    "three steps": ("too few steps", three_steps),
    "ended half way": ("ended while still learning", half_way),
    "answers cut": ("never stops", answers_cut),
    "end of the answer masked": ("never stops", end_masked),
    "long chats dropped": ("chats left out", long_ones_dropped),
    "eight chats, fifteen times": ("overfitting", learned_by_heart),
    "adapter far too strong": ("never stops", adapter_far_too_strong),
    "flat loss": ("loss not falling", flat),
}

HEALTHY = {  # what is different in each
    "as it is": {},
    "seed 1": {"seed": 1},
    "rank 4": {"r": 4, "lora_alpha": 8},
    "rank 64": {"r": 64, "learning_rate": 5e-3},
    "a lower rate, longer": {"learning_rate": 4e-3, "num_train_epochs": 8},
    "DoRA": {"use_dora": True},
    "rsLoRA, LoRA+": {"use_rslora": True, "loraplus_lr_ratio": 4.0, "learning_rate": 3e-3},
    "PiSSA": {"init_lora_weights": "pissa", "learning_rate": 3e-3},
    "attention alone, dropout, linear": {"target_modules": "attention", "lora_dropout": 0.05, "lr_scheduler_type": "linear", "num_train_epochs": 8},
    "accumulated, padded, looks by steps": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "packing": "padded", "eval_strategy": "steps", "eval_steps": 8},
}


@dataclass
class Row:
    "What a diagnosis made of one run."

    what: str
    rule: str  # that should come first; empty for a run that is well
    names: list[str]  # that it found

    @property
    def verdict(self):
        if not self.rule:
            return "false alarm" if self.names else "silent"
        return "first" if self.names[:1] == [self.rule] else "found, not first" if self.rule in self.names else "missed"

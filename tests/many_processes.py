"""What each of two processes does for `test_many.py`: several trainings, one after the other; what came of them goes into files."""

import json
import os
import shutil
import sys
import weakref
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from conftest import some_chats
from full_device import From, limited
from transformers import TrainerCallback

from finetune_nb import cli, sentinels, trainer, training
from finetune_nb.config import FinetuneConfig, FinetuneError
from finetune_nb.data import Chat, Splits
from finetune_nb.launch import keep_error
from finetune_nb.lora import add_lora
from finetune_nb.losses import inner_model
from finetune_nb.models import load_model, load_tokenizer
from finetune_nb.sharding import fill_from_first, outside_whole, shard
from finetune_nb.stop import Stop
from finetune_nb.training import load_base, resume, train

RANK, N = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
training.fastest_ways = lambda *args: ["tree"]  # the last bit depends on it
torch.set_num_threads(1)


def choices(folder, model, name, a_step=8, **changes):
    "One run, with steps of as many chats in however many processes."
    settings = dict(bf16=False, use_cpu=True, num_train_epochs=2, learning_rate=5e-3, lora_dropout=0.0, logging_steps=1, gradient_accumulation_steps=2, max_tokens_at_once=64, preflight=False)
    settings |= {"eval_strategy": "steps", "eval_steps": 2, **changes}
    settings["per_device_train_batch_size"] = a_step // settings["gradient_accumulation_steps"] // N
    return FinetuneConfig(model_name_or_path=model, output_dir=str(folder), run_name=name, **settings)


def seventeen():
    "In steps of eight the last one of an epoch has a single chat, which one of two processes computes."
    return Splits(some_chats()[:17], some_chats()[24:29], [])


def half_masked(config):
    "Every other chat has no label, which tokenize_chats would refuse; in steps of two, processes and whole steps go without."
    made = training._all_tokenized

    def without(*args):
        rows = made(*args)
        return rows | {"train": rows["train"].map(lambda row, i: row | {"labels": [-100] * len(row["labels"])} if i % 2 else row, with_indices=True)}

    training._all_tokenized = without
    try:
        train(config, Splits(some_chats()[:10], some_chats()[24:29], []))
    finally:
        training._all_tokenized = made


PACKED = dict(load_in_4bit=True, eval_strategy="no", max_steps=2, target_modules="all-linear", modules_to_save=["lm_head"])
MASKED = dict(a_step=2, gradient_accumulation_steps=1, packing="padded", eval_strategy="no", num_train_epochs=1)


class At(TrainerCallback):
    "Does something after a step."

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.do()


def stopped_and_on(folder, config):
    "Stopped by one process; kept as it was then, and gone on with."
    stop = Stop()
    wish = At(1, lambda: setattr(stop, "wanted", True)) if RANK else At(0, None)
    run = train(config, seventeen(), [wish], stop)
    if RANK == 0:
        shutil.copytree(run.folder, folder / f"{config.run_name}_kept")
    training.said_by_all()
    return run.facts["ended_by"], run.facts["steps"], resume(run.folder).facts["steps"]


def asked(config):
    "What a model says that was put into parts unlike any run does it: with weights that the first process sent; and how many of its weights are still whole then."
    base, tokenizer = load_base(config, say=len, hollow=N > 1)
    torch.manual_seed(0)
    fill = fill_from_first(base, lambda: load_model(config.model_name_or_path, torch.float32, use_cpu=True, say=len)[0]) if N > 1 else None
    weights, model = [weakref.ref(p) for p in base.parameters()], add_lora(base, config)
    if N > 1:
        shard(model, fill=fill)
    ids = torch.tensor([tokenizer("What is two plus one?")["input_ids"]])
    with outside_whole(model), torch.no_grad():
        text = inner_model(model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0].tolist()
    return text, sum(ref() is not None for ref in weights) if N > 1 else 0


def no_number(folder, config):
    "One chat has no loss; which process computes it, only the order tells."
    splits, real = seventeen(), trainer.token_losses
    asked = splits.train[9].messages
    splits.train[9] = Chat([{**asked[0], "content": asked[0]["content"] + " zebra"}, *asked[1:]], "the zebra")
    (zebra, *_) = load_tokenizer(config.model_name_or_path)(" zebra")["input_ids"]

    def losses(model, batch):
        return real(model, batch) * (float("nan") if (batch.input_ids == zebra).any() else 1.0)

    trainer.token_losses = sentinels.token_losses = losses
    try:
        train(config, splits)
    finally:
        trainer.token_losses = sentinels.token_losses = real


def full(folder, config, most=64):
    "The device of the second process takes fewer tokens from the third step on, also in the looks."
    base = training.load_base(config, lambda text: None)
    table, _ = limited(base[0], 10**9)
    run = train(replace(config, max_tokens_at_once=200), seventeen(), [From(table, 2, most)] if RANK else [], base=base)
    return run.facts["out_of_memory"], run.facts["max_tokens_at_once"], max(table.sizes), max(table.sizes[-4:])


def no_room(folder, config):
    "No chat fits into that of the second process."
    full(folder, config, 8)


def no_file(folder, config):
    "The second process does not find its chats."
    train(config if RANK == 0 else replace(config, train_file=str(folder / "missing.jsonl")), seventeen() if RANK == 0 else None)


def main(folder, model):
    said = {}
    train(choices(folder, model, "ddp", preflight=True), seventeen())
    half_masked(choices(folder, model, "masked", **MASKED))
    said["stopped"] = stopped_and_on(folder, choices(folder, model, "stopped"))
    said["stopped in parts"] = stopped_and_on(folder, choices(folder, model, "parts", fsdp=True, gradient_checkpointing=True))
    said["full"] = full(folder, choices(folder, model, "full"))
    train(choices(folder, model, "never_stopped_in_parts", fsdp=True, gradient_checkpointing=True, preflight=True), seventeen())
    train(choices(folder, model, "packed", fsdp=True, **PACKED), seventeen())
    said["asked"] = asked(choices(folder, model, None))
    for name, end in (("no number", no_number), ("no room", no_room), ("no file", no_file)):
        try:
            end(folder, choices(folder, model, name.replace(" ", "_")))
        except (FinetuneError, OSError) as error:
            said[name] = [type(error).__name__, str(error)]
    with (folder / f"printed_{RANK}.txt").open("w") as file, redirect_stdout(file):
        said["code"] = cli.main(["train", str(folder / "run.yaml"), "--no-evaluate"])  # the processes part at its end
    (folder / f"said_{RANK}.json").write_text(json.dumps(said))


if __name__ == "__main__" and len(sys.argv) == 3:
    main(Path(sys.argv[1]), sys.argv[2])
elif __name__ == "__main__":
    try:
        full(Path(sys.argv[1]), choices(sys.argv[1], sys.argv[2], "full", fsdp=True, eval_strategy="no"))
    except Exception as error:
        keep_error(error)
        raise

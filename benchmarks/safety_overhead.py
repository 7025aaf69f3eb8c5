"""What checkpoints, sentinels and locks cost of a run: the same run with all of them and with none, in turn.

    python benchmarks/safety_overhead.py [--pairs 7] [--steps 24] [--save-steps 8] [--threads 1] [--folder PLACE] [--fp32]

The run is the default one (the embedded model, the ICD-10 chats, steps of 16) but shorter, so that its three checkpoints come closer
together than in any real one. "With" holds the folder's lock, looks at each step, and writes each checkpoint as every run does: hashed,
flushed, read back, renamed, the oldest removed, the folder made private. "Without" writes no checkpoint at all, plain or not: a plain
one is much of the cost already and would hide it. Losses, logs and everything else are the same in both, and so are the weights in
the end, to the bit. Prints for each pair the CPU time of the process and the time on the clock; medians of all pairs and of their
ratios; and, from inside the runs with all of it, the time that each part took, which says more than a ratio on a busy machine.
Time goes from the first step to the last checkpoint, loading and planning left out. Since the whole differs by some percent from run to
run even on a quiet machine, the middle one of the steps is given for both, too: what the safety costs between the parts that are timed
would show there. `--folder` is where the run is written (a disk,
not memory).

Seen on 2026-11-27 (torch 2.13, two hardware threads of one core, the other one idle): from inside 0.65 % of the CPU time and 0.70 % of
the time on the clock, with two checkpoints in 16 steps (0.5 s of 71). Whole runs differ by more than that without any of it: two pairs
had ratios of 1.014 and 0.941, and a step took 4.35 s of CPU time with and 4.50 s without.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers import TrainerCallback


@contextmanager
def timed(spent: dict[str, list[float]], parts: dict[str, tuple[type, str]]):
    "While inside, the methods add to `spent` what they take of CPU time and of the clock."
    kept = {name: getattr(*place) for name, place in parts.items()}

    def watched(name, work):
        def done(*args, **kwargs):
            begun = time.thread_time(), time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                for i, now in enumerate((time.thread_time(), time.perf_counter())):
                    spent[name][i] += now - begun[i]

        return done

    for name, (owner, method) in parts.items():
        setattr(owner, method, watched(name, kept[name]))
    try:
        yield
    finally:
        for name, (owner, method) in parts.items():
            setattr(owner, method, kept[name])


class Steps(TrainerCallback):
    "The CPU time of each step."

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.begun)


def measure(options, base, tokenizer, rows, guarded: bool, spent) -> tuple[float, float, str, float]:
    "CPU time and time on the clock of one run, in seconds, the hash of its adapter, and the CPU time of the middle one of its steps."
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    from finetune_nb.checkpoints import check_room
    from finetune_nb.crash_safe import CrashSafeTrainer
    from finetune_nb.lora import add_lora, remove_lora
    from finetune_nb.packing import PackingCollator
    from finetune_nb.planning import token_budget
    from finetune_nb.run_folder import hold_run
    from finetune_nb.sentinels import Sentinels
    from finetune_nb.trainer import make_trainer

    parts = {
        "before the first step": (Sentinels, "begin"),
        "before each step": (Sentinels, "before_step"),
        "after each step": (Sentinels, "after_step"),
        "weights before a checkpoint": (Sentinels, "check_weights"),
        "at the end": (Sentinels, "end"),
        "checkpoints": (CrashSafeTrainer, "_save_checkpoint"),
    }
    config = options.config
    model = add_lora(base, config)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        collator = PackingCollator("shared", token_budget(config, rows), tokenizer.pad_token_id)
        trainer = make_trainer(config, model, collator, {"train": rows}, folder)
        trainer.args.save_strategy, trainer.args.save_steps = ("steps" if guarded else "no"), options.save_steps
        if not guarded:
            trainer.sentinels = None
        trainer.add_callback(steps := Steps())
        with collator.attention(model), timed(spent, parts):
            begun = time.process_time(), time.perf_counter()
            with hold_run(Path(folder)) if guarded else nullcontext():
                if guarded:
                    check_room(folder, 10**6, config.save_total_limit)
                trainer.train()
            took = time.process_time() - begun[0], time.perf_counter() - begun[1]
        weights = {name: weight.contiguous() for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
        assert not guarded or len(list(Path(folder).glob("checkpoint-*"))) >= 2
    remove_lora(model)
    return *took, hashlib.sha256(save(weights)).hexdigest(), statistics.median(steps.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--save-steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--fp32", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(options.threads)
    from finetune_nb.chat_template import tokenize_chats
    from finetune_nb.config import FinetuneConfig
    from finetune_nb.data import icd10_chats
    from finetune_nb.training import load_base

    options.config = FinetuneConfig(use_cpu=True, bf16=False if options.fp32 else None, eval_strategy="no", max_steps=options.steps)
    base, tokenizer = load_base(options.config, lambda text: None)
    chats = icd10_chats(seed=options.config.seed).train[: 16 * options.save_steps]
    rows = tokenize_chats(chats, tokenizer, options.config.max_length)
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    measure(options, base, tokenizer, rows, True, defaultdict(lambda: [0.0, 0.0]))  # warms up
    pairs = []
    for number in range(options.pairs):
        order = (True, False) if number % 2 else (False, True)
        found = {guarded: measure(options, base, tokenizer, rows, guarded, spent) for guarded in order}
        assert found[True][2] == found[False][2], "what is guarded computes the same"
        pairs.append(found)
        shown = [f"{found[True][i]:.2f} / {found[False][i]:.2f} s = {found[True][i] / found[False][i]:.4f}" for i in (0, 1)]
        print(f"pair {number + 1}: CPU {shown[0]}, clock {shown[1]}", flush=True)
    middle = [statistics.median(found[guarded][3] for found in pairs) for guarded in (True, False)]
    print(f"a step: {middle[0]:.3f} s of CPU time with, {middle[1]:.3f} s without; ratio {middle[0] / middle[1]:.4f}")
    for i, name in enumerate(("CPU time", "clock")):
        alone = [found[False][i] for found in pairs]
        ratio = statistics.median(found[True][i] / found[False][i] for found in pairs)
        guarded = statistics.median(found[True][i] for found in pairs)
        print(f"{name}: median {guarded:.2f} s with, {statistics.median(alone):.2f} s without; median ratio {ratio:.4f}")
        total = sum(part[i] for part in spent.values()) / options.pairs
        print(f"  from inside: {total:.3f} s a run, {total / statistics.median(alone):.2%} of it without")
        for part, seconds in sorted(spent.items(), key=lambda pair: -pair[1][i]):
            print(f"    {part}: {seconds[i] / options.pairs:.4f} s")


if __name__ == "__main__":
    main()

"""How soon does the plan follow a slider?

    python benchmarks/live_plan_speed.py [--seed 0] [--threads 1]

Forty moves on the embedded model and the 1,000 chats of the demo, each of which changes one setting of the move before it: rank,
learning rate, epochs, batch size, targets, dropout, QLoRA, the longest chat. The first plan, which builds the model, measures the
device and traces a first batch, is the warm-up. Prints each move, the median and the worst, in wall-clock time
and in processor time, which is what one idle core would take.
"""

import argparse
import random
import statistics
import time
from dataclasses import replace

import torch

from finetune_nb.chat_template import tokenize_chats
from finetune_nb.config import FinetuneConfig
from finetune_nb.data import icd10_chats
from finetune_nb.live_plan import LivePlan
from finetune_nb.models import load_tokenizer

MOVES = {
    "r": range(1, 257), "learning_rate": (5e-5, 1e-4, 2e-4, 5e-4), "num_train_epochs": (1, 2, 3, 5),
    "per_device_train_batch_size": (1, 2, 4, 8, 16, 32), "lora_dropout": (0.0, 0.05, 0.1), "load_in_4bit": (False, True),
    "target_modules": (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "attention", "all-linear"),
    "max_length": (100, 120, 128, 140, 160, 192, 256, 1024),
}  # fmt: skip


def timed(live: LivePlan, config: FinetuneConfig) -> tuple[float, float]:
    "Milliseconds of wall clock and of processor that a plan takes."
    wall, processor = time.perf_counter(), time.process_time()
    live.plan(config)
    return 1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = random.Random(options.seed)
    config = FinetuneConfig(use_cpu=True, too_long="drop")
    rows = tokenize_chats(icd10_chats().train, load_tokenizer(), max_length=10**6)
    started = time.perf_counter()
    live = LivePlan(rows)
    print(f"{'chats read':45}{1000 * (time.perf_counter() - started):8.0f} ms")
    print("{:45}{:8.0f} ms wall, {:4.0f} ms processor".format("first plan", *timed(live, config)))
    times = []
    for name in rng.sample([*MOVES] * 5, 40):
        value = rng.choice([value for value in MOVES[name] if value != getattr(config, name)])
        config = replace(config, **{name: value})
        times.append(timed(live, config))
        print("{:45}{:8.0f} ms wall, {:4.0f} ms processor".format(f"{name}={value}", *times[-1]))
    for what, found in zip(("wall", "processor"), zip(*times, strict=True), strict=True):
        print(f"{what}: median {statistics.median(found):.0f} ms, worst {max(found):.0f} ms of {len(found)} moves")


if __name__ == "__main__":
    main()

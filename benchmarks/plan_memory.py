"""How far is the memory that `estimate` foretells from the memory that a run takes?

    python benchmarks/plan_memory.py [--out plan_memory.json]

Model shapes (random weights, written to a temporary folder) times rank, length, and method, each in a process of its own: first
the plan, then two steps of the real training on 1,024 tokens of such chats; on a CPU the peak resident memory of the process while
it trains is compared, on a GPU the peak of its allocator. The constants of `gap_bytes` were fitted to the cases with 1,024 tokens
at once; the others were not looked at for that. Prints the table, the median and the worst error.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {  # hidden, intermediate, blocks, heads
    "30M": (384, 1024, 8, 6), "110M": (768, 2048, 12, 12), "135M": (576, 1536, 30, 9), "360M": (960, 2560, 32, 15),
}
CASES = [
    *itertools.product(("30M", "135M", "360M"), (8, 64), (128, 512), ("lora",), (1024,)),
    *itertools.product(("135M", "360M"), (16,), (128, 1024), ("all-linear", "checkpointing", "qlora"), (1024,)),
    *itertools.product(("110M",), (32,), (256,), ("lora", "checkpointing", "qlora"), (512, 2048)),
]


def work(shape: str, r: int, length: int, method: str, tokens: int, folder: str) -> dict:
    "The plan and the run of one case, in this process."
    import random

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from finetune_nb import planning
    from finetune_nb.config import FinetuneConfig
    from finetune_nb.lora import add_lora
    from finetune_nb.losses import recompute_blocks
    from finetune_nb.models import load_tokenizer, release_memory
    from finetune_nb.packing import PackingCollator
    from finetune_nb.planning import blocks_to_recompute, estimate, forget_peak, peak_bytes, resident_bytes
    from finetune_nb.trainer import make_trainer
    from finetune_nb.training import load_base

    path = Path(folder) / shape
    if not path.is_dir():  # made by the first process; the others find it
        hidden, intermediate, blocks, heads = SHAPES[shape]
        config = LlamaConfig(
            vocab_size=49_152, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
            num_key_value_heads=heads // 3, tie_word_embeddings=True, max_position_embeddings=8192,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
        load_tokenizer().save_pretrained(path)
        return {}
    rng = random.Random(0)
    ids = [[rng.randrange(1000, 40_000) for _ in range(length)] for _ in range(tokens // length)]
    rows = [{"input_ids": one, "labels": [-100] * (length // 2) + one[length // 2 :]} for one in ids]
    config = FinetuneConfig(
        model_name_or_path=str(path), r=r, lora_alpha=r, load_in_4bit=method == "qlora", gradient_checkpointing=method == "checkpointing",
        target_modules="all-linear" if method == "all-linear" else "attention", max_tokens_at_once=tokens, max_steps=2,
        per_device_train_batch_size=tokens // length, gradient_accumulation_steps=1, eval_strategy="no", max_length=length,
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    base_before = resident_bytes()
    plan = estimate(config, rows, float("nan"))
    model, tokenizer = load_base(config)
    loaded = peak_bytes()
    from datasets import Dataset

    tuned = add_lora(model, config)
    collator = PackingCollator("shared", tokens, tokenizer.pad_token_id)
    recompute_blocks(tuned, blocks_to_recompute(config, rows))
    trainer = make_trainer(config, tuned, collator, {"train": Dataset.from_list(rows)}, Path(folder) / "run")
    release_memory()
    forget_peak()
    with collator.attention(tuned):
        trainer.train()
    measured = peak_bytes()
    planned = plan.bytes - (plan.parts.get(planning.PROCESS, 0) if cuda else 0)
    return {"planned": planned, "measured": measured, "before": base_before, "loaded": loaded, "parts": plan.parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="keep every figure in this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print("RESULT" + json.dumps(work(*json.loads(options.case))))
        return
    found, made = [], set()
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            for _ in range(1 if case[0] in made else 2):
                made.add(case[0])
                command = [sys.executable, __file__, "--case", json.dumps([*case, folder])]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
                result = json.loads(lines[0].removeprefix("RESULT")) if lines else None
                if result is None:
                    print(case, "did not run:", done.stderr.strip().splitlines()[-1:], flush=True)
            if result:
                error = result["planned"] / result["measured"] - 1
                found.append({"case": case, "error": error, **result})
                planned, measured = result["planned"] / 2**30, result["measured"] / 2**30
                print(f"{case!s:44} planned {planned:6.2f} GiB, measured {measured:6.2f} GiB, {error:+.1%}", flush=True)
    errors = sorted(abs(f["error"]) for f in found)
    print(f"{len(found)} cases: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

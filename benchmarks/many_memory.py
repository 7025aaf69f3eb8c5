"""How far is the memory foretold for a run of several processes from what each of them takes?

    python benchmarks/many_memory.py [--processes 2] [--ways one ddp fsdp fsdp-4bit]

A Llama of 110M parameters with random weights (432 MB in fp32) is trained for three steps on a CPU: in one process, in several that each
hold the model (DDP), in several that hold a part of it (FSDP2), and in parts packed to 4 bits. The peak of the resident memory is
asked every ten milliseconds over the whole run, loading, planning and looks included, and is held against the plan that was made before
a weight was loaded. Prints for each way the plan, the peak of the process that took most, and what the imports took of it.

Seen on 2026-11-27 (Linux, torch 2.13, gloo, two busy hardware threads of one core), in MiB planned and taken: one process 1,151 and
1,241, DDP 1,144 and 1,244, FSDP2 1,246 and 1,262, FSDP2 in 4 bits 1,349 and 1,348; imports are 541 of each. So a short run takes up to
8 % more for a moment than is planned for its training.
"""

# ruff: noqa: E501
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

WAYS = {"one": {}, "ddp": {}, "fsdp": {"fsdp": True}, "fsdp-4bit": {"fsdp": True, "load_in_4bit": True}}


def resident() -> float:
    "Of this process, in MiB."
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def make(folder: str) -> None:
    "Writes the model."
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from finetune_nb.models import load_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)


def work(folder: str, way: str) -> None:
    "One of the processes: trains, and prints what it took."
    peak = [0.0]

    def look() -> None:
        while True:
            peak[0] = max(peak[0], resident())
            time.sleep(0.01)

    threading.Thread(target=look, daemon=True).start()
    from finetune_nb.config import FinetuneConfig
    from finetune_nb.data import Chat, Splits
    from finetune_nb.processes import leave
    from finetune_nb.training import train

    imports, world = resident(), int(os.environ.get("WORLD_SIZE", 1))
    texts = [(f"What is {i} plus one?", f"It is {i + 1}." + " Really." * (i % 5)) for i in range(24)]
    chats = [Chat([{"role": "user", "content": asked}, {"role": "assistant", "content": said}], f"line {i}") for i, (asked, said) in enumerate(texts)]
    config = FinetuneConfig(
        model_name_or_path=f"{folder}/model", output_dir=f"{folder}/runs", run_name=way, bf16=False, use_cpu=True, num_train_epochs=1,
        lora_dropout=0.0, gradient_accumulation_steps=1, per_device_train_batch_size=8 // world, max_tokens_at_once=128, preflight=False, **WAYS[way],
    )  # fmt: skip
    run = train(config, Splits(chats[:20], chats[20:], []), say=lambda text: None)
    print("RESULT" + json.dumps({"peak": peak[0], "imports": imports, "planned": run.facts["planned"]["peak_memory_gib"] * 1024}), flush=True)
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(*options.work)
    env = {"OMP_NUM_THREADS": "1"} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/model")
        for way in options.ways:
            n = 1 if way == "one" else options.processes
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), __file__, "--work", folder, way]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            found = [json.loads(line.partition("RESULT")[2]) for line in done.stdout.splitlines() if "RESULT" in line]
            if len(found) < n:
                print(f"{way:10} did not run: {done.stderr.strip()[-600:]}", flush=True)
                continue
            most = max(found, key=lambda one: one["peak"])
            error = most["planned"] / most["peak"] - 1
            print(f"{way:10} planned {most['planned']:6.0f} MiB, taken {most['peak']:6.0f} MiB ({error:+.1%}), of which imports {most['imports']:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

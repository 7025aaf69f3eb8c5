"""Tokens per second of a LoRA training: ours, TRL's SFTTrainer, and transformers' Trainer with PEFT, on the same chats in turn.

    python benchmarks/train_throughput.py [--scenarios short shared-300 ...] [--threads 1 2] [--dtypes bf16 fp32]
        [--steps 4] [--rounds 3] [--out train_throughput.json]

Each measurement is a process of its own, so that its peak memory is its own: it loads the embedded model, adds the same adapter
(r 16 on q, k, v, o, no dropout), trains one step to warm up and then times `--steps` optimizer steps of 16 chats each, the same
chats in the same order and from the same token ids and labels. The engines take turns; medians over the rounds are printed, with
the ratio to the best of the peers (by CPU time, which other work on the machine disturbs least), peak resident memory, and the
loss of each step. For ours also the share of the speed of a matrix product, measured in the same process, that the step reaches
(multiply-adds of its layers alone), how much arithmetic it has saved, and with `--profile` where its time goes. Peers run without
checkpointing, in each shape that is theirs to choose: one batch of 16, four batches of 4, and for TRL also packing (which forms its
own steps).
Needs trl (pip install trl); what is missing is left out and said.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time

SCENARIOS = ("short", "shared-300", "shared-800", "mixed", "nothing-in-common")
PEERS = ("trl", "trl-4x4", "trl-packing", "trainer", "trainer-4x4")
STEP = 16  # chats in each optimizer step


def words(n: int, rng: random.Random) -> str:
    "`n` words of no great meaning."
    return " ".join(rng.choice(WORDS) for _ in range(n))


WORDS = "code note entry patient report list rule left right acute chronic first second other part same over under with of the a in".split()


def chats_of(scenario: str, n: int) -> list[list[dict[str, str]]]:
    "The messages of `n` chats."
    from finetune_nb.data import icd10_chats

    rng = random.Random(7)
    if scenario == "nothing-in-common":
        return [_problem(rng) for _ in range(n)]
    base = [[dict(m) for m in chat.messages] for chat in icd10_chats(seed=7).train[:n]]
    system = {"short": "You are a helpful medical coding assistant.", "mixed": "You are a helpful medical coding assistant."}.get(scenario)
    if system is None:  # about 1.15 tokens to a word
        system = f"You are a medical coding assistant. {words(round(int(scenario.rpartition('-')[2]) * 0.97) - 8, rng)}."
    for messages in base:
        messages[0] = {"role": "system", "content": system}
        if scenario == "mixed" and rng.random() < 0.5:
            messages[1]["content"] = f"Notes: {words(rng.choice((50, 150, 400, 700)), rng)}\n\n{messages[1]['content']}"
    return base


def _problem(rng: random.Random) -> list[dict[str, str]]:
    "A word problem with a worked answer, in the shape of GSM8K, that shares nothing with another one."
    a, b, c = rng.randrange(3, 90), rng.randrange(2, 40), rng.randrange(2, 9)
    name, thing = rng.choice("Ana Ben Chloe Dev Eva Finn Gul Hana".split()), rng.choice("apples books cards coins pens stamps".split())
    question = f"{name} has {a} {thing} and gets {b} more from each of {c} friends. {words(30, rng).capitalize()}. How many {thing}?"
    product = f"{c} friends give {b} {thing} each, which makes {c} * {b} = {c * b}. {words(40, rng).capitalize()}."
    answer = f"{product} With the first {a} that is {a} + {c * b} = {a + c * b}. The answer is {a + c * b}."
    texts = (("system", f"{rng.random()}"), ("user", question), ("assistant", answer))
    return [{"role": role, "content": text} for role, text in texts]


def work(options: argparse.Namespace) -> dict:
    "One measurement, in this process."
    import torch

    torch.set_num_threads(options.threads[0])
    from finetune_nb.chat_template import tokenize_chats
    from finetune_nb.config import FinetuneConfig
    from finetune_nb.data import Chat
    from finetune_nb.models import load_model
    from finetune_nb.training import peak_memory_gib

    engine, scenario, low = options.engine, options.scenarios[0], options.dtypes[0] == "bf16"
    steps, scratch = options.steps + 1, tempfile.TemporaryDirectory()
    dtype = torch.bfloat16 if low else torch.float32
    config = FinetuneConfig(
        lora_dropout=0, bf16=low, use_cpu=True, eval_strategy="no", max_steps=steps, logging_steps=1, max_length=4096,
        lr_scheduler_type="constant", warmup_ratio=0, output_dir=scratch.name,
    )  # fmt: skip
    model, tokenizer = load_model(config.model_name_or_path, dtype, "sdpa", use_cpu=True)
    chats = [Chat(messages, f"chat {i}") for i, messages in enumerate(chats_of(scenario, STEP * steps))]
    rows = tokenize_chats(chats, tokenizer, 4096).select_columns(["input_ids", "labels"])
    trainer = _ours(config, model, tokenizer, rows) if engine == "ours" else _peer(engine, config, model, tokenizer, rows)
    clock = _Clock()
    trainer.add_callback(clock.callback())
    trainer.train()
    timed = rows.select(range(STEP, len(rows)))
    tokens, supervised = sum(map(len, timed["input_ids"])), sum(label != -100 for labels in timed["labels"] for label in labels)
    seen = 1.0
    if engine == "trl-packing":  # its steps hold other numbers of chats
        n = trainer.args.per_device_train_batch_size
        seen = sum(map(len, trainer.train_dataset["input_ids"][n : n * steps])) / tokens
    seconds, cpu = (clock.ticks[-1][i] - clock.ticks[0][i] for i in (0, 1))
    peak = peak_memory_gib()
    own = _work_of(trainer, rows, cpu, options) if engine == "ours" else {}
    return own | {
        "chats/s": seen * STEP * options.steps / seconds,
        "tokens/s": seen * tokens / seconds,
        "supervised/s": seen * supervised / seconds,
        "cpu seconds per chat": cpu / (seen * STEP * options.steps),
        "peak GiB": peak,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


class _Clock:
    "Wall and CPU time at the end of each step."

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float]] = []

    def callback(self):
        from transformers import TrainerCallback

        ticks = self.ticks

        class Tick(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                ticks.append((time.perf_counter(), time.process_time()))

        return Tick()


def _work_of(trainer, rows, cpu: float, options: argparse.Namespace) -> dict:
    "The share of the machine's matrix peak that our timed steps reached, and with `--profile` what they did."
    from torch.profiler import ProfilerActivity, profile

    from finetune_nb.losses import inner_model, token_losses
    from finetune_nb.planning import flops_per_second, training_flops

    steps = [trainer.data_collator.batches(list(rows.select(range(i, i + STEP)))) for i in range(STEP, len(rows), STEP)]
    flops = sum(training_flops(trainer.model, batch.tokens, len(batch.at)) for step in steps for batch in step)
    peak = statistics.median(flops_per_second("cpu", inner_model(trainer.model).dtype) for _ in range(5))
    lengths = [len(ids) for ids in rows["input_ids"][STEP:]]
    filled = sum(4 * max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    all_of_it = training_flops(trainer.model, filled, filled)
    found = {"of matrix peak": flops / cpu / (peak / options.threads[0]), "less arithmetic": all_of_it / flops}
    if options.profile:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for batch in steps[0]:
                token_losses(trainer.model, batch).sum().backward()
        kinds = dict.fromkeys(("mm", "addmm", "addmm_"), "products") | dict.fromkeys(("copy_", "cat", "fill_"), "copies")
        kinds["bmm"] = "attention's products"
        times: dict[str, float] = {}
        for row in seen.key_averages():
            kind = kinds.get(row.key.removeprefix("aten::"), "norms, gates, softmax and the rest")
            times[kind] = times.get(kind, 0.0) + row.self_cpu_time_total
        found["profile"] = {kind: time / sum(times.values()) for kind, time in times.items()}
    return found


def _ours(config, model, tokenizer, rows):
    from finetune_nb.attention import PACKED
    from finetune_nb.lora import add_lora
    from finetune_nb.packing import PackingCollator
    from finetune_nb.planning import token_budget
    from finetune_nb.trainer import make_trainer

    tuned = add_lora(model, config)
    collator = PackingCollator("shared", token_budget(config, rows), tokenizer.pad_token_id)
    trainer = make_trainer(config, tuned, collator, {"train": rows}, config.output_dir)
    trainer.args.train_sampling_strategy = "sequential"
    model.set_attn_implementation(PACKED["tree"])
    return trainer


def _peer(engine, config, model, tokenizer, rows):
    from peft import LoraConfig, get_peft_model

    batch = 4 if engine.endswith("4x4") else STEP
    lora = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules, task_type="CAUSAL_LM")
    common = dict(
        output_dir=config.output_dir, per_device_train_batch_size=batch, gradient_accumulation_steps=STEP // batch,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, bf16=config.bf16, use_cpu=True, train_sampling_strategy="sequential", dataloader_pin_memory=False, seed=42,
    )  # fmt: skip
    if engine.startswith("trl"):
        from trl import SFTConfig, SFTTrainer

        length = max(map(len, rows["input_ids"]))
        packing = engine == "trl-packing"
        common |= {"max_length": max(length, 1024) if packing else 4096, "packing": packing, "gradient_checkpointing": False}
        arguments = SFTConfig(**common)
        if packing:  # rows of max_length, as many as hold about the same number of tokens
            tokens = STEP * sum(map(len, rows["input_ids"])) / len(rows)
            arguments.per_device_train_batch_size = max(1, round(tokens / arguments.max_length))
        return SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tuned = get_peft_model(model, lora)
    return Trainer(tuned, TrainingArguments(**common), DataCollatorForSeq2Seq(tokenizer), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS, choices=SCENARIOS)
    parser.add_argument("--engines", nargs="+", default=("ours", *PEERS), choices=("ours", *PEERS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of 16 chats (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all engines in turn (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="say where the time of our step goes")
    parser.add_argument("--out", help="keep every figure in this JSON file")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        print("RESULT" + json.dumps(work(options)))
        return
    everything = []
    for scenario in options.scenarios:
        for threads in options.threads:
            for dtype in options.dtypes:
                everything.append(compare(scenario, threads, dtype, options))
                if options.out:
                    with open(options.out, "w", encoding="utf-8") as file:
                        json.dump(everything, file, indent=1)


def compare(scenario: str, threads: int, dtype: str, options: argparse.Namespace) -> dict:
    "All engines in turn on one scenario; prints the medians."
    found: dict[str, list[dict]] = {}
    for _ in range(options.rounds):
        for engine in options.engines:
            command = [sys.executable, __file__, "--engine", engine, "--scenarios", scenario, "--threads", str(threads)]
            command += ["--dtypes", dtype, "--steps", str(options.steps), *(["--profile"] if options.profile else [])]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            if lines:
                found.setdefault(engine, []).append(json.loads(lines[0].removeprefix("RESULT")))
            else:
                print(f"{engine} did not run: {done.stderr.strip().splitlines()[-1:]}", flush=True)
    named = ("losses", "profile")
    medians = {e: {k: statistics.median(r[k] for r in runs) for k in runs[0] if k not in named} for e, runs in found.items()}
    best = min((m["cpu seconds per chat"] for e, m in medians.items() if e != "ours"), default=float("nan"))
    print(f"\n{scenario}, {dtype}, {threads} thread(s), medians of {options.rounds}; ratios by CPU time")
    print(f"{'engine':16}{'chats/s':>9}{'tokens/s':>10}{'superv./s':>10}{'CPU s/chat':>11}{'peak GiB':>9}{'of best peer':>13}  losses")
    for engine, m in medians.items():
        losses = " ".join(f"{loss:.4f}" for loss in found[engine][0]["losses"])
        print(
            f"{engine:16}{m['chats/s']:9.2f}{m['tokens/s']:10.0f}{m['supervised/s']:10.0f}{m['cpu seconds per chat']:11.3f}"
            f"{m['peak GiB']:9.2f}{best / m['cpu seconds per chat']:12.2f}x  {losses}", flush=True,
        )  # fmt: skip
    for run in found.get("ours", [])[:1]:
        print(f"ours reached {run['of matrix peak']:.0%} of the speed of a matrix product, with {run['less arithmetic']:.2f} times less")
        print("arithmetic than four batches of 4, filled up, with all logits")
        print("\n".join(f"  {share:4.0%} {kind}" for kind, share in run.get("profile", {}).items()), flush=True)
    return {"scenario": scenario, "threads": threads, "dtype": dtype, "runs": found, "medians": medians}


if __name__ == "__main__":
    main()

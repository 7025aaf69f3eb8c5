"""Throws mutated files, run folders, templates and adapters at everything that reads what others wrote.

    python benchmarks/fuzz.py [--mutations 20000] [--only chats run ...] [--seed 0] [--seconds 0]

Each mutation is read in a child process with a bound on memory and on time. What counts as a find: an error that is not one of
ours, more than five seconds of the processor (or a minute) for one input, more than 256 MiB on top of what the process has after a warm-up, a dead process. Finds are
printed with the input's seed, and the input is kept in the folder that --keep names. Prints, for each target, how many were
read, how many refused, and the slowest.

Seen on two hardware threads (2026-11-26 and 27), each with seeds of its own: adapters 480,000 mutations, configurations 380,000, files of
chats 250,000, run folders about 18,000, templates 6,000; together 1,134,000. Found and mended on the way: a damaged adapter_config.json
or safetensors header, JSON nested too deep, a parquet file whose damaged statistics ended the process in pyarrow, tool calls that were
no calls in a message without content. Nothing uncaught since: 70,000 files of chats after the last find, 100,000 adapters.
"""

# ruff: noqa: E501
import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOM, PATIENCE = 256 << 20, 5
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße 🙂?"}, {"role": "assistant", "content": "Hello!"}]}
CALL = {"messages": [{"role": "user", "content": "Time?"}, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "t", "arguments": "{\"z\": 1}"}}]}, {"role": "tool", "tool_call_id": "a", "content": "1"}, {"role": "assistant", "content": "One."}]}  # fmt: skip
ODD = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u0000", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"\r\n", b"\n\n", b",", b":", b"!!python/object/apply:os.system", b"&a *a", b"{{", b"}}", b"{%", b"%}", b"../../", b"[" * 2000, b"9" * 5000, b"\xe2\x80\xae", b"<script>")  # fmt: skip


def mutate(data: bytes, rng: random.Random) -> bytes:
    "Some changes: bytes flipped, cut out, doubled, odd things put in."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + n]
        elif kind == 2:
            data[at:at] = data[at : at + n] * rng.choice((1, 2, 50))
        elif kind == 3:
            data[at:at] = rng.choice(ODD)
        elif kind == 4:
            data[at : at + n] = rng.randbytes(min(n, 16))
        elif kind == 5:
            del data[at:]
        else:
            other = rng.randrange(len(data) + 1)
            data[at : at + n] = data[other : other + n]
    return bytes(data)


def chat_files(folder: Path) -> list[Path]:
    "Good files of every format."
    rows = "".join(json.dumps(row) + "\n" for row in (CHAT, CALL, CHAT)).encode()
    csv = b"user,assistant\nHi,Hello\n\"a, b\",\"c \"\"d\"\"\"\n"
    made = {"a.jsonl": rows, "a.json": json.dumps([CHAT, CALL]).encode(), "a.csv": csv, "a.tsv": csv.replace(b",", b"\t"), "a.jsonl.gz": gzip.compress(rows)}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.jsonl", rows)
    made["a.jsonl.zip"] = packed.getvalue()
    for name, data in made.items():
        (folder / name).write_bytes(data)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"user": ["Hi", "a"], "assistant": ["Hello", "b"]}), folder / "a.parquet")
    return [*map(folder.__truediv__, made), folder / "a.parquet"]


def chats_target(folder: Path) -> Callable[[random.Random], bytes]:
    from finetune_nb.data import check_chats, load_chats

    good = [(path.name, path.read_bytes()) for path in chat_files(folder)]

    def one(rng: random.Random) -> bytes:
        name, data = rng.choice(good)
        data = mutate(data, rng)
        if name.endswith(".gz") and rng.random() < 0.5:  # through to what is packed
            data = gzip.compress(mutate(gzip.decompress(dict(good)[name]), rng), 1)
        (folder / f"x{name[1:]}").write_bytes(data)
        chats = load_chats(folder / f"x{name[1:]}", on_error=rng.choice(("raise", "skip")))
        if len(chats) and rng.random() < 0.05:
            repr(check_chats(chats)), check_chats(chats)._repr_html_()
        return data

    return one


def config_target(folder: Path) -> Callable[[random.Random], bytes]:
    from finetune_nb.config import FinetuneConfig, load_config, save_config

    good = save_config(FinetuneConfig(), folder / "c.yaml").read_bytes()

    def one(rng: random.Random) -> bytes:
        data = mutate(good, rng)
        (folder / "x.yaml").write_bytes(data)
        load_config(folder / "x.yaml")
        return data

    return one


def run_target(folder: Path) -> Callable[[random.Random], bytes]:
    from finetune_nb.config import FinetuneConfig, save_config
    from finetune_nb.locks import held_elsewhere
    from finetune_nb.record import read_record
    from finetune_nb.runs import list_runs

    run = folder / "runs" / "run-001"
    (run / "adapter").mkdir(parents=True)
    save_config(FinetuneConfig(), run / "config.yaml")
    history = [{"step": i, "loss": 2.0 - i / 10, "learning_rate": 1e-4, "eval_loss": 2.0} for i in range(5)]
    facts = {"ended_by": "the plan", "steps": 4, "seconds": 1.0, "peak_memory_gib": 1.0, "best_step": 4, "best_eval_loss": 1.5, "parameters": "x", "hardware": "cpu", "versions": {}, "data": {"train": {"chats": 3, "sha256": "a"}}}  # fmt: skip
    files = {"history.jsonl": "".join(json.dumps(row) + "\n" for row in history), "run.json": json.dumps(facts), "started.json": json.dumps(facts), "samples.jsonl": json.dumps({"step": 1, "question": "a", "expected": "b", "answer": "c"}) + "\n", ".lock": json.dumps({"pid": 1, "host": "a"}), "failed.json": json.dumps({"kind": "E", "words": "w", "cause": "c", "step": 1}), "report.json": json.dumps({"headline": {}, "verdict": "better"}), "adapter/adapter_config.json": json.dumps({"r": 8, "peft_type": "LORA"})}  # fmt: skip
    for name, text in files.items():
        (run / name).write_text(text)
    good = {name: (run / name).read_bytes() for name in [*files, "config.yaml"]}

    def one(rng: random.Random) -> bytes:
        name = rng.choice(list(good))
        data = mutate(good[name], rng)
        (run / name).write_bytes(data)
        try:
            table = list_runs(folder / "runs")
            str(table), table._repr_html_(), held_elsewhere(run)
            if rng.random() < 0.03:
                read_record(run)
        finally:
            (run / name).write_bytes(good[name])
        return data

    return one


def template_target(folder: Path) -> Callable[[random.Random], bytes]:
    from finetune_nb.models import load_tokenizer
    from finetune_nb.sandbox import RenderLimits, render_chats

    tokenizer = load_tokenizer()
    good = [tokenizer.chat_template, "{% for m in messages %}{{ m.role | upper }}{{ m['content'].strip().replace('a', 'b') }}{% if loop.last and add_generation_prompt %}{{ namespace(x=1).x * 3 }}{% endif %}{% endfor %}"]

    def one(rng: random.Random) -> bytes:
        data = mutate(rng.choice(good).encode(), rng)
        tokenizer.chat_template = data.decode("utf-8", "replace")
        render_chats(tokenizer, [CHAT["messages"]], RenderLimits(seconds=2))
        return data

    return one


def adapter_target(folder: Path) -> Callable[[random.Random], bytes]:
    import torch
    from safetensors.torch import save

    from finetune_nb.lora import read_adapter
    from finetune_nb.origin import check_index, check_model_files, read_settings

    good = {
        "adapter_model.safetensors": save({f"base.layers.{i}.lora_{ab}.weight": torch.ones(4, 4) for i in range(3) for ab in "AB"}),
        "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", "task_type": "CAUSAL_LM"}).encode(),
        "config.json": json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "a--b.C"}}).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors"}}).encode(),
    }
    for name, data in good.items():
        (folder / name).write_bytes(data)

    def one(rng: random.Random) -> bytes:
        name = rng.choice(list(good))
        data = mutate(good[name], rng)
        (folder / name).write_bytes(data)
        try:
            if name.startswith("adapter"):
                read_adapter(folder)
            elif name == "config.json":
                check_model_files(folder, "m", weights=False)
            else:
                check_index(read_settings(folder / name, "m"), "m")
        finally:
            (folder / name).write_bytes(good[name])
        return data

    return one


TARGETS = {"chats": chats_target, "config": config_target, "run": run_target, "template": template_target, "adapter": adapter_target}


class TooSlow(BaseException):
    "One input took too long."


def work(name: str, seeds: range, keep: str | None, sender) -> None:
    "One child: some inputs for one target."
    from jinja2 import TemplateError

    from finetune_nb.config import FinetuneError

    def slow(*_) -> None:
        raise TooSlow

    allowed = (FinetuneError, *((TemplateError, TypeError, ArithmeticError) if name == "template" else ()))  # a template may raise what it likes; `turns` puts it in words
    signal.signal(signal.SIGALRM, slow)
    signal.signal(signal.SIGPROF, slow)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        one, room = TARGETS[name](Path(folder)), None
        for seed in seeds:
            rng, begun, found = random.Random(f"{name} {seed}"), time.monotonic(), ""
            signal.setitimer(signal.ITIMER_PROF, PATIENCE)  # other work on the machine is no fault of an input
            signal.alarm(12 * PATIENCE)
            try:
                one(rng)
                outcome = "read"
            except allowed as error:
                outcome = "refused"
                if not str(error).strip():
                    found = "an error without words"
            except TooSlow:
                outcome, found = "slow", f"took more than {PATIENCE} s: {traceback.format_exc(limit=-3)[:1500]}"
            except BaseException:
                outcome, found = "broken", traceback.format_exc()[-1500:]
            finally:
                signal.alarm(0)
                signal.setitimer(signal.ITIMER_PROF, 0)
            sender.send((seed, outcome, time.monotonic() - begun, found))
            if room is None and seed - seeds.start == 50:  # what is imported late is there by now
                room = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + ROOM
            elif room is not None and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > room:
                sender.send((seed, "memory", 0.0, f"more than {ROOM >> 20} MiB"))
                room *= 2
            if found and keep:
                shutil.copytree(folder, Path(keep) / f"{name}-{seed}", dirs_exist_ok=True)
    sender.send(None)


def run(name: str, mutations: int, seed: int, keep: str | None) -> int:
    "One target, in children that are replaced when they die; returns the number of finds."
    context, finds, counts, slowest, at = multiprocessing.get_context("spawn"), 0, {}, 0.0, seed
    seen: dict[str, int] = {}
    while at < seed + mutations:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=work, args=(name, range(at, min(at + 5000, seed + mutations)), keep, sender))
        child.start()
        sender.close()
        try:
            while receiver.poll(20 * PATIENCE) and (told := receiver.recv()) is not None:
                at, outcome, seconds, found = told[0] + 1, *told[1:]
                counts[outcome] = counts.get(outcome, 0) + 1
                slowest = max(slowest, seconds)
                if found:
                    finds += 1
                    mark = found.strip().splitlines()[-1].partition(":")[0][:80]
                    seen[mark] = seen.get(mark, 0) + 1
                    if seen[mark] <= 3:
                        print(f"{name}, seed {told[0]}: {outcome}\n{found}", flush=True)
            else:
                if child.is_alive() and child.join(10) is None and child.is_alive():
                    raise EOFError
        except EOFError:
            child.kill()
            child.join()
            finds += 1
            print(f"{name}, seed {at}: the process died or hung", flush=True)
            at += 1
    print(f"{name}: {sum(counts.values()):,} inputs, {counts}, slowest {slowest:.2f} s, {finds} finds {seen or ''}", flush=True)
    return finds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000, help="in all, over the targets (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="the first (default: %(default)s)")
    parser.add_argument("--keep", help="folder for the inputs of finds")
    options = parser.parse_args()
    raise SystemExit(bool(sum(run(name, options.mutations // len(options.only), options.seed, options.keep) for name in options.only)))


if __name__ == "__main__":
    main()

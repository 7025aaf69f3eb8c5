"""Runs in processes of their own that die, or whose disk fails, wherever they are told to; what comes of going on with them."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import fork, wait
from transformers import TrainerCallback

from finetune_nb.checkpoints import check_checkpoint
from finetune_nb.config import FinetuneConfig
from finetune_nb.data import Splits
from finetune_nb.run_folder import checkpoints, read_facts, read_lines, step_of
from finetune_nb.training import resume, train

DIED = 9
OF_TIME = ("runtime", "per_second", "memory_gib")  # figures that no two runs share
WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")  # audit events; os.write and os.fsync have none


def config_of(model: str, folder: Path, **more: Any) -> FinetuneConfig:
    "Twelve steps with dropout, looks and checkpoints in the middle of an epoch."
    return FinetuneConfig(
        model_name_or_path=model, bf16=False, use_cpu=True, num_train_epochs=2, learning_rate=5e-3, gradient_accumulation_steps=1, logging_steps=3,
        eval_strategy="steps", eval_steps=4, early_stopping_patience=0, lora_dropout=0.1, output_dir=str(folder), run_name="run", max_new_tokens=8, **{"preflight": False} | more,
    )  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    "What a run came to, without what depends on the clock."

    adapter: str
    last: str
    history: str
    rows: str

    @classmethod
    def of(cls, folder: Path) -> "Outcome":
        history = [{k: v for k, v in row.items() if not k.endswith(OF_TIME)} for row in read_lines(folder / "history.jsonl")]
        weights = [folder / "adapter", *checkpoints(folder)[-1:]]
        hashes = [hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest() for path in weights]
        hashes += [""] * (2 - len(hashes))  # on a full disk, there may be no checkpoint
        return cls(*hashes, hashlib.sha256(json.dumps(history).encode()).hexdigest(), read_facts(folder)["rows_sha256"])


class Saves(TrainerCallback):
    "Writes down each checkpoint that was finished, beside the run."

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not check_checkpoint(Path(args.output_dir, f"checkpoint-{state.global_step}")):
            with self.path.open("a") as file:
                file.write(f"{state.global_step}\n")


def start(work: Callable[[], Any], log: Path) -> int:
    "A child process that does the work and ends; its number."
    if child := fork():
        return child
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def kill_after(child: int, seconds: float) -> int:
    "Kills a process at that time, unless it ended before."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return 0
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return wait(child)


def begin(config: FinetuneConfig, splits: Splits, log: Path, callbacks: Sequence[TrainerCallback] = ()) -> Callable[[], Any]:
    "Trains, or goes on with what is there, as a user would."

    def work() -> None:
        folder, watch = Path(config.output_dir) / config.run_name, [Saves(log.with_suffix(".saves")), *callbacks]
        if read_facts(folder).get("ended_by") == "the plan":
            return
        if (folder / "config.yaml").is_file():
            resume(folder, callbacks=watch)
            return
        if folder.is_dir():  # it died before anything was written
            shutil.rmtree(folder)
        train(config, splits, watch)

    return work


def counted(work: Callable[[], Any], folder: Path, act: Callable[[int, str], None]) -> Callable[[], Any]:
    "The work, with `act` called before each write, flush or change of a name in the folder: its number and what it is."

    def done() -> None:
        count, inside = 0, False

        def seen(what: str, path: Any = None) -> None:
            nonlocal count, inside
            if inside or (path is not None and not str(path).startswith(str(folder))):
                return
            inside = True
            try:
                act(count, what)
            finally:
                count, inside = count + 1, False

        def audit(event: str, args: tuple[Any, ...]) -> None:
            if event in WRITES and not (event == "open" and args[1] is not None and "r" in str(args[1]) and "+" not in str(args[1])):
                path = args[0] if isinstance(args[0], (str, bytes, os.PathLike)) else None
                if path is not None and not (event == "open" and args[1] is None and not args[2] & (os.O_WRONLY | os.O_RDWR)):
                    seen(event, os.fspath(path))

        written, flushed = os.write, os.fsync

        def write(handle: int, data: Any) -> int:
            seen("write", _path_of(handle))
            return written(handle, data)

        def fsync(handle: int) -> None:
            seen("fsync", _path_of(handle))
            flushed(handle)

        sys.addaudithook(audit)
        os.write, os.fsync = write, fsync
        work()
        print(f"EVENTS {count}", flush=True)

    return done


def _path_of(handle: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{handle}")
    return ""


def die_at(number: int) -> Callable[[int, str], None]:
    def act(count: int, what: str) -> None:
        if count == number:
            os._exit(DIED)

    return act


def fail_at(number: int, code: int, times: int = 1) -> Callable[[int, str], None]:
    "The disk says no from there on, so many times."

    def act(count: int, what: str) -> None:
        if number <= count < number + times:
            raise OSError(code, os.strerror(code))

    return act


def lost(folder: Path, saves: Path) -> str:
    "What is wrong with the checkpoints after a death: one that was finished is there no more. Empty when nothing is."
    done = [int(line) for line in saves.read_text().split()] if saves.is_file() else []
    whole = [step_of(path) for path in checkpoints(folder) if not check_checkpoint(path)]
    return f"step {max(done)} was saved, and {whole} are there" if done and max(done) > max(whole, default=0) else ""


def to_the_end(config: FinetuneConfig, splits: Splits, log: Path) -> Outcome:
    "Goes on until the run has ended, and says what it came to."
    folder = Path(config.output_dir) / config.run_name
    if problem := lost(folder, log.with_suffix(".saves")):
        raise AssertionError(problem)
    if code := wait(start(begin(config, splits, log), log)):
        raise AssertionError(f"it can't be gone on with ({code}): {log.read_text()[-2000:]}")
    return Outcome.of(folder)


DISK_FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ESTALE)

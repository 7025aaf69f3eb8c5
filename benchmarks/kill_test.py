"""A run that is killed, again and again, and gone on with: does it end with the very same weights, history and order of chats?

    python benchmarks/kill_test.py [random kills, 200] [every write: 1, every other one: 2, none: 0]

Three ways to die: at a random instant (SIGKILL), at each single write, flush or change of a name of a whole run, and, of
the deaths of the second kind, once more while it is gone on with. Needs Linux. One thread, so that a process can be forked.

Seen on 2026-11-26 (Python 3.11, torch 2.13, two busy hardware threads): a run does 142 writes, flushes and changes of names; it died at
each of them, 142 of 142 came to the same, and 48 of 48 of those that died once more while they were gone on with. On 2026-11-27, with
more that is looked at and so 179 writes: 200 of 200 that were killed at random, up to three times each, came to the same, and so did
90 of 90 that died at every other write and 30 of 30 that died once more.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import conftest  # noqa: E402
import crashing  # noqa: E402

from finetune_nb import training  # noqa: E402

training.fastest_ways = lambda *args: ["tree"]  # ways of computing attention differ in the last bit


class Trial:
    "One model and one set of chats, and what an undisturbed run comes to."

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.splits = folder, conftest.save_tiny(folder / "tiny"), conftest.some_splits()
        self.seen: Counter[str] = Counter()
        config, log = self.make("undisturbed")
        began = time.monotonic()
        work = crashing.counted(crashing.begin(config, self.splits, log), self.place(config), lambda *seen: None)
        assert crashing.wait(crashing.start(work, log)) == 0, log.read_text()
        self.seconds, self.writes = time.monotonic() - began, int(log.read_text().rpartition("EVENTS ")[2])
        self.outcome = crashing.Outcome.of(self.place(config))

    def make(self, name: str):
        folder = self.folder / name
        folder.mkdir()
        return crashing.config_of(self.model, folder), folder / "log"

    def place(self, config) -> Path:
        return Path(config.output_dir) / config.run_name

    def judge(self, kind: str, name: str, config, log: Path) -> None:
        try:
            same = crashing.to_the_end(config, self.splits, log) == self.outcome
            self.seen[f"{kind}: {'the same' if same else 'DIFFERENT'}"] += 1
        except AssertionError as error:
            same = False
            self.seen[f"{kind}: LOST"] += 1
            print(name, str(error)[-1500:], flush=True)
        if same:
            shutil.rmtree(config.output_dir)

    def at_random(self, number: int, rng: random.Random) -> None:
        "Killed up to three times at random instants, then left in peace."
        config, log = self.make(f"random-{number}")
        for _ in range(rng.randint(1, 3)):
            crashing.kill_after(crashing.start(crashing.begin(config, self.splits, log), log), rng.uniform(0, self.seconds))
        self.judge("killed at random", f"random-{number}", config, log)

    def at_write(self, number: int, twice: bool) -> None:
        config, log = self.make(f"write-{number}{'-twice' if twice else ''}")
        for at in (number, number // 2) if twice else (number,):
            work = crashing.begin(config, self.splits, log)
            crashing.wait(crashing.start(crashing.counted(work, self.place(config), crashing.die_at(at)), log))
        self.judge("died at a write, and at one after" if twice else "died at a write", f"write-{number}", config, log)


def main(kills: int = 200, step: int = 1) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trial, rng = Trial(Path(folder)), random.Random(0)
        print(f"An undisturbed run takes {trial.seconds:.1f} s and does {trial.writes} writes, flushes and changes of names.", flush=True)
        for number in range(kills):
            trial.at_random(number, rng)
        print(dict(trial.seen), flush=True)
        for number in range(0, trial.writes, step) if step else ():
            trial.at_write(number, twice=False)
            if number % 3 == 0:
                trial.at_write(number, twice=True)
        for what, n in sorted(trial.seen.items()):
            print(f"{n:5}  {what}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

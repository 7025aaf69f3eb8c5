"""Damage to checkpoints and failing disks: is each fault found, named, and got over?

    python benchmarks/corruption_test.py [faults in files, 600] [faults of the disk, 60]

A run dies with checkpoints at steps 4 and 8. Then a fault is put into the newer one: a flipped bit anywhere in any file, a
file cut short, gone, zeroed, or that of another checkpoint; the older one must be taken, and the file named. Some are gone
on with to the end, to the same weights. A disk fails by saying no (full, quota, read-only, input/output, stale mount) to
one or several writes in a row, anywhere in a run; what is left is gone on with. Needs Linux.
"""

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import crashing  # noqa: E402
from kill_test import Trial  # noqa: E402

from finetune_nb.checkpoints import newest_checkpoint  # noqa: E402


def damage(path: Path, others: list[Path], rng: random.Random) -> str:
    "One fault; what it is, in words."
    data, kind = bytearray(path.read_bytes()), rng.choice(["bit"] * 6 + ["cut", "gone", "zeros", "swapped", "longer"])
    if kind == "bit":
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
    elif kind == "cut":
        os.truncate(path, rng.randrange(len(data)))
    elif kind == "gone":
        path.unlink()
    elif kind == "zeros":
        begin = rng.randrange(len(data))
        path.write_bytes(data[:begin] + bytes(len(data) - begin))
    elif kind == "longer":
        path.write_bytes(data + b"\n")
    else:
        shutil.copy(rng.choice(others), path)
    return kind


def in_files(trial: Trial, faults: int, seen: Counter) -> None:
    config, log = trial.make("stopped")
    work = crashing.counted(crashing.begin(config, trial.splits, log), trial.place(config), crashing.die_at(trial.writes * 3 // 4))
    assert crashing.wait(crashing.start(work, log)) == crashing.DIED
    folder, rng = trial.place(config), random.Random(0)
    newest, older = folder / "checkpoint-8", folder / "checkpoint-4"
    names = sorted(path.name for path in newest.iterdir())
    for number in range(faults):
        name = names[number % len(names)]
        path, before = newest / name, (newest / name).read_bytes()
        kind = damage(path, [older / name] if (older / name).is_file() else [newest / names[number % len(names) - 1]], rng)
        if path.is_file() and path.read_bytes() == before:
            seen["no damage: the same file in both checkpoints, or zeros where zeros were"] += 1
            continue
        said: list[str] = []
        found = newest_checkpoint(folder, said.append)
        named = said and (name in said[0] or kind == "swapped")  # another manifest finds fault with all files
        seen[f"{kind}: {'found, named, fallen back' if found == older and named else 'SILENT'}"] += 1
        if number % 40 == 0:
            again, log_2 = trial.make(f"again-{number}")
            shutil.copytree(folder, trial.place(again))
            trial.judge("gone on with after damage", f"damage-{number}", again, log_2)
        path.write_bytes(before)


def of_the_disk(trial: Trial, faults: int, seen: Counter) -> None:
    rng = random.Random(1)
    for number in range(faults):
        config, log = trial.make(f"disk-{number}")
        at, times = rng.randrange(trial.writes), rng.choice([1, 1, 3, 10, 30])
        fault = crashing.fail_at(at, rng.choice(crashing.DISK_FAULTS), times)
        crashing.wait(crashing.start(crashing.counted(crashing.begin(config, trial.splits, log), trial.place(config), fault), log))
        try:
            after = crashing.to_the_end(config, trial.splits, log)
            same = (after.adapter, after.history, after.rows) == (trial.outcome.adapter, trial.outcome.history, trial.outcome.rows)
            seen[f"the disk says no {times} times: {'the same in the end' if same else 'DIFFERENT'}"] += 1
        except AssertionError as error:
            seen[f"the disk says no {times} times: LOST"] += 1
            print(number, at, times, str(error)[-1500:], flush=True)


def main(in_file: int = 600, of_disk: int = 60) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder))
        in_files(trial, in_file, trial.seen)
        of_the_disk(trial, of_disk, trial.seen)
        for what, n in sorted(trial.seen.items()):
            print(f"{n:5}  {what}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

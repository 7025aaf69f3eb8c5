"""Is the suite flaky? The whole of it again and again, and the tests that failed in some of the times only.

    python benchmarks/suite_in_a_row.py [times, 20] [words for pytest, such as -k checkpoints]

Each time is a process of its own with a random order of Python's sets (another PYTHONHASHSEED, printed with it). After each, how
many passed, failed and were left out, and the time it took; in the end, each test that failed, in how many of the times. What was
seen is kept in `suite_in_a_row.jsonl`, a line for each time with the commit, and times of the same commit are gone on with: so
twenty can be had in several sittings. Ends with 1 where anything failed.
"""

# ruff: noqa: E501
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEN = Path("suite_in_a_row.jsonl")


def once(words: list[str]) -> dict:
    "One time: what pytest counted, the tests that failed, the seconds it took."
    seed, began = str(random.randrange(2**32)), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.xml"
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", f"--junitxml={told}", *words]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=False)
        if not told.is_file():
            raise SystemExit(f"pytest ended with {done.returncode} and without a report:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        suite = ElementTree.parse(told).getroot().find("testsuite")
    failed = sorted(f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None)  # fmt: skip
    skipped = int(suite.get("skipped"))
    return {"passed": int(suite.get("tests")) - len(failed) - skipped, "failed": failed, "skipped": skipped, "seconds": round(time.monotonic() - began), "seed": seed}  # fmt: skip


def commit() -> str:
    "The commit that is tried; the working tree has to be clean, or what was seen would be of nothing that has a name."
    if subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout:
        raise SystemExit(
            "The working tree has changes that are not committed. Commit or stash them: times of different code are no times in a row."
        )
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main(times: int = 20, *words: str) -> None:
    now = {"commit": commit(), "words": list(words)}
    seen = [row for row in map(json.loads, SEEN.read_text().splitlines() if SEEN.exists() else ()) if now.items() <= row.items()]
    while len(seen) < times:
        seen.append(now | once(list(words)))
        with SEEN.open("a") as file:
            file.write(json.dumps(seen[-1]) + "\n")
        print(f"{len(seen):3} {seen[-1]['passed']} passed, {len(seen[-1]['failed'])} failed, {seen[-1]['skipped']} left out, {seen[-1]['seconds']} s, PYTHONHASHSEED={seen[-1]['seed']}", flush=True)  # fmt: skip
    failed = Counter(name for row in seen for name in row["failed"])
    print("\n".join([f"{sum(not row['failed'] for row in seen)} of {len(seen)} times nothing failed, commit {now['commit']}", *(f"{n} of {len(seen)}: {name}" for name, n in failed.most_common())]))  # fmt: skip
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, *sys.argv[2:])

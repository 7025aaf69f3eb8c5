"""How fast load_chats reads and checks JSONL, and how much memory it needs, beside datasets.load_dataset on the same file.

    python benchmarks/read_speed.py --size 1000 --repeat 3

Every reading happens in a fresh process. `row` is the length of a line in bytes.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

READ = {
    "load_chats, lazy": "from finetune_nb.chats import load_chats; chats = load_chats(path, lazy=True, progress=False)",
    "load_chats, list": "from finetune_nb.chats import load_chats; chats = load_chats(path, lazy=False, progress=False)",
    "datasets": "import datasets; chats = datasets.load_dataset('json', data_files=path, cache_dir=cache, split='train')",
}
TIMED = """
import resource, sys, time, tempfile
path, cache = sys.argv[1:]
{imports}
start = time.perf_counter()
{read}
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(chats))
"""


def write_chats(path: Path, size: int, row: int) -> None:
    "A file of about `size` bytes, in lines of about `row` bytes; a tenth of the texts is not ASCII, another tenth holds code."
    rng = random.Random(0)
    words = ["model", "learns", "whatever", "the", "file", "says,", "and", "then\n", "it", "is"]
    kinds = [[*words, "naïve", "“so”"], [*words, "a < b", "list[0]"], *[words] * 8]
    with path.open("w", encoding="utf-8") as file:
        lines = []
        for i in range(2000):
            text = " ".join(rng.choices(kinds[i % 10], k=max(1, (row - 150) // 6)))
            cut = len(text) // 4
            turns = (("user", f"{i}? {text[:cut]}"), ("assistant", f"{text[cut:]}."))
            lines.append(json.dumps({"messages": [{"role": r, "content": t} for r, t in turns], "id": i}, ensure_ascii=False) + "\n")
        block, written = "".join(lines), 0
        while written < size:
            written += file.write(block)


def measure(name: str, path: Path) -> tuple[float, float]:
    "Seconds and MiB of one reading in a fresh process."
    imports, _, read = READ[name].partition("; ")
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", TIMED.format(imports=imports, read=read), str(path), cache]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    seconds, mib, _ = map(float, done.stdout.split()[-3:])
    return seconds, mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1000, help="MB of the large file")
    parser.add_argument("--small", type=int, default=200, help="MB of the file that is read into a list")
    parser.add_argument("--repeat", type=int, default=3, help="readings of each kind; the median counts")
    options = parser.parse_args()
    print(f"load of the machine: {os.getloadavg()[0]:.1f}; {options.repeat} readings each, the median")
    with tempfile.TemporaryDirectory() as folder:
        for size, row, names in (
            (options.size, 1500, ["load_chats, lazy", "datasets"]),
            (options.small, 1500, ["load_chats, list", "datasets"]),
            (options.small, 300, ["load_chats, lazy", "load_chats, list", "datasets"]),
        ):
            path = Path(folder, "chats.jsonl")
            write_chats(path, size * 10**6, row)
            megabytes = path.stat().st_size / 1e6
            for name in names:
                runs = [measure(name, path) for _ in range(options.repeat)]
                seconds, mib = (statistics.median(column) for column in zip(*runs, strict=True))
                speed = f"{megabytes / seconds:6.0f} MB/s  {seconds:6.1f} s  peak {mib:6,.0f} MiB"
                print(f"{megabytes:6,.0f} MB, row {row:5}: {name:17} {speed}", flush=True)


if __name__ == "__main__":
    main()

"Recall and precision of every check on ten seeded data sets with planted faults: python benchmarks/planted_faults.py"

import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from planted import clean_chats, leaks, plant

from finetune_nb.duplicates import matches_between
from finetune_nb.quality import check_chats

# rows that a check may name too, since the other fault brings this one with it
ALSO = {
    "cut_off": {"echoes", "refusals", "boilerplate", "shape"},
    "shape": {"refusals", "echoes", "cut_off", "boilerplate", "contradictions: exact", "contradictions: near"},
}


def measure(seeds: range, n: int = 1000) -> dict[str, list[int]]:
    "Check to [planted, found of them, named, named rightly]."
    table = defaultdict(lambda: [0, 0, 0, 0])

    def add(name: str, want: set, got: set, also: set = frozenset()) -> None:
        for k, value in enumerate((len(want), len(want & got), len(got), len(got & (want | also)))):
            table[name][k] += value

    for seed in seeds:
        rng, kind = random.Random(seed), seed % 5
        clean = clean_chats(kind, rng, n)
        chats, planted = plant(clean, kind, rng)
        report = check_chats(chats, seed=seed)
        everything = set().union(*planted.values())
        for name, want in planted.items():
            check = {"near": "near_duplicates"}.get(name.split(":")[0], name.split(":")[0])
            kin = {r for other, rows in planted.items() if other.split(":")[0] == name.split(":")[0] for r in rows}
            also = kin | {r for other in ALSO.get(check, ()) for r in planted.get(other, ())}
            add(name, want, set(report.rows(check)), also)
        add("clean rows named by copies", set(), {r for c in ("near_duplicates", "contradictions") for r in report.rows(c)}, everything)
        train, test, wanted = leaks(clean, rng)
        found = matches_between(train, test, seed=seed)
        for kind_of in ("exact", "normalised", "near"):
            add(f"leaks: {kind_of}", wanted[kind_of], {(i, j) for i, j, k in found if k == kind_of})
    return table


def show(table: dict[str, list[int]]) -> str:
    "The table as text."
    lines = [f"{'fault':30}{'planted':>8}{'recall':>9}{'named':>8}{'precision':>11}"]
    for name, (planted, hit, named, right) in table.items():
        lines.append(f"{name:30}{planted:8,}{hit / max(1, planted):9.1%}{named:8,}{right / max(1, named):11.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(show(measure(range(int(sys.argv[1]) if len(sys.argv) > 1 else 10))))

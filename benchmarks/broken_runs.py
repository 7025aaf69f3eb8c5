"""Runs that are really broken, each in a known way, and runs that are well: which rule of the diagnosis speaks.

    python benchmarks/broken_runs.py
"""

import gc
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import broken  # noqa: E402

from finetune_nb.diagnosis import diagnose  # noqa: E402


def told(line: str) -> None:
    print(line, flush=True)


def found(make: Callable[[], Path]) -> list[str]:
    "What the diagnosis says of a run that is made now; what the run itself says is left out."
    with redirect_stdout(io.StringIO()):
        return diagnose(make()).names


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shop = broken.Workshop(folder, broken.teach_tiny_model(Path(folder) / "model"))
        gc.collect()
        gc.freeze()  # a run collects garbage a few times
        told("| planted fault | rule | found | also found |\n| --- | --- | --- | --- |")
        for what, (rule, make) in broken.FAULTS.items():
            rows.append(broken.Row(what, rule, found(lambda make=make: make(shop))))
            told(f"| {what} | {rule} | {rows[-1].verdict} | {', '.join(name for name in rows[-1].names if name != rule)} |")
        told("\n| run that is well | findings |\n| --- | --- |")
        for what, changes in broken.HEALTHY.items():
            rows.append(broken.Row(what, "", found(lambda changes=changes: broken.evaluated(shop.train(**changes)))))
            told(f"| {what} | {', '.join(rows[-1].names) or 'none'} |")
    planted, well = [row for row in rows if row.rule], [row for row in rows if not row.rule]
    first, missed = (sum(row.verdict == verdict for row in planted) for verdict in ("first", "missed"))
    alarms = sum(bool(row.names) for row in well)
    told(f"\n{len(planted) - missed} of {len(planted)} planted faults found, {first} of them first.")
    told(f"False alarms on {alarms} of {len(well)} runs that are well.")

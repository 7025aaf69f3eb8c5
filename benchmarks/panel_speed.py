"""What the panel costs: until it is there, what a cell waits beside a run, and what the run pays for being watched.

    python benchmarks/panel_speed.py [--steps 25] [--rounds 3] [--chats 400]
    python benchmarks/panel_speed.py --runs 40      # in place of it: what it costs that many runs are in the folder

All of it happens in a real kernel, whose messages to the page are made and sent; no browser takes them. The panel counts as displayed
when the kernel has sent it all (the browser tests see it drawn). A cell is `6 * 7`, from its request to its reply. Each round trains
the same steps bare (`train`), watched (a job with the panel), and watched with answers to the fixed questions, which are a feature of
the job and no cost of looking. The seconds are those after the fifth step, looks at the validation set included, which all have.

With `--runs`, a run of two steps is trained and copied under as many names, each with an r and a learning_rate of its own. `new` means that
this kernel has read none of them before, as after its start; a slider has moved when the plan beside it is new; the table is opened by the
button Refresh. Each figure is the median of five.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from typing import Any

from jupyter_client.manager import KernelManager

SETUP = """
import json, shutil, time
import torch
from IPython.display import display
from transformers import TrainerCallback
from finetune_nb.config import FinetuneConfig
from finetune_nb.data import Splits, icd10_chats
from finetune_nb.jobs import start_job
from finetune_nb.models import hardware
from finetune_nb.panel import panel
from finetune_nb.training import train

class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        now = time.process_time(), time.perf_counter()
        if state.global_step == 5:
            self.began = now
        elif state.global_step > 5:
            self.took = now[0] - self.began[0], now[1] - self.began[1]

torch.set_num_threads(1)  # threads that wait for each other turn on the spot, which would count as work
data = icd10_chats(n_train={chats})
data = Splits(data.train, data.validation[:8], data.test[:8])
few = {{"target_modules": "all-linear", "lora_dropout": 0.0, "gradient_accumulation_steps": 1, "early_stopping_patience": 0}}
config = FinetuneConfig(**few, max_steps={steps}, logging_steps=1, eval_strategy="steps", eval_steps={steps} // 2, output_dir={folder!r})
print(hardware())
"""
BARE = "clock = Clock()\nrun = train(config, data, [clock], say=lambda line: None)\nrun.release()"
WATCHED = """clock = Clock()
job = start_job(config, data, background=True, questions={questions}, callbacks=[clock])
room.train.attach(job)"""
PANEL = "began = time.perf_counter()\nroom = panel(config, data)\ndisplay(room)\nmade = time.perf_counter() - began"
READ = "while room.data.ready is None: time.sleep(0.01)"

MANY = """
import re
import statistics
import threading
from pathlib import Path
from finetune_nb import runs as runs_chapter
few = FinetuneConfig(gradient_accumulation_steps=1, eval_strategy="no", max_steps=2, output_dir={folder!r})
first = train(few, data, say=lambda line: None)
first.release()
for number in range({runs}):
    folder = Path({folder!r}) / f"run-{{number + 1:03}}"
    if number:
        shutil.copytree(first.folder, folder)
    text = re.sub(r"(?m)^r: [^ ]+", f"r: {{2 ** (2 + number % 5)}}", (folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(re.sub(r"(?m)^learning_rate: [^ ]+", f"learning_rate: {{(number // 5 + 1) * 1e-5}}", text))
config = FinetuneConfig(output_dir={folder!r})

def median(act, before=lambda: None):
    "Of five; what goes before is not counted."
    took = []
    for _ in range(5):
        before()
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return round(statistics.median(took), 3)

def move():
    room.form.controls["r"].value = next(ranks)

def choose(names):
    room.runs.chosen.value = names

def settle():
    while room.data.ready is None or any(thread.name == "Reading" for thread in threading.enumerate()):
        time.sleep(0.01)

ranks = iter([8, 32, 64, 4, 128])
room = panel(config, data)
settle()
room.close()
"""
FIGURES = {
    "panel(), runs new": 'median(lambda: globals().update(room=panel(config, data)), lambda: (settle(), runs_chapter._READ.clear()))',
    "panel() again": 'median(lambda: globals().update(room=panel(config, data)), settle)',
    "a slider": "(settle(), median(move))[1]",
    "the table, runs new": "median(room.runs.renew.click, runs_chapter._READ.clear)",
    "the table again": "median(room.runs.renew.click)",
    "all curves": "median(lambda: choose(room.runs.chosen.options), lambda: choose(()))",
}


class Kernel:
    "A kernel, and what its cells print."

    def __init__(self) -> None:
        self.manager = KernelManager()
        self.manager.start_kernel()
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code: str) -> tuple[str, float]:
        "What the cell printed, and the seconds from its request to its reply; an error of the cell is one here."
        said: list[str] = []

        def take(message: dict) -> None:
            if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
                said.append(message["content"]["text"])

        began = time.perf_counter()
        reply = self.client.execute_interactive(code, timeout=1800, output_hook=take)["content"]
        took = time.perf_counter() - began
        assert reply["status"] == "ok", "\n".join(reply.get("traceback", []))
        return "".join(said), took

    def value(self, expression: str) -> Any:
        "What an expression is worth in the kernel."
        return json.loads(self.run(f"print(json.dumps({expression}))")[0].splitlines()[-1])

    def end(self) -> None:
        "Ends the kernel."
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def beside_many_runs(options: argparse.Namespace) -> None:
    "Prints what the panel costs where many runs are in the folder."
    with tempfile.TemporaryDirectory() as folder:
        kernel = Kernel()
        try:
            print(kernel.run(SETUP.format(chats=options.chats, steps=options.steps, folder=folder))[0])
            kernel.run(MANY.format(runs=options.runs, folder=folder))
            for what, code in FIGURES.items():
                print(f"{options.runs} runs, {what}: {kernel.value(code):.3f} s")
        finally:
            kernel.end()


def main() -> None:
    "Prints the figures."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--chats", type=int, default=400, help="training chats (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=0, help="measure the panel beside this many runs in the folder, and no run at work")
    options = parser.parse_args()
    if options.runs:
        return beside_many_runs(options)
    took: dict[str, list[tuple[float, float]]] = {"bare": [], "watched": [], "watched, with answers": []}
    with tempfile.TemporaryDirectory() as folder:
        kernel = Kernel()
        try:
            print(kernel.run(SETUP.format(chats=options.chats, steps=options.steps, folder=folder))[0])
            for attempt in range(3):
                shown, read = kernel.run(PANEL)[1], kernel.run(READ)[1]
                made = kernel.value("made")
                print(f"panel {attempt + 1}: made in {made:.2f} s, the cell answered after {shown:.2f} s, the data read {read:.2f} s later")
            for _ in range(options.rounds):
                for name, code in zip(took, (BARE, WATCHED.format(questions=0), WATCHED.format(questions=2)), strict=True):
                    kernel.run(code)
                    if name != "bare":
                        kernel.run("_ = job.wait()")
                    took[name].append(tuple(kernel.value("clock.took")))
                    kernel.run(f"shutil.rmtree({folder!r}, ignore_errors=True)")
            kernel.run(WATCHED.format(questions=2))
            waits = []
            while kernel.value("job.active"):
                waits.append(kernel.run("6 * 7")[1])
                time.sleep(0.2)
        finally:
            kernel.end()
    bare = statistics.median(cpu for cpu, _ in took["bare"])
    for name, runs in took.items():
        share = statistics.median(cpu for cpu, _ in runs) / bare
        each = ", ".join(f"{cpu:.1f} s processor in {wall:.1f} s" for cpu, wall in runs)
        print(f"{name:22} {share:.3f} of bare in processor time: {each}")
    print(f"a cell beside a run: median {statistics.median(waits):.3f} s, worst {max(waits):.3f} s of {len(waits)}")


if __name__ == "__main__":
    sys.exit(main())

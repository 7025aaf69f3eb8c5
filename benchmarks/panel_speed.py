"""What the panel costs: until it is there, what a cell waits beside a run, and what the run pays for being watched.

    python benchmarks/panel_speed.py [--steps 25] [--rounds 3] [--chats 400]

All of it happens in a real kernel, whose messages to the page are made and sent; no browser takes them. The panel counts as displayed
when the kernel has sent it all (the browser tests see it drawn). A cell is `6 * 7`, from its request to its reply. Each round trains
the same steps bare (`train`), watched (a job with the panel), and watched with answers to the fixed questions, which are a feature of
the job and no cost of looking. The seconds are those after the fifth step, looks at the validation set included, which all have.
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


def main() -> None:
    "Prints the figures."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--chats", type=int, default=400, help="training chats (default: %(default)s)")
    options = parser.parse_args()
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

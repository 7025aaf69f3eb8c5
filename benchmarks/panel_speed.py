"""What the panel costs: until it is there, what a cell waits beside a run, and what the run pays for being watched.

    python benchmarks/panel_speed.py [--steps 40] [--rounds 3] [--chats 1000]

The panel is made on the demo data after everything has been imported. A cell is stood for by a small computation in the main thread
while a run goes on in the other. The watched run (a job with the view of the panel attached, without a browser: what is
sent is made in full) and the bare one (`train`) take turns, on the same chats, and their steps after the fifth are timed; answers to the
fixed questions, which are a feature of the job and no cost of looking, are left out, and timed apart.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    "Prints the figures."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--chats", type=int, default=1000, help="training chats (default: %(default)s)")
    options = parser.parse_args()

    from transformers import TrainerCallback

    from finetune_nb.config import FinetuneConfig
    from finetune_nb.controls import ConfigForm
    from finetune_nb.data import icd10_chats
    from finetune_nb.jobs import start_job
    from finetune_nb.models import hardware
    from finetune_nb.panel import panel
    from finetune_nb.train_view import TrainView
    from finetune_nb.training import train

    class Clock(TrainerCallback):
        "Processor and wall seconds of the steps after the fifth."

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                self.began = time.process_time(), time.perf_counter()
            self.took = (time.process_time() - self.began[0], time.perf_counter() - self.began[1]) if state.global_step > 5 else (0, 0)

    print(hardware())
    data, folder = icd10_chats(n_train=options.chats), Path(tempfile.mkdtemp())
    small_steps = {"target_modules": "all-linear", "lora_dropout": 0.0, "gradient_accumulation_steps": 1}
    config = FinetuneConfig(**small_steps, max_steps=options.steps, logging_steps=1, eval_strategy="no", output_dir=str(folder))
    for attempt in range(3):
        started = time.perf_counter()
        room = panel(config, data)
        shown = time.perf_counter() - started
        while room.data.ready is None:
            time.sleep(0.01)
        print(f"panel {attempt + 1}: made in {shown:.2f} s, data read and plan shown after {time.perf_counter() - started:.2f} s")

    waits: list[float] = []
    watched, bare, costs = [], [], []
    for _ in range(options.rounds):
        clock = Clock()
        train(config, data, [clock], say=lambda line: None)
        bare.append(clock.took)
        view, clock = TrainView(ConfigForm(config), lambda: data, background=True), Clock()
        job = start_job(config, data, background=True, questions=0, callbacks=[clock])
        view.attach(job)
        while job.active:
            time.sleep(0.2)
            began = time.perf_counter()
            sum(i * i for i in range(1000))
            waits.append(time.perf_counter() - began)
        job.wait()
        watched.append(clock.took)
        costs.append(view.cost)
        shutil.rmtree(folder, ignore_errors=True)
    one, two = (statistics.median(cpu for cpu, _ in runs) for runs in (bare, watched))
    print("bare    " + "  ".join(f"{cpu:.1f} s processor, {wall:.1f} s" for cpu, wall in bare))
    print("watched " + "  ".join(f"{cpu:.1f} s processor, {wall:.1f} s" for cpu, wall in watched))
    print(f"watched / bare: {two / one:.3f} in processor time, of which the view took {statistics.median(costs):.2f} s a run")
    print(f"a cell beside a run: median {1000 * statistics.median(waits):.1f} ms, worst {1000 * max(waits):.0f} ms of {len(waits)}")


if __name__ == "__main__":
    sys.exit(main())

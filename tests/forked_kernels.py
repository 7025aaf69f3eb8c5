"""Kernels that are forked from a process which has imported the package: each is a fresh start, without the seconds that torch takes to load."""

import gc
import multiprocessing
import os
import signal
import time
from typing import Any

LOADED = ["finetune_nb.panel", "finetune_nb.cli", "ipykernel.kernelapp", "matplotlib_inline.backend_inline", "simple_icd_10_cm"]  # the last one parses two seconds for the demo


class Forked:
    "What jupyter_client wants of a process: a part of `subprocess.Popen`."

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], cwd: str | None = None, env: dict[str, str] | None = None, **ignored: Any) -> None:
        self.process = _server().Process(target=_kernel, args=(command[command.index("-f") + 1], cwd, env or dict(os.environ)))
        self.process.start()
        self.pid = self.process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid:  # a signal to its group is to reach nobody else
            time.sleep(0.005)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    return context


def _kernel(connection: str, cwd: str | None, env: dict[str, str]) -> None:
    gc.freeze()  # what is loaded by now is no garbage, and need not be looked at each time that garbage is collected
    os.setsid()
    os.chdir(cwd or ".")
    os.environ.clear()
    os.environ.update(env)
    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(argv=["-f", connection, "--log-level=ERROR"])

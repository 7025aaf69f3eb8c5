"""Programs in a process that is forked from this one, which has all imported: where its start is not what is tested, that saves seconds."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_nb import sandbox


def fork() -> int:
    "As `os.fork`; the process that renders templates serves the child too, while its parent waits: to start another takes a second."
    renderer = sandbox._renderer()
    process = renderer.started()
    child = os.fork()
    if not child:
        renderer.owner, process.poll = os.getpid(), lambda: None
    return child


def wait(child: int) -> int:
    "How it ended; one that was killed may have left an answer to it behind."
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        sandbox._renderer().end()
    return code


class Forked:
    "Runs a program; a part of `subprocess.Popen`. What it says can be read from `stdout` meanwhile."

    def __init__(self, code: str, *words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        read, write = os.pipe()
        self.stdout, self.errors, self.returncode = os.fdopen(read, encoding="utf-8"), tempfile.TemporaryFile(), None
        self.pid = fork()
        if self.pid:
            os.close(write)
            return
        ended = 1
        try:
            os.dup2(write, 1)
            os.dup2(self.errors.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
            sys.argv = ["-c", *words]
            os.environ.update(env or {})
            os.chdir(cwd or ".")
            _alone()
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            ended = 0
        except SystemExit as error:
            ended = error.code if isinstance(error.code, int) else int(bool(error.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended)

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = wait(self.pid)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        "What it has said until its end: as a program, and as errors."
        said = self.stdout.read()
        self.wait()
        self.errors.seek(0)
        return said, self.errors.read().decode("utf-8", "replace")


def _alone() -> None:
    "The threads that computed stayed behind."
    import torch

    torch.set_num_threads(1)


def run(code: str, *words: str, **more: Any) -> Any:
    "The program when it has ended, as `subprocess.run` gives it."
    from subprocess import CompletedProcess

    process = Forked(code, *words, **more)
    said, errors = process.communicate()
    return CompletedProcess([code, *words], process.returncode, said, errors)


def run_command(command: list[str], **ignored: Any) -> Any:
    "In place of `subprocess.run([python, '-c', code, …])`."
    assert command[0] == sys.executable and command[1] == "-c"
    return run(command[2], *command[3:])

"""Programs in processes of their own that have PyTorch, diffusers and the exporters in memory when they begin.

To import them takes most of the time of a test that trains a little in another process, so Python's fork server does
it once for all of a worker's tests. What a command's start does is tested where a process begins with nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

MAIN = "from kdc_edge.cli import main\nmain()"

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["kdc_edge.train.loop", "kdc_edge.export.onnx.export", "kdc_edge.export.targets"])


class Fork:
    """A running program; its stdout and stderr go to files."""

    def __init__(
        self, code: str, *arguments: object, cwd: Path, output: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """`output`.out and `output`.err receive what it says; `environment` is added to this process's."""
        self._output = output
        given = {**os.environ, **(environment or {})}
        self._process: ForkServerProcess = FORKS.Process(
            target=_execute, args=(code, [str(a) for a in arguments], str(cwd), str(output), given), daemon=True
        )
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, how: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, how)

    def wait(self, timeout_sec: float = 120.0) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        self._process.join(timeout_sec)
        assert self._process.exitcode is not None, f"still running after {timeout_sec:g} s: {self.err}"
        return self._process.exitcode

    @property
    def out(self) -> str:
        return self._output.with_suffix(".out").read_text("utf-8")

    @property
    def err(self) -> str:
        return self._output.with_suffix(".err").read_text("utf-8")

    def wait_for(self, file: Path, lines: int) -> None:
        """Until the file has so many lines; AssertionError where the program ends before."""
        deadline = time.monotonic() + 120
        while not (file.is_file() and file.read_text("utf-8").count("\n") >= lines):
            assert self.running, self.err
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _execute(code: str, arguments: list[str], cwd: str, output: str, environment: dict[str, str]) -> None:
    """In the new process: the code as a program, with nothing of the test's about it."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(str(Path(output).with_suffix(suffix)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    if "OMP_NUM_THREADS" in environment:  # which PyTorch has read before
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["-c", *arguments]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<program>", "exec"), module.__dict__)

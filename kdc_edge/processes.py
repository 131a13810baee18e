"""Child processes that end with their parent, however that ends.

    command, environment = python_module("kdc_edge.bench.worker")
    with subprocess.Popen(command, env=environment) as child: ...

The child runs this module first, before any import that takes its time: on Linux it asks the kernel to be ended with
its parent, elsewhere a thread looks for it. Then it becomes the module that was asked for.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

LOOK_SEC = 1.0  # between two looks for the parent, where the kernel does not tell
GRACE_SEC = 20.0  # for a child to remove what is half written
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def python_module(name: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a module in a child process.

    It finds the modules that this process finds, and (-P) none that lie in the current folder.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-P", "-m", "kdc_edge.processes", str(os.getpid()), name]
    return command, {**os.environ, "PYTHONPATH": path}


def run_module(
    name: str, arguments: Sequence[object], *, tell: Callable[[str], None] = lambda _: None
) -> subprocess.CompletedProcess[str]:
    """Run a module to its end; `tell` gets each line of its stderr as it comes, and its stdout is dropped.

    What interrupts this process terminates the child, which cleans up before it ends.
    """
    program, environment = python_module(name)
    command = [*program, *map(str, arguments)]
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as child:
        assert child.stderr is not None
        try:
            for line in child.stderr:
                lines.append(line)
                tell(line.rstrip())
            child.wait()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=GRACE_SEC)
            child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, None, "".join(lines))


def end_with(parent: int) -> None:
    """Kill this process when its parent ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        import threading

        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def _watch(parent: int) -> None:
    import time

    import psutil

    while os.getppid() == parent and psutil.pid_exists(parent):  # Windows tells the number of a parent that is gone
        time.sleep(LOOK_SEC)
    os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    name = sys.argv[2]
    del sys.argv[1:3]
    runpy.run_module(name, run_name="__main__", alter_sys=True)

"""Child processes that end with their parent, however that ends.

    command, environment = python_module("kdc_edge.bench.worker")
    with subprocess.Popen(command, env=environment) as child: ...
    end_with_parent()                                  # the first line of the child

The child learns its parent's number from the environment. On Linux the kernel ends it; elsewhere a thread looks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

PARENT = "KDC_EDGE_PARENT_PID"  # in the environment of a child
LOOK_SEC = 1.0  # between two looks for the parent, where the kernel does not tell
GRACE_SEC = 20.0  # for a child to remove what is half written
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def python_module(name: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a module in a child process.

    It finds the modules that this process finds, and (-P) none that lie in the current folder.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return [sys.executable, "-P", "-m", name], {**os.environ, "PYTHONPATH": path, PARENT: str(os.getpid())}


def run_module(name: str, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """Run a module to its end. What interrupts this process terminates the child, which cleans up before it ends."""
    program, environment = python_module(name)
    command = [*program, *map(str, arguments)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as child:
        try:
            out, err = child.communicate()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=GRACE_SEC)
            child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def end_with_parent() -> None:
    """Kill this process when the one that started it with `python_module` ends; nothing in any other process."""
    parent = os.environ.pop(PARENT, "")
    if not parent.isdecimal():
        return
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        import threading

        threading.Thread(target=_watch, args=(int(parent),), daemon=True).start()
    if os.getppid() != int(parent):  # it ended before the kernel was asked
        os._exit(1)


def _watch(parent: int) -> None:
    import time

    import psutil

    while os.getppid() == parent and psutil.pid_exists(parent):  # Windows tells the number of a parent that is gone
        time.sleep(LOOK_SEC)
    os._exit(1)

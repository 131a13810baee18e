"""The signals that end a command: each becomes an exception, so that what was half done is removed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes
WORDS = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}
RESEND_SEC = 0.05
# Imports that a signal does not cut short: torch runs some of its own from C++, where an exception aborts the process;
# numpy turns whatever ends it into an ImportError, which others catch.
WHOLE_IMPORTS = {"torch", "numpy"}
LONGEST_IMPORT_SEC = 20.0
# A call of an engine or a compiler, which no exception can end: the process ends then, and the next command removes
# what was half done, as after a kill.
LONGEST_CALL_SEC = 5.0


class Signals:
    """`code` is the exit code of the signal that came, None where none did."""

    def __init__(self) -> None:
        self.code: int | None = None
        self._since = 0.0
        self._again: threading.Timer | None = None
        self._hook = sys.unraisablehook
        self._told: int | None = None  # gets a byte as soon as a signal comes

    def listen(self) -> None:
        """Take the signals from now on."""
        sys.unraisablehook = self._unraisable
        with contextlib.suppress(ValueError):  # not in the main thread, where nobody sends us signals
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
                signal.signal(signal.SIGINT, self._end)
            signal.signal(signal.SIGTERM, self._end)
            if sys.platform != "win32":  # which tells sockets alone
                watched, self._told = os.pipe()
                os.set_blocking(self._told, False)
                signal.set_wakeup_fd(self._told, warn_on_full_buffer=False)
                threading.Thread(target=self._watch, args=(watched,), daemon=True).start()

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.code is None:
            self._since = time.monotonic()
        self.code = 128 + number
        if _importing(frame) and time.monotonic() - self._since < LONGEST_IMPORT_SEC:
            self._send_again()
        elif self.code == INTERRUPTED:
            raise KeyboardInterrupt
        else:
            raise SystemExit(self.code)

    def _watch(self, watched: int) -> None:
        """End the process where Python does not come to handle a signal."""
        with os.fdopen(watched, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if signal.getsignal(number[0]) != self._end:
                    continue  # a command's own way to end
                time.sleep(LONGEST_CALL_SEC)
                if self.code is None:
                    with contextlib.suppress(OSError):
                        os.write(2, f"kdc-edge: {WORDS[128 + number[0]]}\n".encode())
                    os._exit(128 + number[0])

    def _send_again(self) -> None:
        """Send the signal again, a moment later."""
        if self.code is not None:
            self._again = threading.Timer(RESEND_SEC, os.kill, (os.getpid(), self.code - 128))
            self._again.daemon = True
            self._again.start()

    def _unraisable(self, failure: UnraisableHookArgs) -> None:
        """Send the signal again where a finalizer or a callback of the interpreter swallowed it."""
        if self.code is None or not isinstance(failure.exc_value, KeyboardInterrupt | SystemExit):
            self._hook(failure)
        else:
            self._send_again()

    def restore(self) -> None:
        """To what ends a process silently: Python's own shutdown would print a traceback."""
        if self._again is not None:
            self._again.cancel()
        sys.unraisablehook = self._hook
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)
            if self._told is not None:
                signal.set_wakeup_fd(-1)
                os.close(self._told)


def _importing(frame: FrameType | None) -> bool:
    """Whether one of WHOLE_IMPORTS is being imported where `frame` runs."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and _package(frame) in WHOLE_IMPORTS:
            return True
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


if sys.platform != "win32":
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are no news of its parent

"""Progress on stderr: a rich bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import rich.progress
from rich.console import Console

from kdc_edge.text import visible

LINE_EVERY_SEC = 5.0


class ProgressBar:
    """Counts to `total`; `step` says where it is, `say` puts a line above the bar."""

    def __init__(self, total: int, *, done: int = 0) -> None:
        self.total, self.done = total, done
        self._last_line = 0.0
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.description}"), console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: int, text: str) -> None:
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif time.monotonic() - self._last_line > LINE_EVERY_SEC or done == self.total:
            self._last_line = time.monotonic()
            print(f"{done}/{self.total} {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(visible(text), markup=False)
        else:
            print(visible(text), file=sys.stderr, flush=True)

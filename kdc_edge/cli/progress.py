"""Progress on stderr: a rich bar or spinner on a terminal; elsewhere a line now and then, or one a stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


class Stages:
    """Work of unknown length, stage by stage; each ends with the time that it took.

    with stages("converting the unet"):                       # "converting the unet ... 31.2 s"
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._open = False  # a line that waits for its time

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        begin, shown = time.monotonic(), visible(what)
        if self._console.is_terminal:
            with rich.progress.Progress(
                rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.TimeElapsedColumn(), console=self._console, transient=True,
            ) as spinner:  # fmt: skip
                spinner.add_task(shown)
                yield
            self.say(self._done(shown, begin))
            return
        self._write(f"{shown} ... ")
        self._open = True
        try:
            yield
        except BaseException:
            self._end_line()
            raise
        self._write(f"{time.monotonic() - begin:.1f} s\n" if self._open else f"{self._done(shown, begin)}\n")
        self._open = False

    def say(self, text: str) -> None:
        """A line of its own, above the spinner or behind the line that is being written."""
        self._end_line()
        self._console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def _done(self, what: str, begin: float) -> str:
        return f"{what}: {time.monotonic() - begin:.1f} s"

    def _end_line(self) -> None:
        if self._open:
            self._write("\n")
        self._open = False

    def _write(self, text: str) -> None:
        print(text, end="", file=sys.stderr, flush=True)

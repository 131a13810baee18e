"""Progress on stderr: a rich bar or spinner on a terminal; elsewhere a line now and then, or one a stage.

with ProgressBar(20) as progress:
    progress.step(1, "timestep 999")

with MeasuringBar(cases) as progress:
    for found in run(cases, tell=progress.tell):
        progress.say(found.row.name)

with Stages()("converting unet") as tell:
    tell("3 of 8 layers")
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kdc_edge.text import visible

if TYPE_CHECKING:
    import rich.progress

    from kdc_edge.bench.case import Case
    from kdc_edge.bench.runner import Doing

LINE_EVERY_SEC = 5.0
STAGE_TOLD_EVERY_SEC = 30.0
DRAWINGS_A_SEC = 4  # of the bar: what is measured or trained beside it is to have the processor


class ProgressBar:
    """Counts to `total`; `step` says where it is, `say` puts a line above the bar."""

    def __init__(self, total: int, *, done: int = 0) -> None:
        self.total, self.done = total, done
        self._before, self._begin = done, time.monotonic()
        self._last_line = 0.0
        self._bar: rich.progress.Progress | None = None
        if sys.stderr.isatty():
            import rich.progress  # 3 MB, for a terminal alone
            from rich.console import Console

            self._bar = rich.progress.Progress(
                rich.progress.BarColumn(), rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.description}", markup=False), console=Console(stderr=True),
                refresh_per_second=DRAWINGS_A_SEC,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: int, text: str) -> None:
        finished = done == self.total != self.done
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total, description=visible(text))
        elif time.monotonic() - self._last_line > LINE_EVERY_SEC or finished:
            self._last_line = time.monotonic()
            print(f"{done}/{self.total} {visible(text)}{self._to_go()}", file=sys.stderr, flush=True)

    def _to_go(self) -> str:
        """The time left at the mean rate so far; nothing where that is not known."""
        now_done, left = self.done - self._before, self.total - self.done
        if now_done <= 0 or left <= 0:
            return ""
        left_sec = (time.monotonic() - self._begin) * left / now_done
        return f", {timedelta(seconds=round(left_sec))} to go"

    def say(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(visible(text), markup=False)
        else:
            print(visible(text), file=sys.stderr, flush=True)


class MeasuringBar(ProgressBar):
    """Measurements in turn, counted in sampler steps; a search may turn out longer or shorter than `planned`."""

    def __init__(self, planned: Sequence[Case]) -> None:
        super().__init__(sum(_steps(case) for case in planned))
        self._planned, self._number = len(planned), 0
        self._case: Case | None = None
        self._finished = 0  # steps of the cases before this one

    def tell(self, case: Case, doing: Doing) -> None:
        """What kdc_edge.bench.runner.run calls."""
        if case is not self._case:
            self._finished += 0 if self._case is None else _steps(self._case)
            self._case, self._number = case, self._number + 1
        self.total = max(self.total, self._finished + _steps(case))
        done = self._finished + int(doing.share * _steps(case))
        of = max(self._number, self._planned)
        self.step(done, f"measurement {self._number} of {of}, {case.folder}: {doing.text}")


def _steps(case: Case) -> int:
    """Sampler steps of all images: where most of the time goes."""
    return case.request.steps * case.images


class Stages:
    """Work of unknown length, stage by stage; each ends with the time that it took.

    with stages("converting the unet") as tell:               # "converting the unet ... 31.2 s"
        tell("3 of 8 layers")                                 # beside the spinner; behind the dots now and then
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._open = False  # a line that waits for its time

    @contextmanager
    def __call__(self, what: str) -> Iterator[Callable[[str], None]]:
        begin, shown = time.monotonic(), visible(what)
        if self._console.is_terminal:
            import rich.progress

            with rich.progress.Progress(
                rich.progress.SpinnerColumn(), rich.progress.TextColumn("{task.description}", markup=False),
                rich.progress.TimeElapsedColumn(), console=self._console, transient=True,
            ) as spinner:  # fmt: skip
                task = spinner.add_task(shown)
                yield lambda text: spinner.update(task, description=f"{shown}: {visible(text)}")
            self.say(self._done(shown, begin))
            return
        self._write(f"{shown} ... ")
        self._open = True
        last = begin

        def tell(text: str) -> None:
            nonlocal last
            if self._open and time.monotonic() - last >= STAGE_TOLD_EVERY_SEC:
                last = time.monotonic()
                self._write(f"{visible(text)} ... ")

        try:
            yield tell
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

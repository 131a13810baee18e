"""One thread makes images for one pipeline; jobs wait in a bounded queue, report events, and stop when asked.

worker = Worker(pipeline, name="onnx-fp16", waiting=8)
job = worker.submit([request], events.append)      # raises Busy where the queue is full
job.cancel()                                       # before the next step; one that waits gives its place free
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdc_edge.errors import KdcError
from kdc_edge.image import encode_png
from kdc_edge.pipeline import Pipeline, Progress
from kdc_edge.request import Request, describe

ENDING = "the server ends: ask again when it runs"


class Busy(KdcError):
    """The queue is full, or the worker ends."""


@dataclass(frozen=True)
class Step:
    image: int  # from 0
    step: int  # from 1
    steps: int
    latents: np.ndarray  # float32 (1, C, h, w)


@dataclass(frozen=True)
class Done:
    """One finished image."""

    image: int
    png: bytes
    seed: int
    seconds: float
    nsfw: bool | None  # flagged, and black; None where the bundle has no safety checker


@dataclass(frozen=True)
class Failed:
    message: str


class Finished:
    """The last event of a job that nobody cancelled."""


Event = Step | Done | Failed | Finished


@dataclass(frozen=True)
class Job:
    requests: Sequence[Request]
    emit: Callable[[Event], None]  # called on the worker's thread; must not block
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop before the next step; no more events follow."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass
class Counts:
    """Totals since the start, for /metrics."""

    images: int = 0
    image_seconds: float = 0.0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0


class Worker:
    """The thread, its queue and its counts."""

    def __init__(self, pipeline: Pipeline, *, name: str, waiting: int = 8) -> None:
        self.pipeline, self.name = pipeline, name
        self.counts = Counts()
        self._most = waiting
        self._waiting: deque[Job] = deque()
        self._working: Job | None = None
        self._ended = False
        self._changed = threading.Condition()  # guards these three
        self._thread = threading.Thread(target=self._work, name="kdc-edge-worker", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], emit: Callable[[Event], None]) -> Job:
        """Queue a job. Raises InputError for a request that cannot be made, Busy where the queue is full."""
        for request in requests:
            self.pipeline.check(request)
        job = Job(requests, emit)
        with self._changed:
            self._drop_cancelled()
            if self._ended or len(self._waiting) >= self._most:
                self.counts.refused += 1
                raise Busy(ENDING if self._ended else "the queue is full: try again later")
            self._waiting.append(job)
            self._changed.notify()
        return job

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        return self._working is not None

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        """Fail the jobs that wait and the one in work, at once; the thread ends before its next step."""
        with self._changed:
            self._ended = True
            ended = [job for job in (self._working, *self._waiting) if job is not None and not job.cancelled]
            self._waiting.clear()
            self._changed.notify()
        for job in ended:
            job.cancel()
            job.emit(Failed(ENDING))

    def close(self) -> None:
        """`end`, and wait for the thread."""
        self.end()
        self._thread.join(timeout=60)

    def _drop_cancelled(self) -> None:
        kept = [job for job in self._waiting if not job.cancelled]
        self.counts.cancelled += len(self._waiting) - len(kept)
        self._waiting = deque(kept)

    def _next(self) -> Job | None:
        """The next job, as soon as there is one; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._waiting)
            self._working = None if self._ended else self._waiting.popleft()
            return self._working

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._make(job)
            except KdcError as error:
                self.counts.failed += 1
                job.emit(Failed(str(error)))
            except Exception as error:  # the thread serves the next job, whatever an engine raises
                self.counts.failed += 1
                job.emit(Failed(f"{type(error).__name__}: the image could not be made; the server's log has more"))
                raise_in_log(error)
            finally:
                self._working = None

    def _make(self, job: Job) -> None:
        for number, request in enumerate(job.requests):
            started = time.perf_counter()
            pixels = nsfw = None
            for progress in self.pipeline.run(request):
                if job.cancelled:
                    self.counts.cancelled += 1
                    return
                if (step := _as_step(progress, number)) is not None:
                    job.emit(step)
                pixels, nsfw = progress.pixels, progress.nsfw
            assert pixels is not None
            seconds = time.perf_counter() - started
            png = encode_png(pixels, describe(request, pixels, self.name))
            self.counts.images += 1
            self.counts.image_seconds += seconds
            job.emit(Done(number, png, request.seed, seconds, nsfw))
        job.emit(Finished())


def _as_step(progress: Progress, number: int) -> Step | None:
    if progress.stage != "scheduler" or progress.latents is None:
        return None
    return Step(number, progress.step, progress.steps, progress.latents)


def raise_in_log(error: Exception) -> None:
    """Hand an unexpected exception to the thread's hook, which prints it."""
    threading.excepthook(
        threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread()))
    )

"""One thread makes images for one pipeline; jobs wait in a bounded queue, report events, and stop when asked.

worker = Worker(pipeline, name="onnx-fp16", waiting=8)
job = worker.submit([request], events.append)      # raises Busy where the queue is full
job.cancel()                                       # before the next step
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdc_edge.errors import KdcError
from kdc_edge.image import encode_png
from kdc_edge.pipeline import Pipeline, Progress
from kdc_edge.request import Request, describe


class Busy(KdcError):
    """The queue is full."""


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
        self._queue: queue.Queue[Job | None] = queue.Queue(waiting)
        self._busy = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kdc-edge-worker", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], emit: Callable[[Event], None]) -> Job:
        """Queue a job. Raises InputError for a request that cannot be made, Busy where the queue is full."""
        for request in requests:
            self.pipeline.check(request)
        job = Job(requests, emit)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self.counts.refused += 1
            raise Busy("the queue is full: try again later") from None
        return job

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return self._queue.qsize()

    @property
    def busy(self) -> bool:
        return self._busy.is_set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread after the job in work."""
        while True:  # a full queue must not keep the end out
            try:
                self._queue.put_nowait(None)
                break
            except queue.Full:
                with_drawn = self._queue.get_nowait()
                if with_drawn is not None:
                    with_drawn.cancel()
        self._thread.join(timeout=60)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self._busy.set()
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
                self._busy.clear()

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

"""Measurements in fresh processes, one after the other, within a budget of time.

    for found in run(cases, budget_sec=600):
        print(found.row.failure or found.row.image_sec)

Each case has a process of its own, so that its memory and its first image are its own. One process may run a third
slower than the next for as long as it lives: where `repeats` is None, a short case is measured in three processes.
Whatever goes wrong in a process, a refusal, a crash or the kernel's out-of-memory killer, becomes the row's failure.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from kdc_edge.bench.case import Case, describe
from kdc_edge.bench.record import Disturbance, Row, Timing, Timings
from kdc_edge.bench.sensors import disturbances, peak_rss_of, pss_of
from kdc_edge.files import temporary_folder
from kdc_edge.processes import python_module
from kdc_edge.text import last_line

WORKER = "kdc_edge.bench.worker"  # the program of the child process
PROCESSES = 3
SHORT_SEC = 20.0  # of a process: a longer case is measured in one
OUT_OF_MEMORY = "out of memory"
LOOK_SEC = 0.05  # between two looks at the child's memory
LOOK_SHARE = 0.02  # of the time may go into looking, which holds the child up


@dataclass(frozen=True)
class Measured:
    """A row, and the images that belong to it."""

    row: Row
    pixels: np.ndarray | None = None  # uint8 (N, H, W, 3), the first image of each prompt; None where it failed
    prompt_images: np.ndarray | None = None  # uint8 (N, H, W, 3), one a prompt, none where none was asked


@dataclass(frozen=True)
class Job:
    """What the child process is to do; it comes to it as JSON on standard input."""

    case: Case
    started: float  # time.perf_counter(), one clock for all processes
    out: Path  # folder for result.json and images.npz


@dataclass(frozen=True)
class Doing:
    """What a measurement computes now, for whoever waits."""

    text: str  # "loading", "image 2 of 5"
    share: float = 0.0  # of the whole that is finished, from 0 to 1


Tell = Callable[[Case, Doing], None]


@dataclass(frozen=True)
class Outcome:
    """The child's result.json, in the row's words."""

    failure: str | None = None
    timings: Timings | None = None
    provider: str | None = None
    compute_dtype: str | None = None
    peak_rss_bytes: int | None = None
    peak_pss_bytes: int | None = None
    energy_joules: float | None = None
    disturbance: Disturbance | None = None


JOB = TypeAdapter(Job)
OUTCOME = TypeAdapter(Outcome)
DOING = TypeAdapter(Doing)


def run(cases: Sequence[Case], *, budget_sec: float | None = None, tell: Tell = lambda *_: None) -> Iterator[Measured]:
    """Measure one after the other, each in a fresh process; one a case, whatever becomes of it.

    `budget_sec` bounds the whole: the case that exceeds it is ended, and the rest is not begun. Whoever consumes this
    keeps the rows so far when it is interrupted; `not_measured` gives the others their reason. `tell` is called with
    each case as it begins, and several times a second while it is measured.
    """
    end = None if budget_sec is None else time.monotonic() + budget_sec
    for case in cases:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            yield not_measured(case, "not reached: --budget-sec was used up")
            continue
        tell(case, Doing("starting"))
        found = measure_in_fresh_process(case, timeout_sec=left, tell=tell)
        if end is not None and time.monotonic() >= end and found.row.failure:
            reason = f"{found.row.failure}: --budget-sec ended it"
            found = replace(found, row=replace(found.row, failure=reason))
        yield found


def not_measured(case: Case, reason: str) -> Measured:
    """A row without numbers, and why."""
    return Measured(replace(describe(case), failure=reason))


def measure_in_fresh_process(case: Case, *, timeout_sec: float | None = None, tell: Tell = lambda *_: None) -> Measured:
    """Measure a bundle or checkpoint in child processes; Ctrl-C ends the child and is raised here."""
    row = describe(case)
    if row.failure is not None:
        return Measured(row)
    begin = time.monotonic()
    outcomes: list[Outcome] = []

    def tell_of_all(doing: Doing) -> None:
        """Of all processes; a first one that takes long is the only one."""
        one = case.repeats is not None or (not outcomes and time.monotonic() - begin > SHORT_SEC)
        tell(case, Doing(doing.text, (len(outcomes) + doing.share) / (1 if one else PROCESSES)))

    outcome, pixels, prompt_images = _one_process(case, timeout_sec, tell_of_all)
    outcomes.append(outcome)
    while case.repeats is None and outcomes[-1].failure is None and len(outcomes) < PROCESSES:
        spent = time.monotonic() - begin
        left = None if timeout_sec is None else timeout_sec - spent
        each = spent / len(outcomes)
        if each > SHORT_SEC or (left is not None and left < 2 * each):
            break
        outcomes.append(_one_process(replace(case, prompts=()), left, tell_of_all)[0])
    outcome = _together(outcomes)
    row = replace(row, **vars(outcome))
    if outcome.timings is None or pixels is None:
        return Measured(row)
    row = replace(row, repeats=len(outcome.timings.end_to_end.samples_sec))
    return Measured(replace(row, width=pixels.shape[2], height=pixels.shape[1]), pixels, prompt_images)


def _one_process(
    case: Case, timeout_sec: float | None, tell: Callable[[Doing], None]
) -> tuple[Outcome, np.ndarray | None, np.ndarray | None]:
    """What came of it, the image, and those of the prompts; none where it failed."""
    with temporary_folder() as out:
        outcome = _run_child(Job(case, time.perf_counter(), out), timeout_sec, tell)
        if outcome.failure is not None:
            return outcome, None, None
        with np.load(out / "images.npz", allow_pickle=False) as found:
            return outcome, found["pixels"], found["prompt_images"]


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """Several processes as one: all samples, the largest memory; the failure of the last, if it failed."""
    last = outcomes[-1]
    timings = [o.timings for o in outcomes if o.timings]
    if last.failure is not None or len(timings) < 2:
        return last
    stages = {
        stage.name: Timing.of([s for t in timings if (timing := getattr(t, stage.name)) for s in timing.samples_sec])
        for stage in fields(Timings)
    }
    joules = [o.energy_joules for o in outcomes if o.energy_joules is not None]
    return replace(
        last,
        timings=Timings(**stages),  # type: ignore[arg-type]  # a stage that was timed in one was timed in all
        peak_rss_bytes=max((o.peak_rss_bytes for o in outcomes if o.peak_rss_bytes is not None), default=None),
        peak_pss_bytes=max((o.peak_pss_bytes for o in outcomes if o.peak_pss_bytes is not None), default=None),
        energy_joules=sum(joules) / len(joules) if joules else None,
        disturbance=disturbances([o.disturbance for o in outcomes if o.disturbance], [t.end_to_end for t in timings]),
    )


def _run_child(job: Job, timeout_sec: float | None, tell: Callable[[Doing], None]) -> Outcome:
    """Run the worker; what it says on its streams, and how it ended, is kept for the reason of a failure."""

    def look() -> None:
        with contextlib.suppress(OSError, ValueError):  # it has told nothing yet
            tell(DOING.validate_json((job.out / "doing.json").read_bytes()))

    log = job.out / "log.txt"
    command, environment = python_module(WORKER)
    memory = _Memory()
    with (
        log.open("wb") as stream,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment) as child,
    ):
        try:
            assert child.stdin is not None
            with child.stdin as pipe:
                pipe.write(JOB.dump_json(job))
            in_time = memory.watch(child, timeout_sec, look)
        except BrokenPipeError:  # it ended before it read: how, is said below
            in_time = True
            child.wait()
        finally:  # Ctrl-C too: no child outlives the call
            if child.poll() is None:
                child.kill()
                child.wait()
    seen = Outcome(peak_rss_bytes=memory.peak_rss_bytes, peak_pss_bytes=memory.peak_pss_bytes)
    if not in_time:
        return replace(seen, failure=f"not done after {timeout_sec:.3g} seconds")
    status = child.returncode
    result = job.out / "result.json"
    if status == 0 and result.is_file():
        outcome = OUTCOME.validate_json(result.read_bytes())
        if outcome.failure not in (None, OUT_OF_MEMORY):
            return outcome  # the memory of a process that refused says nothing about the bundle
        peak = memory.peak_rss_bytes if outcome.peak_rss_bytes is None else outcome.peak_rss_bytes
        return replace(outcome, peak_rss_bytes=peak, peak_pss_bytes=memory.peak_pss_bytes)
    if status < 0:
        name = signal.Signals(-status).name
        hint = ": most likely out of memory" if name == "SIGKILL" else ""
        return replace(seen, failure=f"the process was ended by {name}{hint}")
    said = last_line(log.read_text("utf-8", "replace"), "it said nothing")
    return replace(seen, failure=f"the process ended with code {status}: {said}")


class _Memory:
    """The most memory of another process that was seen."""

    def __init__(self) -> None:
        self.peak_rss_bytes: int | None = None
        self.peak_pss_bytes: int | None = None

    def watch(self, child: subprocess.Popen[bytes], timeout_sec: float | None, look: Callable[[], None]) -> bool:
        """Until it ends; False when it does not in time. `look` is called at each look at its memory."""
        end = None if timeout_sec is None else time.monotonic() + timeout_sec
        while True:
            begin = time.monotonic()
            self.peak_rss_bytes = _larger(self.peak_rss_bytes, peak_rss_of(child.pid))
            self.peak_pss_bytes = _larger(self.peak_pss_bytes, pss_of(child.pid))
            look()
            pause = max(LOOK_SEC, (time.monotonic() - begin) / LOOK_SHARE)
            if end is not None:
                pause = min(pause, max(end - time.monotonic(), 0.0))
            try:
                child.wait(pause)
            except subprocess.TimeoutExpired:
                if end is not None and time.monotonic() >= end:
                    return False
            else:
                return True


def _larger(a: int | None, b: int | None) -> int | None:
    return max((x for x in (a, b) if x is not None), default=None)

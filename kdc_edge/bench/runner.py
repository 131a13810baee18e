"""A process of its own for each measurement, so that its memory and its first image are its own.

    found = measure_in_fresh_process(folder, Request("a red flower"), repeats=None, warmup=1)
    found.row.failure or found.row.timings.end_to_end.median_sec

The same network may run a third slower in one process than in the next, all its life long. So what is over soon is
measured in three processes, one after the other, when nobody says how many images are to count.

Whatever goes wrong in there, the kernel's out-of-memory killer included, becomes the row's reason.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from kdc_edge.bench.measure import MIN_IMAGES, check_counts
from kdc_edge.bench.record import Disturbance, Row, Timing, Timings, text_sha256
from kdc_edge.bench.sensors import disturbances, peak_rss_of, pss_of
from kdc_edge.bundle import Bundle, kind_of
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.formats import find_format
from kdc_edge.pipeline import Request

OPENER = "kdc_edge.runtimes:open_for_bench"  # a name, because the runtimes stand on a higher floor than this one
PROCESSES = 3
SHORT_SEC = 20.0  # of a process: what takes longer is measured in one
OUT_OF_MEMORY = "out of memory"
LOOK_SEC = 0.05  # between two looks at the child's memory
LOOK_SHARE = 0.02  # of the time may go into looking, which holds the child up


@dataclass(frozen=True)
class Measured:
    """A row, and the images that belong to it."""

    row: Row
    pixels: np.ndarray | None = None  # uint8 (H, W, 3), the last image that was timed; None where it failed
    prompt_images: np.ndarray | None = None  # uint8 (N, H, W, 3), one a prompt, none where none was asked


@dataclass(frozen=True)
class Job:
    """What the child process is to do; it comes to it as JSON on standard input."""

    opener: str  # "module:function", called with (folder, engine=, device=, threads=, low_memory=)
    folder: str
    engine: str | None
    device: str | None
    threads: int | None
    low_memory: bool
    request: dict[str, Any]  # the Request's fields but `latents`
    repeats: int | None
    warmup: int
    prompts: tuple[str, ...]
    started: float  # time.perf_counter(), one clock for all processes
    out: str  # folder for result.json and images.npz


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


def measure_in_fresh_process(
    folder: Path,
    request: Request,
    *,
    repeats: int | None,
    warmup: int,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    prompts: Sequence[str] = (),
    opener: str = OPENER,
    timeout_sec: float | None = None,
) -> Measured:
    """Measure a bundle or checkpoint in a child process.

    Whatever goes wrong in there, a refusal, a crash or the kernel's out-of-memory killer, becomes the row's
    `failure`, and no image. Ctrl-C ends the child and is raised here. Raises InputError for wrong counts.
    """
    check_counts(repeats, warmup)
    row = describe(
        folder, request, repeats=repeats, warmup=warmup, engine=engine, device=device, threads=threads,
        low_memory=low_memory,
    )  # fmt: skip
    if row.failure is not None:
        return Measured(row)
    asked = {key: value for key, value in vars(request).items() if key != "latents"}
    job = Job(opener, str(folder), engine, device, threads, low_memory, asked, repeats, warmup, tuple(prompts), 0.0, "")
    begin = time.monotonic()
    outcome, pixels, prompt_images = _one_process(job, timeout_sec)
    outcomes = [outcome]
    while repeats is None and outcomes[-1].failure is None and len(outcomes) < PROCESSES:
        spent = time.monotonic() - begin
        left = None if timeout_sec is None else timeout_sec - spent
        each = spent / len(outcomes)
        if each > SHORT_SEC or (left is not None and left < 2 * each):
            break
        outcomes.append(_one_process(replace(job, prompts=()), left)[0])
    outcome = _together(outcomes)
    row = replace(row, **vars(outcome))
    if outcome.timings is None or pixels is None:
        return Measured(row)
    row = replace(row, repeats=len(outcome.timings.end_to_end.samples_sec))
    return Measured(replace(row, width=pixels.shape[1], height=pixels.shape[0]), pixels, prompt_images)


def _one_process(job: Job, timeout_sec: float | None) -> tuple[Outcome, np.ndarray | None, np.ndarray | None]:
    """What came of it, the image, and those of the prompts; none where it failed."""
    with tempfile.TemporaryDirectory(prefix="kdc-edge-bench-") as out:
        outcome = _run_child(replace(job, started=time.perf_counter(), out=out), timeout_sec)
        if outcome.failure is not None:
            return outcome, None, None
        with np.load(Path(out) / "images.npz", allow_pickle=False) as found:
            return outcome, found["pixels"], found["prompt_images"]


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """Several processes as one: all samples of all, the largest memory; the failure of the last, if it did fail."""
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


def describe(
    folder: Path,
    request: Request,
    *,
    repeats: int | None,
    warmup: int,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    low_memory: bool = False,
) -> Row:
    """The row before anything runs: the conditions, and what the folder says of itself, or why it cannot be read."""
    if request.latents is not None:
        raise InputError("a benchmark draws its noise from the seed: give no latents")
    asked = {key: value for key, value in vars(request).items() if key != "latents"}
    row = Row(
        name=folder.resolve().name,
        folder=str(folder),
        target=None,
        precision=None,
        checkpoint_sha256=None,
        size_bytes=None,
        parity=None,
        engine=engine,
        device=device,
        threads=threads,
        low_memory=low_memory,
        prompt_sha256=text_sha256(request.prompt, request.negative_prompt),
        repeats=MIN_IMAGES if repeats is None else repeats,
        warmup=warmup,
        **asked,
    )
    try:
        return _with_folder(row, folder)
    except KdcError as error:
        return replace(row, failure=str(error))


def _with_folder(row: Row, folder: Path) -> Row:
    if kind_of(folder) != "checkpoint":
        bundle = Bundle.open(folder)
        manifest, model = bundle.manifest, bundle.manifest.model
        row = replace(
            row,
            target=manifest.target,
            precision=manifest.precision,
            checkpoint_sha256=manifest.provenance.checkpoint_sha256,
            engine=row.engine or find_format(manifest.target, manifest.precision).engines[0],
            size_bytes=bundle.size_bytes,
            parity=manifest.image_parity,
        )
    else:
        model = read_model(folder)
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        row = replace(row, engine=row.engine or "torch", size_bytes=size_bytes)
    return replace(row, width=row.width or model.image_size, height=row.height or model.image_size)


def _run_child(job: Job, timeout_sec: float | None) -> Outcome:
    """Run the worker; what it says on its streams, and how it ended, is kept for the reason of a failure."""
    # -P and this path: the child finds the modules that we find, none that lies about in the current folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    log = Path(job.out) / "log.txt"
    command = [sys.executable, "-P", "-m", "kdc_edge.bench.worker"]
    memory = _Memory()
    with (
        log.open("wb") as stream,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment) as child,
    ):
        try:
            assert child.stdin is not None
            with child.stdin as pipe:
                pipe.write(JOB.dump_json(job))
            in_time = memory.watch(child, timeout_sec)
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
    result = Path(job.out) / "result.json"
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
    said = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    last = said[-1][:500] if said else "it said nothing"
    return replace(seen, failure=f"the process ended with code {status}: {last}")


class _Memory:
    """The most memory of another process that was seen."""

    def __init__(self) -> None:
        self.peak_rss_bytes: int | None = None
        self.peak_pss_bytes: int | None = None

    def watch(self, child: subprocess.Popen[bytes], timeout_sec: float | None) -> bool:
        """Until it ends; False when it does not in time."""
        end = None if timeout_sec is None else time.monotonic() + timeout_sec
        while True:
            begin = time.monotonic()
            self.peak_rss_bytes = _larger(self.peak_rss_bytes, peak_rss_of(child.pid))
            self.peak_pss_bytes = _larger(self.peak_pss_bytes, pss_of(child.pid))
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

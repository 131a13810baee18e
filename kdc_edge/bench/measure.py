"""A stopwatch around the pipeline's generator, and the same in a process of its own for each bundle.

    row, pixels = measure_in_fresh_process(folder, Request("a red flower"), repeats=5, warmup=1)
    row.failure or row.timings.end_to_end.median_sec

The peak memory is the kernel's own high-water mark of the process's resident memory, loading included:
VmHWM on Linux, ru_maxrss on macOS, the peak working set on Windows. It covers the whole life of the process,
which is why each bundle gets a fresh one. A sampling thread would miss short peaks, and Linux's ru_maxrss
begins at the parent's size.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
from PIL import Image
from pydantic import TypeAdapter

from kdc_edge.bench.record import Row, Timing, Timings
from kdc_edge.bundle import MANIFEST, Bundle, Check, Manifest
from kdc_edge.checkpoint import read_model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.formats import find_format
from kdc_edge.pipeline import Pipeline, Progress, Request

OPENER = "kdc_edge.runtimes:open_for_bench"  # a name, because the runtimes stand on a higher floor than this one


@dataclass(frozen=True)
class Measurement:
    """What one pipeline took."""

    timings: Timings
    peak_rss_bytes: int | None  # of this process so far
    pixels: np.ndarray  # uint8 (H, W, 3), the last picture


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
    repeats: int
    warmup: int
    out: str  # folder for result.json and picture.png


@dataclass(frozen=True)
class Outcome:
    """The child's result.json."""

    timings: Timings | None = None
    peak_rss_bytes: int | None = None
    failure: str | None = None


JOB = TypeAdapter(Job)
OUTCOME = TypeAdapter(Outcome)


def measure(
    open_pipeline: Callable[[], Pipeline], request: Request, *, repeats: int, warmup: int, low_memory: bool = False
) -> Measurement:
    """Open, run `warmup` pictures that do not count and `repeats` that do; every sample is kept.

    With `low_memory`, where no two components are in memory together, they are loaded within each picture.
    """
    _check_counts(repeats, warmup)
    begin = perf_counter()
    pipeline = open_pipeline()
    if not low_memory:
        pipeline.prepare(request)
    load_sec = perf_counter() - begin
    pictures = [_time_picture(pipeline, request) for _ in range(warmup + repeats)]
    laps = {stage: [s for p, _ in pictures[warmup:] for s in p[stage]] for stage in pictures[0][0]}
    timings = Timings(
        load=_timing([load_sec]),
        first_picture=_timing(pictures[0][0]["end_to_end"]),
        tokenize=_timing(laps["tokenize"]),
        text_encoder=_timing(laps["text_encoder"]),
        unet_first_step=_timing(laps["unet_first_step"]),
        unet_step=Timing.of(laps["unet_step"]),
        vae_decoder=_timing(laps["vae_decoder"]),
        end_to_end=_timing(laps["end_to_end"]),
    )
    return Measurement(timings, peak_rss_bytes(), pictures[-1][1])


def _time_picture(pipeline: Pipeline, request: Request) -> tuple[dict[str, list[float]], np.ndarray]:
    """The laps of one picture by stage, and the picture."""
    stages = ("tokenize", "text_encoder", "unet_first_step", "unet_step", "vae_decoder", "end_to_end")
    laps: dict[str, list[float]] = {stage: [] for stage in stages}
    begin = last = perf_counter()
    pixels = None
    for progress in pipeline.run(request):
        now = perf_counter()
        laps[_lap(progress)].append(now - last)
        last, pixels = now, progress.pixels
    laps["end_to_end"].append(last - begin)
    if pixels is None:
        raise KdcError("the pipeline ended without a picture")
    return laps, pixels


def _lap(progress: Progress) -> str:
    if progress.stage != "unet":
        return progress.stage
    return "unet_first_step" if progress.step == 1 else "unet_step"


def _timing(samples_sec: list[float]) -> Timing:
    timing = Timing.of(samples_sec)
    assert timing is not None  # the pipeline yields this stage for every picture
    return timing


def _check_counts(repeats: int, warmup: int) -> None:
    if repeats < 1:
        raise InputError(f"--repeats {repeats} measures nothing: use 1 or more")
    if warmup < 0:
        raise InputError(f"--warmup {warmup} is negative: use 0 or more")


def peak_rss_bytes() -> int | None:
    """The most resident memory that this process has had; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    return None if peak is None else int(peak)


def measure_in_fresh_process(
    folder: Path,
    request: Request,
    *,
    repeats: int,
    warmup: int,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    opener: str = OPENER,
    timeout_sec: float | None = None,
) -> tuple[Row, np.ndarray | None]:
    """Measure a bundle or checkpoint in a child process: its row, and the last picture, uint8 (H, W, 3).

    Whatever goes wrong in there, a refusal, a crash or the kernel's out-of-memory killer, becomes the row's
    `failure`, and no picture. Ctrl-C ends the child and is raised here. Raises InputError for wrong counts.
    """
    _check_counts(repeats, warmup)
    if request.latents is not None:
        raise InputError("a benchmark draws its noise from the seed: give no latents")
    fields = {key: value for key, value in vars(request).items() if key != "latents"}
    row = Row(
        name=folder.resolve().name,
        folder=str(folder),
        target=None,
        precision=None,
        engine=engine,
        device=device,
        threads=threads,
        low_memory=low_memory,
        size_bytes=None,
        parity=None,
        repeats=repeats,
        warmup=warmup,
        **fields,
    )
    try:
        row = _describe(row, folder)
    except KdcError as error:
        return replace(row, failure=str(error)), None
    with tempfile.TemporaryDirectory(prefix="kdc-edge-bench-") as out:
        job = Job(opener, str(folder), engine, device, threads, low_memory, fields, repeats, warmup, out)
        outcome = _run_child(job, timeout_sec)
        row = replace(row, **vars(outcome))
        if outcome.failure is not None:
            return row, None
        with Image.open(Path(out) / "picture.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
    return replace(row, width=pixels.shape[1], height=pixels.shape[0]), pixels


def _describe(row: Row, folder: Path) -> Row:
    """What the folder says of itself before anything runs."""
    if (folder / MANIFEST).is_file() or not (folder / "model_index.json").is_file():
        bundle = Bundle.open(folder)
        manifest, model = bundle.manifest, bundle.manifest.model
        row = replace(
            row,
            target=manifest.target,
            precision=manifest.precision,
            engine=row.engine or find_format(manifest.target, manifest.precision).engines[0],
            size_bytes=bundle.size_bytes,
            parity=picture_parity(manifest),
        )
    else:
        model = read_model(folder)
        size_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        row = replace(row, engine=row.engine or "torch", size_bytes=size_bytes)
    return replace(row, width=row.width or model.picture_size, height=row.height or model.picture_size)


def picture_parity(manifest: Manifest) -> Check | None:
    """The worst of the manifest's checks of whole pictures; None where no picture was compared."""
    checks = manifest.parity.checks if manifest.parity else []
    pictures = [c for c in checks if "picture" in c.what or "image" in c.what]
    return min(pictures, key=lambda c: float("inf") if c.psnr_db is None else c.psnr_db, default=None)


def _run_child(job: Job, timeout_sec: float | None) -> Outcome:
    """Run the worker; what it says on its streams, and how it ended, is kept for the reason of a failure."""
    # -P and this path: the child finds the modules that we find, none that lies about in the current folder.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    log = Path(job.out) / "log.txt"
    command = [sys.executable, "-P", "-m", "kdc_edge.bench.worker"]
    with (
        log.open("wb") as stream,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stream, stderr=stream, env=environment) as child,
    ):
        try:
            child.communicate(JOB.dump_json(job), timeout_sec)
        except BaseException as error:  # Ctrl-C too: no child outlives the call
            child.kill()
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return Outcome(failure=f"not done after {timeout_sec:g} seconds")
    status = child.returncode
    result = Path(job.out) / "result.json"
    if status == 0 and result.is_file():
        return OUTCOME.validate_json(result.read_bytes())
    if status < 0:
        name = signal.Signals(-status).name
        hint = ": most likely out of memory" if name == "SIGKILL" else ""
        return Outcome(failure=f"the process was ended by {name}{hint}")
    said = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return Outcome(failure=f"the process ended with code {status}: {said[-1][:500] if said else 'it said nothing'}")

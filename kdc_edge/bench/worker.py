"""The child process of a benchmark: a job as JSON on standard input, result.json and images.npz in a folder.

    python -m kdc_edge.bench.worker < job.json

Run by `measure_in_fresh_process`. The result is a file because engines print on the standard streams.
"""

from __future__ import annotations

import contextlib
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from kdc_edge.bench.measure import measure
from kdc_edge.bench.runner import DOING, JOB, OUT_OF_MEMORY, OUTCOME, Doing, Job, Outcome
from kdc_edge.errors import KdcError
from kdc_edge.runtimes import open_for_bench
from kdc_edge.text import printable

OOM_SCORE = 500  # of 1000; a process may raise its own
TELL_EVERY_SEC = 0.25  # at most, while images are made: what is measured is to have the machine


def work(job: Job) -> Outcome:
    """Measure, and leave the images in the job's folder; a failure that can be caught becomes a reason."""
    case = job.case
    opened = partial(
        open_for_bench,
        case.folder,
        engine=case.engine,
        device=case.device,
        threads=case.threads,
        low_memory=case.low_memory,
        check=case.check,
    )
    try:
        found = measure(opened, case, started=job.started, tell=_Teller(job.out / "doing.json"))
    except KdcError as error:
        return Outcome(failure=printable(str(error)))
    except MemoryError:
        return Outcome(failure=OUT_OF_MEMORY)
    except Exception as error:
        return Outcome(failure=printable(f"{type(error).__name__}: {error}"))
    np.savez(job.out / "images.npz", pixels=found.pixels, prompt_images=found.prompt_images)
    return Outcome(
        timings=found.timings,
        provider=found.provider,
        compute_dtype=found.compute_dtype,
        peak_rss_bytes=found.peak_rss_bytes,
        energy_joules=found.energy_joules,
        disturbance=found.disturbance,
    )


class _Teller:
    """Leaves what the process does now in a file, for the parent."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, 0.0

    def __call__(self, text: str, share: float) -> None:
        now = time.monotonic()
        if share > 0 and now - self._last < TELL_EVERY_SEC:
            return
        self._last = now
        with contextlib.suppress(OSError):  # a full disk, or on Windows a parent that reads: the next one comes soon
            part = self._path.with_suffix(".part")
            part.write_bytes(DOING.dump_json(Doing(text, share)))
            part.replace(self._path)


def main() -> None:
    with contextlib.suppress(OSError):  # Linux: when memory runs out, the kernel is to end this process, not another
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    job = JOB.validate_json(sys.stdin.buffer.read())
    (job.out / "result.json").write_bytes(OUTCOME.dump_json(work(job)))


if __name__ == "__main__":
    main()

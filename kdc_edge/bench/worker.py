"""The child process of a benchmark: a job as JSON on standard input, result.json and images.npz in a folder.

    python -m kdc_edge.bench.worker < job.json

Run by `measure_in_fresh_process`. The result is a file because engines print on the standard streams.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from functools import partial
from pathlib import Path

import numpy as np

from kdc_edge.bench.measure import measure
from kdc_edge.bench.runner import JOB, OUT_OF_MEMORY, OUTCOME, Job, Outcome
from kdc_edge.errors import KdcError
from kdc_edge.pipeline import Request

OOM_SCORE = 500  # of 1000; a process may raise its own


def work(job: Job) -> Outcome:
    """Measure, and leave the images in the job's folder; a failure that can be caught becomes a reason."""
    try:
        module, _, function = job.opener.partition(":")
        opener = getattr(importlib.import_module(module), function)
        opened = partial(
            opener,
            Path(job.folder),
            engine=job.engine,
            device=job.device,
            threads=job.threads,
            low_memory=job.low_memory,
        )
        request = Request(**job.request)  # the parent took them from a Request
        found = measure(
            opened, request, repeats=job.repeats, warmup=job.warmup, low_memory=job.low_memory, started=job.started,
            prompts=job.prompts,
        )  # fmt: skip
    except KdcError as error:
        return Outcome(failure=_one_line(error))
    except MemoryError:
        return Outcome(failure=OUT_OF_MEMORY)
    except Exception as error:
        return Outcome(failure=f"{type(error).__name__}: {_one_line(error)}")
    np.savez(Path(job.out) / "images.npz", pixels=found.pixels, prompt_images=found.prompt_images)
    return Outcome(
        timings=found.timings,
        provider=found.provider,
        compute_dtype=found.compute_dtype,
        peak_rss_bytes=found.peak_rss_bytes,
        energy_joules=found.energy_joules,
        disturbance=found.disturbance,
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def main() -> None:
    with contextlib.suppress(OSError):  # Linux: when memory runs out, the kernel is to end this process, not another
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    job = JOB.validate_json(sys.stdin.buffer.read())
    (Path(job.out) / "result.json").write_bytes(OUTCOME.dump_json(work(job)))


if __name__ == "__main__":
    main()

"""Sample sheets while training: the same prompts from the same noise at every step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdc_edge.image import grid, save_png
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.quality.evaluate import Generator, ask

SAMPLES_A_TASK = 4
NOISE = 11


def write_sample_sheet(run: Path, generator: Generator, tasks: Sequence[Task], step: int, size: int) -> Path:
    """`RUN/samples/STEP.png`, one row a task."""
    path = run / "samples" / f"{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    images = [p for t in tasks for p in generator(ask(t, SAMPLES_A_TASK, size=size).prompts, seed=NOISE)]
    save_png(path, grid(images, SAMPLES_A_TASK), None)
    return path

"""Sample sheets while training: the same prompts from the same noise at every step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from kdc_edge.image import grid, save_png
from kdc_edge.train.quality.evaluate import Generator

SAMPLES_A_TASK = 4
NOISE = 11


def write_sample_sheet(run: Path, generator: Generator, prompts: Sequence[Sequence[str]], step: int) -> Path:
    """`RUN/samples/STEP.png`, one row a task, of as many of its prompts as fit."""
    path = run / "samples" / f"{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    rows = [list(itertools.islice(itertools.cycle(asked), SAMPLES_A_TASK)) for asked in prompts]
    images = [p for row in rows for p in generator(row, seed=NOISE)]
    save_png(path, grid(images, SAMPLES_A_TASK), None)
    return path

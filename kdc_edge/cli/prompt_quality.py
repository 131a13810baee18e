"""The quality of images of a file of prompts: prompt accuracy of the garden's captions, CLIP score of other text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdc_edge.cli.project import need_training
from kdc_edge.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from kdc_edge.bench.record import PromptQuality


def open_scorer(prompts: Sequence[str], weights: Path | None) -> Callable[[np.ndarray], PromptQuality]:
    """A function of images uint8 (N, H, W, 3), one a prompt; what it lacks, PyTorch or weights, is raised here."""
    need_training("--prompts")
    import numpy as np

    from kdc_edge.bench.record import PromptQuality, text_sha256
    from kdc_edge.train.quality.evaluate import ask_prompts, score_images
    from kdc_edge.train.quality.metrics import ImageMetrics

    asked = ask_prompts(prompts)
    metrics = None if asked.scenes else ImageMetrics(weights)
    if metrics is not None and not metrics.has_clip:
        needs = next(line for line in metrics.missing() if line.startswith("the CLIP score"))
        raise InputError(f"--prompts: not all are captions of the garden, which the judge could read, and {needs}")
    if metrics is not None:
        metrics.clip_score(
            np.zeros((1, 64, 64, 3), np.uint8), prompts[:1]
        )  # weights that cannot be read: now, not later

    def score(images: np.ndarray) -> PromptQuality:
        found = score_images(images, asked, metrics).values
        return PromptQuality(found, len(prompts), text_sha256(*prompts))

    return score

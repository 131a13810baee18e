"""R's last row for every exported precision, beside the checkpoint's own: does int8 forget more?

    own = evaluate_tasks(open_generator(checkpoint), asked, ...)
    other = evaluate_tasks(open_generator(bundle), asked, ...)
    compare(own, other).added_forgetting          # QualityDrop(mean=0.004, stderr=0.006): within the noise

Prompts and noise are the same, image by image, so that differences are the precision's. What a bundle loses on
the tasks before the last is what it adds to forgetting (maximum minus last): the maximum is the checkpoint's past.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdc_edge.bundle import Bundle
from kdc_edge.errors import InputError
from kdc_edge.image import psnr_db
from kdc_edge.train.quality.evaluate import Evaluated


@dataclass(frozen=True)
class QualityDrop:
    """Quality of the checkpoint minus quality of the bundle: positive is worse."""

    mean: float
    stderr: float | None  # of the differences image by image; None where images have no score of their own
    within_noise: bool | None  # no more than two standard errors?

    @classmethod
    def of(cls, mean: float, stderr: float | None) -> QualityDrop:
        return cls(mean, stderr, None if stderr is None else abs(mean) <= 2 * stderr)


@dataclass(frozen=True)
class Comparison:
    """A bundle beside its checkpoint."""

    lost: dict[str, QualityDrop]  # by task
    added_forgetting: QualityDrop | None  # the mean of `lost` over the tasks before the last; None for a single task
    psnr_db: float | None  # median over all images; None where both are equal
    worst_psnr_db: float | None


def compare(own: Mapping[str, Evaluated], other: Mapping[str, Evaluated]) -> Comparison:
    """The checkpoint's evaluation and a bundle's, of the same tasks in the order of training."""
    lost = {task: _lost(own[task], other[task]) for task in own}
    similar = [psnr_db(a, b) for task in own for a, b in zip(own[task].images, other[task].images, strict=True)]
    median_db, worst_db = (None if math.isinf(db) else db for db in (float(np.median(similar)), min(similar)))
    return Comparison(lost, _mean(list(lost.values())[:-1]), median_db, worst_db)


def _lost(own: Evaluated, other: Evaluated) -> QualityDrop:
    mean = own.score.quality - other.score.quality
    differences = np.subtract(own.score.by_image, other.score.by_image)
    if len(differences) < 2:
        return QualityDrop.of(mean, None)
    return QualityDrop.of(mean, float(np.std(differences, ddof=1) / math.sqrt(len(differences))))


def _mean(losses: Sequence[QualityDrop]) -> QualityDrop | None:
    """Over tasks, whose images are independent."""
    if not losses:
        return None
    errors = [loss.stderr for loss in losses if loss.stderr is not None]
    known = len(errors) == len(losses)
    stderr = math.sqrt(sum(e**2 for e in errors)) / len(losses) if known else None
    return QualityDrop.of(float(np.mean([loss.mean for loss in losses])), stderr)


def refuse_strangers(bundles: Sequence[Path], checkpoint_sha256: str) -> None:
    """Raise InputError naming the first bundle that was exported from another checkpoint."""
    for folder in bundles:
        made_from = Bundle.open(folder).manifest.provenance
        if made_from.checkpoint_sha256 != checkpoint_sha256:
            raise InputError(f"{folder} was exported from another checkpoint ({made_from.checkpoint}): leave it out")

"""R: what a sequence of tasks did to the quality of each.

R[i][j] is the quality on task j after training task i (Lopez-Paz and Ranzato, arXiv 1706.08840). Forgetting is the
maximum over time minus the last (Chaudhry et al., arXiv 1801.10112); libraries that take the first minus the last
give other numbers. Higher is better: distances count negatively.

    matrix = quality_matrix(values, "-kid")
    average(matrix), forgetting(matrix)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# The first of these that was measured on all tasks is R[i][j]; the sign makes higher better.
QUALITIES = (
    ("prompt_accuracy", 1), ("kid", -1), ("clip_score", 1), ("loss", -1), ("lpips", -1), ("exact", 1),
    ("judge_frechet", -1), ("judge_kernel", -1), ("fid", -1),
)  # fmt: skip

Matrix = Sequence[Sequence[float | None]]
Values = Mapping[str, float] | None  # what was measured on a task; None where the task was not known yet


def signed(name: str) -> str:
    """A metric's name as R's: `-kid` where lower is better."""
    return name if dict(QUALITIES)[name] > 0 else f"-{name}"


def choose_metric(row: Sequence[Values]) -> str:
    """The metric that R is made of, of what was measured on each task: the first on all, else the first on any."""
    for enough in (all, any):
        for name, _ in QUALITIES:
            if enough(name in (values or {}) for values in row):
                return signed(name)
    raise ValueError("nothing was measured")


def quality_matrix(values: Sequence[Sequence[Values]], metric: str) -> list[list[float | None]]:
    """R of one metric, e.g. `-kid`; None where it was not measured."""
    name, sign = metric.lstrip("-"), -1 if metric.startswith("-") else 1
    return [[sign * found[name] if found and name in found else None for found in row] for row in values]


def average(matrix: Matrix) -> float:
    """mean_j R[T-1][j]: the quality at the end."""
    return float(np.nanmean(_array(matrix)[-1]))


def backward_transfer(matrix: Matrix) -> float | None:
    """mean_{j<T-1} (R[T-1][j] - R[j][j]): what later tasks gave to earlier ones; None for a single task."""
    r = _array(matrix)
    return _mean((r[-1] - np.diag(r))[:-1])


def forgetting(matrix: Matrix) -> float | None:
    """mean_{j<T-1} (max_i R[i][j] - R[T-1][j]), maximum minus last; None for a single task."""
    r = _array(matrix)
    return _mean((np.fmax.reduce(r, axis=0) - r[-1])[:-1])


def signed_forgetting(matrix: Matrix) -> float | None:
    """mean_{j<T-1} (max_{i<T-1} R[i][j] - R[T-1][j]): negative where the last task made earlier ones better."""
    r = _array(matrix)
    return _mean((np.fmax.reduce(r[:-1], axis=0) - r[-1])[:-1]) if len(r) > 1 else None


def forward_transfer(matrix: Matrix, start: Sequence[float | None]) -> float | None:
    """mean_{j>0} (R[j-1][j] - R_0[j]): what earlier tasks gave to later ones, over the student before training.

    `start` is R_0, its quality on each task (Lopez-Paz and Ranzato, arXiv 1706.08840). None for a single task.
    """
    r = _array(matrix)
    before = _array([[*start, *[None] * r.shape[1]]])[0, : r.shape[1]]
    return _mean(np.diag(r, 1) - before[1:])


def _mean(differences: np.ndarray) -> float | None:
    """Over the tasks on which both were measured; None where there are none."""
    known = differences[~np.isnan(differences)]
    return float(np.mean(known)) if len(known) else None


def _array(matrix: Matrix) -> np.ndarray:
    """R (T, T) with not-a-number where a task was not known yet: early rows of a run that was continued are short."""
    width = max(len(row) for row in matrix)
    rows = [[np.nan if v is None else v for v in row] + [np.nan] * (width - len(row)) for row in matrix]
    return np.array(rows, np.float64)

"""Palettization: each weight tensor as a table of 2**bits values, found by k-means on its histogram.

    package = palettize(package, bits=6)
    lut, indices = kmeans(weight, bits=6)         # (64,) of the weight's type, uint8 (weight.size,)

A float16 has 65,536 values at most, so a weight of any size is a histogram, and k-means takes milliseconds where
sorting the weights takes seconds. Centroids begin where the optimal quantizer of a smooth density has them (Panter and
Dite, 1951: as dense as the third root of the density), and move by Lloyd's algorithm, each round on prefix sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MIN_WEIGHTS = 2048  # smaller constants cost more as a table than they save
ROUNDS = 300  # it is usually done in a few dozen


def palettize(package: Any, bits: int, by_name: Mapping[str, int] | None = None) -> Any:
    """The package with one table of 2**bits values per weight tensor; `by_name` gives exceptions.

    The k-means is ours: coremltools' own is optimal, and a hundred times slower for an error 0 to 3 % smaller.
    """
    from coremltools.optimize import coreml as cto

    def config(n: int) -> Any:
        return cto.OpPalettizerConfig(
            mode="custom", lut_function=lambda weight: kmeans(weight, n), weight_threshold=MIN_WEIGHTS
        )

    names = {name: config(n) for name, n in (by_name or {}).items()}
    return cto.palettize_weights(package, cto.OptimizationConfig(global_config=config(bits), op_name_configs=names))


def kmeans(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A table of 2**bits values and each weight's place in it, with a small squared error."""
    codes = weight.astype(np.float16).reshape(-1).view(np.uint16)
    counts = np.bincount(codes, minlength=1 << 16)
    present = np.flatnonzero(counts)
    values = present.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values)
    present, values, counts = present[order], values[order], counts[present[order]]
    size = 1 << bits
    if len(values) <= size:
        centroids, bounds = values, np.arange(len(values) + 1)
    else:
        centroids, bounds = _lloyd(values, counts, _first_centroids(values, counts, size))
    lut = np.zeros(size, weight.dtype)
    lut[: len(centroids)] = centroids
    place = np.zeros(1 << 16, np.uint8)
    place[present] = np.repeat(np.arange(len(centroids)), np.diff(bounds))
    return lut, place[codes]


def _first_centroids(values: np.ndarray, counts: np.ndarray, size: int) -> np.ndarray:
    width = np.gradient(values)
    dense = np.cumsum(np.cbrt(counts / width) * width)
    return np.asarray(np.interp((np.arange(size) + 0.5) / size * dense[-1], dense, values))


def _lloyd(values: np.ndarray, counts: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroids at rest (or after many rounds), and the bounds of their clusters in the sorted values."""
    weight = np.concatenate([[0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * values)])
    before = None
    for _ in range(ROUNDS):
        edges = np.searchsorted(values, (centroids[:-1] + centroids[1:]) / 2)
        bounds = np.concatenate([[0], edges, [len(values)]])
        if before is not None and np.array_equal(bounds, before):
            break
        mass = np.diff(weight[bounds])
        means = np.diff(moment[bounds]) / np.maximum(mass, 1)
        centroids, before = np.where(mass > 0, means, centroids), bounds
    return centroids, bounds


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder, such as a package."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""coremltools without its noise, and palettization under one name: what converting and compressing share."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdc_edge.export.coreml.kmeans import kmeans

MIN_WEIGHTS = 2048  # smaller constants cost more as a table than they save


def palettize(package: Any, bits: int, by_name: Mapping[str, int] | None = None) -> Any:
    """The package with tables of 2**bits values a weight, found by k-means; `by_name` has exceptions.

    The k-means is ours: coremltools' own is optimal, and a hundred times slower for an error 0 to 3 % smaller.
    """
    from coremltools.optimize import coreml as cto

    def config(n: int) -> Any:
        return cto.OpPalettizerConfig(
            mode="custom", lut_function=lambda weight: kmeans(weight, n), weight_threshold=MIN_WEIGHTS
        )

    names = {name: config(n) for name, n in (by_name or {}).items()}
    return cto.palettize_weights(package, cto.OptimizationConfig(global_config=config(bits), op_name_configs=names))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the progress bars, advice and warnings of the tracer and of coremltools.

    They are about the libraries' own insides, and nobody here can act on them.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def folder_bytes(folder: Path) -> int:
    """Of all files below: a package's size."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

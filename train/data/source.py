"""The contract of a data source: images with captions, read lazily and repeatably.

for item in source.read(size=512, samples=None, seed=0):     # Sample, or LeftOut with a reason
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdc_edge.train.data.images import LeftOut

Part = Literal["train", "test"]

MAX_CAPTION_CHARS = 1000  # CLIP reads 77 tokens


@dataclass(frozen=True)
class Sample:
    """One image with its caption; `name` says where it came from."""

    name: str
    image: np.ndarray  # uint8 (size, size, 3)
    caption: str


class Source(Protocol):
    """Images with captions."""

    @property
    def mirrored(self) -> bool:
        """May images be flipped horizontally?"""
        ...

    @property
    def has_test_part(self) -> bool:
        """Else the test part is the training part."""
        ...

    def fingerprint(self) -> str:
        """A key for caches: it changes whenever the samples of `read` change."""
        ...

    def read(
        self, *, size: int, samples: int | None, seed: int, start: int = 0, part: Part = "train"
    ) -> Iterator[Sample | LeftOut]:
        """At most `samples` entries (all where None) from entry number `start` on, always in the same order."""
        ...

    def notes(self) -> list[str]:
        """Remarks on the data for the user before training: empty classes, rows without an image."""
        ...


def fill(template: str | None, default: str, name: str) -> str:
    """A caption from its template: no format codes, `{name}` alone; lone surrogates replaced."""
    text = " ".join((template or default).replace("{name}", name).split())
    return text.encode("utf-8", "replace").decode()[:MAX_CAPTION_CHARS]

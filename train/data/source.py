"""The contract of a data source: images with captions, read lazily and repeatably.

for item in source.read(size=512, samples=None, seed=0):     # Sample, or LeftOut with a reason
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdc_edge.train.data.images import Crop, LeftOut, Shape

Part = Literal["train", "test"]

Template = str | tuple[str, ...] | None  # with {name}; the source's own where None

SET_ASIDE_SEED = 2024
A_NAME = re.compile(r"\b([Aa]) \{name\}")
AN = re.compile(r"(?!uni|eu|use|one\b)[aeiou]|hour|honest", re.IGNORECASE)  # names that take "an"
MAX_CAPTION_CHARS = 1000  # CLIP reads 77 tokens


@dataclass(frozen=True)
class Sample:
    """One image with its caption; `name` says where it came from."""

    name: str
    image: np.ndarray  # uint8 (size, size, 3), or of a bucket's shape
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
        self,
        *,
        size: int,
        samples: int | None,
        seed: int,
        start: int = 0,
        part: Part = "train",
        crop: Crop = "center",
        buckets: Sequence[Shape] = (),
    ) -> Iterator[Sample | LeftOut]:
        """At most `samples` entries (all where None) from entry number `start` on, always in the same order.

        `crop` and `buckets` are those of `read_image`.
        """
        ...

    def caption_classes(self) -> dict[str, str]:
        """The class of each caption that is made from a class's name; none where classes are not known."""
        ...

    def notes(self) -> list[str]:
        """Remarks on the data for the user before training: empty classes, rows without an image."""
        ...


def set_aside(count: int) -> frozenset[int]:
    """The numbers of a tenth of `count` entries, the same every time, to evaluate on; none of fewer than 20."""
    return frozenset(random.Random(SET_ASIDE_SEED).sample(range(count), count // 10 if count >= 20 else 0))


def fill(template: Template, default: str, name: str, *, key: str = "") -> str:
    """A caption from its template: no format codes, `{name}` alone; lone surrogates replaced.

    Of several templates `key`, the sample's name, chooses one. "a {name}" becomes "an {name}" before a vowel's sound.
    """
    if isinstance(template, tuple):
        template = template[zlib.crc32(key.encode("utf-8", "replace")) % len(template)]
    template = template or default
    if AN.match(name):
        template = A_NAME.sub(r"\1n {name}", template)
    text = " ".join(template.replace("{name}", name).split())
    return text.encode("utf-8", "replace").decode()[:MAX_CAPTION_CHARS]

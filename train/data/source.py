"""The contract of a data source: images with captions, read lazily and repeatably.

for item in read_samples(source.pending(Selection(size=512))):     # Sample, or LeftOut with a reason
"""

from __future__ import annotations

import random
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from kdc_edge.train.data.images import Crop, LeftOut, Shape, read_image
from kdc_edge.train.processes import cores_per_process

Part = Literal["train", "test"]

Template = str | tuple[str, ...] | None  # with {name}; the source's own where None

SET_ASIDE_SEED = 2024
A_NAME = re.compile(r"\b([Aa]) \{name\}")
AN = re.compile(r"(?!uni|eu|use|one\b)[aeiou]|hour|honest", re.IGNORECASE)  # names that take "an"
MAX_CAPTION_CHARS = 1000  # CLIP reads 77 tokens
READERS = 8  # threads at most: more than an encoder can keep up with


@dataclass(frozen=True)
class Selection:
    """Which samples of a source are read, and how their images are cut."""

    size: int  # pixels a side
    samples: int | None = None  # at most; all where None
    seed: int = 0  # of the samples that are drawn, and of random crops
    part: Part = "train"
    crop: Crop = "center"
    buckets: tuple[Shape, ...] = ()  # shapes instead of the square, see `read_image`


@dataclass(frozen=True)
class Sample:
    """One image with its caption; `name` says where it came from."""

    name: str
    image: np.ndarray  # uint8 (size, size, 3), or of a bucket's shape
    caption: str


Pending = Callable[[], Sample]  # a sample not read yet: calling it, in any thread, reads it, or raises LeftOut


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
        """A key for caches: it changes whenever the samples of `pending` change."""
        ...

    def pending(self, selection: Selection) -> Iterator[Pending]:
        """The selected samples, always in the same order, not read yet."""
        ...

    def caption_classes(self) -> dict[str, str]:
        """The class of each caption that is made from a class's name; none where classes are not known."""
        ...

    def notes(self) -> list[str]:
        """Remarks on the data for the user before training: empty classes, rows without an image."""
        ...


def read_samples(pending: Iterable[Pending]) -> Iterator[Sample | LeftOut]:
    """The samples in their order, read ahead by threads: Pillow decodes and resizes without the interpreter's lock.

    Each thread holds one image at full size while it decodes it: 0.3 to 1.1 GB for the largest that is allowed.
    """
    threads = min(cores_per_process(), READERS)
    reading: deque[Future[Sample | LeftOut]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for sample in pending:
                reading.append(pool.submit(_read, sample))
                if len(reading) > 2 * threads:
                    yield reading.popleft().result()
            while reading:
                yield reading.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(sample: Pending) -> Sample | LeftOut:
    try:
        return sample()
    except LeftOut as problem:
        return problem


def read_sample(content: Path | bytes | Image.Image, caption: str, name: str, selection: Selection) -> Sample:
    """An image of an untrusted file with its caption; raises LeftOut as `read_image` does."""
    image = read_image(
        content, size=selection.size, name=name, crop=selection.crop, seed=selection.seed, buckets=selection.buckets
    )
    return Sample(name, image, caption)


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

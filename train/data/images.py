"""Untrusted image files as square RGB arrays: every oddity is either handled or named, none ends a run.

    read_image(Path("rose.jpg"), size=512)      # uint8 (512, 512, 3), or LeftOut with the reason

What is handled and what is left out: kdc_edge/image_files.py; and images that are too small.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from kdc_edge.image_files import BadImage, decode

Crop = Literal["center", "random"]  # of the square that an image is cut to
Shape = tuple[int, int]  # height and width in pixels

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".bin", ".ckpt"})
ENLARGED_AT_MOST = 4  # times; a smaller image is left out


@dataclass(eq=False)
class LeftOut(Exception):
    """A sample that is not trained on: what it is called, and why (a few words, so that they can be counted)."""

    name: str
    reason: str


def read_image(
    content: Path | bytes | Image.Image, *, size: int, name: str = "", crop: Crop = "center", seed: int = 0,
    buckets: Sequence[Shape] = (),
) -> np.ndarray:  # fmt: skip
    """An image's middle square, reduced or enlarged to `size` pixels a side: uint8 (size, size, 3).

    A random square's place depends on `name` and `seed`. Of `buckets`, shapes (h, w), the one with the nearest aspect
    ratio is taken instead of the square: uint8 (h, w, 3).
    Raises LeftOut for an image that cannot be used.
    """

    def check(sides: tuple[int, int]) -> None:
        if min(sides) * ENLARGED_AT_MOST < size:
            raise BadImage(f"smaller than {-(-size // ENLARGED_AT_MOST)} pixels")

    name = name or str(content)[:200]
    place = 0.5
    if crop == "random":
        place = random.Random(f"{seed} {name}".encode("utf-8", "surrogatepass")).random()  # a name may be no UTF-8
    try:
        image = decode(content, check)
    except BadImage as bad:
        raise LeftOut(name, str(bad)) from None
    height, width = nearest_bucket(image.height, image.width, buckets) if buckets else (size, size)
    return np.array(
        ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=(place, place))
    )  # a copy that may be written to


def make_buckets(size: int, unit: int) -> tuple[Shape, ...]:
    """Shapes (h, w) of multiples of `unit` pixels, about as large as a square of `size` pixels and no larger.

    Aspect ratios of 1:2 to 2:1.

    >>> make_buckets(512, 64)
    ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    """
    found = ((size * size // width // unit * unit, width) for width in range(unit, 2 * size + 1, unit))
    return tuple((h, w) for h, w in found if h and 0.5 <= w / h <= 2)


def nearest_bucket(height: int, width: int, buckets: Sequence[Shape]) -> Shape:
    """The shape whose aspect ratio is nearest to an image's, on a logarithmic scale."""
    return min(buckets, key=lambda shape: abs(math.log(shape[1] / shape[0] * height / width)))

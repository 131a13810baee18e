"""Untrusted image files as square RGB arrays: every oddity is either handled or named, none ends a run.

    read_image(Path("rose.jpg"), size=512)      # uint8 (512, 512, 3), or LeftOut with the reason

What is handled and what is left out: kdc_edge/image_files.py; and images that are too small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kdc_edge.image_files import BadImage, decode

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".bin", ".ckpt"})
ENLARGED_AT_MOST = 4  # times; a smaller image is left out


@dataclass(eq=False)
class LeftOut(Exception):
    """A sample that is not trained on: what it is called, and why (a few words, so that they can be counted)."""

    name: str
    reason: str


def read_image(content: Path | bytes | Image.Image, *, size: int, name: str = "") -> np.ndarray:
    """An image's middle square, reduced or enlarged to `size` pixels a side: uint8 (size, size, 3).

    Raises LeftOut for an image that cannot be used.
    """

    def check(sides: tuple[int, int]) -> None:
        if min(sides) * ENLARGED_AT_MOST < size:
            raise BadImage(f"smaller than {-(-size // ENLARGED_AT_MOST)} pixels")

    try:
        image = decode(content, check)
    except BadImage as bad:
        raise LeftOut(name or str(content)[:200], str(bad)) from None
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))  # a copy that may be written to

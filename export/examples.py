"""Images for networks that read one, where no user's image is at hand: seeded, smooth and random.

edit = example_edit(read_model(checkpoint))             # of an inpainting model; None of any other
"""

from __future__ import annotations

import numpy as np

from kdc_edge.editing import MASKED_STRENGTH, Edit
from kdc_edge.manifest import Model


def example_edit(model: Model, seed: int = 0) -> Edit | None:
    """An image of which an inpainting model repaints the middle; None for a model that needs none."""
    if not model.inpainting:
        return None
    side = model.image_size
    (image,) = smooth(np.random.default_rng(seed), [1, 3, side, side])
    mask = np.zeros((side, side), np.bool_)
    mask[side // 4 : -(side // 4), side // 4 : -(side // 4)] = True
    pixels = np.round((image.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    return Edit(pixels, MASKED_STRENGTH, mask)


def smooth(rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    """Values in [-1, 1]; patches of 8 pixels where it is an image."""
    if len(shape) < 4 or shape[-1] % 8 or shape[-2] % 8:
        return rng.uniform(0, 1, shape).astype(np.float32)
    small = rng.uniform(-1, 1, [*shape[:2], shape[2] // 8, shape[3] // 8]).astype(np.float32)
    return small.repeat(8, axis=2).repeat(8, axis=3)

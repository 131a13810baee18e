"""The safety checker: images that it flags are made black, as diffusers' StableDiffusionSafetyChecker does.

    pixels, nsfw = check_image(pipeline.components["safety_checker"], pixels)

CLIP's vision model compares the image with 17 concepts; a score above 0 flags it. Which concepts those are was not
published, and it errs both ways: it is a filter, no guarantee.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from kdc_edge.components import CLIP_SIDE, Component
from kdc_edge.errors import KdcError
from kdc_edge.image import Pixels

# Of the images that CLIP was trained on, by channel (transformers' OPENAI_CLIP_MEAN and OPENAI_CLIP_STD).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
DECIMALS = 3  # to which diffusers rounds the scores


def check_image(checker: Component, pixels: Pixels) -> tuple[Pixels, bool]:
    """The image, black where it is flagged, and whether it is. Raises KdcError for scores that are no numbers."""
    scores = checker(clip_input=clip_input(pixels))
    if not np.isfinite(scores).all():
        raise KdcError("the safety checker's scores are no numbers: use a bundle with fp32 weights")
    flagged = bool((scores.round(DECIMALS) > 0).any())
    return (np.zeros_like(pixels) if flagged else pixels), flagged


def clip_input(pixels: Pixels) -> np.ndarray:
    """Pixels, uint8 (H, W, 3), as CLIP sees them: float32 (1, 3, 224, 224), the middle square, normalized.

    Source: transformers' CLIPImageProcessorPil.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    size = CLIP_SIDE * width // short, CLIP_SIDE * height // short
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - CLIP_SIDE) // 2, (size[0] - CLIP_SIDE) // 2
    square = resized[top : top + CLIP_SIDE, left : left + CLIP_SIDE].astype(np.float32) * np.float32(1 / 255)
    return np.ascontiguousarray(((square - MEAN) / DEVIATION).transpose(2, 0, 1)[None])

"""Images changed by diffusers' pipelines and by ours, from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from kdc_edge import Pipeline
from kdc_edge.image import Pixels, psnr_db

PROMPT = "a red flower"
SEED = 7
# By kdc-edge's name: the class, and what it gets beside the checkpoint's config; the first is few-step students'.
SCHEDULERS: dict[str, tuple[Any, dict[str, object]]] = {
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing"}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}


def photo() -> Image.Image:
    """80 x 72: to be resized."""
    small = np.random.default_rng(1).integers(0, 256, (9, 10, 3), np.uint8)
    return Image.fromarray(small).resize((80, 72), Image.Resampling.BICUBIC)


def mask() -> Image.Image:
    found = Image.new("L", (64, 64))
    found.paste(255, (20, 12, 50, 44))
    return found


def by_diffusers(checkpoint: Path, scheduler: str, steps: int, strength: float, *, masked: bool) -> Pixels:
    """The image of diffusers' pipeline for a text-to-image model: uint8 (64, 64, 3)."""
    whole = StableDiffusionPipeline.from_pretrained(checkpoint)
    kind, options = SCHEDULERS[scheduler]
    parts = whole.components | {"scheduler": kind.from_config(dict(whole.scheduler.config), **options)}
    image = photo().resize((64, 64), Image.Resampling.LANCZOS)
    given: dict[str, Any] = {"image": image}
    if masked:
        pipeline: Any = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        given |= {"mask_image": mask(), "height": 64, "width": 64}
    else:
        pipeline = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    (found,) = pipeline(
        PROMPT, **given, strength=strength, num_inference_steps=steps, guidance_scale=3.0,
        generator=torch.Generator("cpu").manual_seed(SEED), output_type="np",
    ).images  # fmt: skip
    return np.asarray((found * 255).round(), np.uint8)


def closeness_db(
    pipeline: Pipeline, checkpoint: Path, scheduler: str, *, masked: bool, steps: int = 4, strength: float = 0.6
) -> float:
    """PSNR of our image to diffusers', dB."""
    made = pipeline(
        PROMPT, image=photo(), strength=strength, mask_image=mask() if masked else None, num_inference_steps=steps,
        guidance_scale=3.0, seed=SEED, scheduler=scheduler,
    )  # fmt: skip
    expected = by_diffusers(checkpoint, scheduler, steps, strength, masked=masked)
    return psnr_db(np.asarray(made.images[0]), expected)

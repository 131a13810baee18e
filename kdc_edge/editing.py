"""Image to image and inpainting: what sampling begins with where it does not begin with noise alone.

    edit = read_edit(Path("flower.jpg"), size=(512, 512), strength=0.6, mask=Path("mask.png"))
    pipeline.run(Request("a blue flower", edit=edit))

As in diffusers' StableDiffusionImg2ImgPipeline, the image's latents get the noise of a later timestep and the steps
before it are left out (SDEdit, Meng et al. 2021, arXiv 2108.01073). With a mask, as in StableDiffusionInpaintPipeline:
for a text-to-image model the unmasked part of the latents is put back after every step, with the noise of the next; an
inpainting model reads the mask and the masked image's latents beside the noisy latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdc_edge.components import Component
from kdc_edge.errors import InputError, KdcError
from kdc_edge.image import Pixels
from kdc_edge.image_files import MAX_PIXELS, BadImage, ImageLike, at_most, decode, decode_mask
from kdc_edge.noise_schedule import Latents
from kdc_edge.samplers import Sampler

ENCODER = "vae_encoder"
STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # defaults, diffusers' own


@dataclass(frozen=True, eq=False)
class Edit:
    """The image that a request begins with."""

    image: Pixels  # uint8 (H, W, 3), of the request's size
    strength: float = STRENGTH  # the share of the steps that are taken: the image is noisier at the start
    mask: NDArray[np.bool_] | None = None  # (H, W): True is repainted, the rest stays

    @property
    def only_noise(self) -> bool:
        """Does the masked part begin with noise alone?"""
        return self.mask is not None and self.strength == 1

    def skipped(self, steps: int) -> int:
        """Steps that are left out, by diffusers' rule. Raises InputError for a strength that leaves none to take."""
        if not 0 <= self.strength <= 1:  # also refuses nan
            raise InputError(f"strength {self.strength} is out of range: use 0.1 (little changes) to 1 (all)")
        if (taken := int(steps * self.strength)) < 1:
            least = math.ceil(100 / steps) / 100
            raise InputError(
                f"strength {self.strength:g} of {steps} steps is none: use {least:g} or more, or more steps"
            )
        return steps - taken


def read_edit(
    image: ImageLike,
    size: tuple[int, int],
    *,
    strength: float | None = None,
    mask: ImageLike | None = None,
    transparent_is_masked: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Edit:
    """An edit from files or opened images, resized to (width, height) as diffusers' VaeImageProcessor does.

    `strength` None: 0.8, or 1 with a mask. Raises InputError for a file that is no image, or too large.
    """
    check = at_most(max_pixels)
    pixels = np.asarray(_named(lambda: decode(image, check), image, "image").resize(size, Image.Resampling.LANCZOS))
    if strength is None:
        strength = STRENGTH if mask is None else MASKED_STRENGTH
    if mask is None:
        return Edit(pixels, strength)
    grey = _named(lambda: decode_mask(mask, check, transparent_is_masked=transparent_is_masked), mask, "mask")
    masked = np.asarray(grey.resize(size, Image.Resampling.LANCZOS)) >= 128  # 0.5 of 255, rounded up
    if not masked.any():
        raise InputError("the mask is black all over, so that nothing is repainted: paint that part white")
    return Edit(pixels, strength, masked)


def check_edits(edits: Sequence[Edit | None], size: tuple[int, int], steps: int, *, inpainting: bool) -> None:
    """Raise InputError for edits that cannot be made, or not in one batch; `size` is (height, width) in pixels.

    `inpainting`: the model is one, which needs an image and a mask.
    """
    if inpainting and any(edit is None or edit.mask is None for edit in edits):
        raise InputError(
            "this is an inpainting model, which repaints a part of an image: give an image and a mask, white where it"
            " repaints"
        )
    kinds = {None if edit is None else (edit.strength, edit.mask is None) for edit in edits}
    if len(kinds) > 1:
        raise InputError("images of one batch share the strength, and all or none have a mask: make these one by one")
    for edit in edits:
        if edit is None:
            continue
        edit.skipped(steps)
        masked = edit.image.shape[:2] if edit.mask is None else edit.mask.shape
        if edit.image.shape != (*size, 3) or edit.image.dtype != np.uint8 or masked != size:
            raise InputError(
                f"an edit needs a uint8 image (and a mask) of the request's size, {size[1]}x{size[0]}, not"
                f" {edit.image.dtype} {edit.image.shape}"
            )


@dataclass(frozen=True)
class Begin:
    """What the latents of a batch begin with, and are held to."""

    latents: Latents | None  # of the images, clean; None where the samples begin with noise alone and need none
    noise: Latents  # unit normal
    mask: NDArray[np.float32] | None = None  # (B, 1, h, w): 1 is repainted
    only_noise: bool = False  # the images show in the unmasked part alone
    masked: Latents | None = None  # of the images without their masked part, for a U-Net that reads these and the mask

    def start(self, sampler: Sampler) -> Latents:
        """The sample of the first step."""
        if self.only_noise or self.latents is None:
            return self.noise * np.float32(sampler.init_noise_sigma)
        return sampler.add_noise(self.latents, self.noise, sampler.first)

    def extend(self, sample: Latents) -> Latents:
        """The U-Net's input (B, C or 2C + 1, h, w) for a sample as the scheduler scales it."""
        if self.masked is None:
            return sample
        return np.concatenate([sample, self.mask, self.masked], axis=1)

    def hold(self, sample: Latents, sampler: Sampler, i: int) -> Latents:
        """The sample after step i, with the unmasked part as it would be had the images got the next step's noise."""
        if self.mask is None or self.latents is None or self.masked is not None:
            return sample
        last = i == len(sampler.timesteps) - 1
        kept = self.latents if last else sampler.add_noise(self.latents, self.noise, i + 1)
        return (1 - self.mask) * kept + self.mask * sample


def encode_edits(
    encoder: Component,
    edits: Sequence[Edit],
    *,
    drawn: Latents | None,
    noise: Latents,
    masked: Latents | None,
    scaling_factor: float,
) -> Begin:
    """The batch's beginning.

    `drawn`, `noise` and `masked` are unit normal (B, C, h, w), which diffusers' generator makes in this order: for a
    draw from the encoder's distribution of the images, for the initial latents, and for a draw for the images without
    their masked part. `drawn` is None where the images' latents are not needed, `masked` where the U-Net does not read
    them. An image that several edits share is encoded once.
    """
    latents = without = mask = None
    if drawn is not None:
        images = [edit.image for edit in edits]
        latents = _encode(encoder, images, {id(i): _sample(i) for i in images}, drawn) * np.float32(scaling_factor)
    if masked is not None:  # the masked part is 0, in the middle of [-1, 1]
        samples = {id(e): _sample(e.image) * ~e.mask for e in edits if e.mask is not None}
        without = _encode(encoder, edits, samples, masked) * np.float32(scaling_factor)
    height, width = noise.shape[2:]
    masks = [edit.mask for edit in edits if edit.mask is not None]
    if masks:  # nearest, as torch's interpolate takes it: the upper left pixel of each latent
        scale = masks[0].shape[0] // height, masks[0].shape[1] // width
        mask = np.stack([m[:: scale[0], :: scale[1]] for m in masks])[:, None].astype(np.float32)
    return Begin(latents, noise, mask, edits[0].only_noise, without)


def _sample(image: Pixels) -> NDArray[np.float32]:
    """(3, H, W) in [-1, 1]."""
    return (image.astype(np.float32) / np.float32(127.5) - 1).transpose(2, 0, 1)


def _encode(
    encoder: Component, keys: Sequence[object], samples: Mapping[int, NDArray[np.float32]], drawn: Latents
) -> Latents:
    """Draws (B, C, h, w) from the encoder's distributions, not yet scaled; a sample is that of its key's id."""
    parameters = {key: encoder(sample=np.ascontiguousarray(sample[None])) for key, sample in samples.items()}
    found = np.concatenate([parameters[id(key)] for key in keys])  # (B, 2C, h, w)
    if not np.isfinite(found).all():
        raise KdcError("the encoder's latents hold values that are no numbers: use a bundle with fp32 weights")
    return draw_latents(found, drawn)


def draw_latents(parameters: Latents, noise: Latents) -> Latents:
    """A draw from the encoder's distribution: mean and log variance (B, 2C, h, w), unit normal (B, C, h, w).

    Source: diffusers' DiagonalGaussianDistribution.
    """
    mean, log_variance = np.split(parameters, 2, axis=1)
    return np.asarray(mean + np.exp(0.5 * np.clip(log_variance, -30, 20)) * noise, np.float32)


def require_encoder(components: Mapping[str, Component]) -> None:
    """Raise InputError where there is no encoder."""
    if ENCODER not in components:
        raise InputError(
            f"this bundle has no {ENCODER}, which reads an image: export it again with kdc-edge export --with {ENCODER}"
        )


def _named(decoded: Callable[[], Image.Image], content: ImageLike, what: str) -> Image.Image:
    try:
        return decoded()
    except BadImage as bad:
        name = f"the {what}" if isinstance(content, bytes | Image.Image) else f"the {what} {content}"
        raise InputError(f"{name} cannot be used: {bad}; give a PNG, JPEG or WebP file") from None

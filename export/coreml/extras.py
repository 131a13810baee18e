"""Further networks for Apple's Swift package: the VAE encoder and the safety checker.

    for name, network in extra_networks(checkpoint, model): ...

The encoder is for image-to-image; the checker, exported where the checkpoint has one, blacks out unsafe images. Neither
is part of our own pipeline, so each is proved here on one input of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdc_edge.bundle import Check, Model
from kdc_edge.errors import CheckpointError
from kdc_edge.export.coreml.apple_modules import AppleNetwork, floats
from kdc_edge.export.parity import compare
from kdc_edge.formats import Format
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program
from kdc_edge.runtimes.torch import load_network
from kdc_edge.text import one_line

EXTRAS = {"vae_encoder": "VAEEncoder", "safety_checker": "SafetyChecker"}


class AppleVaeEncoder(nn.Module):
    """An image (1, 3, 8h, 8w) in [-1, 1] and noise -> latents (1, C, h, w) with the noise of the first step."""

    def __init__(self, network: Any, scaling_factor: float) -> None:
        super().__init__()
        self.encoder, self.quant_conv = network.encoder, network.quant_conv
        self.scaling_factor = scaling_factor

    def forward(
        self,
        sample: Tensor,
        diagonal_noise: Tensor,
        noise: Tensor,
        sqrt_alphas_cumprod: Tensor,
        sqrt_one_minus_alphas_cumprod: Tensor,
    ) -> Tensor:
        hidden = self.encoder(sample)
        moments = hidden if self.quant_conv is None else self.quant_conv(hidden)
        mean, log_variance = moments.chunk(2, dim=1)
        drawn = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * diagonal_noise
        latent: Tensor = sqrt_alphas_cumprod * drawn * self.scaling_factor + sqrt_one_minus_alphas_cumprod * noise
        return latent


class AppleSafetyChecker(nn.Module):
    """CLIP input (1, 3, S, S), images -> images with unsafe ones black, unsafe or not, scores (1, concepts)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.checker = network

    def forward(self, clip_input: Tensor, images: Tensor, adjustment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        checker = self.checker
        embeds = _unit(checker.visual_projection(checker.vision_model(clip_input)[1]))
        special = embeds @ _unit(checker.special_care_embeds).T - checker.special_care_embeds_weights
        stricter = ((special + adjustment).amax(1, keepdim=True) > 0).float() * 0.01
        scores = embeds @ _unit(checker.concept_embeds).T - checker.concept_embeds_weights
        scores = scores + stricter + adjustment
        unsafe = (scores.amax(1) > 0).float()
        return images * (1 - unsafe)[:, None, None, None], unsafe, scores


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / length


def extra_networks(checkpoint: Path, model: Model) -> Iterator[tuple[str, AppleNetwork]]:
    """The folder's name and the network; the next one is loaded when it is asked for."""
    yield "vae_encoder", _vae_encoder(checkpoint, model)
    if (checkpoint / "safety_checker").is_dir():
        yield "safety_checker", _safety_checker(checkpoint / "safety_checker", model)


def prove(name: str, network: AppleNetwork, package: Path, row: Format) -> Check:
    """The package's last output against PyTorch's, on one smooth random image."""
    rng = np.random.default_rng(0)
    inputs = {n: _smooth(rng, [int(side) for side in t.shape]) for n, t in network.inputs.items()}
    with torch.no_grad():
        found: Any = network.module(*map(torch.from_numpy, inputs.values()))
    output = list(network.outputs)[-1]
    expected = (found[-1] if isinstance(found, tuple) else found).numpy()
    evaluate = Evaluator(read_program(package / PROGRAM))
    return compare(name, [(inputs, expected)], lambda **given: evaluate(**given)[output], row.min_component_psnr_db)


def _smooth(rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    """Values in [-1, 1]; patches of 8 pixels where it is an image."""
    if len(shape) < 4 or shape[-1] % 8 or shape[-2] % 8:
        return rng.uniform(0, 1, shape).astype(np.float32)
    small = rng.uniform(-1, 1, [*shape[:2], shape[2] // 8, shape[3] // 8]).astype(np.float32)
    return small.repeat(8, axis=2).repeat(8, axis=3)


def _vae_encoder(checkpoint: Path, model: Model) -> AppleNetwork:
    network = load_network(checkpoint, "vae_decoder")  # the same file holds both halves
    if not hasattr(network, "quant_conv"):
        raise CheckpointError(f"{checkpoint / 'vae'} is no AutoencoderKL, whose encoder --swift exports: leave it out")
    latents = [1, model.latent_channels, model.latent_size, model.latent_size]
    side = model.image_size
    return AppleNetwork(
        AppleVaeEncoder(network, model.scaling_factor).eval(),
        {
            "sample": floats(1, int(network.config.in_channels), side, side),
            "diagonal_noise": floats(*latents),
            "noise": floats(*latents),
            "sqrt_alphas_cumprod": floats(1, 1),
            "sqrt_one_minus_alphas_cumprod": floats(1, 1),
        },
        {"latent": floats(*latents)},
        {
            "sample": "an image in [-1, 1]",
            "diagonal_noise": "unit normal, for drawing from the encoder's distribution",
            "noise": "unit normal, added to the latents",
            "sqrt_alphas_cumprod": "how much of the image is left at the first step",
            "sqrt_one_minus_alphas_cumprod": "how much noise there is at the first step",
            "latent": "noisy latents",
        },
        "turns an image into latents",
    )


def _safety_checker(folder: Path, model: Model) -> AppleNetwork:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    try:
        network = StableDiffusionSafetyChecker.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # both libraries raise whatever comes
        raise CheckpointError(f"{folder} cannot be read as a safety checker: {one_line(error)}") from None
    side = int(network.config.vision_config.image_size)
    images = [1, model.image_size, model.image_size, 3]
    return AppleNetwork(
        AppleSafetyChecker(network.float().eval()),
        {"clip_input": floats(1, 3, side, side), "images": floats(*images), "adjustment": floats(1)},
        {
            "filtered_images": floats(*images),
            "has_nsfw_concepts": floats(1),
            "concept_scores": floats(1, len(network.concept_embeds)),
        },
        {
            "clip_input": "the image as CLIP sees it, normalized",
            "images": "images to make black where they are unsafe",
            "adjustment": "added to every score: more is stricter",
            "filtered_images": "the images, black where they are unsafe",
            "has_nsfw_concepts": "1 where the image is unsafe",
            "concept_scores": "above 0 where a concept is in the image",
        },
        "says whether an image is safe to show",
    )

"""The networks for Core ML: exportable modules wrapped in Apple's names, shapes and layouts.

    network = apple_network(part, model, unet_batch=2)
    network.module(*network.samples()), network.inputs["sample"].shape          # (2, 4, 64, 64)

Names and layouts are those of Apple's Swift package: float token ids, text embeddings with channels before tokens, one
timestep per sample. All shapes are fixed, because Core ML plans its memory ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdc_edge.components import CHECKER, CLIP_SIDE
from kdc_edge.export.components import ExportComponent, TextEncoder, UNet, VaeDecoder
from kdc_edge.manifest import Model
from kdc_edge.manifest import Tensor as TensorInfo
from kdc_edge.runtimes.torch import concept_scores


class AppleTextEncoder(TextEncoder):
    """ids float (1, 77) -> hidden states (1, 77, D), pooled (1, D)."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(input_ids.to(torch.int32))


class AppleUNet(UNet):
    """sample (B, C, h, w), timestep (B), text (B, D, 1, 77) -> prediction (B, C, h, w); see UNet."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: Tensor | None = None
    ) -> Tensor:
        return super().forward(sample, timestep, encoder_hidden_states.squeeze(2).transpose(1, 2), timestep_cond)


class AppleVaeDecoder(VaeDecoder):
    """z (1, C, h, w) -> image (1, 3, 8h, 8w) in [-1, 1]."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z)


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
        scores: Tensor = concept_scores(self.checker, clip_input, adjustment)
        unsafe = (scores.amax(1) > 0).float()
        return images * (1 - unsafe)[:, None, None, None], unsafe, scores


@dataclass(frozen=True)
class AppleNetwork:
    """A traceable module with its inputs and outputs."""

    module: nn.Module
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    descriptions: Mapping[str, str]  # by input or output name
    purpose: str

    def samples(self) -> list[Tensor]:
        """One input each, for the tracer."""
        return [torch.ones(cast(list[int], info.shape)) for info in self.inputs.values()]


def apple_network(part: ExportComponent, model: Model, *, unet_batch: int) -> AppleNetwork:
    """The component in Apple's layout; it shares the weights of `part`."""
    latents = [model.latent_channels, model.latent_size, model.latent_size]
    tokens = part.config.tokens
    described = part.config.output_shapes
    inner: Any = part.module
    if part.name == "text_encoder":
        width = int(described["last_hidden_state"][2])
        return AppleNetwork(
            AppleTextEncoder(inner.text_encoder),
            {"input_ids": floats(1, tokens)},
            {"last_hidden_state": floats(1, tokens, width), "pooled_outputs": floats(1, width)},
            {
                "input_ids": f"token ids of the prompt as floats, padded to {tokens}",
                "last_hidden_state": "the text as the U-Net reads it: one vector a token",
                "pooled_outputs": "the text as one vector; the U-Net does not read it",
            },
            "reads a prompt",
        )
    if part.name == "unet":
        width = int(part.config.input_shapes["encoder_hidden_states"][2])
        embedding = model.guidance_embedding
        guidance = {} if embedding is None else {"timestep_cond": floats(unet_batch, embedding)}
        return AppleNetwork(
            AppleUNet(inner.unet),
            {
                "sample": floats(unet_batch, model.unet_channels, *latents[1:]),
                "timestep": floats(unet_batch),
                "encoder_hidden_states": floats(unet_batch, width, 1, tokens),
                **guidance,
            },
            {"noise_pred": floats(unet_batch, int(described["out_sample"][1]), *latents[1:])},
            {
                "sample": "noisy latents, scaled as the sampler wants them",
                "timestep": "how far the noise has come, one a sample, as a float",
                "encoder_hidden_states": "the text encoder's last hidden state, channels first",
                "timestep_cond": "the guidance scale's embedding",
                "noise_pred": "the noise in the sample, as the network sees it",
            },
            "predicts the noise in latents",
        )
    side = model.image_size
    if part.name == "vae_encoder":
        return AppleNetwork(
            AppleVaeEncoder(inner.vae, model.scaling_factor),
            {
                "sample": floats(1, int(part.config.input_shapes["sample"][1]), side, side),
                "diagonal_noise": floats(1, *latents),
                "noise": floats(1, *latents),
                "sqrt_alphas_cumprod": floats(1, 1),
                "sqrt_one_minus_alphas_cumprod": floats(1, 1),
            },
            {"latent": floats(1, *latents)},
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
    if part.name == CHECKER:
        return AppleNetwork(
            AppleSafetyChecker(inner.checker),
            {
                "clip_input": floats(1, 3, CLIP_SIDE, CLIP_SIDE),
                "images": floats(1, side, side, 3),
                "adjustment": floats(1),
            },
            {
                "filtered_images": floats(1, side, side, 3),
                "has_nsfw_concepts": floats(1),
                "concept_scores": floats(1, int(described["concept_scores"][1])),
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
    return AppleNetwork(
        AppleVaeDecoder(inner.vae),
        {"z": floats(1, *latents)},
        {"image": floats(1, int(described["sample"][1]), side, side)},
        {
            "z": "latents, divided by the scaling factor",
            "image": "the image in [-1, 1]",
        },
        "turns latents into an image",
    )


def floats(*shape: int) -> TensorInfo:
    """A float32 tensor of these sizes, as the manifest lists it."""
    return TensorInfo(dtype="float32", shape=list(shape))

"""Quality per task, and what a sequence of tasks did to it.

R[i][j] is the quality on task j after training task i (Lopez-Paz and Ranzato, arXiv 1706.08840). Forgetting is the
maximum over time minus the last (Chaudhry et al., arXiv 1801.10112); libraries that take the first minus the last
give other numbers. For the garden, quality is the prompt accuracy that the judge reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from kdc_edge.image import to_pixels
from kdc_edge.noise import initial_latents
from kdc_edge.schedulers import NoiseSchedule, make_sampler
from kdc_edge.train.data import GardenSource, Source, TextEmbedder
from kdc_edge.train.garden import Scene
from kdc_edge.train.judge import LABELS, load_judge


@dataclass(frozen=True)
class Score:
    """What the judge found on one task. Both are shares in [0, 1]."""

    accuracy: float  # of the asked attributes, the share that is in the picture
    exact: float  # of the pictures, the share with every attribute right


@dataclass(frozen=True)
class Generator:
    """Networks that turn prompts into pictures, many at a time."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    embed: TextEmbedder
    schedule: NoiseSchedule
    steps: int = 12
    guidance: float = 4.0
    sampler: str = "dpm++2m"

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], *, seed: int, batch_size: int = 16) -> np.ndarray:
        """Pictures uint8 (N, H, W, 3); picture i depends on its prompt, `seed` and i."""
        return np.concatenate(
            [self._batch(prompts[at : at + batch_size], seed + at) for at in range(0, len(prompts), batch_size)]
        )

    def _batch(self, prompts: Sequence[str], seed: int) -> np.ndarray:
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        device, count = self.unet.device, len(prompts)
        hidden = self.embed([""] * count + list(prompts)).to(device)  # (2B, 77, D)
        sampler = make_sampler(self.sampler, self.schedule, self.steps)
        latents = initial_latents((count, channels, side, side), seed) * np.float32(sampler.init_noise_sigma)
        for i, timestep in enumerate(sampler.timesteps):
            sample = torch.from_numpy(sampler.scale_model_input(latents, i)).repeat(2, 1, 1, 1).to(device)
            without, with_ = (
                self.unet(sample, int(timestep), hidden).sample.float().cpu().numpy().reshape(2, *latents.shape)
            )
            latents = sampler.step(without + np.float32(self.guidance) * (with_ - without), i, latents)
        scaled = torch.from_numpy(latents / np.float32(self.vae.config.scaling_factor)).to(device, self.vae.dtype)
        return to_pixels(self.vae.decode(scaled).sample.float().cpu().numpy())


def evaluation_scenes(source: GardenSource, count: int) -> list[Scene]:
    """The prompts that every evaluation of a garden task asks: half of them of combinations held out of training."""
    heldout = source.scenes(count // 2, seed=2024, split="heldout")
    return source.scenes(count - count // 2, seed=2024, split="train") + heldout


def evaluate(generator: Generator, source: Source, *, pictures: int) -> Score:
    """The generator's prompt accuracy on a garden task."""
    assert isinstance(source, GardenSource)  # other sources bring their metrics with them
    chosen = evaluation_scenes(source, pictures)
    found = load_judge().agreement(generator([s.caption for s in chosen], seed=7), chosen)
    return Score(accuracy=float(np.mean([found[n] for n in LABELS])), exact=found["all"])


def average(matrix: Sequence[Sequence[float]]) -> float:
    """mean_j R[T-1][j]: the quality at the end."""
    return float(np.mean(matrix[-1]))


def backward_transfer(matrix: Sequence[Sequence[float]]) -> float | None:
    """mean_{j<T-1} (R[T-1][j] - R[j][j]): what later tasks gave to earlier ones; None for a single task."""
    r = np.asarray(matrix)
    return float(np.mean(r[-1, :-1] - np.diag(r)[:-1])) if len(r) > 1 else None


def forgetting(matrix: Sequence[Sequence[float]]) -> float | None:
    """mean_{j<T-1} (max_i R[i][j] - R[T-1][j]), maximum minus last; None for a single task."""
    r = np.asarray(matrix)
    return float(np.mean((r.max(axis=0) - r[-1])[:-1])) if len(r) > 1 else None

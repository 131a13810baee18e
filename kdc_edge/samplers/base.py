"""What every sampler is, and what most of them share."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdc_edge.errors import InputError
from kdc_edge.noise import Noise
from kdc_edge.noise_schedule import Latents, NoiseSchedule


class Sampler(Protocol):
    """What the pipeline asks of a sampler. Calls come in order: i = first, first + 1, ... len(timesteps) - 1."""

    timesteps: NDArray[Any]  # (n,), in the order of visits; PNDM visits steps + 1, Heun 2 steps - 1
    init_noise_sigma: float  # the initial noise is multiplied by this
    first: int  # index of the first call; past 0 where sampling begins with an image's latents

    def skip(self, steps: int) -> None:
        """Begin after so many steps; to be called before the first one."""
        ...

    def add_noise(self, latents: Latents, noise: Latents, i: int) -> Latents:
        """Clean latents with the noise of the i-th timestep, (B, C, h, w) each, as `step` takes them."""
        ...

    def scale_model_input(self, sample: Latents, i: int) -> Latents: ...

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents: ...


class BaseSampler:
    """Unit noise at the start, and the U-Net sees the sample as it is."""

    init_noise_sigma = 1.0
    first = 0
    calls_a_step = 1

    def __init__(self, schedule: NoiseSchedule, steps: int, timesteps: NDArray[Any]) -> None:
        if timesteps.max() >= schedule.num_train_timesteps:
            raise InputError(
                f"{steps} steps with '{schedule.timestep_spacing}' spacing start past the last timestep "
                "that was trained: ask for fewer steps"
            )
        self.schedule = schedule
        self.timesteps = timesteps

    def scale_model_input(self, sample: Latents, i: int) -> Latents:  # noqa: ARG002
        return sample

    def skip(self, steps: int) -> None:
        self.first = steps * self.calls_a_step


def noised(latents: Latents, noise: Latents, signal: float) -> Latents:
    """x = sqrt(a) x0 + sqrt(1 - a) eps, in float32: (B, C, h, w) each, `signal` = a."""
    return np.float32(math.sqrt(signal)) * latents + np.float32(math.sqrt(1 - signal)) * noise


def draw_fresh(noise: Noise, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Noise for one step, from the stream that gave the initial latents: in diffusers' pipeline one generator
    serves both. A stream that is new passes by the draw of the initial latents first."""
    if noise.fresh:
        noise.draw(shape)
    return noise.draw(shape)


def karras_sigmas(highest: float, lowest: float, steps: int) -> NDArray[np.float64]:
    """`steps` noise levels, falling: Karras et al. 2022 (arXiv 2206.00364), eq. 5 with rho = 7."""
    high, low = highest ** (1 / 7), lowest ** (1 / 7)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** 7)


def timesteps_at(sigmas: NDArray[np.float64], schedule: NoiseSchedule) -> NDArray[np.float64]:
    """The timesteps that carry these noise levels, with fractions: (n,) -> (n,)."""
    known = np.log(schedule.sigmas)
    return np.asarray(np.interp(np.log(sigmas), known, np.arange(len(known))))

"""Samplers on x / sqrt(a), where noise is simply added and the U-Net's input is scaled back: Euler and its kin.

With "linspace" spacing and with Karras' noise levels the timesteps have fractions, as in diffusers, so that they
are float32.
"""

from __future__ import annotations

import math

import numpy as np

from kdc_edge.noise import Noise
from kdc_edge.noise_schedule import Latents, NoiseSchedule
from kdc_edge.samplers.base import BaseSampler, draw_fresh, karras_sigmas, timesteps_at


class Euler(BaseSampler):
    """Karras et al. 2022, Elucidating the Design Space (arXiv 2206.00364), algorithm 2 without churn."""

    def __init__(self, schedule: NoiseSchedule, steps: int, *, karras: bool = False) -> None:
        timesteps = schedule.spaced(steps, points=steps)
        super().__init__(schedule, steps, timesteps.astype(np.float32))
        sigmas = schedule.sigma_at(timesteps)
        if karras:
            sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
            self.timesteps = timesteps_at(sigmas, schedule).astype(np.float32)
        self.sigmas: list[float] = [*sigmas.tolist(), 0.0]
        spread = max(self.sigmas)
        self.init_noise_sigma = math.hypot(spread, 1) if schedule.timestep_spacing == "leading" else spread

    def scale_model_input(self, sample: Latents, i: int) -> Latents:
        return sample / math.hypot(self.sigmas[i], 1)

    def add_noise(self, latents: Latents, noise: Latents, i: int) -> Latents:
        return latents + np.float32(self.sigmas[i]) * noise

    def slope(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        """dx / dsigma at the i-th noise level: the noise in the sample, beside x0 within its bounds."""
        sigma = self.sigmas[i]
        x0, eps = self.schedule.split(noise_pred, self.scale_model_input(sample, i), 1 / (sigma**2 + 1))
        bounded = self.schedule.bound(x0)
        return eps if bounded is x0 else (sample - bounded) / sigma

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        return sample + (self.sigmas[i + 1] - self.sigmas[i]) * self.slope(noise_pred, i, sample)


class EulerAncestral(Euler):
    """Euler's step to a lower noise level than the next, then fresh noise up to it (k-diffusion's
    sample_euler_ancestral; DDPM's variance, Ho et al. 2020)."""

    def __init__(self, schedule: NoiseSchedule, steps: int, noise: Noise) -> None:
        super().__init__(schedule, steps)
        self.noise = noise

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        up = sigma_next * math.sqrt(max(0.0, sigma**2 - sigma_next**2)) / sigma
        down = math.sqrt(max(0.0, sigma_next**2 - up**2))
        x = sample + (down - sigma) * self.slope(noise_pred, i, sample)
        return x + up * draw_fresh(self.noise, sample.shape)


class Heun(Euler):
    """Karras et al. 2022, algorithm 1: each step again with the mean of the slopes at its two ends.

    Visits every timestep but the first twice: as the end of one step and the start of the next.
    """

    calls_a_step = 2

    def __init__(self, schedule: NoiseSchedule, steps: int, *, karras: bool = False) -> None:
        super().__init__(schedule, steps, karras=karras)
        twice = np.repeat(np.arange(steps), 2)[1:]  # 0, 1, 1, 2, 2, ...
        self.timesteps = self.timesteps[twice]
        self.sigmas = [self.sigmas[k] for k in twice] + [0.0]
        self.first_slope: Latents  # at the start of the step
        self.start: Latents

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        slope = self.slope(noise_pred, i, sample)
        if i % 2 == 0:
            self.first_slope, self.start = slope, sample
            return sample + (self.sigmas[i + 1] - self.sigmas[i]) * slope
        return self.start + (self.sigmas[i] - self.sigmas[i - 1]) * (self.first_slope + slope) / 2

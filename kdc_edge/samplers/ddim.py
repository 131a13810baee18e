"""Samplers that go from timestep to timestep along alphas_cumprod: DDIM, PNDM, LCM."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdc_edge.errors import InputError
from kdc_edge.noise import Noise
from kdc_edge.noise_schedule import Latents, NoiseSchedule
from kdc_edge.samplers.base import BaseSampler, draw_fresh, noised


class _TimestepSampler(BaseSampler):
    def __init__(self, schedule: NoiseSchedule, steps: int, timesteps: NDArray[Any]) -> None:
        super().__init__(schedule, steps, timesteps)
        self.stride = schedule.num_train_timesteps // steps
        if schedule.prediction_type == "epsilon" and not self.signal(int(timesteps.max())):
            raise InputError(
                "the scheduler config has rescale_betas_zero_snr with prediction_type = 'epsilon': the last timestep"
                " holds no signal to divide by; take another sampler, such as dpm++2m"
            )

    def signal(self, timestep: int) -> float:
        """alphas_cumprod at a timestep, or the agreed end below zero."""
        if timestep < 0:
            return 1.0 if self.schedule.set_alpha_to_one else float(self.schedule.alphas_cumprod[0])
        return float(self.schedule.alphas_cumprod[timestep])

    def add_noise(self, latents: Latents, noise: Latents, i: int) -> Latents:
        return noised(latents, noise, self.signal(int(self.timesteps[i])))

    def transfer(self, prediction: Latents, x: Latents, start: int, end: int) -> Latents:
        """Carry x from one timestep to another along the prediction: DDIM, eq. 12 with no fresh noise.

        PNDM's eq. 9 is the same map, written in one fraction.
        """
        x0, eps = self.schedule.split(prediction, x, self.signal(start))
        a = self.signal(end)
        return math.sqrt(a) * self.schedule.bound(x0) + math.sqrt(1 - a) * eps


class DDIM(_TimestepSampler):
    """Song et al. 2020, Denoising Diffusion Implicit Models (arXiv 2010.02502), eq. 12 with eta = 0."""

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        super().__init__(schedule, steps, schedule.spaced(steps, points=steps).round().astype(np.int64))

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        t = int(self.timesteps[i])
        return self.transfer(noise_pred, sample, t, t - self.stride)


class PNDM(_TimestepSampler):
    """Liu et al. 2022, Pseudo Numerical Methods (arXiv 2202.09778), algorithm 2 without Runge-Kutta steps.

    Stable Diffusion's first default ("PLMS"): the first step is taken twice, as predictor and corrector, then
    come Adams-Bashforth steps of order two to four. Visits steps + 1 timesteps, or 1 for one step.
    """

    # Adams-Bashforth, for two, three and four predictions, the newest first.
    WEIGHTS = ((3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        once = schedule.spaced(steps, points=steps).round().astype(np.int64)
        super().__init__(schedule, steps, np.concatenate([once[:2], once[1:2], once[2:]]))
        self.history: list[Latents] = []  # the newest prediction first
        self.start: Latents

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        t = int(self.timesteps[i])
        i -= self.first  # begun with an image, it repeats the second timestep that it visits, as diffusers does
        if i == 0:
            self.history, self.start = [noise_pred], sample
            return self.transfer(noise_pred, sample, t, t - self.stride)
        if i == 1:  # the first step again, with the mean of the slopes at its two ends
            return self.transfer((noise_pred + self.history[0]) / 2, self.start, t + self.stride, t)
        self.history = [noise_pred, *self.history[:3]]
        weights = self.WEIGHTS[len(self.history) - 2]
        slope = np.add.reduce([w * e for w, e in zip(weights, self.history, strict=True)])
        return self.transfer(slope, sample, t, t - self.stride)


class LCM(_TimestepSampler):
    """Luo et al. 2023, Latent Consistency Models (arXiv 2310.04378), algorithm 3: jump to x0, add less noise.

    The timesteps come from those that such a model was distilled on, 50 by default, whatever the spacing.
    """

    SIGMA_DATA = 0.5  # c_skip, c_out: appendix C

    def __init__(self, schedule: NoiseSchedule, steps: int, noise: Noise) -> None:
        n = schedule.original_inference_steps
        if steps > n or schedule.num_train_timesteps < n:
            raise InputError(f"lcm takes 1 to {n} steps of a schedule of at least {n}, not {steps}: ask for 4 to 8")
        origins = (np.arange(n, 0, -1) * (schedule.num_train_timesteps // n) - 1).astype(np.int64)
        super().__init__(schedule, steps, origins[np.linspace(0, n, steps, endpoint=False).astype(np.int64)])
        self.noise = noise

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        t = int(self.timesteps[i])
        x0, _ = self.schedule.split(noise_pred, sample, self.signal(t))
        scaled = self.schedule.timestep_scaling * t
        reach = math.hypot(scaled, self.SIGMA_DATA)
        x0 = (scaled / reach) * self.schedule.bound(x0) + (self.SIGMA_DATA / reach) ** 2 * sample
        if i == len(self.timesteps) - 1:
            return x0
        a = self.signal(int(self.timesteps[i + 1]))
        return math.sqrt(a) * x0 + math.sqrt(1 - a) * draw_fresh(self.noise, sample.shape)

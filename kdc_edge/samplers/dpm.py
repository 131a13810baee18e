"""Samplers in steps of log(sqrt(a) / sqrt(1 - a)) = -log(sigma): DPM-Solver++, its stochastic forms, DEIS, UniPC."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from kdc_edge.errors import InputError
from kdc_edge.noise import Noise
from kdc_edge.noise_schedule import Latents, NoiseSchedule
from kdc_edge.samplers.base import BaseSampler, draw_fresh, karras_sigmas, noised, timesteps_at


class _LogSampler(BaseSampler):
    """With `karras` the U-Net is told the nearest timesteps (for squaredcos_cap_v2 DPM-Solver++ of diffusers cuts
    the fractions off instead)."""

    def __init__(self, schedule: NoiseSchedule, steps: int, *, karras: bool) -> None:
        if karras:
            sigmas = karras_sigmas(schedule.sigmas[-1], schedule.sigmas[0], steps)
            timesteps = timesteps_at(sigmas, schedule)
        else:
            timesteps = schedule.spaced(steps, points=steps + 1).round()
            sigmas = schedule.sigma_at(timesteps)
        super().__init__(schedule, steps, timesteps.round().astype(np.int64))
        if len(np.unique(sigmas)) < steps:
            raise InputError(
                f"{steps} steps with '{schedule.timestep_spacing}' spacing visit one noise level twice, "
                "which no multistep sampler can: ask for fewer steps, or for dpm++2m-karras"
            )
        self.sigmas: list[float] = [*sigmas.tolist(), 0.0]

    def signal(self, i: int) -> float:
        """a at the i-th noise level."""
        return 1 / (self.sigmas[i] ** 2 + 1)

    def add_noise(self, latents: Latents, noise: Latents, i: int) -> Latents:
        return noised(latents, noise, self.signal(i))

    def log_step(self, i: int, j: int) -> float:
        """From the i-th noise level to the j-th, in -log(sigma)."""
        return math.log(self.sigmas[i] / self.sigmas[j]) if self.sigmas[j] else math.inf

    def image(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        """x0 within its bounds."""
        x0, _ = self.schedule.split(noise_pred, sample, self.signal(i))
        return self.schedule.bound(x0)


class DPMSolver(_LogSampler):
    """Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095), second order, midpoint; first order at the end.

    Multistep (2M, algorithm 2): each step goes on along the change of x0 since the step before. `single`
    (2S, algorithm 1): every second step is taken again from where the one before it started.
    `noise`: the stochastic form (SDE-DPM-Solver++, appendix B of the paper's second version).
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        steps: int,
        *,
        karras: bool = False,
        single: bool = False,
        noise: Noise | None = None,
    ) -> None:
        if single:  # diffusers' singlestep scheduler has this spacing alone
            schedule = replace(schedule, timestep_spacing="linspace")
        super().__init__(schedule, steps, karras=karras)
        self.single = single
        self.noise = noise
        self.last_x0: Latents
        self.start: Latents  # of a pair of single steps

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        x0 = self.image(noise_pred, i, sample)
        last = i == len(self.timesteps) - 1
        second = i > self.first and not last and (not self.single or i % 2 == 1)
        start, target = i, x0
        if second and not self.single:
            r = self.log_step(i - 1, i) / self.log_step(i, i + 1)
            target = x0 + (x0 - self.last_x0) / (2 * r)
        elif second:
            start, sample = i - 1, self.start
            r = self.log_step(i - 1, i) / self.log_step(i - 1, i + 1)
            target = self.last_x0 + (x0 - self.last_x0) / (2 * r)
        self.last_x0, self.start = x0, sample
        return self.advance(start, i + 1, sample, target)

    def advance(self, i: int, j: int, sample: Latents, target: Latents) -> Latents:
        """From the i-th to the j-th noise level, towards the image `target`."""
        a, a_next = self.signal(i), self.signal(j)
        decay = self.sigmas[j] / self.sigmas[i]  # exp(-h), h the step in -log(sigma)
        if self.noise is None:
            return decay * math.sqrt(a_next / a) * sample + math.sqrt(a_next) * (1 - decay) * target
        fresh = self.sigmas[j] * math.sqrt(a_next * (1 - decay**2)) * draw_fresh(self.noise, sample.shape)
        mean = decay**2 * math.sqrt(a_next / a) * sample + math.sqrt(a_next) * (1 - decay**2) * target
        return mean + fresh


class DEIS(_LogSampler):
    """Zhang and Chen 2022, DEIS (arXiv 2204.13902), in log(sigma), second order; it ends at the noise of timestep 0.

    As in diffusers the last step is of first order where there are fewer than 15.
    """

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        super().__init__(schedule, steps, karras=False)
        self.sigmas[-1] = float(schedule.sigmas[0])
        self.last_noise: Latents

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        a, a_next = self.signal(i), self.signal(i + 1)
        noise = (sample - math.sqrt(a) * self.image(noise_pred, i, sample)) / math.sqrt(1 - a)
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        change = (following - sigma) * noise
        last = i == len(self.timesteps) - 1
        if i > self.first and not (last and len(self.timesteps) < 15):
            # the integral of log(s / sigma) over s, by which the noise goes on along its change in log(sigma)
            along = following * (math.log(following / sigma) - 1) + sigma
            change = change + along / math.log(sigma / self.sigmas[i - 1]) * (noise - self.last_noise)
        self.last_noise = noise
        return math.sqrt(a_next) * (sample / math.sqrt(a) + change)


class UniPC(_LogSampler):
    """Zhao et al. 2023, UniPC (arXiv 2302.04867), algorithms 5 and 6: order two, B2(h), prediction of x0.

    Each sample is corrected by the image that the U-Net sees in it, then the next one is predicted.
    """

    def __init__(self, schedule: NoiseSchedule, steps: int, *, karras: bool = False) -> None:
        super().__init__(schedule, steps, karras=karras)
        self.images: list[Latents] = []  # the newest first
        self.start: Latents  # the corrected sample of the step before
        self.order = 1  # of the step before

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        x0 = self.image(noise_pred, i, sample)
        if i > self.first:
            sample = self.correct(i, x0)
        self.images = [x0, *self.images[:1]]
        self.start = sample
        self.order = min(2, i + 1 - self.first, len(self.timesteps) - i)
        change: Latents | float = 0.0
        if self.order == 2:
            change = (self.images[1] - x0) / self.ratio(i) / 2
        return self.advance(i, i + 1, sample, change)

    def correct(self, i: int, x0: Latents) -> Latents:
        """The i-th sample anew, from the one before it and the image x0 in it: UniC."""
        before = self.images[0]
        if self.order == 1:
            return self.advance(i - 1, i, self.start, (x0 - before) / 2)
        r, h = self.ratio(i - 1), -self.log_step(i - 1, i)
        phi = math.expm1(h) / h - 1  # h phi_2(h), and below 2 h phi_3(h); B(h) = expm1(h)
        first, second = phi / math.expm1(h), 2 * (phi / h - 0.5) / math.expm1(h)
        older = (first - second) / (1 - r)  # solves older + newer = first, r older + newer = second
        newer = first - older
        return self.advance(i - 1, i, self.start, older * (self.images[1] - before) / r + newer * (x0 - before))

    def ratio(self, i: int) -> float:
        """The step before the i-th noise level over the step after it, negative."""
        return -self.log_step(i - 1, i) / self.log_step(i, i + 1)

    def advance(self, i: int, j: int, sample: Latents, change: Latents | float) -> Latents:
        """From the i-th to the j-th noise level, towards the newest image and on along its `change`."""
        a, a_next = self.signal(i), self.signal(j)
        decay = self.sigmas[j] / self.sigmas[i]
        target = self.images[0] + change
        return decay * math.sqrt(a_next / a) * sample + math.sqrt(a_next) * (1 - decay) * target

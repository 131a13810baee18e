"""The samplers: from noise to an image in a few steps, in numpy, equal to diffusers over whole runs.

A sampler is a small object: `timesteps` to visit, then for each index i `scale_model_input` before the
U-Net and `step` after it. Coefficients are computed in double precision, latents stay float32.

    schedule = NoiseSchedule.from_config(json.loads(scheduler_config))
    sampler = make_sampler("dpm++2m", schedule, steps=20)
    x = initial_latents(shape, seed) * sampler.init_noise_sigma                          # (B, 4, h, w)
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(unet(sampler.scale_model_input(x, i), t), i, x)

Notation: a = alphas_cumprod[t]; x = sqrt(a) x0 + sqrt(1 - a) eps; sigma = sqrt((1 - a) / a).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdc_edge.errors import InputError
from kdc_edge.noise import NormalStream, NormalStreams
from kdc_edge.noise_schedule import Latents, NoiseSchedule, is_integer

__all__ = ["DEFAULT_SAMPLER", "SAMPLERS", "NoiseSchedule", "Sampler", "SamplerKind", "make_sampler"]

DEFAULT_SAMPLER = "dpm++2m"
Noise = NormalStream | NormalStreams


class Sampler(Protocol):
    """What the pipeline asks of a sampler. Calls come in order: i = 0, 1, ... len(timesteps) - 1."""

    timesteps: NDArray[Any]  # (n,), in the order of visits; PNDM visits steps + 1
    init_noise_sigma: float  # the initial noise is multiplied by this

    def scale_model_input(self, sample: Latents, i: int) -> Latents: ...

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents: ...


class _Sampler:
    """What most samplers share: unit noise at the start, and the U-Net sees the sample as it is."""

    init_noise_sigma = 1.0

    def __init__(self, schedule: NoiseSchedule, steps: int, timesteps: NDArray[Any]) -> None:
        if timesteps.max() >= schedule.num_train_timesteps:
            raise InputError(
                f"{steps} steps with '{schedule.timestep_spacing}' spacing start past the last timestep "
                "that was trained: ask for fewer steps"
            )
        self.schedule = schedule
        self.timesteps = timesteps
        self.stride = schedule.num_train_timesteps // steps

    def scale_model_input(self, sample: Latents, i: int) -> Latents:  # noqa: ARG002
        return sample

    def signal(self, timestep: int) -> float:
        """alphas_cumprod at a timestep, or the agreed end below zero."""
        if timestep < 0:
            return 1.0 if self.schedule.set_alpha_to_one else float(self.schedule.alphas_cumprod[0])
        return float(self.schedule.alphas_cumprod[timestep])

    def transfer(self, prediction: Latents, x: Latents, start: int, end: int) -> Latents:
        """Carry x from one timestep to another along the prediction: DDIM, eq. 12 with no fresh noise.

        PNDM's eq. 9 is the same map, written in one fraction.
        """
        x0, eps = self.schedule.split(prediction, x, self.signal(start))
        a = self.signal(end)
        return math.sqrt(a) * x0 + math.sqrt(1 - a) * eps


class DDIM(_Sampler):
    """Song et al. 2020, Denoising Diffusion Implicit Models (arXiv 2010.02502), eq. 12 with eta = 0."""

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        super().__init__(schedule, steps, schedule.spaced(steps, points=steps).round().astype(np.int64))

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        t = int(self.timesteps[i])
        return self.transfer(noise_pred, sample, t, t - self.stride)


class PNDM(_Sampler):
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
        if i == 0:
            self.history, self.start = [noise_pred], sample
            return self.transfer(noise_pred, sample, t, t - self.stride)
        if i == 1:  # the first step again, with the mean of the slopes at its two ends
            return self.transfer((noise_pred + self.history[0]) / 2, self.start, t + self.stride, t)
        self.history = [noise_pred, *self.history[:3]]
        weights = self.WEIGHTS[len(self.history) - 2]
        slope = np.add.reduce([w * e for w, e in zip(weights, self.history, strict=True)])
        return self.transfer(slope, sample, t, t - self.stride)


class Euler(_Sampler):
    """Karras et al. 2022, Elucidating the Design Space (arXiv 2206.00364), algorithm 2 without churn.

    Works on x / sqrt(a), where noise is simply added: the U-Net's input is scaled back. With "linspace"
    spacing the timesteps have fractions, as in diffusers, so that they are float32.
    """

    def __init__(self, schedule: NoiseSchedule, steps: int) -> None:
        timesteps = schedule.spaced(steps, points=steps)
        super().__init__(schedule, steps, timesteps.astype(np.float32))
        self.sigmas: list[float] = [*schedule.sigma_at(timesteps).tolist(), 0.0]
        spread = self.sigmas[0]
        self.init_noise_sigma = math.hypot(spread, 1) if schedule.timestep_spacing == "leading" else spread

    def scale_model_input(self, sample: Latents, i: int) -> Latents:
        return sample / math.hypot(self.sigmas[i], 1)

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        _, eps = self.schedule.split(noise_pred, self.scale_model_input(sample, i), 1 / (sigma**2 + 1))
        return sample + (sigma_next - sigma) * eps


class DPMSolver2M(_Sampler):
    """Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095), algorithm 2 (2M, midpoint); first order at the end.

    With `karras` the noise levels follow Karras et al. 2022, eq. 5 with rho = 7, and the U-Net is told the
    nearest timesteps (for squaredcos_cap_v2 diffusers cuts the fractions off instead).
    """

    def __init__(self, schedule: NoiseSchedule, steps: int, *, karras: bool = False) -> None:
        if karras:
            low, high = schedule.sigmas[[0, -1]] ** (1 / 7)
            sigmas = (high + np.linspace(0, 1, steps) * (low - high)) ** 7
            timesteps = np.interp(np.log(sigmas), np.log(schedule.sigmas), np.arange(len(schedule.sigmas)))
        else:
            timesteps = schedule.spaced(steps, points=steps + 1).round()
            sigmas = schedule.sigma_at(timesteps)
        super().__init__(schedule, steps, timesteps.round().astype(np.int64))
        if len(np.unique(sigmas)) < steps:
            raise InputError(
                f"{steps} steps with '{schedule.timestep_spacing}' spacing visit one noise level twice, "
                "which dpm++2m cannot: ask for fewer steps, or for dpm++2m-karras"
            )
        self.sigmas: list[float] = [*sigmas.tolist(), 0.0]
        self.last_x0: Latents

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        a, a_next = 1 / (sigma**2 + 1), 1 / (sigma_next**2 + 1)
        x0, _ = self.schedule.split(noise_pred, sample, a)
        target = x0
        if i > 0 and sigma_next > 0:  # second order: go on along the change since the last x0
            r = math.log(self.sigmas[i - 1] / sigma) / math.log(sigma / sigma_next)
            target = x0 + (x0 - self.last_x0) / (2 * r)
        self.last_x0 = x0
        decay = sigma_next / sigma  # exp(-h), h the step in log(1 / sigma)
        return decay * math.sqrt(a_next / a) * sample + math.sqrt(a_next) * (1 - decay) * target


class LCM(_Sampler):
    """Luo et al. 2023, Latent Consistency Models (arXiv 2310.04378), algorithm 3: jump to x0, add less noise.

    The timesteps come from the 50 that such models are distilled on, whatever the spacing. `noise` is the
    stream that gave the initial latents: as in diffusers' pipeline, one generator serves both. From a fresh
    stream the first step therefore passes by the draw of the initial latents.
    """

    DISTILLED_STEPS = 50
    SIGMA_DATA = 0.5  # c_skip, c_out: appendix C, with timesteps scaled by 10

    def __init__(self, schedule: NoiseSchedule, steps: int, noise: Noise) -> None:
        n = self.DISTILLED_STEPS
        if steps > n or schedule.num_train_timesteps < n:
            raise InputError(f"lcm takes 1 to {n} steps of a schedule of at least {n}, not {steps}: ask for 4 to 8")
        origins = (np.arange(n, 0, -1) * (schedule.num_train_timesteps // n) - 1).astype(np.int64)
        super().__init__(schedule, steps, origins[np.linspace(0, n, steps, endpoint=False).astype(np.int64)])
        self.noise = noise

    def step(self, noise_pred: Latents, i: int, sample: Latents) -> Latents:
        if self.noise.fresh:
            self.noise.draw(sample.shape)
        t = int(self.timesteps[i])
        x0, _ = self.schedule.split(noise_pred, sample, self.signal(t))
        reach = math.hypot(10 * t, self.SIGMA_DATA)
        x0 = (10 * t / reach) * x0 + (self.SIGMA_DATA / reach) ** 2 * sample
        if i == len(self.timesteps) - 1:
            return x0
        a = self.signal(int(self.timesteps[i + 1]))
        return math.sqrt(a) * x0 + math.sqrt(1 - a) * self.noise.draw(sample.shape)


@dataclass(frozen=True)
class SamplerKind:
    """One row of the table of samplers."""

    title: str  # what common user interfaces call it
    make: Callable[[NoiseSchedule, int, Noise], Sampler]


SAMPLERS: dict[str, SamplerKind] = {
    "ddim": SamplerKind("DDIM", lambda schedule, steps, _: DDIM(schedule, steps)),
    "pndm": SamplerKind("PLMS", lambda schedule, steps, _: PNDM(schedule, steps)),
    "euler": SamplerKind("Euler", lambda schedule, steps, _: Euler(schedule, steps)),
    "dpm++2m": SamplerKind("DPM++ 2M", lambda schedule, steps, _: DPMSolver2M(schedule, steps)),
    "dpm++2m-karras": SamplerKind(
        "DPM++ 2M Karras", lambda schedule, steps, _: DPMSolver2M(schedule, steps, karras=True)
    ),
    "lcm": SamplerKind("LCM", LCM),
}


def make_sampler(
    name: str, schedule: NoiseSchedule, steps: int, *, seed: int = 0, noise: Noise | None = None
) -> Sampler:
    """A fresh sampler for one run. Only "lcm" draws noise of its own.

    It goes on with `noise`, the stream that the initial latents were drawn from; without one, with a stream
    from `seed` as it is after `initial_latents(shape, seed)`.
    Raises InputError for an unknown name, or a number of steps that the sampler cannot take.
    """
    if name not in SAMPLERS:
        raise InputError(f"there is no sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    most = schedule.num_train_timesteps
    if not is_integer(steps) or not 1 <= steps <= most:
        raise InputError(f"{steps!r} steps cannot be taken: ask for 1 to {most}, such as 20")
    return SAMPLERS[name].make(schedule, steps, noise or NormalStream(seed))

"""The noise schedule: how much noise each training timestep carries, and which timesteps a run visits.

A `NoiseSchedule` is what a diffusers scheduler_config.json says. The samplers of samplers.py use it.

    >>> NoiseSchedule.from_config({"num_train_timesteps": 1000}).spaced(4, points=4)
    array([751., 501., 251.,   1.])

Notation: a = alphas_cumprod[t]; x = sqrt(a) x0 + sqrt(1 - a) eps; sigma = sqrt((1 - a) / a).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdc_edge.errors import InputError

Latents = NDArray[Any]  # float32 (B, C, h, w)

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
# Switches of diffusers that change the images and that no sampler here has: on, they are refused.
UNSUPPORTED = ("trained_betas", "rescale_betas_zero_snr", "thresholding", "clip_sample")


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each training timestep carries: what a diffusers scheduler_config.json says about it.

    The defaults are Stable Diffusion 1.x's. Raises InputError for a value that cannot be used.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear", "squaredcos_cap_v2"
    prediction_type: str = "epsilon"  # or "v_prediction"
    steps_offset: int = 1  # added to every timestep of the "leading" spacing
    set_alpha_to_one: bool = False  # DDIM and PNDM end at a = 1 instead of alphas_cumprod[0]
    timestep_spacing: str = "leading"  # or "trailing", "linspace"

    def __post_init__(self) -> None:
        n, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        self._check("beta_schedule", self.beta_schedule in BETA_SCHEDULES, f"one of {BETA_SCHEDULES}")
        self._check("prediction_type", self.prediction_type in PREDICTION_TYPES, f"one of {PREDICTION_TYPES}")
        self._check("timestep_spacing", self.timestep_spacing in SPACINGS, f"one of {SPACINGS}")
        self._check("num_train_timesteps", is_integer(n) and 1 <= n <= 100_000, "an integer from 1 to 100000")
        offset_fits = is_integer(self.steps_offset) and 0 <= self.steps_offset < n
        self._check("steps_offset", offset_fits, "an integer from 0, below num_train_timesteps")
        self._check("set_alpha_to_one", isinstance(self.set_alpha_to_one, bool), "true or false")
        self._check("beta_start", isinstance(start, float) and 0 < start < 1, "a number between 0 and 1")
        self._check("beta_end", isinstance(end, float) and start <= end < 1, "a number from beta_start to 1")

    def _check(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            value = getattr(self, name)
            raise InputError(f"the scheduler config has {name} = {value!r:.80}; it must be {wanted}")

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> NoiseSchedule:
        """From a scheduler_config.json. Unknown keys are ignored, but no switch that changes the images."""
        for name in UNSUPPORTED:
            if config.get(name):
                raise InputError(f"the scheduler config sets {name}, which no sampler here supports: turn it off")
        known: dict[str, Any] = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        return cls(**known)

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """The share of signal that is left at each timestep: (num_train_timesteps,), falling, read-only.

        Rounded to float32 where torch rounds, since the network was trained with those values: near the first
        timesteps 1 - a keeps four digits only, enough to move a Karras timestep by one.
        """
        n = self.num_train_timesteps
        if self.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            signal = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
        elif self.beta_schedule == "linear":  # Ho et al. 2020
            betas = np.linspace(self.beta_start, self.beta_end, n)
        else:  # Rombach et al. 2022: linear in the square root
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, n).astype(np.float32) ** 2
        alphas = np.float32(1) - betas.astype(np.float32)
        alphas_cumprod = np.cumprod(alphas, dtype=np.float64).astype(np.float32).astype(np.float64)
        alphas_cumprod.setflags(write=False)
        return alphas_cumprod

    @cached_property
    def sigmas(self) -> NDArray[np.float64]:
        """The noise-to-signal ratio at each timestep: (num_train_timesteps,), rising."""
        a = self.alphas_cumprod.astype(np.float32)
        return (((1 - a) / a) ** 0.5).astype(np.float64)

    def sigma_at(self, timesteps: NDArray[np.float64]) -> NDArray[np.float64]:
        """The noise-to-signal ratio at timesteps that may have fractions, interpolated: (n,) -> (n,)."""
        return np.interp(timesteps, np.arange(self.num_train_timesteps), self.sigmas)

    def spaced(self, steps: int, *, points: int) -> NDArray[np.float64]:
        """The first `steps` of `points` timesteps, falling (Lin et al. 2023, arXiv 2305.08891, table 2).

        "trailing" takes no notice of `points`, as in diffusers. Where its arithmetic gives a step too many
        (61 of 1000 is such a count) diffusers goes on to timestep -1; here it ends.
        """
        n = self.num_train_timesteps
        if self.timestep_spacing == "leading":
            timesteps = np.arange(points)[::-1] * float(n // points) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            timesteps = np.arange(n, 0, -n / steps).round() - 1
        else:
            timesteps = np.linspace(0, n - 1, points)[::-1]
        return timesteps[:steps].astype(np.float64)

    def split(self, prediction: Latents, x: Latents, a: float) -> tuple[Latents, Latents]:
        """The image x0 and the noise eps that the U-Net sees in x, (B, C, h, w) each, at signal share a.

        Epsilon: Ho et al. 2020, eq. 9. v: Salimans & Ho 2022, section 4 and appendix D.
        """
        signal, noise = math.sqrt(a), math.sqrt(1 - a)
        if self.prediction_type == "v_prediction":
            return signal * x - noise * prediction, signal * prediction + noise * x
        return (x - noise * prediction) / signal, prediction


def is_integer(value: object) -> bool:
    """True for an int that is no bool, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)

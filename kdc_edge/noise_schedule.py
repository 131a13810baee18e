"""The noise schedule: how much noise each training timestep carries, and which timesteps a run visits.

A `NoiseSchedule` is what a diffusers scheduler_config.json says. The samplers of kdc_edge.samplers use it.

    >>> NoiseSchedule.from_config({"num_train_timesteps": 1000}).spaced(4, points=4)
    array([751., 501., 251.,   1.])

Notation: a = alphas_cumprod[t]; x = sqrt(a) x0 + sqrt(1 - a) eps; sigma = sqrt((1 - a) / a).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdc_edge.diffusers_defaults import scheduler_settings
from kdc_edge.errors import InputError

Latents = NDArray[Any]  # float32 (B, C, h, w)

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
LAST_SIGNAL = 2.0**-24  # of a schedule rescaled to zero terminal SNR, where a noise-to-signal ratio must be finite


@dataclass(frozen=True)
class NoiseSchedule:
    """How much noise each training timestep carries: what a diffusers scheduler_config.json says about it.

    The defaults are Stable Diffusion 1.x's. Raises InputError for a value that cannot be used.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear", "squaredcos_cap_v2"
    prediction_type: str = "epsilon"  # or "v_prediction", or "sample": the image itself
    rescale_betas_zero_snr: bool = False  # no signal is left at the last timestep
    steps_offset: int = 1  # added to every timestep of the "leading" spacing
    set_alpha_to_one: bool = False  # DDIM and PNDM end at a = 1 instead of alphas_cumprod[0]
    timestep_spacing: str = "leading"  # or "trailing", "linspace"
    clip_sample: bool = False  # keep x0 within clip_sample_range
    clip_sample_range: float = 1.0
    thresholding: bool = False  # keep x0 within a quantile of itself, which comes before clip_sample
    dynamic_thresholding_ratio: float = 0.995  # the quantile
    sample_max_value: float = 1.0  # its upper bound
    original_inference_steps: int = 50  # that an LCM was distilled on
    timestep_scaling: float = 10.0  # of an LCM's boundary condition
    config: Mapping[str, object] | None = field(default=None, repr=False, compare=False)  # that it was read from

    def __post_init__(self) -> None:
        n, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        self._check("beta_schedule", self.beta_schedule in BETA_SCHEDULES, f"one of {BETA_SCHEDULES}")
        self._check("prediction_type", self.prediction_type in PREDICTION_TYPES, f"one of {PREDICTION_TYPES}")
        self._check("timestep_spacing", self.timestep_spacing in SPACINGS, f"one of {SPACINGS}")
        self._check("num_train_timesteps", is_integer(n) and 1 <= n <= 100_000, "an integer from 1 to 100000")
        offset_fits = is_integer(self.steps_offset) and 0 <= self.steps_offset < n
        self._check("steps_offset", offset_fits, "an integer from 0, below num_train_timesteps")
        for switch in ("set_alpha_to_one", "rescale_betas_zero_snr", "clip_sample", "thresholding"):
            self._check(switch, isinstance(getattr(self, switch), bool), "true or false")
        self._check("beta_start", isinstance(start, float) and 0 < start < 1, "a number between 0 and 1")
        self._check("beta_end", isinstance(end, float) and start <= end < 1, "a number from beta_start to 1")
        quantile = self.dynamic_thresholding_ratio
        self._check("dynamic_thresholding_ratio", is_number(quantile) and 0 <= quantile <= 1, "a number from 0 to 1")
        for bound, least in (("clip_sample_range", 0), ("sample_max_value", 1), ("timestep_scaling", 0)):
            value = getattr(self, bound)
            self._check(bound, is_number(value) and least <= value < math.inf, f"a number from {least}")
        origins = self.original_inference_steps
        self._check("original_inference_steps", is_integer(origins) and origins >= 1, "an integer from 1")

    def _check(self, name: str, fits: bool, wanted: str) -> None:
        if not fits:
            value = getattr(self, name)
            raise InputError(f"the scheduler config has {name} = {value!r:.80}; it must be {wanted}")

    @classmethod
    def from_config(cls, config: Mapping[str, object], class_name: str | None = None) -> NoiseSchedule:
        """From a scheduler_config.json as a scheduler class reads it, by default the config's own class.

        Unknown keys are ignored. Raises InputError for a noise schedule that is of another kind.
        """
        settings = scheduler_settings(config, class_name)
        for key in ("trained_betas", "use_flow_sigmas"):
            if settings.get(key):
                raise InputError(f"the scheduler config has {key} = {settings[key]!r:.80}, which cannot be used here")
        known: dict[str, Any] = {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
        return cls(**known, config=dict(config))

    def read_by(self, class_name: str) -> NoiseSchedule:
        """The same file as another scheduler class reads it; a schedule that is of no file stays as it is."""
        return self if self.config is None else self.from_config(self.config, class_name)

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
        if self.rescale_betas_zero_snr:
            alphas = _rescaled(alphas)
        alphas_cumprod = _cumulative(alphas).astype(np.float64)
        alphas_cumprod.setflags(write=False)
        return alphas_cumprod

    @cached_property
    def sigmas(self) -> NDArray[np.float64]:
        """The noise-to-signal ratio at each timestep: (num_train_timesteps,), rising."""
        a = self.alphas_cumprod.astype(np.float32)
        if self.rescale_betas_zero_snr:
            a[-1] = LAST_SIGNAL  # as diffusers has it, so that the ratio ends at 4096
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
        if self.prediction_type == "sample":
            return prediction, (x - signal * prediction) / noise
        if self.prediction_type == "v_prediction":
            return signal * x - noise * prediction, signal * prediction + noise * x
        return (x - noise * prediction) / signal, prediction

    def bound(self, x0: Latents) -> Latents:
        """The image (B, C, h, w), kept within bounds where the config says so.

        Thresholding: Saharia et al. 2022, Imagen (arXiv 2205.11487), section 2.3.
        """
        if self.thresholding:
            levels = np.quantile(np.abs(x0.reshape(len(x0), -1)), self.dynamic_thresholding_ratio, axis=1)
            s = np.clip(levels, 1, self.sample_max_value).astype(x0.dtype).reshape(-1, 1, 1, 1)
            return np.asarray(np.clip(x0, -s, s) / s)
        if self.clip_sample:
            return np.clip(x0, -self.clip_sample_range, self.clip_sample_range)
        return x0


def _cumulative(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    product: NDArray[np.float64] = np.cumprod(alphas, dtype=np.float64)
    return product.astype(np.float32)


def _rescaled(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shifted and scaled so that the last timestep has no signal: Lin et al. 2023 (arXiv 2305.08891), algorithm 1."""
    signal = np.sqrt(_cumulative(alphas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    share = signal**2
    betas = np.float32(1) - np.concatenate([share[:1], share[1:] / share[:-1]])
    return np.asarray(np.float32(1) - betas, np.float32)


def is_integer(value: object) -> bool:
    """True for an int, numpy's too, that is no bool, which Python counts among them."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for an int or a float that is no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)

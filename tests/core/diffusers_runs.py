"""Runs of our samplers and of diffusers' schedulers, from the same noise, with a stand-in for the U-Net."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kdc_edge.noise import initial_latents
from kdc_edge.samplers import SAMPLERS, NoiseSchedule, make_sampler

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
OLD_ARRAYS = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SD_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
REFERENCES: dict[str, tuple[Any, dict[str, Any]]] = {
    name: (getattr(diffusers, kind.scheduler), {**kind.options, **({"clip_sample": False} if name == "ddim" else {})})
    for name, kind in SAMPLERS.items()
}
KEYS = {name: inspect.signature(kind).parameters for name, (kind, _) in REFERENCES.items()}
SHAPE = (2, 4, 5, 6)
SEED = 3


def reference(name: str, config: dict[str, Any], steps: int) -> Any:
    kind, options = REFERENCES[name]
    known = inspect.signature(kind).parameters  # Euler and DPM-Solver have no set_alpha_to_one
    scheduler = kind(**{**options, **{key: value for key, value in config.items() if key in known}})
    scheduler.set_timesteps(steps)
    return scheduler


def denoiser(x: Any, t: float) -> Any:
    """A smooth stand-in for the U-Net that numpy and torch compute alike; its runs stay near unit scale."""
    return 0.8 * x - 0.2 * x / (1 + x * x) + 0.05 * t / 1000


def assert_equal_timesteps(ours: np.ndarray, theirs: Any) -> None:
    if ours.dtype == np.float32:  # with fractions, which diffusers computes in single precision
        np.testing.assert_allclose(ours, theirs.timesteps.numpy(), rtol=0, atol=0.02)
    else:
        assert np.array_equal(ours, theirs.timesteps.numpy())


def trajectories(name: str, config: dict[str, Any], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Latents after every step, ours and diffusers': (visits, *SHAPE) each, over the initial noise level."""
    return runs(name, config, reference(name, config, steps), steps)


def runs(name: str, config: dict[str, Any], theirs: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    sampler = make_sampler(name, NoiseSchedule.from_config(config), steps, seed=SEED)
    theirs.set_timesteps(steps)
    if hasattr(theirs, "set_begin_index"):
        theirs.set_begin_index(0)
    assert_equal_timesteps(sampler.timesteps, theirs)

    generator = torch.Generator("cpu").manual_seed(SEED)
    x = initial_latents(SHAPE, SEED) * np.float32(sampler.init_noise_sigma)
    y = torch.randn(SHAPE, generator=generator) * theirs.init_noise_sigma
    random = {"generator": generator} if "generator" in inspect.signature(theirs.step).parameters else {}
    ours_all, theirs_all = [x], [y.numpy()]
    for i, t in enumerate(theirs.timesteps):
        x = sampler.step(denoiser(sampler.scale_model_input(x, i), float(t)), i, x)
        y = theirs.step(denoiser(theirs.scale_model_input(y, t), float(t)), t, y, return_dict=False, **random)[0]
        assert x.dtype == np.float32
        ours_all.append(x)
        theirs_all.append(y.numpy())
    scale = max(1.0, sampler.init_noise_sigma)
    return np.stack(ours_all) / scale, np.stack(theirs_all) / scale


def assert_equal_runs(name: str, config: dict[str, Any], steps: int) -> None:
    ours, theirs = trajectories(name, config, steps)
    assert np.isfinite(theirs).all()
    assert 0.01 < np.abs(theirs).max() < 20  # near unit scale, so that the bound below means something
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)

"""kdc_edge.samplers against diffusers, over whole runs from noise to latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdc_edge.errors import InputError
from kdc_edge.noise import NormalStream, initial_latents
from kdc_edge.samplers import DEFAULT_SAMPLER, SAMPLERS, NoiseSchedule, Sampler, make_sampler
from tests.core.diffusers_runs import (
    OLD_ARRAYS,
    REFERENCES,
    SD_CONFIG,
    SHAPE,
    assert_equal_runs,
    assert_equal_timesteps,
    denoiser,
    reference,
    trajectories,
)

pytestmark = OLD_ARRAYS


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 10, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_whole_run_equals_diffusers(name: str, prediction_type: str, steps: int) -> None:
    assert_equal_runs(name, {**SD_CONFIG, "prediction_type": prediction_type}, steps)


@pytest.mark.parametrize("steps", [1, 2, 4, 9, 25, 48])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_other_spacings_equal_diffusers(name: str, spacing: str, steps: int) -> None:
    assert_equal_runs(name, {**SD_CONFIG, "timestep_spacing": spacing}, steps)


OTHER_BETAS = [(name, betas) for name in SAMPLERS for betas in ("linear", "squaredcos_cap_v2")]
# There diffusers cuts the timesteps' fractions off, of 998.9999 too; ours takes the nearest.
OTHER_BETAS.remove(("dpm++2m-karras", "squaredcos_cap_v2"))
OTHER_BETAS.remove(("dpm++2m-sde-karras", "squaredcos_cap_v2"))


@pytest.mark.parametrize(("name", "beta_schedule"), OTHER_BETAS)
def test_other_beta_schedules_equal_diffusers(name: str, beta_schedule: str) -> None:
    """With v-prediction: where the cosine leaves no signal, epsilon could not be divided by it."""
    config = {**SD_CONFIG, "beta_schedule": beta_schedule, "prediction_type": "v_prediction"}
    assert_equal_runs(name, config, 10)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_set_alpha_to_one_equals_diffusers(name: str) -> None:
    config = {**SD_CONFIG, "set_alpha_to_one": True, "steps_offset": 0}
    assert_equal_runs(name, config, 10)
    changed, _ = trajectories(name, config, 10)
    usual, _ = trajectories(name, {**config, "set_alpha_to_one": False}, 10)
    assert np.abs(changed[-1] - usual[-1]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        ("ddim", {}, 999),
        ("ddim", {"steps_offset": 0}, 1000),
        ("pndm", {}, 999),
        ("euler", {}, 999),
        ("dpm++2m", {"timestep_spacing": "trailing"}, 1000),
        ("dpm++2m-karras", {}, 1000),
    ],
)
def test_the_longest_runs_equal_diffusers(name: str, config: dict[str, Any], steps: int) -> None:
    assert_equal_runs(name, {**SD_CONFIG, **config}, steps)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_equal_diffusers_for_many_step_counts(name: str, spacing: str) -> None:
    config = {**SD_CONFIG, "timestep_spacing": spacing}
    schedule = NoiseSchedule.from_config(config)
    for steps in (6, 8, 11, 12, 13, 15, 16, 24, 30, 33, 49):
        assert_equal_timesteps(make_sampler(name, schedule, steps).timesteps, reference(name, config, steps))


@pytest.mark.parametrize("steps", [43, 52, 73, 85, 103, 127, 400])
def test_karras_timesteps_equal_diffusers(steps: int) -> None:
    """Counts at which double precision throughout would round a timestep the other way."""
    ours = make_sampler("dpm++2m-karras", NoiseSchedule(), steps).timesteps
    assert np.array_equal(ours, reference("dpm++2m-karras", SD_CONFIG, steps).timesteps.numpy())


def test_trailing_does_not_run_past_the_first_timestep() -> None:
    """diffusers visits a 62nd timestep, -1, when asked for 61: its arange rounds. Ours ends where asked."""
    config = {**SD_CONFIG, "timestep_spacing": "trailing"}
    theirs = reference("ddim", config, 61).timesteps.numpy()
    ours = make_sampler("ddim", NoiseSchedule.from_config(config), 61).timesteps
    assert len(ours) == 61
    assert ours[-1] >= 0
    assert np.array_equal(ours, theirs[:61])


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "linear", "squaredcos_cap_v2"])
def test_alphas_cumprod_equal_diffusers(beta_schedule: str) -> None:
    config = {**SD_CONFIG, "beta_schedule": beta_schedule}
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, reference("ddim", config, 1).alphas_cumprod.numpy(), rtol=2e-6, atol=1e-9)


def run(sampler: Sampler, x: np.ndarray) -> np.ndarray:
    for i, t in enumerate(sampler.timesteps):
        x = sampler.step(denoiser(sampler.scale_model_input(x, i), float(t)), i, x)
    return x


def test_lcm_goes_on_with_a_stream_or_a_seed_alike() -> None:
    schedule, stream = NoiseSchedule(), NormalStream(5)
    x = stream.draw(SHAPE)
    from_stream = run(make_sampler("lcm", schedule, 4, noise=stream), x)
    assert np.array_equal(from_stream, run(make_sampler("lcm", schedule, 4, seed=5), x))
    assert not np.array_equal(from_stream, run(make_sampler("lcm", schedule, 4, seed=6), x))


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "deis"])
def test_a_perfect_denoiser_gets_the_image_back(name: str) -> None:
    """Against the mathematics: when eps is exact, every sampler that ends at sigma 0 must end at x0."""
    schedule = NoiseSchedule(set_alpha_to_one=True, steps_offset=0)
    sampler = make_sampler(name, schedule, 7)
    x0 = initial_latents(SHAPE, 1)
    t = int(sampler.timesteps[0])
    a = float(schedule.alphas_cumprod[t])
    x = np.sqrt(a) * x0 + np.sqrt(1 - a) * initial_latents(SHAPE, 2)
    if name.startswith(("euler", "heun")):
        x = x / np.sqrt(a)
    x = x.astype(np.float32)
    for i, timestep in enumerate(sampler.timesteps):
        seen = sampler.scale_model_input(x, i)
        a = float(schedule.alphas_cumprod[int(timestep)])
        x = sampler.step(((seen - np.sqrt(a) * x0) / np.sqrt(1 - a)).astype(np.float32), i, x)
    np.testing.assert_allclose(x, x0, atol=2e-3)


def test_public_names() -> None:
    assert set(SAMPLERS) == set(REFERENCES)
    assert {kind.scheduler for kind in SAMPLERS.values()} == {kind.__name__ for kind, _ in REFERENCES.values()}
    assert DEFAULT_SAMPLER in SAMPLERS
    assert NoiseSchedule() == NoiseSchedule.from_config({**SD_CONFIG, "_class_name": "PNDMScheduler"})


@pytest.mark.parametrize(
    ("name", "steps", "said"),
    [
        ("plms", 20, "scheduler 'plms' is unknown"),
        ("ddim", 0, "ask for 1 to 1000"),
        ("ddim", -1, "ask for 1 to 1000"),
        ("ddim", 1001, "ask for 1 to 1000"),
        ("ddim", 2.0, "ask for 1 to 1000"),
        ("ddim", True, "ask for 1 to 1000"),
        ("ddim", 1000, "ask for fewer steps"),  # leading, with an offset of 1: timestep 1000
        ("dpm++2m", 1000, "ask for fewer steps"),
        ("dpm++2m", 999, "ask for fewer steps"),
        ("lcm", 51, "ask for 4 to 8"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(name: str, steps: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make_sampler(name, NoiseSchedule(), steps)
    assert "\n" not in str(caught.value)


def test_repeated_noise_levels_are_refused() -> None:
    with pytest.raises(InputError, match="one noise level twice"):
        make_sampler("dpm++2m", NoiseSchedule(timestep_spacing="linspace"), 1000)

"""Scheduler configurations of checkpoints: every setting has diffusers' effect, or is refused by its name."""

from __future__ import annotations

import warnings
from typing import Any

import diffusers
import numpy as np
import pytest

from kdc_edge.errors import InputError
from kdc_edge.samplers import DEFAULT_SAMPLER, SAMPLERS, NoiseSchedule, make_sampler, sampler_for
from tests.core.diffusers_runs import (
    KEYS,
    OLD_ARRAYS,
    REFERENCES,
    SD_CONFIG,
    assert_equal_runs,
    assert_equal_timesteps,
    reference,
    runs,
    trajectories,
)

pytestmark = OLD_ARRAYS

# Every setting of these classes, at a value that is not the default.
FLIPPED: list[tuple[str, Any]] = [
    ("num_train_timesteps", 500), ("beta_start", 0.002), ("beta_end", 0.02), ("beta_schedule", "linear"),
    ("trained_betas", [0.01] * 1000), ("prediction_type", "v_prediction"), ("clip_sample", True),
    ("set_alpha_to_one", True), ("steps_offset", 3), ("thresholding", True), ("dynamic_thresholding_ratio", 0.5),
    ("clip_sample_range", 0.5), ("sample_max_value", 2.0), ("timestep_spacing", "trailing"),
    ("rescale_betas_zero_snr", True), ("skip_prk_steps", True), ("interpolation_type", "log_linear"),
    ("use_karras_sigmas", True), ("use_exponential_sigmas", True), ("use_beta_sigmas", True), ("sigma_min", 0.1),
    ("sigma_max", 9.0), ("timestep_type", "continuous"), ("final_sigmas_type", "sigma_min"), ("solver_order", 3),
    ("algorithm_type", "sde-dpmsolver++"), ("solver_type", "heun"), ("lower_order_final", False),
    ("lower_order_final", True), ("euler_at_final", True), ("use_lu_lambdas", True), ("use_flow_sigmas", True),
    ("flow_shift", 3.0), ("lambda_min_clipped", -5.1), ("variance_type", "learned"),
    ("variance_type", "fixed_small"), ("use_dynamic_shifting", True), ("time_shift_type", "linear"),
    ("predict_x0", False), ("disable_corrector", [0]), ("solver_p", "dpm"), ("shift_terminal", 0.1),
    ("original_inference_steps", 20), ("timestep_scaling", 2.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10**9),
        ("num_train_timesteps", "1000"),
        ("num_train_timesteps", True),
        ("beta_start", 0.0),
        ("beta_start", "0.1"),
        ("beta_start", float("nan")),
        ("beta_end", 0.0001),
        ("beta_end", 1.0),
        ("beta_end", None),
        ("beta_schedule", "sigmoid"),
        ("beta_schedule", ["linear"]),
        ("prediction_type", "flow_prediction"),
        ("steps_offset", -1),
        ("steps_offset", 1000),
        ("set_alpha_to_one", "no"),
        ("timestep_spacing", "karras"),
        ("trained_betas", [0.1, 0.2]),
        ("rescale_betas_zero_snr", "yes"),
        ("thresholding", 1),
        ("dynamic_thresholding_ratio", 1.5),
        ("sample_max_value", 0.5),
        ("clip_sample", None),
        ("clip_sample_range", "1"),
        ("original_inference_steps", 0),
        ("timestep_scaling", float("nan")),
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
        ("_class_name", "EDMEulerScheduler"),
        ("_class_name", ["DDIMScheduler"]),
    ],
)
def test_a_bad_config_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key) as caught:
        NoiseSchedule.from_config({**SD_CONFIG, key: value})
    assert "\n" not in str(caught.value)


def test_switches_that_are_off_and_unknown_keys_are_ignored() -> None:
    off = {"trained_betas": None, "clip_sample": False, "thresholding": False, "skip_prk_steps": True}
    assert NoiseSchedule.from_config({**SD_CONFIG, **off}) == NoiseSchedule()


def knows(key: str) -> list[str]:
    return [name for name in SAMPLERS if key in KEYS[name]]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_equals_diffusers(name: str, spacing: str) -> None:
    """Classes without the key leave it out, as diffusers' do."""
    config = {**SD_CONFIG, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert_equal_runs(name, {**config, "timestep_spacing": spacing}, 10)


def test_zero_terminal_snr_leaves_no_signal_at_the_last_timestep() -> None:
    config = {**SD_CONFIG, "rescale_betas_zero_snr": True}
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    assert ours[-1] == 0
    np.testing.assert_allclose(ours, reference("ddim", config, 1).alphas_cumprod.numpy(), rtol=2e-5, atol=1e-9)
    with pytest.raises(InputError, match="rescale_betas_zero_snr with prediction_type = 'epsilon'"):
        make_sampler("ddim", NoiseSchedule.from_config({**config, "timestep_spacing": "trailing"}), 10)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("pndm", "euler-a")])
def test_prediction_of_the_image_equals_diffusers(name: str) -> None:
    assert_equal_runs(name, {**SD_CONFIG, "prediction_type": "sample"}, 10)


@pytest.mark.parametrize("name", ["pndm", "euler-a"])
def test_prediction_of_the_image_is_refused_where_diffusers_has_it_not(name: str) -> None:
    with pytest.raises(InputError, match="prediction_type = 'sample'"):
        make_sampler(name, NoiseSchedule.from_config({**SD_CONFIG, "prediction_type": "sample"}), 10)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        *((n, {"clip_sample": True, "clip_sample_range": 0.5}) for n in knows("clip_sample")),
        *((n, {"thresholding": True, "sample_max_value": 1.2}) for n in knows("thresholding")),
        *((n, {"thresholding": True, "dynamic_thresholding_ratio": 0.5}) for n in knows("thresholding")),
    ],
)
def test_bounds_of_the_image_equal_diffusers(name: str, bounds: dict[str, Any]) -> None:
    assert_equal_runs(name, {**SD_CONFIG, **bounds}, 10)
    bounded, _ = trajectories(name, {**SD_CONFIG, **bounds}, 10)
    usual, _ = trajectories(name, {**SD_CONFIG, "clip_sample": False}, 10)
    assert np.abs(bounded[-1] - usual[-1]).max() > 1e-3


@pytest.mark.parametrize("options", [{"original_inference_steps": 20}, {"timestep_scaling": 0.01}])
def test_an_lcms_own_settings_equal_diffusers(options: dict[str, Any]) -> None:
    assert_equal_runs("lcm", {**SD_CONFIG, **options}, 8)
    changed, _ = trajectories("lcm", {**SD_CONFIG, **options}, 8)
    usual, _ = trajectories("lcm", SD_CONFIG, 8)
    assert np.abs(changed[-1] - usual[-1]).max() > 1e-3


# Whole configs as checkpoints have them, read by the class itself and by others; absent keys among them.
BARE: dict[str, dict[str, Any]] = {
    "nothing but the class": {},
    "betas alone": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "no betas": {"timestep_spacing": "trailing", "steps_offset": 1, "clip_sample": False},
}


@pytest.mark.parametrize("given", BARE)
@pytest.mark.parametrize("own", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_absent_keys_are_the_defaults_of_the_class_that_reads_them(name: str, own: str, given: str) -> None:
    """Of `from_config` where another class reads the file; of StableDiffusionPipeline's own scheduler else."""
    config = {"_class_name": own, **BARE[given]}
    kind, options = REFERENCES[name]
    theirs = pipeline_scheduler(config)
    if kind.__name__ != own:
        theirs = kind.from_config(theirs.config, **{k: v for k, v in options.items() if k != "clip_sample"})
    elif name == "pndm":
        theirs.register_to_config(skip_prk_steps=True)
    theirs.set_timesteps(10)
    ours = make_sampler(name, NoiseSchedule.from_config(config), 10)
    if name != "euler-karras" or own != "EulerDiscreteScheduler":  # there the config itself says no Karras
        assert_equal_timesteps(ours.timesteps, theirs)
    schedule = ours.schedule  # type: ignore[attr-defined]
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-6, atol=1e-9)
    for key in ("clip_sample", "set_alpha_to_one", "steps_offset", "timestep_spacing", "prediction_type"):
        if key in KEYS[name]:
            assert getattr(schedule, key) == theirs.config[key], key


def pipeline_scheduler(config: dict[str, Any]) -> Any:
    """A scheduler as diffusers' pipeline holds it, which corrects two settings."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "unet": None, "safety_checker": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = diffusers.StableDiffusionPipeline(
            **parts, scheduler=scheduler, feature_extractor=None, requires_safety_checker=False
        )
    return pipe.scheduler


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_checkpoints_own_scheduler_has_its_sampler(name: str) -> None:
    kind, options = REFERENCES[name]
    assert sampler_for({"_class_name": kind.__name__, **SD_CONFIG, **options}) == (name, "")
    assert sampler_for(dict(kind(**options).config) | {"_class_name": kind.__name__}) == (name, "")


@pytest.mark.parametrize(
    ("config", "taken", "said"),
    [
        ({"_class_name": "LMSDiscreteScheduler"}, "dpm++2m", "no sampler of that class"),
        ({"_class_name": "PNDMScheduler"}, "dpm++2m", "skip_prk_steps = False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "dpm++2m", "solver_order = 3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "ddim", "use_lu_lambdas = True"),
        ({"_class_name": "HeunDiscreteScheduler", "use_beta_sigmas": True}, "ddim", "use_beta_sigmas = True"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "dpm++2m", "solver_type = 'bh1'"),
        (SD_CONFIG, DEFAULT_SAMPLER, ""),
    ],
)
def test_another_sampler_is_taken_and_said(config: dict[str, Any], taken: str, said: str) -> None:
    name, note = sampler_for(config)
    assert name == taken
    assert said in note
    assert "\n" not in note
    make_sampler(name, NoiseSchedule.from_config(config), 5)


@pytest.mark.parametrize(("key", "value"), FLIPPED)
def test_no_setting_of_a_scheduler_is_ignored(key: str, value: object) -> None:
    """Flipped by itself in the config of every class that has it: the run is diffusers', or the key is named."""
    for own, name in {kind.scheduler: name for name, kind in SAMPLERS.items()}.items():
        if key not in KEYS[name]:
            continue
        always = {"skip_prk_steps": True} if own == "PNDMScheduler" and key != "skip_prk_steps" else {}
        config = {"_class_name": own, **SD_CONFIG, **always, key: value}
        try:
            taken, note = sampler_for(config)
            if not note:
                make_sampler(taken, NoiseSchedule.from_config(config), 8)
        except InputError as error:
            note = str(error)
        assert key in note or not note
        if not note:
            ours, theirs = runs(taken, config, pipeline_scheduler(config), 8)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4, err_msg=own)


def test_every_setting_of_every_scheduler_is_flipped() -> None:
    flipped = {key for key, _ in FLIPPED}
    assert {key for name in SAMPLERS for key in KEYS[name]} == flipped

"""kdc_edge.samplers against diffusers, over whole runs from noise to latents."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kdc_edge.errors import InputError
from kdc_edge.noise import NormalStream, initial_latents
from kdc_edge.samplers import DEFAULT_SAMPLER, SAMPLERS, NoiseSchedule, Sampler, make_sampler, sampler_for

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
pytestmark = [
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
        ("plms", 20, "--scheduler 'plms' is unknown"),
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


KEYS = {name: inspect.signature(kind).parameters for name, (kind, _) in REFERENCES.items()}


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

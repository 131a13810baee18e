"""kdc_edge.diffusers_folder and kdc_edge.diffusers_defaults against diffusers: checkpoints with few keys and odd ones.

Whole images are diffusers' own StableDiffusionPipeline's, by the checkpoint's own scheduler, from the same seed.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig

from kdc_edge.diffusers_defaults import AUTOENCODER_TINY, SCHEDULERS, TEXT_ENCODER, UNET, VAE
from kdc_edge.diffusers_folder import RANDOM_WEIGHTS, read_model
from kdc_edge.errors import CheckpointError
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.torch import quiet
from kdc_edge.samplers import sampler_for
from kdc_edge.train.checkpoint import GARDEN_TEACHER, find_teacher
from tests.core.published import PUBLISHED, make_published

# diffusers 0.42 hands torch tensors to numpy 2 in the old way, and says what its pipeline corrects in a config.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "a purple flower with five petals and a yellow center on a sky background"


def signature(cls: Any) -> dict[str, Any]:
    """Defaults of a class's settings, in JSON's types."""
    given = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}


def source_signature(name: str, module: str) -> dict[str, Any]:
    """The same from the source, for a class whose module needs a package that is not installed."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text("utf-8"))
    (cls,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    (init,) = (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    names = [a.arg for a in init.args.args[1:]]
    return dict(zip(names, map(ast.literal_eval, init.args.defaults), strict=True))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedulers_defaults_are_those_of_diffusers(name: str) -> None:
    if name == "DPMSolverSDEScheduler":
        theirs = source_signature(name, "diffusers.schedulers.scheduling_dpmsolver_sde")
    else:
        theirs = signature(getattr(diffusers, name))
    assert SCHEDULERS[name] == theirs


def test_the_networks_defaults_are_those_of_diffusers_and_transformers() -> None:
    assert signature(diffusers.UNet2DConditionModel) == UNET
    assert signature(diffusers.AutoencoderKL) == VAE
    assert signature(diffusers.AutoencoderTiny) == AUTOENCODER_TINY
    theirs = CLIPTextConfig().to_dict()
    assert {key: theirs[key] for key in TEXT_ENCODER} == TEXT_ENCODER


def edit(path: Path, drop: tuple[str, ...] = (), **new: object) -> None:
    config = json.loads(path.read_text("utf-8")) | new
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))


def set_scheduler(folder: Path, config: dict[str, Any]) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    edit(folder / "model_index.json", scheduler=["diffusers", config["_class_name"]])


def open_diffusers(folder: Path, **parts: Any) -> Any:
    with quiet():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts)
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(ours: Pipeline, theirs: Any, steps: int, side: int | None = None) -> float:
    """Of our image to that of diffusers' pipeline, dB: both by the checkpoint's own scheduler."""
    sampler, note = sampler_for(ours.model.scheduler)
    assert note == ""
    side = side or ours.model.image_size
    image = theirs(
        PROMPT, guidance_scale=4.0, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(1),
        output_type="np", width=side, height=side,
    ).images[0]  # fmt: skip
    found = ours.generate(Request(PROMPT, steps=steps, guidance=4.0, seed=1, sampler=sampler, width=side, height=side))
    error = np.mean((found - np.asarray(image) * 255.0) ** 2)
    return float(10 * np.log10(255**2 / error))


EQUAL_DB = 55  # rounding to 8 bits alone leaves 59


@pytest.fixture(scope="module")
def opened() -> tuple[Pipeline, Any]:
    """The garden's networks, opened once by each side."""
    return open_pipeline(GARDEN_TEACHER), open_diffusers(GARDEN_TEACHER)


SD: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
}  # fmt: skip
LEADING = {**SD, "timestep_spacing": "leading", "steps_offset": 1}
TRAILING = {**SD, "timestep_spacing": "trailing"}
# The scheduler configs of published checkpoints, and what old versions of diffusers and tools left out.
OWN: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.4 and 1.5": {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **SD, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
    },
    "Stable Diffusion 2.1": {
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", **SD, "clip_sample": False,
        "prediction_type": "v_prediction", "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
        "trained_betas": None,
    },
    "zero terminal SNR": {
        "_class_name": "DDIMScheduler", **TRAILING, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1,
    },
    "DDIM without betas": {"_class_name": "DDIMScheduler", "clip_sample": False, "steps_offset": 1},
    "DDIM without clip_sample and steps_offset": {"_class_name": "DDIMScheduler", **SD},
    "DDIM with steps_offset 0": {"_class_name": "DDIMScheduler", **SD, "steps_offset": 0, "clip_sample": True},
    "Euler": {"_class_name": "EulerDiscreteScheduler", **LEADING},
    "Euler a": {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING, "steps_offset": 1},
    "Heun": {"_class_name": "HeunDiscreteScheduler", **LEADING},
    "DPM++ 2M Karras": {"_class_name": "DPMSolverMultistepScheduler", **SD, "use_karras_sigmas": True},
    "DPM++ 2M SDE": {"_class_name": "DPMSolverMultistepScheduler", **SD, "algorithm_type": "sde-dpmsolver++"},
    "DPM++ SDE": {"_class_name": "DPMSolverSinglestepScheduler", **SD, "algorithm_type": "sde-dpmsolver++"},
    "UniPC": {"_class_name": "UniPCMultistepScheduler", **SD},
    "LCM of 20 steps": {"_class_name": "LCMScheduler", **LEADING, "original_inference_steps": 20},
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_the_checkpoints_own_scheduler_gives_the_image_of_diffusers(
    teacher: Path, opened: tuple[Pipeline, Any], name: str
) -> None:
    set_scheduler(teacher, OWN[name])
    ours, theirs = opened
    parts = {key: part for key, part in theirs.components.items() if key != "scheduler"}
    ours = Pipeline(read_model(teacher), ours.tokenizer, ours.components)
    assert psnr(ours, open_diffusers(teacher, **parts), 6) > EQUAL_DB


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_keys_of_published_checkpoints_are_enough(tmp_path: Path, name: str) -> None:
    """At 64 pixels a side, whatever the configuration says."""
    folder = make_published(name, GARDEN_TEACHER, tmp_path / "published")
    model = read_model(folder)
    assert (model.scaling_factor, model.latent_size) == (0.18215, PUBLISHED[name]["unet"]["sample_size"])
    ours, theirs = open_pipeline(folder), open_diffusers(folder)
    assert psnr(ours, theirs, 6, side=64) > EQUAL_DB
    find_teacher(str(folder))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"sample_size": [16, 16]}),
        ("unet", {"attention_head_dim": [2, 2, 2, 2]}),
        ("unet", {"center_input_sample": True}),
        ("unet", {"flip_sin_to_cos": False, "freq_shift": 1}),
        ("vae", {"scaling_factor": 0.5}),
        ("vae", {"shift_factor": 0.3, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}),  # not read by either
        ("vae", {"force_upcast": False}),
    ],
)
def test_other_settings_give_the_image_of_diffusers(teacher: Path, part: str, change: dict[str, Any]) -> None:
    edit(teacher / part / "config.json", **change)
    assert psnr(open_pipeline(teacher), open_diffusers(teacher), 2) > EQUAL_DB


def test_a_small_sample_size_of_an_old_version_is_64(teacher: Path) -> None:
    """diffusers' pipeline takes it for the default of a version that did not save it."""
    edit(teacher / "unet" / "config.json", _diffusers_version="0.6.0")
    assert read_model(teacher).latent_size == 64
    with quiet(), pytest.warns(FutureWarning, match="sample_size"):
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(teacher, local_files_only=True)
    assert theirs.unet.config.sample_size == 64


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unet/config.json", {"in_channels": 9}, "in_channels = 9 where the VAE has 4: an inpainting model"),
    ("unet/config.json", {"in_channels": 8}, "in_channels = 8 where the VAE has 4: an image-to-image model"),
    ("unet/config.json", {"in_channels": [4, 4]}, r"in_channels = \[4, 4\] where the VAE has 4: another kind of model"),
    ("unet/config.json", {"out_channels": 8}, "out_channels = 8"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
    ("unet/config.json", {"num_class_embeds": 10}, "num_class_embeds = 10"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256: a latent consistency model"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time'.*XL"),
    ("unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type = 'image_proj'"),
    ("unet/config.json", {"cross_attention_dim": 768}, "cross_attention_dim = 768.*hidden_size = 128"),
    ("unet/config.json", {"sample_size": [16, 24]}, r"sample_size = \[16, 24\], which is no square"),
    ("unet/config.json", {"sample_size": None}, "latent_size"),
    ("unet/config.json", {"_class_name": "UNetMotionModel"}, "class 'UNetMotionModel'"),
    ("vae/config.json", {"_class_name": "VQModel"}, "class 'VQModel'"),
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "class 'StableDiffusionXLPipeline'"),
    ("model_index.json", {"_class_name": "FluxPipeline"}, "class 'FluxPipeline'"),
    ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
    ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
]


@pytest.mark.parametrize(("file", "change", "said"), REFUSED)
def test_other_kinds_of_models_are_refused_by_the_setting(
    teacher: Path, file: str, change: dict[str, Any], said: str
) -> None:
    """By whatever opens a checkpoint: reading, a teacher for init and train."""
    edit(teacher / file, **change)
    uses: list[Callable[[Path], object]] = [read_model, lambda folder: find_teacher(str(folder))]
    exported = any(kind in said for kind in ("inpainting", "consistency"))  # these are no teachers, but work otherwise
    for use in uses[1:] if exported else uses:
        with pytest.raises(CheckpointError, match=said) as caught:
            use(teacher)
        assert "\n" not in str(caught.value)


def test_a_model_without_a_unet_is_refused_by_its_class(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    with pytest.raises(CheckpointError, match="class 'StableDiffusion3Pipeline'"):
        read_model(tmp_path)


def test_random_weights_are_read_from_the_index(own_checkpoint: Path) -> None:
    """As kdc-edge init writes it where there is no teacher; diffusers opens the folder all the same."""
    assert not read_model(own_checkpoint).random_weights
    path = own_checkpoint / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {RANDOM_WEIGHTS: True}))
    assert read_model(own_checkpoint).random_weights
    with quiet():
        diffusers.StableDiffusionPipeline.from_pretrained(own_checkpoint, local_files_only=True)

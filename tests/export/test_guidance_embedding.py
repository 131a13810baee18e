"""U-Nets that read the guidance scale: diffusers' LatentConsistencyModelPipeline makes the same images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, StableDiffusionPipeline, UNet2DConditionModel

from kdc_edge import Pipeline
from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import LCM_PIPELINE, read_model
from kdc_edge.errors import CheckpointError, InputError, KdcWarning
from kdc_edge.export.calibration import calibrate
from kdc_edge.export.targets import CoreMLOptions, ExportRequest, export_checkpoint
from kdc_edge.guidance import guidance_embedding
from kdc_edge.image import psnr_db
from kdc_edge.quiet import quiet
from kdc_edge.request import Request, made_for, own_request
from kdc_edge.train.teachers import find_teacher
from tests.cli.test_commands import complaint, run
from tests.export.editing import PROMPT, SEED, closeness_db

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
WIDTH = 256
# The keys of LCM_Dreamshaper_v7's scheduler.
SCHEDULER = {
    "_class_name": "LCMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "clip_sample": False, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "num_train_timesteps": 1000,
    "original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0, "set_alpha_to_one": True, "steps_offset": 0, "thresholding": False,
    "timestep_spacing": "leading", "trained_betas": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def consistency(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a small U-Net that reads the guidance scale, random weights, and LCMScheduler."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("checkpoint") / "consistency"))
    shutil.rmtree(folder / "unet")
    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32,), layers_per_block=1, mid_block_type=None, cross_attention_dim=128,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=4, norm_num_groups=16, time_cond_proj_dim=WIDTH,
    )  # fmt: skip
    unet.time_embedding.cond_proj.weight.data *= 5  # so that the guidance scale shows
    unet.save_pretrained(folder / "unet")
    change(folder / "model_index.json", _class_name=LCM_PIPELINE, scheduler=["diffusers", "LCMScheduler"])
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def change(path: Path, **new: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | new))


def by_diffusers(checkpoint: Path, **asked: Any) -> np.ndarray:
    with quiet():
        pipeline = LatentConsistencyModelPipeline.from_pretrained(checkpoint, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    (found,) = pipeline(PROMPT, generator=generator, output_type="np", **asked).images
    return np.asarray((found * 255).round(), np.uint8)


def ours(pipeline: Pipeline, **asked: Any) -> np.ndarray:
    return np.asarray(pipeline(PROMPT, seed=SEED, **asked).images[0])


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.5, 0.5])
def test_the_embedding_is_diffusers(scale: float) -> None:
    embed: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for width in (WIDTH, 17):
        expected = embed(None, torch.tensor([scale - 1]), width)[0].numpy()
        found = guidance_embedding(scale, width)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 2e-3  # the sine of 7,500 in float32


def test_pytorch_makes_the_images_of_diffusers(consistency: Path) -> None:
    """By its own steps and guidance, and by those that are asked for; with the noise between the steps."""
    pipeline = Pipeline.open(consistency, threads=1)
    expected = by_diffusers(consistency)
    assert psnr_db(ours(pipeline), expected) > 55
    other = by_diffusers(consistency, num_inference_steps=3, guidance_scale=2.0)
    assert psnr_db(ours(pipeline, num_inference_steps=3, guidance_scale=2.0), other) > 55
    assert psnr_db(by_diffusers(consistency, guidance_scale=2.0), expected) < 45  # it reads the guidance scale


def test_clipping_is_as_written(consistency: Path, tmp_path: Path) -> None:
    """StableDiffusionPipeline would correct it."""
    folder = Path(shutil.copytree(consistency, tmp_path / "clipped"))
    change(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    expected = by_diffusers(folder)
    assert psnr_db(ours(Pipeline.open(folder, threads=1)), expected) > 55
    assert psnr_db(by_diffusers(consistency), expected) < 45


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_another_sampler_is_that_of_stable_diffusions_pipeline(consistency: Path) -> None:
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(consistency, local_files_only=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    generator = torch.Generator("cpu").manual_seed(SEED)
    (found,) = pipeline(PROMPT, generator=generator, output_type="np", **asked).images
    expected = np.asarray((found * 255).round(), np.uint8)
    assert psnr_db(ours(Pipeline.open(consistency, threads=1), scheduler="ddim", **asked), expected) > 55


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_images_are_changed_as_in_diffusers(consistency: Path, masked: bool) -> None:
    assert closeness_db(Pipeline.open(consistency, threads=1), consistency, "lcm", masked=masked) > 60


def test_images_of_a_batch_are_those_made_alone(consistency: Path) -> None:
    pipeline = Pipeline.open(consistency, threads=1)
    batch = pipeline(PROMPT, num_images_per_prompt=2, num_inference_steps=2, seed=4).images
    alone = [pipeline(PROMPT, num_inference_steps=2, seed=seed).images[0] for seed in (4, 5)]
    for one, other in zip(batch, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_every_target_makes_the_images_of_diffusers(
    consistency: Path, target: str, export_fp16: Callable[..., Bundle]
) -> None:
    made = export_fp16(consistency, "AppleUNet")
    batch = 1 if target == "coreml" else "batch_size"
    assert made.manifest.components["unet"].inputs["timestep_cond"].shape == [batch, WIDTH]
    assert made.manifest.model.guidance_embedding == WIDTH
    parity = made.manifest.parity
    assert parity is not None
    assert "LatentConsistencyModelPipeline with LCMScheduler" in parity.reference
    assert "4 steps of lcm, guidance 8.5" in parity.conditions
    pipeline = Pipeline.open(made.root, exact=True)
    list(pipeline.prepare(made_for(pipeline.model, Request(""))))
    for asked in ({}, {"num_inference_steps": 2, "guidance_scale": 3.0}):
        assert psnr_db(ours(pipeline, **asked), by_diffusers(consistency, **asked)) > 35


def test_calibration_reads_the_guidance_scale(consistency: Path) -> None:
    calibration = calibrate(consistency, [PROMPT], samples=2)
    assert [call["timestep_cond"].shape for call in calibration.inputs] == [(1, WIDTH)] * 2
    assert np.array_equal(calibration.inputs[0]["timestep_cond"][0], guidance_embedding(8.5, WIDTH))
    assert (calibration.info.sampler, calibration.info.steps, calibration.info.guidance) == ("lcm", 4, 8.5)


def test_its_own_sampling_is_the_default(consistency: Path, tmp_path: Path) -> None:
    model = read_model(consistency)
    own = {"sampler": None, "steps": None, "guidance": None}
    request, note = own_request(model, Request(PROMPT), **own)
    assert (request.conditions, note) == ("4 steps of LCM, guidance 8.5", "")
    assert not model.guided  # classifier-free
    folder = Path(shutil.copytree(consistency, tmp_path / "ddim"))
    change(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    request, _ = own_request(read_model(folder), Request(PROMPT), **own)
    assert request.conditions == "20 steps of DDIM, guidance 7.5"


def test_a_negative_prompt_is_left_out_with_a_line(consistency: Path, tmp_path: Path) -> None:
    options = ("--bundle", consistency, "--steps", 1, "--seed", SEED, "--out", "x.png")
    said = run("generate", PROMPT, "--negative-prompt", "blue", *options, cwd=tmp_path).stderr
    assert said.count("the negative prompt is not used: this model reads the guidance scale") == 1
    said = complaint("generate", PROMPT, "--guidance-interval", "0.0:0.5", *options, cwd=tmp_path)
    assert "a guidance interval is for classifier-free guidance; this model reads the guidance scale" in said
    pipeline = Pipeline.open(consistency, threads=1)
    plain = ours(pipeline, num_inference_steps=1)
    with pytest.warns(KdcWarning, match="the negative prompt is not used: this model reads the guidance scale"):
        negative = ours(pipeline, num_inference_steps=1, negative_prompt="blue")
    assert np.array_equal(plain, negative)


def test_it_is_no_teacher_and_apples_package_has_no_embedding(consistency: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="time_cond_proj_dim = 256: a latent consistency model that reads"):
        find_teacher(str(consistency))
    with pytest.raises(InputError, match="--swift is for Apple's Swift package, which has no guidance embedding"):
        export_checkpoint(ExportRequest(consistency, tmp_path / "out", "coreml", "fp16"), CoreMLOptions(swift=True))
    assert not (tmp_path / "out").exists()

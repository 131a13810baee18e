"""U-Nets that read a mask and the masked image: diffusers' StableDiffusionInpaintPipeline makes the same images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image
from starlette.testclient import TestClient

from kdc_edge import Pipeline
from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.export.calibration import calibrate
from kdc_edge.export.targets import CoreMLOptions, ExportRequest, export_checkpoint
from kdc_edge.image import psnr_db
from kdc_edge.quiet import quiet
from kdc_edge.serve.app import make_app
from kdc_edge.serve.worker import Worker
from kdc_edge.train.teachers import find_teacher
from tests.cli.test_commands import complaint, run
from tests.export.editing import PROMPT, SCHEDULERS, SEED, mask, photo
from tests.serve.client import base64_of, message, pixels

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
ASKED = "this is an inpainting model, which repaints a part of an image: give an image and a mask"


@pytest.fixture(scope="module")
def inpainting(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a small U-Net of 9 input channels and the layers of Stable Diffusion 2, random weights.

    Its scheduler is that of few-step students.
    """
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("checkpoint") / "inpainting"))
    shutil.rmtree(folder / "unet")
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=9, out_channels=4, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None, cross_attention_dim=128, attention_head_dim=[4], norm_num_groups=16,
        use_linear_projection=True,
    )  # fmt: skip
    unet.conv_in.weight.data[:, 4:] *= 20  # so that the mask and the image show
    unet.save_pretrained(folder / "unet")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionInpaintPipeline"}))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"timestep_spacing": "trailing"}))
    return folder


def by_diffusers(checkpoint: Path, steps: int, strength: float, scheduler: str = "ddim", **change: Any) -> np.ndarray:
    with quiet():
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(checkpoint, local_files_only=True)
    kind, options = SCHEDULERS[scheduler]
    pipeline.scheduler = kind.from_config(dict(pipeline.scheduler.config), **options)
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": photo().resize((64, 64), Image.Resampling.LANCZOS), "mask_image": mask()} | change
    (found,) = pipeline(
        PROMPT, **given, strength=strength, num_inference_steps=steps, guidance_scale=3.0, height=64, width=64,
        generator=torch.Generator("cpu").manual_seed(SEED), output_type="np",
    ).images  # fmt: skip
    return np.asarray((found * 255).round(), np.uint8)


def ours(pipeline: Pipeline, steps: int, strength: float, scheduler: str = "ddim") -> np.ndarray:
    made = pipeline(
        PROMPT, image=photo(), mask_image=mask(), strength=strength, num_inference_steps=steps, guidance_scale=3.0,
        seed=SEED, scheduler=scheduler,
    )  # fmt: skip
    return np.asarray(made.images[0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pytorch_repaints_as_diffusers_does(inpainting: Path, scheduler: str) -> None:
    assert read_model(inpainting).inpainting
    pipeline = Pipeline.open(inpainting, threads=1)
    for steps, strength in ((4, 0.6), (2, 1.0)):
        expected = by_diffusers(inpainting, steps, strength, scheduler)
        assert psnr_db(ours(pipeline, steps, strength, scheduler), expected) > 60
    changed = photo().transpose(Image.Transpose.ROTATE_180).resize((64, 64), Image.Resampling.LANCZOS)
    assert psnr_db(by_diffusers(inpainting, 2, 1.0, scheduler, image=changed), expected) < 45  # it reads the image


def test_images_of_a_batch_are_those_made_alone(inpainting: Path) -> None:
    pipeline = Pipeline.open(inpainting, threads=1)
    options: dict[str, Any] = {"image": photo(), "mask_image": mask(), "strength": 0.7, "num_inference_steps": 3}
    batch = pipeline(PROMPT, **options, num_images_per_prompt=2, seed=4).images
    alone = [pipeline(PROMPT, **options, seed=seed).images[0] for seed in (4, 5)]
    for one, other in zip(batch, alone, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_every_target_repaints_as_diffusers_does(inpainting: Path, export_fp16: Callable[..., Bundle]) -> None:
    made = export_fp16(inpainting, "AppleUNet")
    info = made.manifest.components["unet"].inputs["sample"]
    assert info.shape[1] == 9
    assert made.manifest.model.inpainting
    parity = made.manifest.parity
    assert parity is not None
    assert "StableDiffusionInpaintPipeline" in parity.reference
    assert [c.what for c in parity.checks][-2:] == ["image", "vae_encoder"]
    assert json.loads((made.root / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    pipeline = Pipeline.open(made.root, exact=True)
    for steps, strength in ((2, 1.0), (2, 0.5)):
        assert psnr_db(ours(pipeline, steps, strength), by_diffusers(inpainting, steps, strength)) > 35


def test_calibration_repaints_too(inpainting: Path) -> None:
    calls = calibrate(inpainting, [PROMPT], samples=2).inputs
    assert [call["sample"].shape for call in calls] == [(2, 9, 16, 16)] * 2
    assert np.array_equal(np.unique(calls[0]["sample"][:, 4]), [0, 1])  # the mask


def test_what_is_missing_is_said_in_a_line(inpainting: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    for options in ((), ("--image", "photo.png")):
        said = complaint("generate", "a", "--bundle", inpainting, *options, cwd=tmp_path)
        assert ASKED in said
        assert len(said.splitlines()) == 1
    with pytest.raises(InputError, match=ASKED):
        Pipeline.open(inpainting)(PROMPT)
    mask().save(tmp_path / "mask.png")
    options = ("--image", "photo.png", "--mask", "mask.png", "--steps", 1, "--out", "x.png")
    run("generate", "a", "--bundle", inpainting, *options, cwd=tmp_path)
    assert (tmp_path / "x.png").is_file()


def test_commands_without_an_image_refuse_it_in_a_line(inpainting: Path, tmp_path: Path) -> None:
    said = "this is an inpainting model, and {} has no image for it to repaint: try it with kdc-edge generate --image"
    task = ("--task", "flowers=garden:flowers")
    assert said.format("kdc-edge eval") in complaint("eval", inpainting, *task, cwd=tmp_path)
    assert said.format("kdc-edge fit") in complaint("fit", inpainting, cwd=tmp_path)
    done = run("bench", inpainting, "--format", "json", cwd=tmp_path, code=1)
    (row,) = json.loads(done.stdout)["rows"]
    assert said.format("a benchmark") in row["failure"]
    assert row["timings"] is None


def test_it_is_served(inpainting: Path) -> None:
    """POST /v1/images/edits repaints as the pipeline does; without a mask, the answer says what is missing."""
    pipeline = Pipeline.open(inpainting, threads=1)
    worker = Worker(pipeline, name="inpainting")
    asked: dict[str, Any] = {
        "prompt": PROMPT, "num_inference_steps": 2, "seed": SEED, "guidance_scale": 3.0, "scheduler": "ddim",
        "image": base64_of(photo()),
    }  # fmt: skip
    with TestClient(make_app(worker)) as client:
        done = client.post("/v1/images/edits", json=asked | {"mask": base64_of(mask())})
        without = client.post("/v1/images/edits", json=asked)
        from_noise = client.post("/v1/images/generations", json={"prompt": PROMPT})
    worker.close()
    assert done.status_code == 200, done.text
    assert np.array_equal(pixels(done.json()["data"][0]), ours(pipeline, 2, 1.0))
    for answer in (without, from_noise):
        assert answer.status_code == 422
        assert "this is an inpainting model" in message(answer)


def test_it_is_no_teacher_and_apples_package_has_no_inpainting(inpainting: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in_channels = 9 where the VAE has 4: an inpainting model; take a text"):
        find_teacher(str(inpainting))
    with pytest.raises(InputError, match="--swift is for Apple's Swift package, which has no inpainting"):
        export_checkpoint(ExportRequest(inpainting, tmp_path / "out", "coreml", "fp16"), CoreMLOptions(swift=True))
    assert not (tmp_path / "out").exists()

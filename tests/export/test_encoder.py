"""The optional VAE encoder: exported, proved, and images changed with it are those of diffusers, on every engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from kdc_edge import Pipeline
from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError
from kdc_edge.export.components import load_component
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from kdc_edge.image import read_parameters
from tests.cli.test_commands import complaint, run
from tests.export.editing import SCHEDULERS, closeness_db, photo

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="module")
def few_step(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with the scheduler of few-step students."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("checkpoint") / "few"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"timestep_spacing": "trailing"}))
    return folder


@pytest.fixture(scope="module")
def onnx_bundle(few_step: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    out = tmp_path_factory.mktemp("bundles") / "onnx"
    request = ExportRequest(few_step, out, "onnx", "fp16", prompts=["a red flower"], extra=["vae_encoder"])
    return export_checkpoint(request).root


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pytorch_changes_images_as_diffusers_does(few_step: Path, scheduler: str, masked: bool) -> None:
    pipeline = Pipeline.open(few_step, threads=1)
    for steps, strength in ((4, 0.6), (2, 1.0)):
        assert closeness_db(pipeline, few_step, scheduler, masked=masked, steps=steps, strength=strength) > 60


@pytest.mark.parametrize("masked", [False, True])
def test_onnx_runtime_does(onnx_bundle: Path, few_step: Path, masked: bool) -> None:
    assert closeness_db(Pipeline.open(onnx_bundle, threads=1), few_step, "ddim", masked=masked) > 35


@pytest.mark.parametrize("masked", [False, True])
def test_core_mls_files_do(coreml_bundle: Path, checkpoint: Path, masked: bool) -> None:
    """Apple's encoder, whose mean and deviation are told from two draws."""
    pipeline = Pipeline.open(coreml_bundle, engine="mil")
    assert closeness_db(pipeline, checkpoint, "dpm++2m", masked=masked, steps=2, strength=1.0 if masked else 0.5) > 35


def test_the_files_are_optimums_and_the_proof_names_the_encoder(onnx_bundle: Path, few_step: Path) -> None:
    manifest = Bundle.open(onnx_bundle).manifest
    info = manifest.components["vae_encoder"]
    assert info.class_name == "AutoencoderKL"
    assert info.outputs["latent_parameters"].shape == ["batch_size", 8, "latent_height", "latent_width"]
    assert (onnx_bundle / "vae_encoder" / "config.json").is_file()
    assert manifest.parity is not None
    assert [c.what for c in manifest.parity.checks][-1] == "vae_encoder"
    assert manifest.parity.checks[-1].reaches(60)
    graph = onnx.load(onnx_bundle / "vae_encoder" / "model.onnx").graph
    assert ([i.name for i in graph.input], [o.name for o in graph.output]) == (["sample"], ["latent_parameters"])
    image = np.random.default_rng(2).uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32)  # sizes are free
    session = onnxruntime.InferenceSession(onnx_bundle / "vae_encoder" / "model.onnx")
    vae = AutoencoderKL.from_pretrained(few_step / "vae")
    with torch.no_grad():
        expected = vae.encode(torch.from_numpy(image)).latent_dist.parameters
    np.testing.assert_allclose(session.run(None, {"sample": image})[0], expected.numpy(), atol=2e-2)


@pytest.mark.usefixtures("traced_once")
def test_fixed_sizes(few_step: Path) -> None:
    from kdc_edge.export.onnx import export as module

    model = module.trace(load_component(few_step, "vae_encoder"), module.static_sizes(read_model(few_step)))
    sides = [list(value.shape.numpy()) for value in (*model.graph.inputs, *model.graph.outputs) if value.shape]
    assert sides == [[1, 3, 64, 64], [1, 8, 16, 16]]


def test_generate_begins_with_an_image(onnx_bundle: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    options = ("--bundle", onnx_bundle, "--image", "photo.png", "--steps", 4, "--guidance", 2)
    done = run("generate", "a fish", *options, "--strength", 0.6, "--images", 2, cwd=tmp_path)
    assert done.stdout.split() == ["a-fish-0.png", "a-fish-1.png"]
    assert read_parameters(tmp_path / "a-fish-1.png")["Denoising strength"] == "0.6"
    assert "8/8 image 2 of 2" in done.stderr  # progress over the whole
    made = Pipeline.open(onnx_bundle)(
        "a fish", image=tmp_path / "photo.png", strength=0.6, num_inference_steps=4, guidance_scale=2, seed=1
    ).images[0]
    assert np.abs(np.asarray(made, int) - np.asarray(Image.open(tmp_path / "a-fish-1.png"), int)).max() <= 1
    *_, last = Pipeline.open(onnx_bundle).stream("a", image=photo(), strength=0.5, num_inference_steps=4)
    assert (last.step, last.steps) == (2, 2)


def test_what_is_missing_is_said(bundle: Path, onnx_bundle: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    said = complaint("generate", "a", "--bundle", bundle, "--image", "photo.png", cwd=tmp_path)
    assert "has no vae_encoder, which reads an image: export it again with kdc-edge export --with vae_encoder" in said
    assert "give the image to change" in complaint("generate", "a", "--strength", 0.5, cwd=tmp_path, code=2)
    said = complaint("generate", "a", "--bundle", onnx_bundle, "--image", "nothing.png", cwd=tmp_path)
    assert "the image nothing.png cannot be used: missing" in said
    said = complaint("export", "nowhere", "--with", "vae_decoder", cwd=tmp_path, code=2)
    assert "--with 'vae_decoder' is unknown, did you mean vae_encoder? Choose from vae_encoder" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.png"]
    with pytest.raises(InputError, match="without an image to change"):
        Pipeline.open(onnx_bundle)("a", mask_image=photo())

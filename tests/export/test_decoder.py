"""A small decoder in a bundle: the image that diffusers makes with it, in every target, and what the bundle says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from torch import nn

from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import hash_checkpoint, read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.export.components import load_component
from kdc_edge.export.coreml.apple_modules import apple_network
from kdc_edge.export.rewrites.upsampling import SubpixelUpsample, split_upsampling
from kdc_edge.export.targets import CoreMLOptions, ExportRequest, export_checkpoint
from kdc_edge.image import psnr_db, to_pixels
from kdc_edge.noise import initial_latents
from kdc_edge.presets import DECODERS, find_decoder
from kdc_edge.quiet import quiet
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.base import LoadOptions, get_runtime
from kdc_edge.runtimes.torch import load_network
from kdc_edge.runtimes.torch.small_decoder import load_decoder, new_decoder
from tests.cli.test_commands import complaint, run

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_decoder(folder: Path, name: str = "garden-decoder") -> Path:
    """Random weights that give an image with contrast."""
    torch.manual_seed(1)
    network = new_decoder(next(p for p in DECODERS if p.name == name), 4)
    for layer in network.decoder.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, a=1.2)
    with quiet():
        network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoders") / "small")


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path, decoder: Path) -> StableDiffusionPipeline:
    """diffusers' own with `vae=AutoencoderTiny`."""
    with quiet():
        tiny = AutoencoderTiny.from_pretrained(decoder)
        made = StableDiffusionPipeline.from_pretrained(checkpoint, vae=tiny, local_files_only=True)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def small_bundle(
    checkpoint: Path,
    decoder: Path,
    traced_once: None,  # noqa: ARG001
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """As a user types it."""
    out = tmp_path_factory.mktemp("bundles") / "onnx-fp32"
    run("export", checkpoint, "--precision", "fp32", "--decoder", decoder, "--out", out, cwd=out.parent)
    return Bundle.open(out)


def test_the_component_decodes_as_diffusers_pipeline_does(
    checkpoint: Path, decoder: Path, pipeline: StableDiffusionPipeline
) -> None:
    """Latents as the U-Net makes them: diffusers divides by AutoencoderTiny's factor, we by the checkpoint's."""
    latents = torch.from_numpy(initial_latents((2, 4, 16, 16), 3))
    part = load_component(checkpoint, "vae_decoder", decoder)
    with torch.no_grad():
        ours = part.module(latents / read_model(checkpoint).scaling_factor)
        theirs = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert read_model(checkpoint).scaling_factor != 1
    processed = pipeline.image_processor.postprocess(theirs, output_type="np")
    assert np.abs(to_pixels(ours.numpy()) - (processed * 255).round()).max() <= 1


def test_the_bundle_makes_diffusers_image(small_bundle: Bundle, pipeline: StableDiffusionPipeline) -> None:
    request = Request("a red flower", steps=3, guidance=4.0, seed=5, sampler="ddim")
    ours = open_pipeline(small_bundle.root).generate(request)
    latents = torch.from_numpy(initial_latents((1, 4, 16, 16), 5))
    found = pipeline("a red flower", num_inference_steps=3, guidance_scale=4.0, latents=latents, output_type="np")
    theirs = (found.images[0] * 255).round().astype(np.uint8)
    assert ours.std() > 20
    assert psnr_db(ours, theirs) > 50


def test_the_bundle_is_proved_and_says_what_decodes(small_bundle: Bundle, checkpoint: Path, decoder: Path) -> None:
    manifest = small_bundle.manifest
    assert {n: c.class_name for n, c in manifest.components.items()} == {
        "text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae_decoder": "AutoencoderTiny",
    }  # fmt: skip
    assert manifest.provenance.checkpoint_sha256 == hash_checkpoint(checkpoint)
    assert (manifest.provenance.decoder, manifest.provenance.decoder_sha256) == ("small", hash_checkpoint(decoder))
    assert manifest.parity is not None
    assert "with the small decoder" in manifest.parity.reference
    assert [c.passed for c in manifest.parity.checks] == [True] * 4
    assert small_bundle.verify() > 0
    config = json.loads((small_bundle.root / "vae_decoder" / "config.json").read_text("utf-8"))
    assert config["_class_name"] == "AutoencoderKL"
    assert config["scaling_factor"] == manifest.model.scaling_factor == read_model(checkpoint).scaling_factor
    assert "AutoencoderTiny" in run("info", small_bundle.root, cwd=small_bundle.root).stdout


def test_a_bundle_without_one_says_so(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.components["vae_decoder"].class_name == "AutoencoderKL"
    assert manifest.provenance.decoder is manifest.provenance.decoder_sha256 is None


@pytest.mark.parametrize("preset", ["taesd", "thin"])
def test_upsampling_is_split_with_the_same_answer(preset: str) -> None:
    network = new_decoder(find_decoder(preset, 8), 4).decoder.double()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    expected = network(x)
    split_upsampling(network)
    assert sum(isinstance(layer, SubpixelUpsample) for layer in network.modules()) == 3
    assert not any(isinstance(layer, nn.Upsample) for layer in network.modules())
    torch.testing.assert_close(network(x), expected)


def only_the_decoder(write: Any) -> Any:
    """The target's own work on one component, with the bundle around it left out."""

    def write_bundle(request: ExportRequest, write_component: Any, **_: Any) -> Any:
        request.out.mkdir()
        part = load_component(request.checkpoint, "vae_decoder", request.decoder)
        write(write_component(part, request.out), request.out)

    return write_bundle


@pytest.mark.parametrize("target", ["openvino", "coreml"])
def test_the_other_targets_decode_the_same(
    checkpoint: Path, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    files: list[str] = []
    module = "kdc_edge.export.openvino" if target == "openvino" else "kdc_edge.export.coreml.export"
    monkeypatch.setattr(f"{module}.write_bundle", only_the_decoder(lambda found, _: files.extend(found)))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = load_decoder(decoder, read_model(checkpoint)).decode(latents)[0].numpy()
    out = tmp_path / "out"
    export_checkpoint(ExportRequest(checkpoint, out, target, "fp32", decoder=decoder))
    if target == "openvino":
        import openvino as ov

        found = ov.Core().compile_model(out / files[0], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([latents.numpy()])[
            0
        ]
    else:
        from kdc_edge.runtimes.mil.evaluator import Evaluator
        from kdc_edge.runtimes.mil.program import read_program

        found = Evaluator(read_program(out / files[0]))(z=latents.numpy())["image"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.fixture
def tiny_checkpoint(own_checkpoint: Path, decoder: Path) -> Path:
    """A checkpoint whose `vae` is an AutoencoderTiny, as diffusers saves it."""
    shutil.rmtree(own_checkpoint / "vae")
    shutil.copytree(decoder, own_checkpoint / "vae")
    index = json.loads((own_checkpoint / "model_index.json").read_text("utf-8"))
    (own_checkpoint / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    return own_checkpoint


@pytest.mark.usefixtures("traced_once")
def test_a_checkpoint_with_a_small_vae_is_read_and_exported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = read_model(tiny_checkpoint)
    assert (model.scaling_factor, model.vae_scale, model.latent_channels) == (1, 4, 4)
    tiny = load_network(tiny_checkpoint, "vae_decoder")
    assert isinstance(tiny, AutoencoderTiny)
    latents = initial_latents((1, 4, 16, 16), 0)
    found = get_runtime("torch").load(tiny_checkpoint, "vae_decoder", LoadOptions(device="CPU"))(latent_sample=latents)
    np.testing.assert_array_equal(found, tiny.decode(torch.from_numpy(latents)).sample.numpy())
    made = export_checkpoint(ExportRequest(tiny_checkpoint, tmp_path / "out", "onnx", "fp32", verify=False))
    assert made.manifest.components["vae_decoder"].class_name == "AutoencoderTiny"
    assert json.loads((made.root / "model_index.json").read_text("utf-8"))["vae"] == ["diffusers", "AutoencoderKL"]
    session = onnxruntime.InferenceSession(made.root / "vae_decoder" / "model.onnx")
    np.testing.assert_allclose(session.run(None, {"latent_sample": latents})[0], found, rtol=1e-3, atol=1e-3)
    request = ExportRequest(tiny_checkpoint, tmp_path / "other", "coreml", "fp16")
    with pytest.raises(CheckpointError, match="no AutoencoderKL, whose encoder --swift exports"):
        export_checkpoint(request, CoreMLOptions(swift=True))


def edit(folder: Path, change: Mapping[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))


def test_decoders_that_cannot_be_are_one_line(checkpoint: Path, decoder: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        return complaint("export", checkpoint, "--decoder", folder, "--precision", "fp32", cwd=tmp_path)

    assert "no decoder at" in refused(tmp_path / "nowhere")
    own = Path(shutil.copytree(decoder, tmp_path / "own"))
    (own / WEIGHTS).rename(own / "diffusion_pytorch_model.bin")
    assert "pickles alone" in refused(own)
    (own / "diffusion_pytorch_model.bin").unlink()
    assert "the folder is incomplete" in refused(own)
    (own / WEIGHTS).write_bytes(b"\xff" * 100)
    assert "is no safetensors file" in refused(own)
    (own / WEIGHTS).unlink()
    (own / WEIGHTS).symlink_to(decoder / WEIGHTS)
    assert "is a link out of its folder" in refused(own)
    (own / WEIGHTS).unlink()
    edit(own, {"_class_name": "VQModel"})
    assert "'VQModel': a small decoder is one of AutoencoderTiny, ThinDecoder" in refused(own)
    large = make_decoder(tmp_path / "taesd", "taesd")
    assert "does not fit: it has 8 pixels a latent each way, 4 are needed" in refused(large)
    edit(large, {"decoder_block_out_channels": [64, 64, 32, 32]})
    assert "cannot be read as AutoencoderTiny" in refused(large)


def test_a_decoder_of_other_latents_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with quiet():
        new_decoder(find_decoder(None, 4), 16).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="it has 16 channels of latents, 4 are needed"):
        load_decoder(tmp_path / "wide", read_model(checkpoint))


def test_a_decoder_without_an_encoder_is_enough(checkpoint: Path, decoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = Path(shutil.copytree(decoder, tmp_path / "own"))
    kept = {n: t for n, t in load_file(own / WEIGHTS).items() if n.startswith("decoder.")}
    save_file(kept, own / WEIGHTS)
    assert load_decoder(own, read_model(checkpoint)).decode(torch.zeros(1, 4, 2, 2))[0].shape == (1, 3, 8, 8)
    assert apple_network(load_component(checkpoint, "vae_decoder", own), read_model(checkpoint), unet_batch=2).inputs
    kept.pop("decoder.layers.0.weight")
    save_file(kept, own / WEIGHTS)
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights of AutoencoderTiny, such as decoder\.layers\.0\.weight"
    ):
        load_decoder(own, read_model(checkpoint))

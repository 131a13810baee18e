"""A VAE whose activations overflow in half precision: the proof finds it, and the bundle keeps it in fp32."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from kdc_edge.bundle import Bundle
from kdc_edge.errors import ParityError
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.program import read_program
from tests.export.test_coreml import start_from_packages_of

PROMPT = "a red flower"


@pytest.fixture(scope="module")
def overflowing(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a small VAE, whose decoder's first activations are over float16's largest value, 65504."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("checkpoint") / "overflowing"))
    torch.manual_seed(5)
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, scaling_factor=1.0,
    )  # fmt: skip
    vae.decoder.conv_in.weight.data *= 1e5  # each weight fits in float16
    assert vae.decoder.conv_in.weight.abs().max() < 65504
    with torch.no_grad():
        assert vae.decoder.conv_in(vae.post_quant_conv(torch.randn(1, 4, 16, 16))).abs().max() > 65504
    shutil.rmtree(folder / "vae")
    vae.save_pretrained(folder / "vae")
    return folder


def export(checkpoint: Path, out: Path, target: str, precision: str) -> tuple[Bundle, list[str]]:
    said: list[str] = []
    request = ExportRequest(checkpoint, out, target, precision, prompts=[PROMPT], tell=said.append)
    return export_checkpoint(request), said


def test_core_ml_keeps_the_decoder_in_fp32(
    overflowing: Path, coreml_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_from_packages_of(coreml_bundle, monkeypatch, anew="AppleVaeDecoder")
    made, said = export(overflowing, tmp_path / "out", "coreml", "fp16")
    assert said == ["vae_decoder is kept in fp32; in fp16 it gives values that are no numbers, or a wrong shape"]
    manifest = made.manifest
    assert {name: info.precision for name, info in manifest.components.items()} == {
        "text_encoder": None, "unet": None, "vae_decoder": "fp32",
    }  # fmt: skip
    assert manifest.parity is not None
    assert all(check.passed for check in manifest.parity.checks)
    assert next(c for c in manifest.parity.checks if c.what == "vae_decoder").reaches(60)
    program = read_program(made.root / "vae_decoder" / "VAEDecoder.mlpackage" / PROGRAM)
    assert "fp16" not in {t.dtype for o in program.operations for t in o.outputs.values()}
    made.verify()


@pytest.mark.usefixtures("traced_once")
def test_a_decoder_that_fails_in_fp32_too_is_no_bundle(
    overflowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written where the rest is not proved either."""
    from kdc_edge.export import bundle_writer

    load = bundle_writer.load_component

    def other(checkpoint: Path, name: str, decoder: Path | None = None) -> object:
        part = load(checkpoint, name, decoder)
        if name == "vae_decoder":
            part.module.vae.decoder.conv_out.weight.data *= 1.5
        return part

    monkeypatch.setattr(bundle_writer, "load_component", other)
    with pytest.raises(ParityError, match=r"vae_decoder: .* dB where 45 dB are needed"):
        export(overflowing, tmp_path / "out", "onnx", "fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_arithmetic_of_32_bits_does_not_overflow(overflowing: Path, tmp_path: Path, target: str) -> None:
    """ONNX Runtime widens the weights; OpenVINO computes in fp32, or in bfloat16, which has fp32's range."""
    made, _ = export(overflowing, tmp_path / "out", target, "fp16")
    assert made.manifest.parity is not None
    assert all(check.passed for check in made.manifest.parity.checks)
    if target == "onnx":
        assert made.manifest.components["vae_decoder"].precision is None

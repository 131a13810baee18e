"""Core ML exports have Apple's names and shapes, are proved without a Mac, and say what they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdc_edge.bundle import Bundle
from kdc_edge.errors import BundleError, InputError, ParityError
from kdc_edge.export.components import load_component
from kdc_edge.export.coreml import export as coreml
from kdc_edge.export.rewrites.attention import set_attention
from kdc_edge.export.targets import CoreMLOptions, ExportRequest, export_checkpoint
from kdc_edge.request import Request
from kdc_edge.runtimes import LoadOptions, get_runtime, open_for_bench, open_pipeline
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.coreml_tools import load_coremltools
from kdc_edge.runtimes.mil.program import read_program
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from tests.cli.test_commands import complaint, run

# Names and shapes that Apple's Swift package expects, in the garden's sizes.
APPLE = {
    "text_encoder/TextEncoder": (
        {"input_ids": (1, 77)},
        {"last_hidden_state": (1, 77, 128), "pooled_outputs": (1, 128)},
    ),
    "unet/Unet": (
        {"sample": (2, 4, 16, 16), "timestep": (2,), "encoder_hidden_states": (2, 128, 1, 77)},
        {"noise_pred": (2, 4, 16, 16)},
    ),
    "vae_decoder/VAEDecoder": ({"z": (1, 4, 16, 16)}, {"image": (1, 3, 64, 64)}),
}
# With --swift, for image to image.
ENCODER = (
    {
        "sample": (1, 3, 64, 64),
        "diagonal_noise": (1, 4, 16, 16),
        "noise": (1, 4, 16, 16),
        "sqrt_alphas_cumprod": (1, 1),
        "sqrt_one_minus_alphas_cumprod": (1, 1),
    },
    {"latent": (1, 4, 16, 16)},
)


def start_from_packages_of(bundle: Path, patch: pytest.MonkeyPatch, *, anew: str | None = None) -> None:
    """Exports take the converted networks of an fp16 bundle: tracing and converting is most of their time.

    A module of the class `anew` is converted.
    """
    names = {
        "AppleTextEncoder": "text_encoder/TextEncoder",
        "AppleUNet": "unet/Unet",
        "AppleVaeEncoder": "vae_encoder/VAEEncoder",
    }

    def convert(network: Any, **options: Any) -> Any:
        if (kind := type(network.module).__name__) == anew:
            return original(network, **options)
        name = names.get(kind, "vae_decoder/VAEDecoder")
        return load_coremltools("a test").models.MLModel(str(bundle / f"{name}.mlpackage"), skip_model_load=True)

    original = coreml.convert
    patch.setattr(coreml, "convert", convert)


@pytest.fixture
def converted(coreml_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_from_packages_of(coreml_bundle, monkeypatch)


def test_names_shapes_and_types_are_apples(coreml_bundle: Path) -> None:
    for name, (inputs, outputs) in (APPLE | {"vae_encoder/VAEEncoder": ENCODER}).items():
        program = read_program(coreml_bundle / f"{name}.mlpackage" / PROGRAM)
        assert {n: t.shape for n, t in program.inputs.items()} == inputs
        assert {n: t.shape for n, t in program.outputs.items()} == outputs
        assert {t.dtype for t in (program.inputs | program.outputs).values()} == {"fp32"}
        assert program.opset == "CoreML7"  # iOS 17, macOS 14
        assert "Stable Diffusion student" in program.metadata["shortDescription"]
        assert program.metadata["author"] == "exported by kdc-edge"
    spec = load_coremltools("a test").utils.load_spec(str(coreml_bundle / "unet" / "Unet.mlpackage"))
    assert [f.shortDescription for f in spec.description.input][1].endswith("one a sample, as a float; 2")


def test_the_manifest_describes_the_packages(coreml_bundle: Path) -> None:
    bundle = Bundle.open(coreml_bundle)
    for name, info in bundle.manifest.components.items():
        known = APPLE | {"vae_encoder/VAEEncoder": ENCODER}
        ((package, (inputs, outputs)),) = [(k, v) for k, v in known.items() if k.startswith(name)]
        assert info.files[0] == f"{package}.mlpackage/{PROGRAM}"
        assert sorted(info.files[1:]) == [
            f"{package}.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
            f"{package}.mlpackage/Manifest.json",
        ]
        assert {n: tuple(t.shape) for n, t in (info.inputs | info.outputs).items()} == inputs | outputs
        assert {t.dtype for t in (info.inputs | info.outputs).values()} == {"float32"}
    assert bundle.verify() == len(bundle.manifest.files)
    assert "coremltools" in bundle.manifest.provenance.packages


def test_the_proof_was_computed_here(coreml_bundle: Path) -> None:
    parity = Bundle.open(coreml_bundle).manifest.parity
    assert parity is not None
    assert parity.conditions.startswith("mil ")
    assert [c.what for c in parity.checks] == ["text_encoder", "unet", "vae_decoder", "image", "vae_encoder"]
    for check in parity.checks:
        assert check.psnr_db is not None
        assert check.psnr_db > 45  # random weights of the garden's shape; 35 dB are demanded


@pytest.mark.usefixtures("converted")
def test_compressed_weights(checkpoint: Path, coreml_bundle: Path, tmp_path: Path) -> None:
    made = export_checkpoint(
        ExportRequest(checkpoint, tmp_path / "out", "coreml", "palette4", prompts=["a red flower"])
    )
    assert made.size_bytes < 0.4 * Bundle.open(coreml_bundle).size_bytes + 500_000
    parity = made.manifest.parity
    assert parity is not None
    assert all(check.passed and check.psnr_db is not None and check.psnr_db < 50 for check in parity.checks)
    kinds = {o.type for o in read_program(tmp_path / f"out/unet/Unet.mlpackage/{PROGRAM}").operations}
    assert "constexpr_lut_to_dense" in kinds


@pytest.mark.usefixtures("converted")
def test_a_large_unet_lies_in_two_packages(
    checkpoint: Path, coreml_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdc_edge.export.coreml.export.CHUNK_BYTES", 1_000_000)
    made = export_checkpoint(ExportRequest(checkpoint, tmp_path / "out", "coreml", "fp16", verify=False))
    files = made.manifest.components["unet"].files
    assert files[:2] == [f"unet/UnetChunk{i}.mlpackage/{PROGRAM}" for i in (1, 2)]
    assert sorted(p.name for p in (made.root / "unet").iterdir()) == [
        "UnetChunk1.mlpackage", "UnetChunk2.mlpackage", "config.json",
    ]  # fmt: skip
    inputs = some_inputs(2)
    whole, chunked = (get_runtime("mil").load(b, "unet") for b in (coreml_bundle, made.root))
    np.testing.assert_allclose(chunked(**inputs), whole(**inputs), atol=2e-3)


def some_inputs(batch: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((batch, 4, 16, 16), np.float32),
        "timestep": np.array([500]),
        "encoder_hidden_states": random.standard_normal((batch, 77, 128), np.float32),
    }


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_batch_goes_through_a_fixed_one(coreml_bundle: Path, checkpoint: Path, batch: int) -> None:
    inputs = some_inputs(batch)
    found = get_runtime("mil").load(coreml_bundle, "unet", LoadOptions(device="cpu"))(**inputs)
    expected = get_runtime("torch").load(checkpoint, "unet")(**inputs)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_another_size_is_refused_in_one_line(coreml_bundle: Path) -> None:
    pipeline = open_pipeline(coreml_bundle, engine="mil")
    with pytest.raises(InputError, match="width 96 cannot be made: this bundle's sizes are fixed"):
        pipeline.check(Request("a red flower", steps=1, width=96))
    with pytest.raises(InputError, match="takes sample of 4x16x16 where 4x16x24 are given: its sizes are fixed"):
        pipeline.components["unet"](**some_inputs(1) | {"sample": np.zeros((1, 4, 16, 24), np.float32)})
    with pytest.raises(BundleError, match="takes latent_sample where latent are given"):
        get_runtime("mil").load(coreml_bundle, "vae_decoder")(latent=np.zeros((1, 4, 16, 16), np.float32))


@pytest.mark.parametrize("kind", ["original", "split-einsum", "sdpa"])
def test_attention_layouts_compute_the_same(checkpoint: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdc_edge.export.rewrites.attention.QUERIES_AT_ONCE", 100)
    part = load_component(checkpoint, "unet")
    inputs = {name: torch.from_numpy(value) for name, value in some_inputs(2).items()}
    with torch.no_grad():
        expected = part.module(**inputs)
        set_attention(part.module.unet, kind)
        found = part.module(**inputs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "target"), [("original", "iOS17"), ("split-einsum", "iOS17"), ("sdpa", "iOS18")])
def test_attention_layouts_through_core_ml(kind: str, target: str) -> None:
    from diffusers.models.attention_processor import Attention

    from kdc_edge.export.coreml.apple_modules import AppleNetwork
    from kdc_edge.export.coreml.export import convert
    from kdc_edge.manifest import Tensor
    from kdc_edge.runtimes.mil.evaluator import Evaluator

    torch.manual_seed(0)
    attention = Attention(64, cross_attention_dim=48, heads=2, dim_head=32).eval()
    inputs = {"x": torch.randn(2, 40, 64), "text": torch.randn(2, 7, 48)}
    expected = attention(inputs["x"], inputs["text"]).detach().numpy()
    set_attention(attention, kind)
    described = {name: Tensor(dtype="float32", shape=list(value.shape)) for name, value in inputs.items()}
    network = AppleNetwork(attention, described, {"y": Tensor(dtype="float32", shape=[2, 40, 64])}, {}, "")
    package = convert(network, half=True, target=target)
    folder = Path(package.package_path)
    program = read_program(folder / PROGRAM)
    kinds = {o.type for o in program.operations}
    assert ("scaled_dot_product_attention" in kinds) == (kind == "sdpa")
    assert ("conv" in kinds) == (kind == "split-einsum")
    weights = {o.name for o in program.operations if o.type == "const" and o.attributes["val"].type.size >= 2048}
    assert {f"to_{x}_weight_to_fp16" for x in ("q", "k", "v")} <= weights  # a recipe finds its layers by name
    found = Evaluator(program)(**{name: value.numpy() for name, value in inputs.items()})["y"]
    error = np.mean((found - expected) ** 2)
    assert 10 * np.log10(np.abs(expected).max() ** 2 / error) > 55


@pytest.mark.full
@pytest.mark.parametrize(("kind", "target"), [("original", "iOS17"), ("split-einsum", "iOS17"), ("sdpa", "iOS18")])
def test_whole_images_with_each_attention_layout(kind: str, target: str, tmp_path: Path) -> None:
    options = CoreMLOptions(attention=kind, deployment_target=target)
    made = export_checkpoint(ExportRequest(GARDEN_TEACHER, tmp_path / kind, "coreml", "fp16"), options)
    parity = made.manifest.parity
    assert parity is not None
    assert {"unet", "image"} <= {c.what for c in parity.checks}
    assert all(c.passed and (c.psnr_db or 99) >= 35 for c in parity.checks)


def test_resources_for_swift(coreml_bundle: Path, tmp_path: Path) -> None:
    resources = coreml_bundle / "Resources"
    assert sorted(p.name for p in resources.iterdir()) == ["compile.sh", "merges.txt", "vocab.json"]
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "xcrun").write_text('#!/bin/sh\n[ -d "$3" ] && mkdir "$4/$(basename "$3" .mlpackage).mlmodelc"\n')
    (tools / "xcrun").chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["sh", str(resources / "compile.sh")]
    assert subprocess.run(command, capture_output=True, env=environment, check=False).returncode != 0
    subprocess.run([*command, str(tmp_path / "app data")], check=True, env=environment)
    assert sorted(p.name for p in (tmp_path / "app data").iterdir()) == [
        "TextEncoder.mlmodelc", "Unet.mlmodelc", "VAEDecoder.mlmodelc", "VAEEncoder.mlmodelc", "merges.txt",
        "vocab.json",
    ]  # fmt: skip
    assert Bundle.open(coreml_bundle).verify() > 0  # the bundle is as it was


def test_on_a_mac_resources_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdc_edge.export.coreml import swift

    monkeypatch.setattr(swift, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for part in ("unet/Unet.mlpackage", "bin"):
        (tmp_path / part).mkdir(parents=True)
    shutil.copytree(GARDEN_TEACHER / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(InputError, match="xcrun, which comes with Xcode"):
        swift.lay_out_resources(tmp_path)
    for script, code in (("echo 'bad model' >&2; exit 1", 1), ('mkdir "$4/$(basename "$3" .mlpackage).mlmodelc"', 0)):
        shutil.rmtree(tmp_path / "Resources")
        (tmp_path / "bin" / "xcrun").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / "xcrun").chmod(0o755)
        if code:
            with pytest.raises(InputError, match=r"cannot compile Unet\.mlpackage: bad model"):
                swift.lay_out_resources(tmp_path)
        else:
            swift.lay_out_resources(tmp_path)
    assert sorted(p.name for p in (tmp_path / "Resources").iterdir()) == ["Unet.mlmodelc", "merges.txt", "vocab.json"]


def test_options_are_checked_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"unet_batch": 3}, "--unet-batch 3 is not supported by Apple's package: use 2 or 1"),
        ({"deployment_target": "iOS9"}, "--deployment-target 'iOS9' is unknown: choose from iOS17, iOS18"),
        ({"attention": "flash"}, "--attention 'flash' is unknown"),
        ({"attention": "sdpa"}, "add --deployment-target iOS18"),
    ):
        with pytest.raises(InputError, match=message):
            CoreMLOptions(**options)  # type: ignore[arg-type]
    said = complaint("export", checkpoint, "--target", "onnx", "--swift", cwd=tmp_path)
    assert "--swift is for --target coreml: leave it out" in said


@pytest.mark.usefixtures("converted")
def test_damaged_weights_fail_the_export(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = coreml.save

    def save_wrongly(package: Any, folder: Path, name: str, network: Any, tell: Any) -> list[str]:
        files = save(package, folder, name, network, tell)
        weights = folder / next(f for f in files if f.endswith("weight.bin"))
        if name == "unet":
            stored = [o.attributes["val"] for o in read_program(folder / files[0]).operations if o.type == "const"]
            largest = max((v for v in stored if v.file), key=lambda v: v.type.size)
            data = bytearray(weights.read_bytes())
            begin = largest.offset + 64  # behind its metadata
            data[begin : begin + largest.type.size] = bytes(largest.type.size)  # half of its 16-bit values
            weights.write_bytes(data)
        return files

    monkeypatch.setattr(coreml, "save", save_wrongly)
    with pytest.raises(ParityError, match=r"coreml-fp16 does not compute .*: unet: "):
        export_checkpoint(ExportRequest(checkpoint, tmp_path / "out", "coreml", "fp16", prompts=["a red flower"]))
    assert list(tmp_path.iterdir()) == []


def test_an_image_on_any_machine_and_no_benchmark(coreml_bundle: Path, tmp_path: Path) -> None:
    done = run("generate", "a red flower", "--bundle", coreml_bundle, "--steps", 1, "--out", "a.png", cwd=tmp_path)
    assert (tmp_path / "a.png").is_file()
    assert "coremltools" not in done.stderr
    with pytest.raises(InputError, match="mil only proves this bundle: measure it where its engine runs"):
        open_for_bench(coreml_bundle)
    with pytest.raises(InputError, match="coreml needs Apple's frameworks, which only macOS has: use the engine mil"):
        open_pipeline(coreml_bundle, engine="coreml")
    rows = json.loads(run("devices", "--json", cwd=tmp_path).stdout)["engines"]
    found = {row["engine"]: row for row in rows}
    assert "only macOS has" in found["coreml"]["missing"]
    assert found["mil"]["devices"][0]["name"] == "CPU"


def test_converting_is_quiet(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from kdc_edge.diffusers_folder import read_model
    from kdc_edge.export.coreml.apple_modules import apple_network
    from kdc_edge.export.coreml.export import convert

    part = load_component(checkpoint, "text_encoder")
    convert(apple_network(part, read_model(checkpoint), unet_batch=2), half=True, target="iOS17")
    assert capfd.readouterr() == ("", "")


@pytest.mark.full
def test_the_482m_student(tmp_path: Path) -> None:
    """Names and sizes of the full size, and one pass of its U-Net in fp16 against PyTorch."""
    from kdc_edge.presets import find_preset
    from kdc_edge.train.checkpoint import init_checkpoint

    source = tmp_path / "student"
    init_checkpoint(source, find_preset("kdc-482m"), None, seed=0)
    bundles = {
        p: export_checkpoint(ExportRequest(source, tmp_path / p, "coreml", p, verify=False))
        for p in ("fp16", "palette6", "w8")
    }
    assert bundles["palette6"].size_bytes < 560e6
    unet = bundles["fp16"].manifest.components["unet"]
    assert {n: t.shape for n, t in (unet.inputs | unet.outputs).items()} == {
        "sample": [2, 4, 64, 64],
        "timestep": [2],
        "encoder_hidden_states": [2, 768, 1, 77],
        "noise_pred": [2, 4, 64, 64],
    }
    random = np.random.default_rng(0)
    inputs = {
        "sample": random.standard_normal((2, 4, 64, 64), np.float32),
        "timestep": np.array([990]),
        "encoder_hidden_states": random.standard_normal((2, 77, 768), np.float32),
    }
    expected = get_runtime("torch").load(source, "unet")(**inputs)
    for precision, least_db in (("fp16", 45), ("w8", 30), ("palette6", 25)):
        found = get_runtime("mil").load(bundles[precision].root, "unet")(**inputs)
        assert 10 * np.log10(np.abs(expected).max() ** 2 / np.mean((found - expected) ** 2)) > least_db
    ids = np.array(
        [[49406, 320, 1125, *[49407] * 74]]
    )  # ids that 16 signed bits do not hold: coremltools likes to store indices so
    text = get_runtime("mil").load(bundles["fp16"].root, "text_encoder")(input_ids=ids)
    expected = get_runtime("torch").load(source, "text_encoder")(input_ids=ids)
    assert 10 * np.log10(np.abs(expected).max() ** 2 / np.mean((text - expected) ** 2)) > 45

"""The optional safety checker: exported, proved, and what it flags is what diffusers' flags, on every engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kdc_edge import Pipeline
from kdc_edge.bundle import Bundle
from kdc_edge.checkpoints import Additions, open_checkpoint
from kdc_edge.components import CHECKER
from kdc_edge.errors import CheckpointError
from kdc_edge.export.bundle_writer import Interface, optimum_interface
from kdc_edge.export.components import load_component
from kdc_edge.export.optional import prove_optional
from kdc_edge.export.targets import CoreMLOptions, ExportRequest, export_checkpoint
from kdc_edge.formats import find_format
from kdc_edge.manifest import ComponentInfo, list_files, write_manifest
from kdc_edge.noise import initial_latents
from kdc_edge.quiet import quiet
from kdc_edge.request import Request
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program
from kdc_edge.safety import check_image, clip_input
from tests.cli.test_commands import complaint, run
from tests.export.checker import make_checker

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
SEEDS = [0, 1, 2, 3]
PROMPT = "a red flower"
HOW: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def unchecked(checkpoint: Path) -> list[np.ndarray]:
    """The images that no checker has seen."""
    made = Pipeline.open(checkpoint, threads=1)(PROMPT, num_images_per_prompt=4, scheduler="ddim", **HOW)
    assert made.nsfw_content_detected is None
    return [np.asarray(image) for image in made.images]


@pytest.fixture(scope="module")
def checked(checkpoint: Path, unchecked: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a safety checker that flags two of them."""
    folder = Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("checkpoint") / "checked"))
    make_checker(folder, unchecked)
    return folder


@pytest.fixture(scope="module")
def onnx_bundle(checked: Path, traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    out = tmp_path_factory.mktemp("bundles") / "onnx"
    return export_checkpoint(ExportRequest(checked, out, "onnx", "fp16", prompts=[PROMPT], extra=[CHECKER])).root


def with_checker(
    bundle: Path, out: Path, target: str, interface: Interface, write: Callable[[Path], list[str]]
) -> Path:
    """A copy of a bundle with a checker of another target: the other networks need not be converted again."""
    root = Path(shutil.copytree(bundle, out))
    shutil.rmtree(root / CHECKER, ignore_errors=True)
    (root / CHECKER).mkdir()
    files = [f"{CHECKER}/{file}" for file in write(root / CHECKER)]
    info = ComponentInfo(files=files, inputs=interface[0], outputs=interface[1])
    manifest = Bundle.open(bundle).manifest
    update = {
        "target": target, "components": manifest.components | {CHECKER: info}, "files": list_files(root),
    }  # fmt: skip
    write_manifest(root, manifest.model_copy(update=update))
    return root


@pytest.fixture(scope="module")
def openvino_bundle(checked: Path, onnx_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its other networks stay ONNX files, which nobody loads."""
    from kdc_edge.export import openvino

    part = load_component(checked, CHECKER)

    def write(folder: Path) -> list[str]:
        import openvino as ov

        with quiet(progress=True):
            ov.save_model(openvino.convert(part), folder / openvino.MODEL)
        return [openvino.MODEL, "openvino_model.bin"]

    return with_checker(
        onnx_bundle, tmp_path_factory.mktemp("bundles") / "openvino", "openvino", optimum_interface(part), write
    )


@pytest.fixture(scope="module")
def coreml(checked: Path, coreml_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kdc_edge.diffusers_folder import read_model
    from kdc_edge.export.coreml.apple_modules import apple_network
    from kdc_edge.export.coreml.export import convert, save

    network = apple_network(load_component(checked, CHECKER), read_model(checked), unet_batch=2)

    def write(folder: Path) -> list[str]:
        return save(convert(network, half=True, target="iOS17"), folder, CHECKER, network, print)

    interface = dict(network.inputs), dict(network.outputs)
    return with_checker(coreml_bundle, tmp_path_factory.mktemp("bundles") / "coreml", "coreml", interface, write)


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (512, 512), (100, 80), (81, 133), (500, 225), (333, 512)])
def test_images_reach_clip_as_transformers_sends_them(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = CLIPImageProcessorPil()(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    found = clip_input(pixels)
    assert (found.shape, found.dtype) == ((1, 3, 224, 224), np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_is_flagged_is_what_diffusers_flags(
    onnx_bundle: Path, openvino_bundle: Path, coreml: Path, checked: Path, unchecked: list[np.ndarray]
) -> None:
    whole = StableDiffusionPipeline.from_pretrained(checked)
    assert whole.safety_checker is None  # its index names none
    checker = make_checker(checked, unchecked)
    parts = whole.components | {"safety_checker": checker, "feature_extractor": CLIPImageProcessorPil()}
    pipeline: Any = StableDiffusionPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.concatenate([initial_latents((1, 4, 16, 16), seed) for seed in SEEDS]))
    expected = pipeline([PROMPT] * 4, latents=latents, **HOW)
    flags = expected.nsfw_content_detected
    assert sorted(flags) == [False, False, True, True]
    for folder in (checked, onnx_bundle):
        made = Pipeline.open(folder, threads=1)(PROMPT, num_images_per_prompt=4, scheduler="ddim", **HOW)
        assert made.nsfw_content_detected == flags
        for flagged, image, theirs, before in zip(flags, made.images, expected.images, unchecked, strict=True):
            assert np.asarray(theirs).any() != flagged
            assert np.asarray(image).any() != flagged
            assert flagged or np.abs(np.asarray(image, int) - before).max() < 16
    for folder, engine in ((openvino_bundle, "openvino"), (coreml, "mil")):
        component = Pipeline.open(folder, engine=engine).components[CHECKER]
        assert [check_image(component, image)[1] for image in unchecked] == flags


def test_the_proof_names_the_checker(onnx_bundle: Path) -> None:
    manifest = Bundle.open(onnx_bundle).manifest
    info = manifest.components["safety_checker"]
    assert info.class_name == "StableDiffusionSafetyChecker"
    assert (info.inputs["clip_input"].shape, info.outputs["concept_scores"].shape) == (
        ["batch_size", 3, 224, 224], ["batch_size", 17],
    )  # fmt: skip
    assert manifest.parity is not None
    found = {check.what: check for check in manifest.parity.checks}
    assert found[CHECKER].reaches(60)
    assert found["image"].passed  # which no checker made black
    assert Bundle.open(onnx_bundle).verify()


@pytest.mark.parametrize("target", ["openvino", "coreml"])
def test_other_targets_are_proved(checked: Path, openvino_bundle: Path, coreml: Path, target: str) -> None:
    root = openvino_bundle if target == "openvino" else coreml
    (check,) = prove_optional(checked, root, find_format(target, "fp16"), [CHECKER])
    assert (check.what, check.reaches(50)) == (CHECKER, True)


def test_core_mls_file_is_what_apples_package_reads(coreml: Path) -> None:
    program = read_program(coreml / CHECKER / "SafetyChecker.mlpackage" / PROGRAM)
    assert list(program.inputs) == ["clip_input", "images", "adjustment"]
    assert program.outputs.keys() == {"filtered_images", "has_nsfw_concepts", "concept_scores"}
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    for adjustment, unsafe in ((-5.0, 0.0), (5.0, 1.0)):
        inputs = {"clip_input": image, "images": np.ones((1, 64, 64, 3), np.float32)}
        found = Evaluator(program)(**inputs, adjustment=np.full(1, adjustment, np.float32))
        assert found["has_nsfw_concepts"].tolist() == [unsafe]
        assert found["filtered_images"].max() == 1 - unsafe


def test_generate_says_which_image_was_blanked(onnx_bundle: Path, tmp_path: Path) -> None:
    options = ("--steps", 1, "--guidance", 1, "--scheduler", "ddim", "--images", 4, "--threads", 1)
    done = run("generate", PROMPT, "--bundle", onnx_bundle, *options, cwd=tmp_path)
    black = [i for i, name in enumerate(done.stdout.split(), 1) if not np.asarray(Image.open(tmp_path / name)).any()]
    assert len(black) == 2
    for i in SEEDS:
        assert (f"image {i + 1} was blanked by the safety checker" in done.stderr) == (i + 1 in black)


def test_an_image_is_given_when_it_has_been_checked(onnx_bundle: Path, unchecked: list[np.ndarray]) -> None:
    pipeline = Pipeline.open(onnx_bundle, threads=1)
    request = Request(PROMPT, steps=1, guidance=1, sampler="ddim")
    requests = [replace(request, seed=seed) for seed in SEEDS]
    done = [(p.stage, p.pixels is not None, p.nsfw is not None) for p in pipeline.run(*requests)][-8:]
    assert done == [("vae_decoder", False, False)] * 4 + [(CHECKER, True, True)] * 4
    loaded = [p.step for p in pipeline.prepare(request) if p.stage == "load"]
    assert loaded == [1, 2, 3, 4]
    flags = [list(pipeline.stream(PROMPT, seed=seed, **HOW))[-1].nsfw_content_detected for seed in SEEDS]
    assert flags.count(True) == 2
    without = Pipeline.open(onnx_bundle, threads=1, safety_checker=False)
    assert CHECKER not in without.components
    made = without(PROMPT, seed=1, scheduler="ddim", **HOW)
    assert made.nsfw_content_detected is None
    assert np.abs(np.asarray(made.images[0], int) - unchecked[1]).max() < 16


def test_a_checkpoint_with_additions_keeps_its_checker(own_checkpoint: Path) -> None:
    make_checker(own_checkpoint)
    assembled = open_checkpoint(own_checkpoint, Additions(prediction_type="v_prediction"))
    assert assembled != own_checkpoint
    assert CHECKER in Pipeline.open(assembled).components
    weights = [folder / CHECKER / "model.safetensors" for folder in (assembled, own_checkpoint)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_checkers_that_cannot_be_used_are_refused_before_the_work(
    checkpoint: Path, own_checkpoint: Path, tmp_path: Path
) -> None:
    said = complaint("export", checkpoint, "--with", "safety_checker", cwd=tmp_path)
    assert "has no safety_checker: copy that folder from the teacher, or leave --with safety_checker out" in said
    (own_checkpoint / CHECKER).mkdir()
    (own_checkpoint / CHECKER / "pytorch_model.bin").write_bytes(b"")
    request = ExportRequest(own_checkpoint, tmp_path / "out", "coreml", "fp16", extra=[CHECKER])
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        export_checkpoint(request, CoreMLOptions())
    assert Pipeline.open(own_checkpoint).components.keys() == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    make_checker(own_checkpoint, image_size=112)
    with pytest.raises(CheckpointError, match="reads images of 112 pixels where CLIP's have 224"):
        export_checkpoint(request, CoreMLOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]

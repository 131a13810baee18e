"""The Core ML engine: on a Mac as it is, elsewhere through a fake of coremltools' compiled model."""

from __future__ import annotations

import enum
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdc_edge.errors import BundleError, InputError
from kdc_edge.request import Request
from kdc_edge.runtimes import LoadOptions, base, get_runtime, open_pipeline
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program


class Unit(enum.Enum):
    ALL = 1
    CPU_AND_GPU = 2
    CPU_ONLY = 3
    CPU_AND_NE = 4


class FakeModel:
    """coremltools' CompiledMLModel, as far as the engine uses it; the mil engine computes."""

    opened: list[tuple[str, Unit]]  # set anew for each test

    def __init__(self, path: str, compute_units: Unit) -> None:
        if not (Path(path) / "compiled").is_file():
            raise RuntimeError(f"Error compiling model: no model at {path}\nand a second line")
        self.opened.append((Path(path).name, compute_units))
        self._evaluate = Evaluator(read_program(Path(path) / PROGRAM))

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._evaluate(**inputs)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Mac's coremltools; `compiled` counts compilations."""
    from kdc_edge.runtimes import coreml

    compiled: list[str] = []

    def compile_model(package: str, destination: str) -> str:
        compiled.append(Path(package).name)
        shutil.copytree(package, destination)
        (Path(destination) / "compiled").touch()
        return destination

    FakeModel.opened = []
    models = SimpleNamespace(CompiledMLModel=FakeModel, utils=SimpleNamespace(compile_model=compile_model))
    monkeypatch.setattr(coreml, "_ct", SimpleNamespace(models=models, ComputeUnit=Unit, __version__="9.0"))
    monkeypatch.setattr(base, "sys", SimpleNamespace(platform="darwin"))
    return SimpleNamespace(compiled=compiled)


@pytest.fixture
def own_coreml_bundle(coreml_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coreml_bundle, tmp_path / "coreml-fp16"))


def test_elsewhere_it_is_refused_in_one_line(coreml_bundle: Path) -> None:
    if base.sys.platform == "darwin":
        pytest.skip("this is a Mac")
    with pytest.raises(
        InputError, match="coreml needs Apple's frameworks, which only macOS has: use the engine mil here"
    ):
        open_pipeline(coreml_bundle, engine="coreml")


def test_an_image_as_the_evaluator_makes_it(fake: SimpleNamespace, own_coreml_bundle: Path) -> None:
    request = Request("a red flower", steps=2, guidance=3.0, seed=1)
    found = open_pipeline(own_coreml_bundle).generate(request)  # on a Mac it is the preferred engine
    np.testing.assert_array_equal(found, open_pipeline(own_coreml_bundle, engine="mil").generate(request))
    assert sorted(fake.compiled) == ["TextEncoder.mlpackage", "Unet.mlpackage", "VAEDecoder.mlpackage"]
    assert {units for _, units in FakeModel.opened} == {Unit.ALL}


def test_compiled_models_are_kept_beside_the_bundle(
    fake: SimpleNamespace, own_coreml_bundle: Path, tmp_path: Path
) -> None:
    runtime = get_runtime("coreml")
    for _ in range(2):
        runtime.load(own_coreml_bundle, "text_encoder", LoadOptions(device="cpu_and_ne"))
    assert len(fake.compiled) == 1
    assert FakeModel.opened[0][1] is Unit.CPU_AND_NE
    (kept,) = (tmp_path / ".coreml-fp16.compiled").glob("*.mlmodelc")
    assert kept.name == FakeModel.opened[0][0]
    assert kept.name.startswith("TextEncoder-")
    half = tmp_path / "elsewhere" / f".{kept.name}.part-new"  # of a process that was killed
    half.mkdir(parents=True)
    runtime.load(own_coreml_bundle, "text_encoder", LoadOptions(cache=tmp_path / "elsewhere"))
    assert not half.exists()
    assert (tmp_path / "elsewhere" / kept.name).is_dir()
    # Another system, or another bundle in its place, is compiled anew.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platform.platform", lambda: "macOS-99")
        runtime.load(own_coreml_bundle, "text_encoder")
    assert len(fake.compiled) == 3


def test_what_core_ml_refuses_is_one_line(fake: SimpleNamespace, own_coreml_bundle: Path, tmp_path: Path) -> None:
    runtime = get_runtime("coreml")
    runtime.load(own_coreml_bundle, "vae_decoder")
    (kept,) = (tmp_path / ".coreml-fp16.compiled").glob("*.mlmodelc")
    (kept / "compiled").unlink()
    with pytest.raises(BundleError, match=r"VAEDecoder\.mlpackage is refused by Core ML: Error compiling") as caught:
        runtime.load(own_coreml_bundle, "vae_decoder")
    assert "\n" not in str(caught.value)
    runtime.load(own_coreml_bundle, "vae_decoder")  # the damaged one is gone, so the next try compiles again
    assert len(fake.compiled) == 2


def test_what_cannot_be_computed_is_one_line(fake: SimpleNamespace, own_coreml_bundle: Path, monkeypatch: Any) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\non the Neural Engine")

    del fake
    monkeypatch.setattr(FakeModel, "predict", fail)
    text = get_runtime("coreml").load(own_coreml_bundle, "text_encoder")
    with pytest.raises(BundleError, match=r"TextEncoder\.mlpackage cannot compute this: out of memory$"):
        text(input_ids=np.ones((1, 77), np.int64))


@pytest.mark.usefixtures("fake")
def test_devices_are_compute_units(own_coreml_bundle: Path) -> None:
    runtime = get_runtime("coreml")
    assert [d.name for d in runtime.devices()] == ["ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"]
    with pytest.raises(InputError, match="coreml has no device 'GPU' here: choose from ALL"):
        runtime.load(own_coreml_bundle, "unet", LoadOptions(device="GPU"))


@pytest.mark.macos
@pytest.mark.parametrize("device", ["ALL", "CPU_ONLY"])
def test_core_ml_itself(own_coreml_bundle: Path, device: str) -> None:
    request = Request("a red flower", steps=2, guidance=3.0, seed=1)
    found = open_pipeline(own_coreml_bundle, device=device).generate(request).astype(int)
    expected = open_pipeline(own_coreml_bundle, engine="mil").generate(request)
    assert np.mean((found - expected) ** 2) < 255**2 / 10**3.5  # 35 dB

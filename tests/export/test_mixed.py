"""Mixed bits: the search keeps to its budget, goes on where it was cut off, and its recipe applies again."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError
from kdc_edge.export.calibration import Calibration
from kdc_edge.export.coreml.apple_modules import AppleNetwork, AppleUNet
from kdc_edge.export.coreml.export import _Export, convert
from kdc_edge.export.coreml.mixed import (
    BITS,
    Budget,
    Search,
    apply_recipe,
    bargains,
    read_recipe,
    stored_bytes,
)
from kdc_edge.export.coreml.palettize import folder_bytes, kmeans
from kdc_edge.export.targets import CoreMLOptions, ExportRequest, export_checkpoint
from kdc_edge.files import _lock
from kdc_edge.guidance import guided
from kdc_edge.manifest import CalibrationInfo, Recipe, Tensor
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program

Inputs = list[dict[str, np.ndarray]]
INFO = CalibrationInfo(prompts_sha256="0" * 64, prompts=3, samples=3, seed=0, sampler="dpm++2m", steps=10, guidance=2.0)


class TinyUNet(torch.nn.Module):
    """Three layers that are large enough for a table, and two that are not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = torch.nn.Conv2d(4, 24, 1)
        self.first = torch.nn.Conv2d(24, 32, 3, padding=1)
        self.second = torch.nn.Conv2d(32, 32, 3, padding=1)
        self.text = torch.nn.Linear(96, 32)
        self.conv_out = torch.nn.Conv2d(32, 4, 1)

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = False) -> Any:
        del return_dict
        hidden = torch.nn.functional.silu(self.first(self.conv_in(sample)))
        hidden = (
            hidden + self.text(encoder_hidden_states).mean(1)[:, :, None, None] + 0.01 * timestep[:, None, None, None]
        )
        return (self.conv_out(torch.nn.functional.silu(self.second(hidden))),)


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    random = np.random.default_rng(0)
    return [
        {
            "sample": random.standard_normal((2, 4, 8, 8), np.float32),
            "timestep": np.array([t]),
            "encoder_hidden_states": random.standard_normal((2, 5, 96), np.float32),
        }
        for t in (10, 500, 900)
    ]


@pytest.fixture(scope="module")
def package() -> Any:
    described = {"sample": [2, 4, 8, 8], "timestep": [2], "encoder_hidden_states": [2, 96, 1, 5]}
    network = AppleNetwork(
        AppleUNet(TinyUNet()).eval(),
        {name: Tensor(dtype="float32", shape=list(shape)) for name, shape in described.items()},
        {"noise_pred": Tensor(dtype="float32", shape=[2, 4, 8, 8])},
        {}, "",
    )  # fmt: skip
    return convert(network, half=True, target="iOS17")


@pytest.fixture(scope="module")
def search(inputs: Inputs, package: Any, tmp_path_factory: pytest.TempPathFactory) -> Search:
    return Search(TinyUNet().eval(), package, Calibration(inputs, INFO), tmp_path_factory.mktemp("search"), print)


def test_guidance_is_the_pipelines() -> None:
    cond, uncond = torch.tensor([3.0, 10.0]), torch.tensor([1.0, 20.0])
    assert guided(cond, uncond, 2.0).tolist() == guided(cond.numpy(), uncond.numpy(), 2.0).tolist() == [5.0, 0.0]


def test_layers_are_matched_by_name(search: Search) -> None:
    assert search.layers == {
        "unet_first_weight_to_fp16": 24 * 32 * 9,
        "unet_second_weight_to_fp16": 32 * 32 * 9,
        "unet_text_weight_to_fp16": 96 * 32,
    }


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
def test_a_size_is_kept_to(search: Search, package: Any, inputs: Inputs, tmp_path: Path, share: float) -> None:
    least, most = (search.size_bytes(dict.fromkeys(search.layers, bits)) for bits in (1, 8))
    budget = int(least + share * (most - least))
    recipe = search.find(Budget(max_size_bytes=budget))
    assert recipe.size_bytes <= budget
    assert recipe.psnr_db == pytest.approx(search.psnr_db(recipe.bits), abs=0.01)
    apply_recipe(package, recipe).save(str(tmp_path / "mixed.mlpackage"))
    assert folder_bytes(tmp_path / "mixed.mlpackage") == pytest.approx(recipe.size_bytes, abs=2500)
    # What was measured in PyTorch is what the package computes.
    unet = search._unet
    search.set_weights(recipe.bits)
    call = {name: torch.from_numpy(value) for name, value in inputs[1].items()}
    expected = unet(**call | {"timestep": call["timestep"].repeat(2)})[0].detach().numpy()
    search.restore(list(recipe.bits))
    found = Evaluator(read_program(tmp_path / "mixed.mlpackage" / PROGRAM))(
        sample=inputs[1]["sample"],
        timestep=np.full(2, 500, np.float32),
        encoder_hidden_states=inputs[1]["encoder_hidden_states"].transpose(0, 2, 1)[:, :, None],
    )["noise_pred"]
    assert 10 * np.log10(np.abs(expected).max() ** 2 / np.mean((found - expected) ** 2)) > 50


def test_an_error_is_kept_to(search: Search) -> None:
    recipes = [search.find(Budget(min_psnr_db=db)) for db in (45.0, 30.0, 15.0)]
    assert all(recipe.psnr_db >= db for recipe, db in zip(recipes, (45, 30, 15), strict=True))
    assert recipes[0].size_bytes > recipes[1].size_bytes > recipes[2].size_bytes


def test_mixed_is_no_worse_than_plain(search: Search) -> None:
    for bits in (6, 4, 2):
        plain = dict.fromkeys(search.layers, bits)
        mixed = search.find(Budget(max_size_bytes=search.size_bytes(plain)))
        assert mixed.psnr_db > search.psnr_db(plain) - 1.5  # three layers leave little to choose


def test_searches_in_one_folder_take_turns(
    checkpoint: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same versions: what others measured would be of other weights."""
    folders: list[Path] = []

    class Found:
        def __init__(self, _unet: Any, _package: Any, _calibration: Any, folder: Path, _tell: Any) -> None:
            with pytest.raises(BlockingIOError):
                os.close(_lock(folder / "lock"))
            folders.append(folder)

        def find(self, _budget: Budget) -> None: ...

    monkeypatch.setattr("kdc_edge.export.coreml.export.Search", Found)
    monkeypatch.setattr("kdc_edge.export.coreml.export.convert", lambda *_, **__: None)
    export = _Export(ExportRequest(checkpoint, tmp_path / "out", "coreml", "mixed"), read_model(checkpoint),
                     CoreMLOptions())  # fmt: skip
    for versions in ({"torch": "3"}, {"torch": "3"}, {"torch": "4"}):
        monkeypatch.setattr("kdc_edge.export.coreml.export.package_versions", lambda _, found=versions: found)
        export.search(Budget(min_psnr_db=30.0), Calibration(inputs, INFO))
    assert folders[0] == folders[1] != folders[2]


def test_budgets_that_cannot_be(search: Search) -> None:
    with pytest.raises(InputError, match=r"--max-size 0\.001MB is below .* MB, the least at 1 bit a weight"):
        search.find(Budget(max_size_bytes=1000))
    with pytest.raises(InputError, match=r"--min-psnr 99 is above .* dB, the PSNR of 8 bits per weight"):
        search.find(Budget(min_psnr_db=99.0))
    for both in ((None, None), (1, 1.0)):
        with pytest.raises(InputError, match="needs one budget: give --max-size 300MB or --min-psnr 30"):
            Budget(*both)


def test_an_interrupted_search_goes_on(
    search: Search, package: Any, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search.damage()
    path = search.folder / "damage.jsonl"
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) == len(search.layers) * len(BITS)
    path.write_text("\n".join(lines[:9]) + "\n" + lines[9][:20])  # cut off in the middle of a line
    monkeypatch.setattr("kdc_edge.export.coreml.mixed.palettize", None)  # the tables are there
    again = Search(TinyUNet().eval(), package, Calibration(inputs, INFO), search.folder, print)
    measured: list[object] = []
    error = again._error
    monkeypatch.setattr(again, "_error", lambda bits: measured.append(bits) or error(bits))
    found = again.damage()
    assert len(measured) == len(lines) - 9
    assert found.keys() == expected.keys()
    for layer, by_bits in expected.items():
        assert found[layer] == pytest.approx(by_bits)
    assert len(Search(TinyUNet().eval(), package, Calibration(inputs, INFO), search.folder, print).damage()) == 3


def test_a_recipe_is_applied_again_or_refused(search: Search, package: Any, tmp_path: Path) -> None:
    recipe = search.find(Budget(min_psnr_db=30.0))
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    assert read_recipe(tmp_path / "recipe.json") == recipe
    (tmp_path / "manifest.json").write_text('{"target": "coreml", "recipe": ' + recipe.model_dump_json() + "}")
    assert read_recipe(tmp_path / "manifest.json") == recipe
    (tmp_path / "other.json").write_text('{"bits": {"a": 7}, "size_bytes": 1, "psnr_db": 3}')
    with pytest.raises(InputError, match=r"other\.json holds no recipe: bits\.a"):
        read_recipe(tmp_path / "other.json")
    with pytest.raises(InputError, match="names the layer 'unet_third_weight'"):
        apply_recipe(package, Recipe(bits={"unet_third_weight": 4}, size_bytes=0, psnr_db=0))


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 4, 6, 8]), seed=st.integers(0, 99), size=st.integers(2048, 20_000),
    kind=st.sampled_from(["standard_normal", "laplace", "uniform"]),
)  # fmt: skip
def test_kmeans_is_near_the_optimum(bits: int, seed: int, size: int, kind: str) -> None:
    from coremltools.models.neural_network.quantization_utils import _get_kmeans_lookup_table_and_weight as optimum

    weight = (getattr(np.random.default_rng(seed), kind)(size=size) * 0.05).astype(np.float16).reshape(1, -1)
    lut, indices = kmeans(weight, bits)
    assert lut.shape == (2**bits,)
    assert (lut.dtype, indices.dtype, indices.shape) == (np.float16, np.uint8, (size,))
    best, places = optimum(bits, weight, force_kmeans1d=True)
    least, ours = (float(np.square(t.astype(float) - weight[0]).mean()) for t in (best[places], lut[indices]))
    # With few values a place, single ones decide, and the errors are small against what fp16 loses anyway.
    assert ours <= 1.15 * least + 1e-4 * float(weight.astype(float).var())


@settings(max_examples=100, deadline=None)
@given(size=st.integers(2048, 10**7), errors=st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_each_step_of_a_layer_is_a_worse_bargain_than_the_last(size: int, errors: list[float]) -> None:
    damage = dict(zip(BITS, errors, strict=True))
    found = bargains("x", size, damage)
    assert all(a.bits > b.bits for a, b in pairwise(found))
    rates = [s.added_error / s.saved_bytes for s in found]
    assert all(a <= b * (1 + 1e-9) + 1e-15 for a, b in pairwise(rates))
    assert sum(s.saved_bytes for s in found) == stored_bytes(size, 8) - stored_bytes(size, 1)


def test_only_mixed_takes_a_budget(checkpoint: Path, tmp_path: Path) -> None:
    budget = CoreMLOptions(max_size="1MB")
    with pytest.raises(InputError, match="coreml-fp16 has no budget"):
        export_checkpoint(ExportRequest(checkpoint, tmp_path / "out", "coreml", "fp16"), budget)
    with pytest.raises(InputError, match="coreml-mixed needs one of --max-size 300MB, --min-psnr 30 and --recipe FILE"):
        export_checkpoint(ExportRequest(checkpoint, tmp_path / "out", "coreml", "mixed"))
    assert not (tmp_path / "out").exists()

"""References are kept for the next export of the same checkpoint, and never stand in its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdc_edge.bundle import Bundle
from kdc_edge.components import COMPONENTS
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.export import kept
from kdc_edge.export.calibration import calibrate_for
from kdc_edge.export.kept import hash_of
from kdc_edge.export.parity import check_parity
from kdc_edge.export.reference import Reference
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from kdc_edge.formats import find_format
from kdc_edge.manifest import Provenance
from kdc_edge.request import Request


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDC_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def reference(value: float) -> Reference:
    call = ({"x": np.full(3, value), "timestep": np.array([4])}, np.full(2, -value, np.float32))
    return Reference(
        {component: [call, call] for component in COMPONENTS}, [np.full((4, 4, 3), 7, np.uint8)], "made by hand"
    )


def kept_reference(key: str, make: Callable[[], Reference]) -> Reference:
    return kept.kept(Reference, key, make)


def key_of(made: Provenance, requests: Sequence[Request]) -> str:
    return hash_of("reference", made.checkpoint_sha256, made.decoder_sha256, requests=requests)


def never(*_: object, **__: object) -> Any:
    raise AssertionError("computed again")


def test_an_entry_is_computed_once(cache: Path) -> None:
    made = kept_reference("a", lambda: reference(1))
    found = kept_reference("a", never)
    assert found.made_by == "made by hand"
    assert np.array_equal(found.images[0], made.images[0])
    for component in COMPONENTS:
        for (inputs, output), (expected, wanted) in zip(found.calls[component], made.calls[component], strict=True):
            assert inputs.keys() == expected.keys()
            assert all(np.array_equal(inputs[n], expected[n]) for n in inputs)
            assert np.array_equal(output, wanted)
            assert output.dtype == np.float32
    assert [p.name for p in cache.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another"])
def test_a_damaged_entry_is_computed_again(cache: Path, damage: str) -> None:
    kept_reference("a", lambda: reference(1))
    path = cache / "a.npz"
    content = path.read_bytes()
    at = content.index(np.full(2, -1, np.float32).tobytes())
    path.write_bytes(
        {"cut": content[:-90], "flipped": content[: at + 3] + b"@" + content[at + 4 :], "empty": b"",
         "another": b"a text\n"}[damage]
    )  # fmt: skip
    assert kept_reference("a", lambda: reference(2)).calls["unet"][0][1][0] == -2
    assert kept_reference("a", never).calls["unet"][0][1][0] == -2


def test_the_oldest_entries_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for i, name in enumerate("abc"):
        kept_reference(name, lambda: reference(1))
        os.utime(cache / f"{name}.npz", (i, i))
    kept_reference("a", never)  # used now
    monkeypatch.setattr(kept, "MAX_BYTES", 3.5 * (cache / "a.npz").stat().st_size)
    kept_reference("d", lambda: reference(1))
    assert sorted(p.name for p in cache.iterdir()) == ["a.npz", "c.npz", "d.npz"]


def test_what_is_larger_than_all_may_be_is_not_kept_at_the_others_cost(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_reference("a", lambda: reference(1))
    monkeypatch.setattr(kept, "MAX_BYTES", 2 * (cache / "a.npz").stat().st_size)
    large = replace(reference(2), images=[np.zeros((kept.MAX_BYTES, 1, 1), np.uint8)])
    assert kept_reference("b", lambda: large) is large
    assert [p.name for p in cache.iterdir()] == ["a.npz"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KDC_EDGE_CACHE", str(tmp_path / "file"))
    assert kept_reference("a", lambda: reference(1)).made_by == "made by hand"


def test_whatever_decides_a_reference_is_in_its_key(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Bundle.open(bundle).manifest.provenance
    request = Request("a red flower")
    keys = {
        key_of(made, [request]),
        key_of(made, [request, request]),
        *(key_of(made, [replace(request, **change)])  # type: ignore[arg-type]
          for change in ({"prompt": "a fish"}, {"seed": 1}, {"steps": 3}, {"guidance": 2.0}, {"width": 64},
                         {"sampler": "pndm"})),
        key_of(made.model_copy(update={"checkpoint_sha256": "0" * 64}), [request]),
        key_of(made.model_copy(update={"decoder_sha256": "0" * 64}), [request]),
    }  # fmt: skip
    monkeypatch.setattr(kept, "package_versions", lambda _: {"torch": "3"})
    assert len(keys | {key_of(made, [request])}) == 11
    monkeypatch.undo()
    assert key_of(made, [request]) in keys


def test_a_calibration_is_recorded_once_for_every_target(
    cache: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(target: str, **more: Any) -> ExportRequest:
        return ExportRequest(checkpoint, tmp_path / "out", target, "int8", **{"calibration_samples": 5} | more)

    first = calibrate_for(request("onnx"))
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("kdc_edge.export.calibration.calibrate", never)
    again = calibrate_for(request("openvino"))
    assert again.info == first.info
    assert len(again.inputs) == len(first.inputs) == 5
    for found, expected in zip(again.inputs, first.inputs, strict=True):
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert all(found[name].dtype == expected[name].dtype for name in expected)
    for other in ({"calibration_samples": 6}, {"calibration_prompts": ["a red flower"]}):
        with pytest.raises(AssertionError, match="computed again"):
            calibrate_for(request("openvino", **other))
    with pytest.raises(AssertionError, match="computed again"):
        calibrate_for(request("openvino"), samples_an_image=1)


def test_what_cannot_be_exported_is_refused_before_the_calibration(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdc_edge.export.calibration.calibrate", never)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for target in ("onnx", "openvino"):
        request = ExportRequest(checkpoint, tmp_path / "mine", target, "int8", calibration_samples=3)
        with pytest.raises(InputError, match="mine exists and holds other files"):
            export_checkpoint(request)
        request = replace(request, out=tmp_path / "mine" / "thesis.txt" / "out")
        with pytest.raises(InputError, match="cannot be written: Not a directory"):
            export_checkpoint(request)
        with pytest.raises(CheckpointError, match="has no safety_checker"):
            export_checkpoint(replace(request, out=tmp_path / "out", extra=("safety_checker",)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_next_precision_needs_no_reference_of_its_own(
    cache: Path, checkpoint: Path, bundle: Path, bundle_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check_parity(checkpoint, bundle, find_format("onnx", "fp16"), ["a red flower"])
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("kdc_edge.export.parity.record", never)
    second = check_parity(checkpoint, bundle_fp32, find_format("onnx", "fp32"), ["a red flower"])
    assert second.reference == first.reference
    assert all(check.passed for check in second.checks)

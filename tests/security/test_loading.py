"""A bundle's files are what its manifest lists, or nothing is made of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from kdc_edge.bundle import Bundle, find_bundles, kind_of, unproved
from kdc_edge.errors import BundleError
from kdc_edge.manifest import MANIFEST, list_files
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.base import LoadOptions, get_runtime
from tests.cli.test_commands import complaint, run

REQUEST = Request("a red flower", steps=1, guidance=1.0)


def flip(path: Path, place: float = 0.7) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["text_encoder/model.onnx", "unet/model.onnx", "vae_decoder/model.onnx"])
def test_a_damaged_byte_of_the_weights_is_a_line_and_no_image(own_bundle: Path, tmp_path: Path, name: str) -> None:
    flip(own_bundle / name)
    said = complaint("generate", "x", "--bundle", own_bundle, "--steps", 1, "--out", "a.png", cwd=tmp_path)
    assert f"{name} has changed since it was exported" in said
    run("generate", "x", "--bundle", own_bundle, "--steps", 1, "--no-check", "--out", "a.png", cwd=tmp_path)


def test_a_changed_vocabulary_is_refused(own_bundle: Path) -> None:
    path = own_bundle / "tokenizer" / "vocab.json"
    path.write_text(path.read_text("utf-8").replace('"red</w>"', '"der</w>"'))
    with pytest.raises(BundleError, match=r"tokenizer/vocab\.json has changed"):
        open_pipeline(own_bundle)


def test_a_vocabulary_that_changes_is_refused_where_it_is_read_for_each_image(own_bundle: Path) -> None:
    pipeline = open_pipeline(own_bundle, low_memory=True)
    pipeline.generate(REQUEST)
    path = own_bundle / "tokenizer" / "vocab.json"
    path.write_text(path.read_text("utf-8").replace('"red</w>"', '"der</w>"'))
    with pytest.raises(BundleError, match=r"tokenizer/vocab\.json has changed"):
        pipeline.generate(REQUEST)


def test_every_way_of_loading_checks(own_bundle: Path) -> None:
    flip(own_bundle / "unet" / "model.onnx")
    with pytest.raises(BundleError, match="has changed"):
        get_runtime("onnxruntime").load(own_bundle, "unet")
    with pytest.raises(BundleError, match="has changed"):
        open_pipeline(own_bundle).components["unet"]
    with pytest.raises(BundleError, match="has changed"):
        list(open_pipeline(own_bundle, low_memory=True).run(REQUEST))
    assert get_runtime("onnxruntime").load(own_bundle, "unet", LoadOptions(check=False))


@pytest.mark.parametrize("change", ["written", "replaced"])
def test_a_file_that_changes_after_its_check_is_checked_again(own_bundle: Path, change: str) -> None:
    unet = own_bundle / "unet" / "model.onnx"
    pipeline = open_pipeline(own_bundle)
    assert pipeline.components["vae_decoder"]  # the last one to be checked
    before = unet.stat()
    if change == "replaced":
        shutil.copy(unet, unet.with_name("new"))
        unet.with_name("new").replace(unet)
    flip(unet)
    os.utime(unet, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(BundleError, match=r"unet/model\.onnx has changed"):
        pipeline.components["unet"]


def rewrite_hashes(bundle: Path, **changes: str | None) -> None:
    """Set these fields of every listed file."""
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    for info in manifest["files"].values():
        info.update(changes)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_each_of_the_two_hashes_is_of_the_files_content(own_bundle: Path) -> None:
    rewrite_hashes(own_bundle, sha256="0" * 64)
    assert open_pipeline(own_bundle).components["unet"]  # by the fastest
    with pytest.raises(BundleError, match="has changed"):
        Bundle.open(own_bundle).verify()
    rewrite_hashes(own_bundle, blake3="0" * 64)
    with pytest.raises(BundleError, match="has changed"):
        open_pipeline(own_bundle)


def test_a_bundle_of_before_is_checked_by_sha256(own_bundle: Path) -> None:
    rewrite_hashes(own_bundle, blake3=None)
    assert Bundle.open(own_bundle).verify()
    assert open_pipeline(own_bundle).components["unet"]
    flip(own_bundle / "unet" / "model.onnx")
    for use in (Bundle.open(own_bundle).verify, lambda: open_pipeline(own_bundle).components["unet"]):
        with pytest.raises(BundleError, match="has changed"):
            use()


def put_weights_beside(bundle: Path) -> None:
    """Move the decoder's largest weight into a file of its own, which the manifest lists."""
    path = bundle / "vae_decoder" / "model.onnx"
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (path.parent / "beside").write_bytes(weights.raw_data)
    onnx.external_data_helper.set_external_data(weights, "beside", 0, len(weights.raw_data))
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    manifest["files"] = {n: i.model_dump() for n, i in list_files(bundle).items()}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_weights_that_no_manifest_lists_are_not_used(own_bundle: Path) -> None:
    put_weights_beside(own_bundle)
    assert open_pipeline(own_bundle).generate(REQUEST).shape == (64, 64, 3)
    manifest = json.loads((own_bundle / MANIFEST).read_text("utf-8"))
    del manifest["files"]["vae_decoder/beside"]
    (own_bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="vae_decoder/beside is not part of the bundle"):
        open_pipeline(own_bundle).generate(REQUEST)


@pytest.mark.parametrize(
    "add",
    [
        lambda folder: (folder / "openvino_model.bin").touch(),
        lambda folder: (folder / "link").symlink_to("/etc/hostname"),
        lambda folder: (folder / "deep").mkdir() or (folder / "deep" / "weights").touch(),
    ],
)
def test_what_lies_among_a_components_files_is_listed(own_bundle: Path, add: Callable[[Path], None]) -> None:
    add(own_bundle / "unet")
    with pytest.raises(BundleError, match="is not part of the bundle"):
        get_runtime("onnxruntime").load(own_bundle, "unet")


def test_what_a_file_manager_leaves_does_no_harm(own_bundle: Path) -> None:
    (own_bundle / "unet" / ".DS_Store").touch()
    assert open_pipeline(own_bundle).components["unet"]
    assert Bundle.open(own_bundle).verify()


def test_an_image_is_the_same_with_and_without_the_check(bundle: Path) -> None:
    images = [open_pipeline(bundle, check=check).generate(REQUEST) for check in (True, False)]
    assert np.array_equal(*images)


def test_what_is_not_proved_is_a_bundle_for_its_own_export_alone(own_bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(own_bundle).manifest
    (own_bundle / MANIFEST).unlink()
    with unproved(own_bundle, manifest):
        assert kind_of(own_bundle) == "bundle"
        assert open_pipeline(own_bundle).components["unet"]
        assert find_bundles(tmp_path) == []
    with pytest.raises(BundleError, match="is no bundle"):
        Bundle.open(own_bundle)
    shutil.copytree(own_bundle, tmp_path / ".other.part-new")
    assert find_bundles(tmp_path) == []

"""A bundle is untrusted: whatever is in its manifest, it opens or says in one line why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import check_weights, hash_checkpoint, read_model
from kdc_edge.errors import BundleError, CheckpointError
from kdc_edge.manifest import MANIFEST
from kdc_edge.weight_files import read_shapes


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def refusal(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_opens_and_verifies(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.manifest.name == "onnx-fp16"
    assert opened.manifest.model.image_size == 64
    assert opened.size_bytes == sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file() and p.name != MANIFEST)
    assert opened.verify() == len(opened.manifest.files)
    assert opened.component("unet")[1] == bundle / "unet" / "model.onnx"
    with pytest.raises(BundleError, match="has no vae_encoder"):
        opened.component("vae_encoder")


def test_missing_and_empty(tmp_path: Path) -> None:
    assert "no bundle at" in refusal(tmp_path / "nowhere")
    assert "kdc-edge.json is missing" in refusal(tmp_path)


def test_half_a_bundle(own_bundle: Path) -> None:
    (own_bundle / "unet" / "model.onnx").unlink()
    assert "unet/model.onnx is missing" in refusal(own_bundle)


def test_a_cut_file(own_bundle: Path) -> None:
    path = own_bundle / "vae_decoder" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    assert "vae_decoder/model.onnx has" in refusal(own_bundle)


def test_verify_names_a_changed_byte(own_bundle: Path) -> None:
    path = own_bundle / "unet" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"unet/model\.onnx has changed"):
        Bundle.open(own_bundle).verify()


@pytest.mark.parametrize("link", [False, True])
def test_verify_names_an_added_file(own_bundle: Path, link: bool) -> None:
    added = own_bundle / "unet" / "extra.so"
    added.symlink_to("/nowhere") if link else added.touch()
    with pytest.raises(BundleError, match=r"extra\.so is not part of the bundle"):
        Bundle.open(own_bundle).verify()


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "unet/../../secret.txt", "..\\secret.txt"])
def test_paths_out_of_the_folder(own_bundle: Path, name: str) -> None:
    (own_bundle.parent / "secret.txt").write_text("secret")

    def point_out(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"size_bytes": 6, "sha256": "0" * 64}
        manifest["components"]["unet"]["files"] = [name]

    edit(own_bundle, point_out)
    assert "leaves the folder" in refusal(own_bundle)


def test_a_link_out_of_the_folder(own_bundle: Path) -> None:
    path = own_bundle / "unet" / "model.onnx"
    shutil.move(path, own_bundle.parent / "elsewhere.onnx")
    path.symlink_to(own_bundle.parent / "elsewhere.onnx")
    assert "link out of its folder" in refusal(own_bundle)


def test_a_component_that_is_not_listed(own_bundle: Path) -> None:
    edit(own_bundle, lambda m: m["components"]["unet"].update(files=["unet/other.onnx"]))
    assert "used but not listed" in refusal(own_bundle)


def test_a_huge_manifest(own_bundle: Path) -> None:
    with (own_bundle / MANIFEST).open("ab") as file:
        file.truncate(17 * 2**20)
    assert "larger than 16 MiB" in refusal(own_bundle)


def test_other_versions_and_schemas(own_bundle: Path) -> None:
    edit(own_bundle, lambda m: m.update(unknown="key\nwith a second line"))
    assert "unknown" in refusal(own_bundle)
    edit(own_bundle, lambda m: m.update(format_version=2))
    assert "format version 2" in refusal(own_bundle)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path into a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(p for key, inner in items for p in places(inner, (*path, key)))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_manifest_opens_or_is_refused(own_bundle: Path, bundle: Path, data: st.DataObject) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text("utf-8"))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from([p for p in places(manifest) if p]))
        node = manifest
        for key in way:
            node = node[key]
        action = data.draw(st.sampled_from(["replace", "delete", "add", "rename"]))
        if action == "replace":
            node[last] = data.draw(JSON)
        elif action == "delete":
            del node[last]
        elif isinstance(node, dict):
            node[data.draw(st.text())] = node.pop(last) if action == "rename" else data.draw(JSON)
        if not manifest:
            break
    (own_bundle / MANIFEST).write_text(json.dumps(manifest), "utf-8", "surrogatepass")
    try:
        Bundle.open(own_bundle)
    except BundleError:
        refusal(own_bundle)


def test_a_checkpoint_of_pickles_is_refused(own_checkpoint: Path) -> None:
    weights = own_checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"model\.bin is a pickle.*safetensors"):
        check_weights(own_checkpoint)
    (own_checkpoint / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="the checkpoint is incomplete"):
        check_weights(own_checkpoint)


def test_a_single_pickle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        check_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        check_weights(tmp_path)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"model\.ckpt is a pickle"):
        check_weights(tmp_path)


def test_a_model_is_read_without_its_weights(checkpoint: Path, own_checkpoint: Path) -> None:
    model = read_model(checkpoint)
    assert (model.latent_size, model.latent_channels, model.vae_scale) == (16, 4, 4)
    assert model.unet_parameters > 500_000
    assert hash_checkpoint(checkpoint) == hash_checkpoint(own_checkpoint)
    weights = own_checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_shapes(weights)
    assert hash_checkpoint(checkpoint) != hash_checkpoint(own_checkpoint)
    before = hash_checkpoint(own_checkpoint)
    shutil.copytree(checkpoint, own_checkpoint / "bundles" / "onnx-fp16")  # made in the checkpoint's own folder
    (own_checkpoint / "report.json").write_text("{}")
    assert hash_checkpoint(own_checkpoint) == before
    (own_checkpoint / "prompts.txt").write_text("a red flower")
    assert hash_checkpoint(own_checkpoint) != before
    config = own_checkpoint / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"scaling_factor": "large"}))
    shutil.copytree(checkpoint / "unet", own_checkpoint / "unet", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="scaling_factor"):
        read_model(own_checkpoint)

"""A checkpoint or a teacher is read from its own folder, from safetensors, and within bounds."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdc_edge.diffusers_folder import check_weights, hash_checkpoint, read_model
from kdc_edge.errors import BundleError, CheckpointError, InputError, KdcError
from kdc_edge.files import read_bounded, read_json
from kdc_edge.presets import find_preset
from kdc_edge.prompts import read_prompts
from kdc_edge.runtimes.torch import load_network
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.checkpoint import GARDEN_TEACHER, find_teacher, init_checkpoint
from kdc_edge.weight_files import count_parameters, read_shapes

UNET = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))


def shard(teacher: Path, **names: str) -> None:
    """Put the U-Net's weights behind a map; `names` are entries of their own."""
    (teacher / "unet" / UNET).rename(teacher / "unet" / "part-1.safetensors")
    weights = dict.fromkeys(read_shapes(teacher / "unet" / "part-1.safetensors"), "part-1.safetensors")
    (teacher / "unet" / f"{UNET}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights | names}))


def test_weights_in_parts_are_read_counted_and_hashed(teacher: Path) -> None:
    whole = count_parameters(teacher / "unet")
    shard(teacher)
    assert count_parameters(teacher / "unet") == whole
    assert load_network(teacher, "unet")
    before = hash_checkpoint(teacher)
    path = teacher / "unet" / "part-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert hash_checkpoint(teacher) != before


@pytest.mark.parametrize(
    "name", ["weights.bin", "../../secret.safetensors", "/tmp/x.safetensors", "gone.safetensors", ""]
)
def test_a_weight_map_names_safetensors_of_its_own_folder(teacher: Path, name: str) -> None:
    shutil.copy(teacher / "unet" / UNET, teacher.parent / "secret.safetensors")
    (teacher / "unet" / "weights.bin").write_bytes(b"\x80\x04.")
    shard(teacher, **{"conv_in.weight": name})
    for read in (check_weights, read_model, lambda folder: load_network(folder, "unet")):
        with pytest.raises(CheckpointError, match="no safetensors file beside it"):
            read(teacher)


@pytest.mark.parametrize(
    "place", ["vae/notes.json", "tokenizer/secret.txt", "text_encoder/config.json", "prompts.txt", "sampling.json"]
)
def test_a_link_out_of_a_teacher_lands_in_no_checkpoint(teacher: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "secret").write_text("{}")
    (teacher / place).unlink(missing_ok=True)
    (teacher / place).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        init_checkpoint(tmp_path / "student", find_preset("garden-student"), teacher, seed=0)
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        read_model(teacher)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "teacher"]


def test_a_part_is_a_folder_of_its_own(teacher: Path, tmp_path: Path) -> None:
    (teacher / "vae").rename(tmp_path / "vae")
    (teacher / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="vae is a link out of its folder"):
        find_teacher(str(teacher))
    (teacher / "vae").unlink()
    (teacher / "vae").symlink_to("vae")
    with pytest.raises(CheckpointError, match="vae is a link out of its folder"):
        find_teacher(str(teacher))


def test_what_lies_about_in_a_part_is_not_copied(teacher: Path, tmp_path: Path) -> None:
    for name in ("weights.bin", "notes.md"):
        (teacher / "vae" / name).touch()
    init_checkpoint(tmp_path / "student", find_preset("garden-student"), teacher, seed=0)
    assert sorted(p.name for p in (tmp_path / "student" / "vae").iterdir()) == ["config.json", UNET]


def test_the_hubs_cache_links_to_its_own_blobs_alone(tmp_path: Path) -> None:
    """As the hub lays it out: every file of a snapshot is a link to a blob, named by its hash."""
    repository = tmp_path / "models--someone--garden"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    blobs.mkdir(parents=True)
    for path in sorted(p for p in GARDEN_TEACHER.rglob("*") if p.is_file()):
        place = snapshot / path.relative_to(GARDEN_TEACHER)
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / str(len(list(blobs.iterdir())))
        shutil.copy(path, blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    init_checkpoint(tmp_path / "student", find_preset("garden-student"), find_teacher(str(snapshot)), seed=0)
    assert not any(path.is_symlink() for path in (tmp_path / "student").rglob("*"))
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "config.json").symlink_to(tmp_path / "student" / "vae" / "config.json")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        find_teacher(str(snapshot))


def test_an_adapter_is_refused(teacher: Path) -> None:
    (teacher / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/someone"}')
    with pytest.raises(CheckpointError, match="takes weights from elsewhere"):
        check_weights(teacher)


def safetensors(path: Path, header: Any, data: bytes = bytes(8)) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def tensor(shape: Any = (2,), dtype: Any = "F32", offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor((-2,))},
        {"a": tensor((2**60, 2**60))},
        {"a": tensor([1] * 100)},
        {"a": tensor((2.0,))},
        {"a": tensor((True, 2))},
        {"a": tensor("2")},
        {"a": tensor(dtype="F31")},
        {"a": tensor(dtype=["F32"])},
        {"a": tensor(dtype="F16")},
        {"a": tensor(offsets=(8, 0))},
        {"a": tensor(offsets=(0, 16))},
        {"a": tensor(offsets=None)},
        {"a": tensor(), "b": tensor()},
        {"a": tensor((1,), offsets=(0, 4)), "b": tensor((1,), offsets=(0, 4))},
        {"a": tensor((1,), offsets=(0, 4))},
        {"a\x1b[31m": tensor((-2,))},
        {"a": 5},
        [],
        b"[" * 100_000,
        b"1" * 5_000,
        b"\xff\xfe",
    ],
)
def test_absurd_headers_are_a_line(tmp_path: Path, header: Any) -> None:
    path = safetensors(tmp_path / "a.safetensors", header)
    with pytest.raises(CheckpointError, match="is no safetensors file") as caught:
        read_shapes(path)
    assert str(caught.value).isprintable()


def test_sound_headers_are_read(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": tensor((0, 3), offsets=(4, 4)), "a": tensor((1,), offsets=(0, 4)),
              "c": tensor((), offsets=(4, 8))}  # fmt: skip
    assert read_shapes(safetensors(tmp_path / "a.safetensors", header)) == {"b": [0, 3], "a": [1], "c": []}


def test_a_header_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**32)  # a file with a hole takes no room
    with pytest.raises(CheckpointError, match="its header is longer than the file"):
        read_shapes(path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_never_ends_is_not_read(teacher: Path, tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "endless"
    make(path)
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_json(path, BundleError),
        lambda: read_bounded(path, 100, InputError),
        lambda: read_prompts(path),
    )
    for read in readers:
        with pytest.raises(KdcError, match="is a device or a pipe"):
            read()
    for place in ("unet/config.json", "tokenizer/merges.txt", "text_encoder/model.safetensors", "model_index.json"):
        kept = (teacher / place).read_bytes()
        (teacher / place).unlink()
        make(teacher / place)
        with pytest.raises(KdcError):
            read_model(teacher)
        if place.startswith("tokenizer"):
            with pytest.raises(BundleError, match="is a device or a pipe"):
                Tokenizer.from_folder(teacher / "tokenizer")
        (teacher / place).unlink()
        (teacher / place).write_bytes(kept)
    assert read_model(teacher)

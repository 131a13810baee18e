"""Folders whose weight files have a variant's name, or that have several: which are loaded, counted and copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from kdc_edge.checkpoints import open_checkpoint
from kdc_edge.diffusers_folder import read_model
from kdc_edge.presets import find_preset
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.torch import load_network
from kdc_edge.train.checkpoint import init_checkpoint
from kdc_edge.train.teachers import GARDEN_TEACHER
from kdc_edge.weight_files import count_parameters, weights_of

UNET, TEXT = "diffusion_pytorch_model", "model"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))


def rename(folder: Path, variant: str) -> Path:
    for path in list(folder.glob("*/*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))
    return folder


def shard(network: Path, stem: str, variant: str = "") -> None:
    """As diffusers and transformers write two files and an index."""
    path = network / f"{stem}.safetensors"
    state = load_file(path)
    path.unlink()
    names, more = sorted(state), f".{variant}" if variant else ""
    index: dict[str, str] = {}
    for i, group in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"{stem}{more}-{i:05d}-of-00002.safetensors"
        save_file({n: state[n] for n in group}, network / file, metadata={"format": "pt"})
        index |= dict.fromkeys(group, file)
    (network / f"{stem}.safetensors.index{more}.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def same(folder: Path, component: str = "unet") -> bool:
    ours, wanted = load_network(folder, component).state_dict(), load_network(GARDEN_TEACHER, component).state_dict()
    return all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
def test_a_folder_of_one_variant_is_used_as_it_is(teacher: Path, tmp_path: Path, variant: str) -> None:
    said: list[str] = []
    assert open_checkpoint(rename(teacher, variant), say=said.append) == teacher
    assert f"unet: weights of {UNET}.{variant}.safetensors" in said
    assert all(same(teacher, component) for component in ("unet", "vae_decoder", "text_encoder"))
    init_checkpoint(tmp_path / "student", find_preset("garden-student"), teacher, seed=0)
    with quiet():  # under the usual names, so that others open it
        StableDiffusionPipeline.from_pretrained(tmp_path / "student", local_files_only=True)


def test_a_sharded_variant_is_used_and_copied_under_the_usual_name(teacher: Path, tmp_path: Path) -> None:
    shard(teacher / "unet", UNET, "fp16")
    shard(teacher / "text_encoder", TEXT, "fp16")
    assert same(teacher)
    assert same(teacher, "text_encoder")
    init_checkpoint(tmp_path / "student", find_preset("garden-student"), teacher, seed=0)
    assert same(tmp_path / "student", "text_encoder")
    assert (tmp_path / "student" / "text_encoder" / f"{TEXT}.safetensors.index.json").is_file()


def test_of_several_files_one_is_taken_said_and_counted(teacher: Path) -> None:
    whole = read_model(GARDEN_TEACHER).unet_parameters
    for name in ("fp16", "non_ema"):
        shutil.copy(teacher / "unet" / f"{UNET}.safetensors", teacher / "unet" / f"{UNET}.{name}.safetensors")
    said: list[str] = []
    open_checkpoint(teacher, say=said.append)
    assert said == [f"unet: weights of {UNET}.safetensors, not {UNET}.fp16.safetensors, {UNET}.non_ema.safetensors"]
    assert count_parameters(teacher / "unet") == whole
    (teacher / "unet" / f"{UNET}.safetensors").unlink()
    assert weights_of(teacher / "unet").variant == "fp16"


def test_of_a_file_and_an_index_the_libraries_choice_is_counted(teacher: Path) -> None:
    """diffusers takes the index and transformers the file: the other one has other weights here."""
    unet, text = teacher / "unet" / f"{UNET}.safetensors", teacher / "text_encoder" / f"{TEXT}.safetensors"
    kept = {path: load_file(path) for path in (unet, text)}
    shard(teacher / "unet", UNET)
    shard(teacher / "text_encoder", TEXT)
    save_file({n: t + 1 for n, t in kept[unet].items()}, unet, metadata={"format": "pt"})
    assert same(teacher)
    assert len(weights_of(teacher / "unet").files) == 2
    for path in (teacher / "text_encoder").glob("*-of-00002.safetensors"):
        save_file({n: t + 1 for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    save_file(kept[text], text, metadata={"format": "pt"})
    assert same(teacher, "text_encoder")
    assert weights_of(teacher / "text_encoder").files == (text,)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_a_repository_of_half_precision_alone_is_fetched(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variant: str
) -> None:
    """Half precision is fetched only where there is nothing else."""
    snapshot, asked = tmp_path / "snapshot", []
    monkeypatch.chdir(tmp_path)
    if variant:
        rename(teacher, variant)

    def download(_: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:  # noqa: ARG001
        if not ignore_patterns:  # of what kind it is
            snapshot.mkdir()
            shutil.copy2(teacher / "model_index.json", snapshot)
            return str(snapshot)
        asked.append(ignore_patterns)
        left = shutil.ignore_patterns(*ignore_patterns)
        return str(shutil.copytree(teacher, snapshot, ignore=left, dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("owner/name") == snapshot
    assert ["*.fp16.*" in patterns for patterns in asked] == [True, False][: 2 if variant else 1]
    assert isinstance(load_network(snapshot, "unet"), UNet2DConditionModel)

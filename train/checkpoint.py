"""Checkpoints written: complete diffusers folders that `StableDiffusionPipeline.from_pretrained` opens.

teacher = find_teacher("garden")                     # or a folder, or a hub id such as "owner/name"
init_checkpoint(Path("student"), find_preset("kdc-482m"), teacher, seed=0)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from kdc_edge.checkpoints.parts import copy_part, write_small_parts
from kdc_edge.diffusers_folder import (
    PROMPTS_FILE,
    RANDOM_WEIGHTS,
    SAMPLING_FILE,
    SOURCES_FILE,
    TRAINING_FILE,
    check_weights,
)
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import atomic_folder, read_json, write_atomic
from kdc_edge.manifest import Model
from kdc_edge.presets import SCHEDULER, TEXT_ENCODERS, VAES, Preset
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.torch import load_network
from kdc_edge.tokenizer import write_vocabulary
from kdc_edge.train.student import Account, make_student
from kdc_edge.train.teachers import GARDEN_TEACHER, find_teacher

__all__ = ["GARDEN_TEACHER", "find_teacher", "init_checkpoint", "write_checkpoint"]

PARTS = ("text_encoder", "tokenizer", "vae", "scheduler")  # that a student takes from its teacher
NOT_KEPT = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a teacher that no student has


def write_checkpoint(
    out: Path,
    unet: UNet2DConditionModel,
    *,
    parts_from: Path,
    model: Model | None = None,
    card: str | None = None,
    prompts: Sequence[str] = (),
    note: str | None = None,
) -> None:
    """A diffusers folder with this U-Net; text encoder, tokenizer, VAE and scheduler come from `parts_from`.

    `model` brings a few-step student's scheduler and sampling. `card` is the model card, README.md; `prompts` are
    captions that an export proves and calibrates itself on; `note` is said in the manifests of bundles.
    """
    check_weights(parts_from)
    with atomic_folder(out, marker="model_index.json") as folder, quiet():
        for part in PARTS:
            copy_part(parts_from / part, folder / part)
        if (parts_from / SOURCES_FILE).is_file():
            shutil.copyfile(parts_from / SOURCES_FILE, folder / SOURCES_FILE)
        write_vocabulary(folder / "tokenizer")
        index = read_json(parts_from / "model_index.json", CheckpointError)
        index |= {name: [None, None] for name in NOT_KEPT} | {"requires_safety_checker": False}
        if model is not None and model.sampling is not None:
            class_name = str(model.scheduler["_class_name"])
            index["scheduler"] = ["diffusers", class_name]
            write_atomic(folder / "scheduler" / "scheduler_config.json", json.dumps(model.scheduler, indent=2))
            write_atomic(folder / SAMPLING_FILE, model.sampling.model_dump_json(indent=2))
        write_atomic(folder / "model_index.json", json.dumps(index, indent=2))
        unet.save_pretrained(folder / "unet")
        if card:
            write_atomic(folder / "README.md", card)
        if prompts:
            write_atomic(folder / PROMPTS_FILE, "".join(f"{' '.join(p.split())}\n" for p in prompts))
        if note:
            write_atomic(folder / TRAINING_FILE, json.dumps({"note": note}, indent=2))
        _let_others_read(folder)


def init_checkpoint(out: Path, preset: Preset, teacher: Path | None, *, seed: int) -> Account:
    """`kdc-edge init`: a complete checkpoint of a preset; the account of its U-Net's weights."""
    if teacher is not None:
        student, account = make_student(preset, load_network(teacher, "unet"), seed=seed)
        write_checkpoint(out, student, parts_from=teacher)
        return account
    if preset.family not in TEXT_ENCODERS:
        raise InputError(f"{preset.name} needs a teacher for its text encoder and VAE: give --from garden")
    with atomic_folder(out, marker="model_index.json") as folder, torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        save_text_encoder(CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS[preset.family])), folder / "text_encoder")
        AutoencoderKL(**VAES[preset.family]).save_pretrained(folder / "vae")
        student, account = make_student(preset, None, seed=seed)
        student.save_pretrained(folder / "unet")
        write_small_parts(folder, {"_class_name": "DDIMScheduler", **SCHEDULER})
        index = read_json(folder / "model_index.json", CheckpointError)
        # Students of this checkpoint keep it: their text encoder and VAE are its own.
        write_atomic(folder / "model_index.json", json.dumps(index | {RANDOM_WEIGHTS: True}, indent=2))
        _let_others_read(folder)
    return account


def save_text_encoder(network: PreTrainedModel, folder: Path) -> None:
    """Save it under the names of the published checkpoints, which begin with `text_model.`.

    transformers 5 leaves that out; version 4 would then take random weights, and only warn.
    """
    network.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _let_others_read(folder: Path) -> None:
    """safetensors writes for its owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)

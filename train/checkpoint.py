"""Teachers found, checkpoints written: complete diffusers folders that `StableDiffusionPipeline.from_pretrained` opens.

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
from transformers import CLIPTextConfig, CLIPTextModel

from kdc_edge.bundle import Model
from kdc_edge.diffusers_folder import (
    PROMPTS_FILE,
    SAMPLING_FILE,
    SUFFIXES,
    TRAINING_FILE,
    check_weights,
    fetch,
    is_hub_id,
    read_model,
)
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import atomic_folder, read_json, write_atomic
from kdc_edge.presets import SCHEDULER, TEXT_ENCODERS, VAES, Preset
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.torch import load_network
from kdc_edge.tokenizer import CLIP_FOLDER, write_vocabulary
from kdc_edge.train.student import Account, make_student

GARDEN_TEACHER = Path(__file__).parent / "assets" / "garden-teacher"

PARTS = ("text_encoder", "tokenizer", "vae", "scheduler")  # that a student takes from its teacher
NOT_KEPT = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a teacher that no student has
HUB_FILES = (
    "model_index.json",
    "tokenizer/*",
    "scheduler/*.json",
    *(f"{n}/*" for n in ("text_encoder", "unet", "vae")),
)
HUB_LEFT = ("*.bin", "*.ckpt", "*.msgpack", "*.onnx*", "*.fp16.*", "*.non_ema.*")


def find_teacher(name: str) -> Path:
    """`garden` is the teacher that ships; else a diffusers folder, or a hub id. Raises CheckpointError."""
    folder = GARDEN_TEACHER if name == "garden" else Path(name)
    if name != "garden" and is_hub_id(name):
        folder = fetch(name, HUB_FILES, ignored=HUB_LEFT)
    read_model(folder)  # refuses a teacher that cannot be used, before any work
    return folder


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
            _copy_part(parts_from / part, folder / part)
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
        CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS[preset.family])).save_pretrained(folder / "text_encoder")
        AutoencoderKL(**VAES[preset.family]).save_pretrained(folder / "vae")
        student, account = make_student(preset, None, seed=seed)
        student.save_pretrained(folder / "unet")
        _write_small_parts(folder)
        _let_others_read(folder)
    return account


def _copy_part(source: Path, target: Path) -> None:
    """What a checkpoint loads from a part, and nothing that lies about there."""
    for path in sorted(source.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)


def _let_others_read(folder: Path) -> None:
    """safetensors writes for its owner alone."""
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _write_small_parts(folder: Path) -> None:
    """Tokenizer, scheduler and index of a Stable Diffusion 1.x pipeline, as diffusers writes them."""
    shutil.copytree(CLIP_FOLDER, folder / "tokenizer")
    token = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        **token,
    }
    write_atomic(folder / "tokenizer" / "tokenizer_config.json", json.dumps(config, indent=2))
    scheduler = {"_class_name": "DDIMScheduler", **SCHEDULER}
    write_atomic(folder / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_atomic(folder / "model_index.json", json.dumps(index, indent=2))

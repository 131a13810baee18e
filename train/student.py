"""A student from a teacher: which weight comes from where.

Each block's first and last layer survive (BK-SDM, arXiv 2305.15798; KDC-Diff, arXiv 2505.06995): the same names
are copied as they are, the student's second up layer comes from the teacher's third, the mid block is dropped
where the student has none. A student with fewer stages is matched to the teacher's shallow ones.

    kept = inherit(teacher_unet, student_unet)       # copies; {"up_blocks.1.resnets.1...": "up_blocks.1.resnets.2..."}
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from kdc_edge.checkpoint import check_weights
from kdc_edge.errors import InputError
from kdc_edge.files import atomic_folder, write_atomic
from kdc_edge.presets import SCHEDULER, TEXT_ENCODERS, VAES, Preset
from kdc_edge.runtimes.torch import load_network
from kdc_edge.tokenizer import CLIP_FOLDER

GARDEN_TEACHER = Path(__file__).parent / "assets" / "garden-teacher"

_UP_LAYER = re.compile(r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")


def source_name(name: str, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> str:
    """The teacher's name for the weight that the student calls `name`.

    >>> # with SD 1.x and the 482M student: up_blocks.2.attentions.1.norm.weight -> up_blocks.2.attentions.2.norm.weight
    """
    found = _UP_LAYER.match(name)
    if not found:
        return re.sub(
            r"^up_blocks\.(\d+)\.",
            lambda m: f"up_blocks.{int(m[1]) + len(teacher.up_blocks) - len(student.up_blocks)}.",
            name,
        )
    block, kind, layer = int(found[1]), found[2], int(found[3])
    deeper = block + len(teacher.up_blocks) - len(student.up_blocks)
    if layer == len(student.up_blocks[block].resnets) - 1:  # the last survives as the last
        layer = len(teacher.up_blocks[deeper].resnets) - 1
    return f"up_blocks.{deeper}.{kind}.{layer}.{name[found.end() :]}"


def inherit(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> dict[str, str | None]:
    """Copy the teacher's weights into the student: what each came from, None where the shapes leave it as it was."""
    have, account = teacher.state_dict(), {}
    weights = student.state_dict()
    for name, weight in weights.items():
        source = source_name(name, teacher, student)
        fits = source in have and have[source].shape == weight.shape
        account[name] = source if fits else None
        if fits:
            weights[name] = have[source].to(weight.dtype)
    student.load_state_dict(weights)
    return account


def find_teacher(name: str) -> Path:
    """`garden` is the teacher that ships; anything else is a diffusers folder. Raises CheckpointError."""
    folder = GARDEN_TEACHER if name == "garden" else Path(name)
    check_weights(folder)
    return folder


def make_student(
    preset: Preset, teacher: UNet2DConditionModel | None, *, seed: int
) -> tuple[UNet2DConditionModel, dict[str, str | None]]:
    """The preset's U-Net, seeded random weights overwritten by the teacher's where they fit, and the account."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student: UNet2DConditionModel = UNet2DConditionModel(**preset.unet)
    if teacher is None:
        return student, {}
    for key in ("in_channels", "cross_attention_dim", "sample_size"):
        if teacher.config[key] != student.config[key]:
            raise InputError(
                f"{preset.name} does not fit this teacher: its {key} is {student.config[key]} and the teacher's"
                f" {teacher.config[key]}; choose another preset"
            )
    return student, inherit(teacher, student)


def write_checkpoint(out: Path, unet: UNet2DConditionModel, *, parts_from: Path) -> None:
    """A diffusers folder with this U-Net; text encoder, tokenizer, VAE and scheduler come from `parts_from`."""
    with atomic_folder(out, marker="model_index.json") as folder:
        for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
            shutil.copytree(parts_from / part, folder / part)
        shutil.copy(parts_from / "model_index.json", folder)
        unet.save_pretrained(folder / "unet")


def init_checkpoint(out: Path, preset: Preset, teacher: Path | None, *, seed: int) -> dict[str, str | None]:
    """`kdc-edge init`: a complete checkpoint of a preset; the account of inherited weights, empty without a teacher."""
    if teacher is not None:
        student, account = make_student(preset, load_network(teacher, "unet"), seed=seed)
        write_checkpoint(out, student, parts_from=teacher)
        return account
    if preset.family not in TEXT_ENCODERS:
        raise InputError(f"{preset.name} needs a teacher for its text encoder and VAE: give --from garden")
    with atomic_folder(out, marker="model_index.json") as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPTextModel(CLIPTextConfig(**TEXT_ENCODERS[preset.family])).save_pretrained(folder / "text_encoder")
        AutoencoderKL(**VAES[preset.family]).save_pretrained(folder / "vae")
        make_student(preset, None, seed=seed)[0].save_pretrained(folder / "unet")
        _write_small_parts(folder)
    return {}


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

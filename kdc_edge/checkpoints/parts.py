"""Parts of a diffusers folder: copied under their usual names, or written for Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from kdc_edge.diffusers_defaults import Settings
from kdc_edge.diffusers_folder import PIPELINES, SUFFIXES
from kdc_edge.errors import CheckpointError
from kdc_edge.files import read_json, write_atomic
from kdc_edge.tokenizer import CLIP_FOLDER, END, START
from kdc_edge.weight_files import WEIGHTS, weights_of


def copy_part(source: Path, target: Path, *, link: bool = False) -> None:
    """What a checkpoint loads from a part, and nothing that lies about there.

    Weights get their usual names where they are a variant's (`model.fp16.safetensors`). `link` makes hard links of
    them where the file system can.
    """
    weights = weights_of(source) if source.name in WEIGHTS else None
    for path in sorted(source.rglob("*")):
        of_weights = weights is not None and (".safetensors" in path.name or path.suffix == ".safetensors")
        if path.suffix in SUFFIXES and path.is_file() and not of_weights:
            _place(path, target / path.relative_to(source), link=link and path.suffix == ".safetensors")
    for path in weights.files if weights else ():
        name = path.name if weights and weights.index else WEIGHTS[source.name]
        _place(path, target / name, link=link)
    if weights and weights.index:
        _place(weights.index, target / f"{WEIGHTS[source.name]}.index.json", link=False)


def _place(source: Path, target: Path, *, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copy2(source, target)


def write_small_parts(folder: Path, scheduler: Settings, *, pad_token: str = END, pipeline: str = PIPELINES[0]) -> None:
    """Tokenizer, scheduler and index of a Stable Diffusion 1.x or 2.x pipeline, as diffusers writes them."""
    shutil.copytree(CLIP_FOLDER, folder / "tokenizer", dirs_exist_ok=True)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "pad_token": pad_token,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
    }
    write_atomic(folder / "tokenizer" / "tokenizer_config.json", json.dumps(config, indent=2))
    write_atomic(folder / "scheduler" / "scheduler_config.json", json.dumps(scheduler, indent=2))
    index = {
        "_class_name": pipeline,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_atomic(folder / "model_index.json", json.dumps(index, indent=2))


def read_config(folder: Path) -> dict[str, object]:
    """A part's config.json."""
    return read_json(folder / "config.json", CheckpointError)

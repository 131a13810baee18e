"""A checkpoint: a diffusers folder with safetensors. Read here as far as that needs no PyTorch.

model = read_model(Path("runs/latest/checkpoint"))     # latent shape, scaling factor, scheduler
check_weights(folder)                                  # refuses pickles, names what is missing
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from kdc_edge.bundle import MODEL_INDEX, Model
from kdc_edge.errors import CheckpointError, require
from kdc_edge.files import read_json, sha256
from kdc_edge.presets import recognise
from kdc_edge.text import invalid_field, one_line

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
TINY_VAE = "AutoencoderTiny"  # the other class that a `vae` may have
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
PROMPTS_FILE = "prompts.txt"  # captions that it was trained on, one a line: what to calibrate and prove it with
MAX_HEADER_BYTES = 100 * 2**20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Is this `owner/name`, and no folder or place for one?"""
    return not Path(name).exists() and HUB_ID.fullmatch(name) is not None and not Path(name).parent.exists()


def fetch(hub_id: str, patterns: Sequence[str], *, leave: Sequence[str] = ()) -> Path:
    """The hub's folder in the local cache; the network is used unless HF_HUB_OFFLINE is set. Raises CheckpointError."""
    hub = require("huggingface_hub", extra="train", purpose="a hub id")
    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=list(patterns), ignore_patterns=list(leave)))
    except Exception as error:  # offline, no such id, no permission, no space: the library has a dozen kinds
        words = one_line(error)
        raise CheckpointError(
            f"{hub_id} is neither a folder nor can it be had from the hub: {words:.200};"
            " check the name, the network and HF_HUB_OFFLINE"
        ) from None


def check_weights(folder: Path) -> None:
    """Raise CheckpointError unless the folder holds each network as safetensors."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: name a diffusers folder, or run kdc-edge train")
    if not (folder / MODEL_INDEX).is_file():
        pickles = [p.name for pattern in PICKLES for p in folder.glob(pattern)]
        if pickles:
            raise CheckpointError(_refuse_pickle(folder / pickles[0]))
        raise CheckpointError(f"{folder} is no checkpoint: {MODEL_INDEX} is missing")
    for network, name in WEIGHTS.items():
        if (folder / network / name).is_file() or list((folder / network).glob("*.safetensors.index.json")):
            continue
        pickles = [p.name for pattern in PICKLES for p in (folder / network).glob(pattern)]
        if pickles:
            raise CheckpointError(_refuse_pickle(folder / network / pickles[0]))
        raise CheckpointError(f"{folder / network / name} is missing: the checkpoint is incomplete")


def _refuse_pickle(path: Path) -> str:
    return f"{path} is a pickle, which can run code: convert it to safetensors"


def read_model(folder: Path) -> Model:
    """What a pipeline needs to know of the checkpoint, from its configuration files alone."""
    check_weights(folder)
    unet = read_json(folder / "unet" / "config.json", CheckpointError)
    vae = read_json(folder / "vae" / "config.json", CheckpointError)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", CheckpointError)
    stages, unet_stages = vae.get("block_out_channels"), unet.get("block_out_channels")
    try:
        return Model.model_validate(
            {
                "preset": recognise(unet),
                "unet_parameters": count_parameters(folder / "unet"),
                "latent_channels": vae.get("latent_channels"),
                "latent_size": unet.get("sample_size"),
                "latent_unit": 2 ** (len(unet_stages) - 1) if isinstance(unet_stages, list) else None,
                "vae_scale": 2 ** (len(stages) - 1) if isinstance(stages, list) else None,
                "scaling_factor": vae.get("scaling_factor"),
                "scheduler": {k: v for k, v in scheduler.items() if not k.startswith("_")},
            }
        )
    except ValidationError as error:
        raise CheckpointError(f"{folder} cannot be used: {invalid_field(error)}") from None


def count_parameters(network: Path) -> int:
    """The number of weights in a network's safetensors files, from their headers."""
    files = sorted(network.glob("*.safetensors"))
    return sum(math.prod(shape) for path in files for shape in read_shapes(path).values())


def read_shapes(path: Path) -> Mapping[str, list[int]]:
    """The tensors' names and shapes in a safetensors file; the weights are not read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        return {name: list(info["shape"]) for name, info in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from None


def hash_checkpoint(folder: Path) -> str:
    """One SHA-256 over the names and contents of the checkpoint's configuration and weight files."""
    kept = {".json", ".safetensors", ".txt"}
    files = sorted(p for p in folder.rglob("*") if p.suffix in kept and p.is_file())
    lines = [f"{p.relative_to(folder).as_posix()} {sha256(p)}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

"""Data sources, and what they become: latents and captions, computed once.

A task is written `NAME=SOURCE`, a source `KIND:WHAT`, e.g. `flowers=garden:flowers`. The VAE and the text encoder
never learn, so each picture is encoded once (posterior mean and deviation, fp16) and each caption once.

    task = parse_task("flowers=garden:flowers")
    latents = cache_latents(task, vae, samples=2000, seed=0, folder=Path("runs/a/cache"), key=...)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTextModel

from kdc_edge.errors import InputError
from kdc_edge.files import write_atomic
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.garden import PLURALS, Scene, Split, draw_scenes, render_many


class Source(Protocol):
    """Pictures with captions."""

    def load(self, samples: int, *, seed: int) -> tuple[np.ndarray, list[str]]:
        """uint8 pictures (N, H, W, 3) and their captions."""
        ...


@dataclass(frozen=True)
class GardenSource:
    """Procedural pictures of one subject; held-out combinations are left out."""

    subject: str

    def scenes(self, count: int, *, seed: int, split: Split) -> list[Scene]:
        return draw_scenes(self.subject, count, seed=seed, split=split)

    def load(self, samples: int, *, seed: int) -> tuple[np.ndarray, list[str]]:
        chosen = self.scenes(samples, seed=seed, split="train")
        return render_many(chosen, seed=seed), [s.caption for s in chosen]


def _garden(what: str) -> GardenSource:
    for subject, plural in PLURALS.items():
        if what == plural:
            return GardenSource(subject)
    raise InputError(f"the garden has no {what!r}: choose from {', '.join(PLURALS.values())}")


SOURCES: dict[str, Callable[[str], Source]] = {"garden": _garden}


@dataclass(frozen=True)
class Task:
    """One part of the sequence that a student learns."""

    name: str
    source: str

    def open(self) -> Source:
        kind, _, what = self.source.partition(":")
        if kind not in SOURCES:
            raise InputError(f"unknown data source {kind!r} in {self.source!r}: choose from {', '.join(SOURCES)}")
        return SOURCES[kind](what)


def parse_task(text: str) -> Task:
    """`NAME=KIND:WHAT` as a task whose source exists; raises InputError."""
    name, equals, source = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise InputError(f"--task {text!r} is not NAME=SOURCE: write for example flowers=garden:flowers")
    task = Task(name, source)
    task.open()
    return task


@dataclass(frozen=True)
class Latents:
    """A task's encoded samples: scaled posterior mean and deviation (N, C, h, w) fp16, caption of each."""

    mean: Tensor
    std: Tensor
    captions: list[str]


@torch.inference_mode()
def encode_pictures(vae: AutoencoderKL, pictures: np.ndarray, *, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """uint8 (N, H, W, 3) -> posterior mean and deviation (N, C, h, w) fp16, times the scaling factor."""
    means, deviations = [], []
    for start in range(0, len(pictures), batch_size):
        batch = torch.from_numpy(pictures[start : start + batch_size]).permute(0, 3, 1, 2)
        posterior = vae.encode(batch.to(vae.device, vae.dtype) / 127.5 - 1).latent_dist
        means.append((posterior.mean * vae.config.scaling_factor).half().cpu())
        deviations.append((posterior.std * vae.config.scaling_factor).half().cpu())
    return torch.cat(means).contiguous(), torch.cat(deviations).contiguous()


def cache_latents(
    task: Task, vae: AutoencoderKL, *, samples: int, seed: int, folder: Path, teacher_sha256: str
) -> Latents:
    """The task's latents, from `folder` when they were encoded before with the same source, VAE and seed."""
    key = hashlib.sha256(f"{task.source} {samples} {seed} {teacher_sha256}".encode()).hexdigest()[:16]
    path = folder / f"{task.name}-{key}.safetensors"
    if not path.is_file():
        pictures, captions = task.open().load(samples, seed=seed)
        mean, std = encode_pictures(vae, pictures)
        write_atomic(path, save({"mean": mean, "std": std}, metadata={"captions": json.dumps(captions)}))
    with safe_open(path, framework="pt") as file:
        return Latents(file.get_tensor("mean"), file.get_tensor("std"), json.loads(file.metadata()["captions"]))


class TextEmbedder:
    """Captions to text embeddings, each caption encoded once."""

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: Tokenizer) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (N, 77, D) of the captions, on the text encoder's device."""
        new = [c for c in dict.fromkeys(captions) if c not in self._known]
        for start in range(0, len(new), 64):
            batch = new[start : start + 64]
            ids = torch.from_numpy(self.tokenizer.encode(batch)).to(self.text_encoder.device)
            self._known.update(zip(batch, self.text_encoder(ids).last_hidden_state, strict=True))
        return torch.stack([self._known[c] for c in captions])

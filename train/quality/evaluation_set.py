"""What a task is evaluated on, kept in the run: later evaluations need none of the task's data.

    RUN/evaluation/flowers.safetensors      prompts, reference images, latents held out of training with their captions

The garden is drawn anew instead. A continued run takes the files along, so that every row of R asks the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import write_atomic
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.quality.evaluate import Asked, ask

FOLDER = "evaluation"


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts and reference images of a task, and latents held out of training where its loss is measured."""

    asked: Asked
    latents: Latents | None = None

    def first(self, count: int) -> EvaluationSet:
        """The first `count` prompts, reference images and latents of a set that was loaded."""
        asked, latents = self.asked, self.latents
        references = None if asked.references is None else asked.references[:count]
        asked = replace(asked, prompts=asked.prompts[:count], scenes=asked.scenes[:count], references=references)
        if latents is not None:
            latents = Latents([(mean[:count], std[:count]) for mean, std in latents.shards], latents.captions[:count])
        return EvaluationSet(asked, latents)

    def save(self, path: Path, key: str, *, images: int) -> None:
        """Write it whole; `key` tells sets of one task apart, `images` were asked for."""
        assert self.latents is not None
        assert self.asked.references is not None
        texts = {
            "key": key,
            "images": str(images),
            "kind": self.asked.kind,
            "prompts": json.dumps(self.asked.prompts),
            "captions": json.dumps(self.latents.captions),
            "classes": json.dumps(dict(self.asked.classes)),
        }
        tensors = {
            "references": torch.from_numpy(self.asked.references),
            "mean": torch.cat([mean[:, :1] for mean, _ in self.latents.shards]),
            "std": torch.cat([std[:, :1] for _, std in self.latents.shards]),
        }
        write_atomic(path, save({n: t.contiguous() for n, t in tensors.items()}, metadata=texts))

    @classmethod
    def load(cls, path: Path) -> EvaluationSet:
        """Read a kept one; raises CheckpointError for a damaged one."""
        try:
            with safe_open(path, framework="pt") as file:
                texts = file.metadata()
                asked = Asked(
                    tuple(json.loads(texts["prompts"])), (), file.get_tensor("references").numpy(), texts["kind"],
                    json.loads(texts.get("classes", "{}")),
                )  # fmt: skip
                shard = (file.get_tensor("mean"), file.get_tensor("std"))
                return cls(asked, Latents([shard], json.loads(texts["captions"])))
        except Exception as error:
            raise CheckpointError(f"{path} is damaged: {error}; remove it, it is made again from the data") from None


def key_of(task: Task, *, size: int, vae_sha256: str) -> str:
    """Of what a kept set depends on, but for the data itself, which may be gone."""
    return json.dumps([task.source, task.caption, size, vae_sha256])


def kept_images(path: Path, key: str) -> int:
    """For how many images the set of this key was made; 0 where there is none. A task may have had fewer."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        texts = file.metadata()
    return int(texts["images"]) if texts["key"] == key else 0


def ask_as_kept(run: Path, task: Task, images: int | None, *, size: int, vae_sha256: str, usual: int) -> Asked:
    """What a run asks for on its task: from the set that it keeps, from the task's data where `images` are more.

    Without `images`, as many as are kept, else `usual`. Where the data cannot be read, what is kept is all there is.
    """
    path = run / FOLDER / f"{task.name}.safetensors"
    kept = kept_images(path, key_of(task, size=size, vae_sha256=vae_sha256))
    wanted = images or kept or usual
    if wanted > kept:
        try:
            return ask(task, wanted, size=size)
        except InputError:
            if not kept:
                raise
    return EvaluationSet.load(path).first(wanted).asked

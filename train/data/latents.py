"""Encoded samples of a task, memory-mapped from the cache's shards, and the reading of a shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kdc_edge.errors import CheckpointError


@dataclass(frozen=True)
class Latents:
    """Encoded samples: scaled posterior mean and std, (n, F, C, h, w) fp16 a shard; a task's are memory-mapped.

    F is 2 where the mirror image was encoded too, else 1.
    """

    shards: list[tuple[Tensor, Tensor]]  # of one shape each; of several where images are grouped by aspect ratio
    captions: list[str]
    starts: Tensor = field(init=False)  # the first sample's number of each shard, (shards,)

    def __post_init__(self) -> None:
        sizes = torch.tensor([0] + [len(mean) for mean, _ in self.shards])
        object.__setattr__(self, "starts", sizes.cumsum(0)[:-1])

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def flips(self) -> int:
        return int(self.shards[0][0].shape[1])

    @cached_property
    def groups(self) -> dict[torch.Size, Tensor]:
        """The numbers (n,) of the samples of each shape (C, h, w)."""
        numbers: dict[torch.Size, list[Tensor]] = {}
        for start, (mean, _) in zip(self.starts.tolist(), self.shards, strict=True):
            numbers.setdefault(mean.shape[2:], []).append(torch.arange(start, start + len(mean)))
        return {shape: torch.cat(found) for shape, found in numbers.items()}

    def shape_of(self, number: int) -> torch.Size:
        """The shape (C, h, w) of a sample."""
        shard = int(torch.searchsorted(self.starts, number, right=True)) - 1
        return self.shards[shard][0].shape[2:]

    def share(self, shape: torch.Size) -> float:
        """The share of the samples that have this shape."""
        return len(self.groups[shape]) / len(self) if shape in self.groups else 0.0

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """`count` numbers (count,) of samples of this shape, drawn uniformly, with repetition."""
        group = self.groups[shape]
        return group[torch.randint(len(group), (count,), generator=generator)]

    def take(self, numbers: Tensor, flipped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and std (B, C, h, w) fp16 of samples (B,) of one shape, mirrored where `flipped` (B,) says so."""
        shard = torch.searchsorted(self.starts, numbers, right=True) - 1
        row = numbers - self.starts[shard]
        flip = torch.zeros_like(row) if flipped is None else flipped.long()
        picked = [
            (self.shards[s][0][r, f], self.shards[s][1][r, f])
            for s, r, f in zip(shard.tolist(), row.tolist(), flip.tolist(), strict=True)
        ]
        return torch.stack([mean for mean, _ in picked]), torch.stack([std for _, std in picked])


def open_shard(path: Path) -> safe_open:
    """A shard of the cache, memory-mapped. Raises CheckpointError where it is damaged."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove its folder, it will be made again") from None


def shapes_in(file: safe_open) -> list[str]:
    """What the names of a shard's tensors end in: "" where all of its samples have one shape, else "-HxW" of each."""
    names: list[str] = file.keys()  # type: ignore[no-untyped-call]
    return sorted(name.removeprefix("mean") for name in names if name.startswith("mean"))

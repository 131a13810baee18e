"""Latent replay: a bounded, uniform memory of the samples that earlier tasks trained on.

It holds VAE posteriors (fp16) and captions, never pixels. The reservoir is kept in batch form: every sample
gets a uniform random key, and the `capacity` largest keys stay, which is a uniform sample of the whole stream
(Efraimidis and Spirakis, 2006, with equal weights), and needs no count of the stream to be resumed.

    buffer = ReplayBuffer(capacity=500)
    buffer.add(mean, std, captions, task="flowers", generator=generator)
    picked = buffer.draw(8, generator)       # indices into buffer.mean, buffer.std, buffer.captions
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdc_edge.errors import CheckpointError


class ReplayBuffer:
    """`capacity` samples: posterior mean and deviation (N, C, h, w) fp16, caption and task of each."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.keys = torch.empty(0, dtype=torch.float64)
        self.mean: Tensor = torch.empty(0, dtype=torch.float16)
        self.std: Tensor = torch.empty(0, dtype=torch.float16)
        self.captions: list[str] = []
        self.tasks: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def add(self, mean: Tensor, std: Tensor, captions: list[str], *, task: str, generator: torch.Generator) -> None:
        """Offer a stream's next samples (N, C, h, w); which stay is up to their keys."""
        if self.capacity == 0 or not captions:
            return
        keys = torch.cat([self.keys, torch.rand(len(captions), generator=generator, dtype=torch.float64)])
        keep = keys.topk(min(self.capacity, len(keys))).indices.sort().values
        first = len(self) == 0
        self.keys = keys[keep]
        self.mean = (mean.half() if first else torch.cat([self.mean, mean.half()]))[keep]
        self.std = (std.half() if first else torch.cat([self.std, std.half()]))[keep]
        offered = self.captions + captions
        tasks = self.tasks + [task] * len(captions)
        self.captions = [offered[i] for i in keep.tolist()]
        self.tasks = [tasks[i] for i in keep.tolist()]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` indices (count,) drawn uniformly, with repetition."""
        return torch.randint(len(self), (count,), generator=generator)

    @property
    def size_bytes(self) -> int:
        """Memory of the latents and captions."""
        return 2 * (self.mean.numel() + self.std.numel()) + sum(len(c.encode()) for c in self.captions)

    def save(self, path: Path) -> None:
        texts = {
            "capacity": str(self.capacity),
            "captions": json.dumps(self.captions),
            "tasks": json.dumps(self.tasks),
        }
        save_file({"keys": self.keys, "mean": self.mean, "std": self.std}, path, metadata=texts)

    @classmethod
    def load(cls, path: Path) -> ReplayBuffer:
        """Read a saved buffer; raises CheckpointError for a damaged one."""
        try:
            with safe_open(path, framework="pt") as file:
                texts = file.metadata()
                buffer = cls(int(texts["capacity"]))
                buffer.keys, buffer.mean, buffer.std = (file.get_tensor(n) for n in ("keys", "mean", "std"))
                buffer.captions, buffer.tasks = json.loads(texts["captions"]), json.loads(texts["tasks"])
        except Exception as error:
            raise CheckpointError(f"{path} is no replay buffer: {error}") from None
        if not len(buffer.keys) == len(buffer.mean) == len(buffer.std) == len(buffer.captions) == len(buffer.tasks):
            raise CheckpointError(f"{path} is damaged: its parts have different lengths")
        return buffer

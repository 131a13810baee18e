"""Latent replay: a bounded memory of the samples that earlier tasks trained on.

It holds VAE posteriors (fp16) and captions, never pixels. Every sample gets a uniform random key once, and the order
of keys decides who stays (Efraimidis and Spirakis, 2006, with equal weights), which needs no count of the stream to
be resumed:

- `reservoir`: the largest keys of all stay, a uniform sample of everything seen;
- `balanced`: the largest keys of each task stay, as many of one task as of another while they last.

    buffer = ReplayBuffer(capacity=500)
    buffer.add(captions, latents.take, task="flowers", generator=generator)
    picked = buffer.draw(8, generator)       # indices into buffer.mean, buffer.std, buffer.captions
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdc_edge.errors import CheckpointError

Take = Callable[[Tensor], tuple[Tensor, Tensor]]  # numbers (n,) -> mean and std (n, C, h, w)


class ReplayBuffer:
    """Samples within `capacity` and `capacity_bytes` (None: no limit): mean, std (N, C, h, w) fp16, caption, task."""

    def __init__(self, capacity: int | None, *, capacity_bytes: int | None = None, policy: str = "reservoir") -> None:
        self.capacity, self.capacity_bytes, self.policy = capacity, capacity_bytes, policy
        self.keys = torch.empty(0, dtype=torch.float64)
        self.mean: Tensor = torch.empty(0, dtype=torch.float16)
        self.std: Tensor = torch.empty(0, dtype=torch.float16)
        self.captions: list[str] = []
        self.tasks: list[str] = []

    def __len__(self) -> int:
        return len(self.captions)

    def add(self, captions: Sequence[str], take: Take, *, task: str, generator: torch.Generator) -> None:
        """Offer a stream's next samples; `take` is asked for the latents of those that stay, and for no others."""
        if self.capacity == 0 or self.capacity_bytes == 0 or not captions:
            return
        held = len(self)
        keys = torch.cat([self.keys, torch.rand(len(captions), generator=generator, dtype=torch.float64)])
        tasks = self.tasks + [task] * len(captions)
        offered = self.captions + list(captions)
        mean, std = take(torch.zeros(1, dtype=torch.long))
        latent_bytes = 2 * (mean[0].numel() + std[0].numel())
        keep = self._survivors(keys, tasks, [latent_bytes + len(c.encode()) for c in offered])
        old, new = keep[keep < held], keep[keep >= held] - held
        if held == 0:
            self.mean, self.std = mean[:0].half(), std[:0].half()
        mean, std = take(new) if len(new) else (self.mean[:0], self.std[:0])
        self.mean, self.std = torch.cat([self.mean[old], mean.half()]), torch.cat([self.std[old], std.half()])
        self.keys = keys[keep]
        self.captions = [offered[i] for i in keep.tolist()]
        self.tasks = [tasks[i] for i in keep.tolist()]

    def limit(self, capacity: int | None, *, capacity_bytes: int | None, policy: str) -> None:
        """Take on another budget; what no longer fits goes, as if the budget had always been this one."""
        self.capacity, self.capacity_bytes, self.policy = capacity, capacity_bytes, policy
        if not len(self):
            return
        latent_bytes = 2 * (self.mean[0].numel() + self.std[0].numel())
        keep = self._survivors(self.keys, self.tasks, [latent_bytes + len(c.encode()) for c in self.captions])
        self.keys, self.mean, self.std = self.keys[keep], self.mean[keep], self.std[keep]
        self.captions = [self.captions[i] for i in keep.tolist()]
        self.tasks = [self.tasks[i] for i in keep.tolist()]

    def _survivors(self, keys: Tensor, tasks: list[str], sizes: list[int]) -> Tensor:
        """The numbers, rising, of the samples that stay."""
        order = keys.argsort(descending=True, stable=True)
        if self.policy == "balanced":  # every task's best first, then every task's second ...
            seen: dict[str, int] = {}
            ranks = torch.zeros(len(keys), dtype=torch.long)
            for i in order.tolist():
                ranks[i] = seen.get(tasks[i], 0)
                seen[tasks[i]] = int(ranks[i]) + 1
            order = order[ranks[order].argsort(stable=True)]
        order = order[: self.capacity]
        if self.capacity_bytes is not None:
            total = torch.tensor([sizes[i] for i in order.tolist()]).cumsum(0)
            order = order[: int((total <= self.capacity_bytes).sum())]
        return order.sort().values

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` indices (count,) drawn uniformly, with repetition."""
        return torch.randint(len(self), (count,), generator=generator)

    @property
    def size_bytes(self) -> int:
        """Memory of the latents and captions."""
        return 2 * (self.mean.numel() + self.std.numel()) + sum(len(c.encode()) for c in self.captions)

    def save(self, path: Path) -> None:
        texts = {
            "capacity": json.dumps(self.capacity),
            "capacity_bytes": json.dumps(self.capacity_bytes),
            "policy": self.policy,
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
                capacity, capacity_bytes = (json.loads(texts[n]) for n in ("capacity", "capacity_bytes"))
                buffer = cls(capacity, capacity_bytes=capacity_bytes, policy=texts["policy"])
                buffer.keys, buffer.mean, buffer.std = (file.get_tensor(n) for n in ("keys", "mean", "std"))
                buffer.captions, buffer.tasks = json.loads(texts["captions"]), json.loads(texts["tasks"])
        except Exception as error:
            raise CheckpointError(f"{path} is no replay buffer: {error}") from None
        if not len(buffer.keys) == len(buffer.mean) == len(buffer.std) == len(buffer.captions) == len(buffer.tasks):
            raise CheckpointError(f"{path} is damaged: its parts have different lengths")
        return buffer

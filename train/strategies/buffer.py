"""Latent replay: a bounded memory of the samples that earlier tasks trained on.

It holds VAE posteriors (fp16) and captions, never pixels. Every sample gets a uniform random key once, and the order
of keys decides who stays (Efraimidis and Spirakis, 2006, with equal weights), which needs no count of the stream to
be resumed:

- `reservoir`: the largest keys of all stay, a uniform sample of everything seen;
- `balanced`: the largest keys of each task stay, as many of one task as of another while they last.

    buffer = ReplayBuffer(capacity=500)
    buffer.add(captions, latents.take, task="flowers", generator=generator)
    mean, std = buffer.latents.take(buffer.latents.draw(8, shape, generator))    # (8, C, h, w) each
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdc_edge.errors import CheckpointError
from kdc_edge.train.data.latents import Latents

Take = Callable[[Tensor], tuple[Tensor, Tensor]]  # numbers (n,) -> mean and std (n, C, h, w)


class ReplayBuffer:
    """Samples within `capacity` and `capacity_bytes` (None: no limit): latents with captions, key and task of each."""

    def __init__(self, capacity: int | None, *, capacity_bytes: int | None = None, policy: str = "reservoir") -> None:
        self.capacity, self.capacity_bytes, self.policy = capacity, capacity_bytes, policy
        self.keys = torch.empty(0, dtype=torch.float64)
        self.latents = Latents([], [])  # a shard of each shape, without mirror images
        self.tasks: list[str] = []

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def captions(self) -> list[str]:
        return self.latents.captions

    def add(
        self, captions: Sequence[str], take: Take, *, task: str, generator: torch.Generator,
        groups: Iterable[Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Offer a stream's next samples; `take` is asked for the latents of those that stay, and for no others.

        `groups` are the numbers (n,) of the samples of each shape; None where all have one.
        """
        if self.capacity == 0 or self.capacity_bytes == 0 or not captions:
            return
        keys = torch.cat([self.keys, torch.rand(len(captions), generator=generator, dtype=torch.float64)])
        groups = [torch.arange(len(captions))] if groups is None else groups
        offered = [(take(numbers[:1])[0].shape[1:], numbers) for numbers in groups]
        self._keep(keys, [*self.tasks, *[task] * len(captions)], [*self.captions, *captions], offered, take)

    def limit(self, capacity: int | None, *, capacity_bytes: int | None, policy: str) -> None:
        """Take on another budget; what no longer fits goes, as if the budget had always been this one."""
        self.capacity, self.capacity_bytes, self.policy = capacity, capacity_bytes, policy
        self._keep(self.keys, self.tasks, self.captions, [], self.latents.take)

    def may_hold_more_than(self, other: ReplayBuffer) -> bool:
        """Is one of the limits higher than the other buffer's?"""
        limits = (self.capacity, other.capacity), (self.capacity_bytes, other.capacity_bytes)
        return any(theirs is not None and (own is None or own > theirs) for own, theirs in limits)

    def replace_latents(self, mean: Tensor, std: Tensor) -> None:
        """Give the captions that are kept other latents (N, C, h, w) fp16."""
        self.latents = Latents([(mean.unsqueeze(1), std.unsqueeze(1))] if len(mean) else [], self.captions)

    def _keep(
        self, keys: Tensor, tasks: list[str], captions: list[str], offered: list[tuple[torch.Size, Tensor]], take: Take
    ) -> None:
        """Keep what fits of the held samples and, numbered from 0 behind them, those `offered` of each shape."""
        held = len(self)
        sizes = torch.tensor([len(caption.encode()) for caption in captions], dtype=torch.long)
        for shape, numbers in [*self.latents.groups.items(), *((s, held + n) for s, n in offered)]:
            sizes[numbers] += 2 * 2 * shape.numel()  # mean and std in fp16
        stays = self._survivors(keys, tasks, sizes)
        found: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}  # numbers (n,), mean and std of each shape
        for (shape, numbers), (mean, std) in zip(self.latents.groups.items(), self.latents.shards, strict=True):
            kept = stays[numbers]
            found[shape] = [(numbers[kept], mean[kept], std[kept])]
        for shape, numbers in offered:
            new = numbers[stays[held + numbers]]
            if len(new):
                mean, std = (part.half().unsqueeze(1) for part in take(new))
                found.setdefault(shape, []).append((held + new, mean, std))
        whole = [[torch.cat(parts) for parts in zip(*of_shape, strict=True)] for of_shape in found.values()]
        order = torch.cat([torch.empty(0, dtype=torch.long), *(numbers for numbers, _, _ in whole)])
        shards = [(mean, std) for _, mean, std in whole if len(mean)]
        self.latents = Latents(shards, [captions[i] for i in order.tolist()])
        self.keys, self.tasks = keys[order], [tasks[i] for i in order.tolist()]

    def _survivors(self, keys: Tensor, tasks: list[str], sizes: Tensor) -> Tensor:
        """Which samples (n,) stay, of these sizes in bytes (n,)."""
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
            order = order[sizes[order].cumsum(0) <= self.capacity_bytes]
        stays = torch.zeros(len(keys), dtype=torch.bool)
        stays[order] = True
        return stays

    @property
    def size_bytes(self) -> int:
        """Memory of the latents and captions."""
        latents = sum(2 * (mean.numel() + std.numel()) for mean, std in self.latents.shards)
        return latents + sum(len(c.encode()) for c in self.captions)

    def save(self, path: Path) -> None:
        texts = {
            "capacity": json.dumps(self.capacity),
            "capacity_bytes": json.dumps(self.capacity_bytes),
            "policy": self.policy,
            "captions": json.dumps(self.captions),
            "tasks": json.dumps(self.tasks),
        }
        shards = self.latents.shards or [(torch.empty(0, 1, dtype=torch.float16),) * 2]
        tensors = {"keys": self.keys}
        for names, shard in zip(_names(len(shards)), shards, strict=True):
            tensors |= {name: tensor[:, 0].contiguous() for name, tensor in zip(names, shard, strict=True)}
        save_file(tensors, path, metadata=texts)

    @classmethod
    def load(cls, path: Path) -> ReplayBuffer:
        """Read a saved buffer; raises CheckpointError for a damaged one."""
        try:
            with safe_open(path, framework="pt") as file:
                texts = file.metadata()
                capacity, capacity_bytes = (json.loads(texts[n]) for n in ("capacity", "capacity_bytes"))
                buffer = cls(capacity, capacity_bytes=capacity_bytes, policy=texts["policy"])
                buffer.keys, buffer.tasks = file.get_tensor("keys"), json.loads(texts["tasks"])
                shapes = sum(name.startswith("mean") for name in file.keys())  # noqa: SIM118 - no dictionary
                found = [[file.get_tensor(name).unsqueeze(1) for name in names] for names in _names(shapes)]
                buffer.latents = Latents(
                    [(mean, std) for mean, std in found if len(mean) or len(std)], json.loads(texts["captions"])
                )
        except Exception as error:
            raise CheckpointError(f"{path} is no replay buffer: {error}") from None
        counts = {sum(len(shard[i]) for shard in buffer.latents.shards) for i in range(2)}
        if counts | {len(buffer.keys), len(buffer.tasks)} != {len(buffer)}:
            raise CheckpointError(f"{path} is damaged: its parts have different lengths")
        return buffer


def _names(shapes: int) -> list[tuple[str, str]]:
    """What a file calls mean and std (n, C, h, w) of so many shapes."""
    return [("mean", "std")] if shapes == 1 else [(f"mean-{i}", f"std-{i}") for i in range(shapes)]

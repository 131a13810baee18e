"""Samples of earlier tasks in every batch: their latents, or latents of images that are generated again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdc_edge.errors import InputError
from kdc_edge.train.data.cache import encode_images
from kdc_edge.train.quality.spread import generate_spread
from kdc_edge.train.strategies.buffer import ReplayBuffer
from kdc_edge.train.strategies.strategy import Strategy

if TYPE_CHECKING:
    from kdc_edge.train.data.latents import Latents
    from kdc_edge.train.data.tasks import Task


class LatentReplay(Strategy):
    """Latents and captions of earlier tasks (KDC-Diff, arXiv 2505.06995, version 2)."""

    keeps_samples = True

    def remember(self, task: Task, latents: Latents, generator: torch.Generator) -> None:
        from kdc_edge.train.data.batch import random_flip  # which imports the buffer of this package

        flipped = random_flip(latents, generator)
        if task.name not in self.buffer.tasks:  # a few-step stage begins with the samples of all its tasks
            self.buffer.add(
                latents.captions, flipped, task=task.name, generator=generator, groups=latents.groups.values()
            )

    def load_state_dict(self, tensors: Mapping[str, Tensor], buffer: ReplayBuffer, *, tasks: int) -> None:
        if any(not mean.numel() for mean, _ in buffer.latents.shards):
            raise InputError("the run kept captions alone, no latents: go on with --strategy captions or generative")
        super().load_state_dict(tensors, buffer, tasks=tasks)


class CaptionReplay(Strategy):
    """Captions of earlier tasks; at the beginning of a task the teacher makes images of them, as in an evaluation.

    The latents of these images are in the buffer until the task ends, and in the saved states of that time.
    """

    keeps_samples = True
    painted_by_student = False

    def begin_task(self, number: int, generator: torch.Generator) -> None:
        super().begin_task(number, generator)
        if len(self.buffer):
            seed = int(torch.randint(2**31, (), generator=generator))
            with self.student.averaged() if self.painted_by_student else nullcontext(self.teacher.unet) as unet:
                model = self.objective.ships(self.teacher.model) if self.painted_by_student else None
                painter = self.teacher.generator(unet, model)
                images = generate_spread(self.accelerator, painter, self.buffer.captions, seed=seed)
            parts = [encode_images(self.teacher.vae, images[i : i + 16]) for i in range(0, len(images), 16)]
            self.buffer.replace_latents(*(torch.cat(found).contiguous() for found in zip(*parts, strict=True)))

    def remember(self, task: Task, latents: Latents, generator: torch.Generator) -> None:
        self.buffer.replace_latents(*_no_latents(torch.arange(len(self.buffer))))
        if task.name not in self.buffer.tasks:
            self.buffer.add(latents.captions, _no_latents, task=task.name, generator=generator)

    @property
    def size_bytes(self) -> int:
        return sum(len(caption.encode()) for caption in self.buffer.captions)


class GenerativeReplay(CaptionReplay):
    """The same by the EMA student from the previous task (deep generative replay, Shin et al., arXiv 1705.08690)."""

    painted_by_student = True


def _no_latents(numbers: Tensor) -> tuple[Tensor, Tensor]:
    empty = torch.empty(len(numbers), 0, dtype=torch.float16)
    return empty, empty

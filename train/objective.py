"""What a step computes: a noisy batch, the teacher's and the student's view of it, the loss of each sample.

    objective = Distillation(teacher, schedule, config.loss)
    terms = objective(student, batch, hidden)          # {"task": (B,), ..., "total": (B,)}

The loop takes any callable of this shape, so that another objective is another object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from time import perf_counter

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.train.config import LossWeights
from kdc_edge.train.losses import distillation_loss
from kdc_edge.train.student import source_name

QUARTERS = 4  # of the timesteps, whose losses are told apart: forgetting differs between them


@dataclass(frozen=True)
class Batch:
    """Samples of a step with everything random about them: latents (B, C, h, w) fp32, the others (B,)."""

    sample: Tensor
    noise: Tensor
    timestep: Tensor
    replayed: Tensor  # bool: from the buffer
    captions: list[str]  # emptied where dropped

    def __len__(self) -> int:
        return len(self.captions)

    def part(self, number: int, of: int) -> Batch:
        """Every `of`-th sample from `number` on, so that replayed ones are spread evenly."""
        found = {f.name: getattr(self, f.name)[number::of] for f in fields(self)}
        return Batch(**found)

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.sample.to(device),
            self.noise.to(device),
            self.timestep.to(device),
            self.replayed.to(device),
            self.captions,
        )


class Stopwatch:
    """Seconds by section. On a GPU the sections are true only when `exact`, which waits for the device."""

    def __init__(self, device: torch.device, *, exact: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = exact and device.type == "cuda"

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds[section] = self.seconds.get(section, 0.0) + self._now() - started

    def _now(self) -> float:
        if self._wait:
            torch.cuda.synchronize()
        return perf_counter()


class FeatureTap:
    """The outputs of a U-Net's down and up blocks, caught as they are computed; names are the module's own."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.features: dict[str, Tensor] = {}
        for name, module in unet.named_modules():
            if re.fullmatch(r"(down|up)_blocks\.\d+", name):
                module.register_forward_hook(partial(self._catch, name))

    def _catch(self, name: str, _module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.features[name] = output[0] if isinstance(output, tuple) else output


class Distillation:
    """The dual-layered distillation from a frozen teacher, or, for replayed samples, from an earlier student."""

    def __init__(
        self,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        schedule: NoiseSchedule,
        weights: LossWeights,
        device: torch.device,
    ) -> None:
        self.teacher, self.weights, self.schedule = teacher, weights, schedule
        self.alphas_cumprod = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32).to(device)
        self.teacher_tap, self.student_tap = FeatureTap(teacher), FeatureTap(student)
        blocks = [n for n, _ in student.named_modules() if re.fullmatch(r"(down|up)_blocks\.\d+", n)]
        self.pairs = {n: source_name(f"{n}.", teacher, student)[:-1] for n in blocks}  # student's -> teacher's
        self.earlier: UNet2DConditionModel | None = None
        self._earlier_tap: FeatureTap | None = None

    def replay_from(self, earlier: UNet2DConditionModel | None) -> None:
        """Distil replayed samples from this student of before the task; from the teacher where None."""
        self.earlier = earlier
        self._earlier_tap = FeatureTap(earlier) if earlier is not None else None

    def __call__(
        self,
        student: nn.Module,
        batch: Batch,
        hidden: Tensor,
        *,
        watch: Stopwatch,
        autocast: AbstractContextManager[object] | None = None,
    ) -> dict[str, Tensor]:
        """Every loss term (B,) of the batch under text embeddings `hidden` (B, 77, D)."""
        a = self.alphas_cumprod[batch.timestep].view(-1, 1, 1, 1)
        noisy = a.sqrt() * batch.sample + (1 - a).sqrt() * batch.noise
        # v-prediction: Salimans and Ho, arXiv 2202.00512, appendix D
        velocity = self.schedule.prediction_type == "v_prediction"
        target = a.sqrt() * batch.noise - (1 - a).sqrt() * batch.sample if velocity else batch.noise
        with autocast or nullcontext():
            with watch("teacher"), torch.no_grad():
                taught, shown = self._teach(noisy, batch.timestep, hidden, batch.replayed)
            with watch("student"):
                learnt = student(noisy, batch.timestep, hidden).sample
        with watch("student"):
            seen = {n: f.float() for n, f in self.student_tap.features.items()}
            return distillation_loss(learnt.float(), taught.float(), target, seen, shown, self.weights)

    def _teach(
        self, noisy: Tensor, timestep: Tensor, hidden: Tensor, replayed: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Prediction and features, by the student's block names."""
        if self.earlier is None or self._earlier_tap is None or not replayed.any():
            taught = self.teacher(noisy, timestep, hidden).sample
            return taught, {ours: self.teacher_tap.features[theirs] for ours, theirs in self.pairs.items()}
        earlier = self.earlier(noisy[replayed], timestep[replayed], hidden[replayed]).sample
        taught = torch.empty(noisy.shape, dtype=earlier.dtype, device=noisy.device)
        taught[replayed] = earlier
        if not replayed.all():
            new = ~replayed
            taught[new] = self.teacher(noisy[new], timestep[new], hidden[new]).sample.to(taught.dtype)
        shown = {}
        for ours, theirs in self.pairs.items():
            memory = self._earlier_tap.features[ours]
            shown[ours] = memory.new_empty((len(noisy), *memory.shape[1:]))
            shown[ours][replayed] = memory
            if not replayed.all():
                shown[ours][~replayed] = self.teacher_tap.features[theirs].to(memory.dtype)
        return taught, shown

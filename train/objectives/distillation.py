"""Dual-layered distillation (KDC-Diff, arXiv 2505.06995): predictions and block features of the teacher as targets.

    objective = Distillation(setup)
    terms = objective(student, batch, text)      # task, output, soft, feature and total, each (B,)

The mathematics is in train/losses.py. Blocks are matched by name. Replayed samples may take their targets from the
EMA student from the previous task instead of the teacher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from kdc_edge.train.data.batch import Batch, add_noise
from kdc_edge.train.losses import distillation_loss
from kdc_edge.train.objective import Objective, Setup
from kdc_edge.train.student import source_name

BLOCK = re.compile(r"(down|up)_blocks\.\d+")


class FeatureTap:
    """The outputs of a U-Net's down and up blocks, caught as they are computed, by the module's own names."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.features: dict[str, Tensor] = {}
        for name, module in unet.named_modules():
            if BLOCK.fullmatch(name):
                module.register_forward_hook(partial(self._catch, name))

    def _catch(self, name: str, _module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.features[name] = output[0] if isinstance(output, tuple) else output


class Distillation(Objective):
    """The student follows a frozen teacher and the denoising task at once."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        teacher, student = setup.teacher, setup.student
        self.teacher_tap, self.student_tap = FeatureTap(teacher), FeatureTap(student)
        self.previous_tap: FeatureTap | None = None
        blocks = [n for n, _ in student.named_modules() if BLOCK.fullmatch(n)]
        self.pairs = {n: source_name(f"{n}.", teacher, student)[:-1] for n in blocks}  # student's -> teacher's

    def replay_from(self, weights: Mapping[str, Tensor]) -> None:
        super().replay_from(weights)
        assert self.previous_student is not None
        self.previous_tap = FeatureTap(self.previous_student)

    def __call__(self, student: nn.Module, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        watch = self.setup.watch
        noisy, target = add_noise(batch, self.alphas_cumprod, prediction_type=self.schedule.prediction_type)
        with self.setup.autocast():
            with watch("teacher"), torch.no_grad():
                teacher_pred, teacher_features = self._targets(noisy, batch.timestep, text, batch.replayed)
            with watch("student"):
                student_pred = student(noisy, batch.timestep, text).sample
        with watch("student"):
            student_features = {n: f.float() for n, f in self.student_tap.features.items()}
            return distillation_loss(
                student_pred.float(), teacher_pred.float(), target, student_features, teacher_features,
                self.setup.config.loss,
            )  # fmt: skip

    def _targets(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, replayed: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Teacher prediction (B, C, h, w) and features, by the student's block names."""
        teacher, previous = self.setup.teacher, self.previous_student
        if previous is None or self.previous_tap is None or not replayed.any():
            pred = teacher(noisy, timestep, text).sample
            return pred, {ours: self.teacher_tap.features[theirs] for ours, theirs in self.pairs.items()}
        previous_pred = previous(noisy[replayed], timestep[replayed], text[replayed]).sample
        pred = torch.empty(noisy.shape, dtype=previous_pred.dtype, device=noisy.device)
        pred[replayed] = previous_pred
        new = ~replayed
        if new.any():
            pred[new] = teacher(noisy[new], timestep[new], text[new]).sample.to(pred.dtype)
        features = {}
        for ours, theirs in self.pairs.items():
            remembered = self.previous_tap.features[ours]
            features[ours] = remembered.new_empty((len(noisy), *remembered.shape[1:]))
            features[ours][replayed] = remembered
            if new.any():
                features[ours][new] = self.teacher_tap.features[theirs].to(remembered.dtype)
        return pred, features

"""Dual-layered distillation (KDC-Diff, arXiv 2505.06995): predictions and block features of the teacher as targets.

    objective = Distillation(setup)
    terms = objective(student, batch, text)      # task, output, soft, feature and total, each (B,)

The mathematics is in train/losses.py; a term of weight 0 is not computed. Replayed samples may take their targets from
the EMA student from the previous task instead of the teacher.

Blocks are matched by name, as weights are inherited. Where a student with fewer stages ends without the downsampler
that the teacher's block has, the features before the downsampler are compared (BK-SDM, arXiv 2305.15798: the teacher's
down_blocks.2.attentions.1 with the student's down_blocks.2.attentions.0). Mid blocks are compared where both networks
have as many stages; with fewer, the student's works at another resolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from kdc_edge.train.data.batch import Batch, add_noise
from kdc_edge.train.losses import distillation_loss, min_snr_weight
from kdc_edge.train.objective import Objective, Setup
from kdc_edge.train.student import source_name

BLOCK = re.compile(r"(down|up)_blocks\.\d+|mid_block")


class FeatureTap:
    """The outputs of a U-Net's blocks of these names, caught as they are computed.

    Of the blocks in `before_downsampler`, the output of the last layer before it.
    """

    def __init__(
        self, unet: UNet2DConditionModel, names: Iterable[str], before_downsampler: Iterable[str] = ()
    ) -> None:
        self.features: dict[str, Tensor] = {}
        cut = set(before_downsampler)
        for name in names:
            layers = len(unet.get_submodule(name).resnets) if name in cut else None
            unet.get_submodule(name).register_forward_hook(partial(self._catch, name, layers))

    def _catch(
        self, name: str, layers: int | None, _module: object, _inputs: object, output: Tensor | tuple[Any, ...]
    ) -> None:
        if not isinstance(output, tuple):
            self.features[name] = output
        else:  # of a down block: its output, and those of its layers and downsampler
            self.features[name] = output[0] if layers is None else output[1][layers - 1]


def pair_blocks(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> dict[str, str]:
    """The student's blocks and the teacher's whose features they are compared with."""
    names = [n for n, _ in student.named_modules() if BLOCK.fullmatch(n)]
    pairs = {n: source_name(f"{n}.", teacher, student)[:-1] for n in names}
    if teacher.mid_block is None or len(teacher.down_blocks) != len(student.down_blocks):
        pairs.pop("mid_block", None)
    return pairs


class Distillation(Objective):
    """The student follows a frozen teacher and the denoising task at once."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        teacher, student, weights = setup.teacher, setup.student, setup.config.loss
        self.binned_term = "task" if weights.task else "total"
        self.asks_teacher = bool(weights.output or weights.soft or weights.feature)
        self.pairs = pair_blocks(teacher, student) if weights.feature else {}  # student's -> teacher's
        cut = [
            theirs
            for ours, theirs in self.pairs.items()
            if _downsamples(teacher.get_submodule(theirs)) and not _downsamples(student.get_submodule(ours))
        ]
        self.teacher_tap = FeatureTap(teacher, self.pairs.values(), before_downsampler=cut)
        self.student_tap = FeatureTap(student, self.pairs)
        self.previous_tap: FeatureTap | None = None

    def replay_from(self, weights: Mapping[str, Tensor]) -> None:
        super().replay_from(weights)
        assert self.previous_student is not None
        self.previous_tap = FeatureTap(self.previous_student, self.pairs)

    def __call__(self, student: nn.Module, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        watch = self.setup.watch
        noisy, target = add_noise(batch, self.alphas_cumprod, prediction_type=self.schedule.prediction_type)
        with self.setup.autocast():
            teacher_pred: Tensor | None = None
            teacher_features: dict[str, Tensor] = {}
            if self.asks_teacher:
                with watch("teacher"), torch.no_grad():
                    teacher_pred, teacher_features = self._targets(noisy, batch.timestep, text, batch.replayed)
            with watch("student"):
                student_pred = student(noisy, batch.timestep, text).sample
        with watch("student"):
            student_features = {n: f.float() for n, f in self.student_tap.features.items()}
            return distillation_loss(
                student_pred.float(), None if teacher_pred is None else teacher_pred.float(), target, student_features,
                teacher_features, self.setup.config.loss, self._task_weight(batch.timestep),
            )  # fmt: skip

    def _task_weight(self, timestep: Tensor) -> Tensor | None:
        """Min-SNR weights (B,) where they are asked for."""
        gamma = self.setup.config.snr_gamma
        if gamma is None:
            return None
        return min_snr_weight(self.alphas_cumprod[timestep], gamma, self.schedule.prediction_type)

    def _targets(
        self, noisy: Tensor, timestep: Tensor, text: Tensor, replayed: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
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


def _downsamples(block: nn.Module) -> bool:
    return getattr(block, "downsamplers", None) is not None

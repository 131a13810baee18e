"""Dual-layered distillation (KDC-Diff, arXiv 2505.06995): pure functions of what two networks computed.

    L = w_task * MSE(e_s, e)                                     the denoising task
      + w_out  * MSE(e_s, e_t)                                   output level
      + w_soft * T^2 * KL(softmax_c(e_t / T) || softmax_c(e_s / T))   layer 1, soft targets ("semantic")
      + w_feat * sum_b MSE(f_s[b], f_t[b])                       layer 2, block features ("structural")

e is the noise (or the velocity), e_s and e_t the student's and the teacher's predictions, f[b] a block's output;
the temperature T is 2 in the authors' code.
Gradients flow into the student's side alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdc_edge.train.config import LossWeights


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Of each sample, (B, ...) -> (B,): the mean over all else."""
    return (a - b).square().flatten(1).mean(1)


def soft_target_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax_c(teacher / T) || softmax_c(student / T)) over the channels, (B, C, h, w) -> (B,).

    Averaged over positions. The authors' `batchmean` sums over positions, which is h * w times larger
    (4096 at 64x64 latents) and changes with the image's size. T^2 keeps the gradient's scale (Hinton et al.,
    arXiv 1503.02531, section 2).
    """
    log_student = F.log_softmax(student / temperature, dim=1)  # (B, C, h, w)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)  # (B, h, w)
    return temperature**2 * divergence.flatten(1).mean(1)


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """The sum over blocks of the mean squared difference of features of the same name: (B,).

    Raises KeyError where the teacher lacks one of the student's blocks.
    """
    return torch.stack([mean_squared_error(f, teacher[name]) for name, f in student.items()]).sum(0)


def min_snr_weight(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR weights (B,) of the denoising loss at `alphas_cumprod` (B,) (Hang et al., arXiv 2303.09556, section 3.4).

    min(SNR, gamma) over the SNR for noise, over SNR + 1 for the velocity, over 1 for the clean sample;
    SNR = a / (1 - a).
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    least = snr.clamp(max=gamma)
    if prediction_type == "sample":
        return least
    return least / (snr + 1) if prediction_type == "v_prediction" else least / snr.clamp(min=1e-8)


def distillation_loss(
    student_pred: Tensor,
    teacher_pred: Tensor | None,
    target: Tensor,
    student_features: Mapping[str, Tensor],
    teacher_features: Mapping[str, Tensor],
    weights: LossWeights,
    task_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Each term whose weight is not 0, unweighted, and their weighted `total`, each (B,).

    Predictions and target are (B, C, h, w); without the teacher's there are no output-level and soft terms.
    `task_weight` (B,) weights the denoising loss of each sample in the total.
    """
    terms = {}
    if weights.task:
        terms["task"] = mean_squared_error(student_pred, target)
    if teacher_pred is not None and weights.output:
        terms["output"] = mean_squared_error(student_pred, teacher_pred.detach())
    if teacher_pred is not None and weights.soft:
        terms["soft"] = soft_target_loss(student_pred, teacher_pred.detach(), weights.temperature)
    if weights.feature:
        terms["feature"] = feature_loss(student_features, {n: f.detach().float() for n, f in teacher_features.items()})
    weighted = {name: getattr(weights, name) * term for name, term in terms.items()}
    if task_weight is not None and "task" in weighted:
        weighted["task"] = task_weight * weighted["task"]
    return terms | {"total": torch.stack(list(weighted.values())).sum(0)}

"""The distillation losses against torch's own functions and against their mathematics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdc_edge.train.config import LossWeights
from kdc_edge.train.losses import distillation_loss, feature_loss, min_snr_weight, soft_target_loss


def batch(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_soft_targets_equal_torchs_divergence_per_position(temperature: float) -> None:
    student, teacher = batch(0, 3, 4, 8, 8), batch(1, 3, 4, 8, 8)
    per_position = [x.permute(0, 2, 3, 1).reshape(-1, 4) / temperature for x in (student, teacher)]
    expected = F.kl_div(F.log_softmax(per_position[0], 1), F.softmax(per_position[1], 1), reduction="batchmean")
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature).mean(), expected * temperature**2)


def test_soft_targets_do_not_depend_on_the_images_size() -> None:
    student, teacher = batch(0, 2, 4, 4, 4), batch(1, 2, 4, 4, 4)
    tiled = soft_target_loss(student.repeat(1, 1, 3, 3), teacher.repeat(1, 1, 3, 3), 2.0)
    torch.testing.assert_close(tiled, soft_target_loss(student, teacher, 2.0))


def test_every_term_is_zero_when_student_and_teacher_and_target_agree() -> None:
    x, features = batch(0, 2, 4, 8, 8), {"down_blocks.0": batch(1, 2, 8, 4, 4)}
    terms = distillation_loss(x, x, x, features, features, LossWeights())
    assert all(value.shape == (2,) and value.abs().max() < 1e-6 for value in terms.values())


def test_the_total_is_the_weighted_sum() -> None:
    x, y, z = (batch(s, 2, 4, 8, 8) for s in range(3))
    f, g = {"up_blocks.0": batch(3, 2, 8, 4, 4)}, {"up_blocks.0": batch(4, 2, 8, 4, 4)}
    weights = LossWeights(task=0.5, output=2.0, soft=3.0, feature=0.25)
    terms = distillation_loss(x, y, z, f, g, weights)
    expected = (
        0.5 * F.mse_loss(x, z)
        + 2 * F.mse_loss(x, y)
        + 3 * soft_target_loss(x, y, 2.0).mean()
        + 0.25 * F.mse_loss(f["up_blocks.0"], g["up_blocks.0"])
    )
    torch.testing.assert_close(terms["total"].mean(), expected)


@pytest.mark.parametrize("term", ["task", "output", "soft", "feature"])
def test_each_term_alone_has_a_gradient_for_the_student_and_none_for_the_teacher(term: str) -> None:
    student, teacher = batch(0, 2, 4, 8, 8).requires_grad_(), batch(1, 2, 4, 8, 8).requires_grad_()
    student_features = {"up_blocks.0": student * 2}
    teacher_features = {"up_blocks.0": teacher * 3}
    terms = distillation_loss(student, teacher, batch(2, 2, 4, 8, 8), student_features, teacher_features, LossWeights())
    terms[term].sum().backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_a_block_that_the_teacher_lacks_is_an_error() -> None:
    with pytest.raises(KeyError):
        feature_loss({"mid_block": batch(0, 1, 2, 2, 2)}, {"up_blocks.0": batch(0, 1, 2, 2, 2)})


def test_min_snr_weights_are_the_papers_and_weight_the_denoising_loss_alone() -> None:
    """By hand: SNR 9 and 1/4 with gamma 5."""
    a = torch.tensor([0.9, 0.2])
    assert min_snr_weight(a, 5.0, "epsilon").tolist() == pytest.approx([5 / 9, 1])
    assert min_snr_weight(a, 5.0, "v_prediction").tolist() == pytest.approx([5 / 10, 0.25 / 1.25])
    assert min_snr_weight(a, 5.0, "sample").tolist() == pytest.approx([5, 0.25])
    assert min_snr_weight(torch.tensor([0.0]), 5.0, "epsilon").isfinite().all()
    student, teacher, target = (torch.randn(2, 4, 2, 2) for _ in range(3))
    weights = LossWeights(task=2.0, output=1.0, soft=0.0, feature=0.0)
    weighted = distillation_loss(student, teacher, target, {}, {}, weights, torch.tensor([0.5, 0.0]))
    expected = 2 * torch.tensor([0.5, 0.0]) * weighted["task"] + weighted["output"]
    torch.testing.assert_close(weighted["total"], expected)

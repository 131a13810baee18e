"""Distribution matching: what its loss is, what it moves, and that it resumes exactly."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError
from kdc_edge.request import Request, made_for
from kdc_edge.train.config import FewSteps, TrainConfig
from kdc_edge.train.loop import Trainer
from kdc_edge.train.objectives.distribution import Distribution
from kdc_edge.train.runs.continuing import begin_stage
from kdc_edge.train.stepping import StepDone
from tests.train.test_loop import TASKS, config, weights

STEPS = FewSteps(phases=2, grid_points=2, guidance=1.0, score_updates=2, score_learning_rate=1e-4)


def matching(**changes: object) -> TrainConfig:
    return config(objective="distribution", few_steps=STEPS, **changes)


def test_an_interrupted_stage_ends_with_the_same_weights_and_says_how_it_is_sampled(
    two_tasks: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings = begin_stage(two_tasks, whole, matching(steps=2))
    trainer = Trainer(settings, whole, resume=True)
    for event in trainer.run():
        if isinstance(event, StepDone):
            assert set(event.losses) == {"matching", "total"}
            if event.total == 3:
                trainer.save()
                shutil.copytree(whole, cut)  # as it would be if the run had been killed here
    for _ in Trainer(settings, cut, resume=True).run():
        pass
    expected, before = weights(whole), weights(two_tasks)
    assert all(torch.equal(t, expected[n]) for n, t in weights(cut).items())
    assert any(not torch.equal(t, before[n]) for n, t in expected.items())
    made = made_for(read_model(whole / "checkpoint"), Request(""))
    assert (made.sampler, made.steps, made.guidance) == ("ddim", 2, 1.0)


def test_the_student_follows_the_difference_of_teacher_and_score_network(tmp_path: Path) -> None:
    trainer = Trainer(matching(), tmp_path / "run")
    objective, network, teacher = trainer.objective, trainer.student.network, trainer.teacher.unet
    assert isinstance(objective, Distribution)
    batch = trainer.draw_batch(trainer.teacher.latents(TASKS[0]))
    text = trainer.teacher.embed(batch.captions)
    objective(network, batch, text)["total"].mean().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    score, _ = objective._score_network()
    moved = [not torch.equal(a, b) for a, b in zip(score.parameters(), network.parameters(), strict=True)]
    assert any(moved)

    image = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(0))
    number = torch.tensor([0, 1, 0, 1])  # of two phases
    with torch.no_grad():
        assert torch.allclose(objective._target(teacher, image, text, number), image, atol=1e-4)  # they agree
        state = objective.generator.get_state()
        target = objective._target(score, image, text, number)
        objective.generator.set_state(state)
        x_t, t, _ = objective._noised(image)
        real = objective._image(x_t, teacher(x_t, t, text).sample, t)
        fake = objective._image(x_t, score(x_t, t, text).sample, t)
    matched = image + (real - fake) / (image - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(target, matched, rtol=1e-3, atol=1e-4)


def test_guidance_acts_below_the_phase_that_made_the_image(tmp_path: Path) -> None:
    trainer = Trainer(replace(matching(), few_steps=replace(STEPS, guidance=3.0)), tmp_path / "run")
    objective, teacher = trainer.objective, trainer.teacher.unet
    assert isinstance(objective, Distribution)
    text = trainer.teacher.embed(["a red fish on a sand background"] * 20)
    image = torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    number = torch.arange(20) % 2
    with torch.no_grad():
        state = objective.generator.get_state()
        target = objective._target(teacher, image, text, number)  # a score network that agrees: guidance alone
        objective.generator.set_state(state)
        _, everywhere, _ = objective._noised(image)
        x_s, s, _ = objective._noised(image, below=torch.tensor([499, 999])[number])
        null = trainer.teacher.embed([""] * 20)
        cond, uncond = (objective._image(x_s, teacher(x_s, s, t).sample, s) for t in (text, null))
    assert s[number == 0].max() < 499 < s[number == 1].max() < 980
    assert everywhere[number == 0].max() > 499
    distance = (image - uncond - 3 * (cond - uncond)).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(target - image, 2 * (cond - uncond) / distance, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [{"replay_teacher": "student"}, {"strategy": "lwf"}, {"strategy": "ewc"}])
def test_what_it_cannot_remember_by_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(InputError, match="remembers by captions"):
        Trainer(matching(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()

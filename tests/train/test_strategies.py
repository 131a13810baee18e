"""Strategies against forgetting: what each keeps, what it does to a step, and exact resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from kdc_edge.errors import InputError
from kdc_edge.train.config import StrategyName, TrainConfig
from kdc_edge.train.data.batch import draw_batch
from kdc_edge.train.data.cache import encode_images
from kdc_edge.train.distributed import under
from kdc_edge.train.loop import Trainer
from kdc_edge.train.runs.continuing import continue_run, extend_run
from kdc_edge.train.runs.states import load_state
from kdc_edge.train.stepping import StepDone
from kdc_edge.train.strategies import weights as weights_module
from kdc_edge.train.strategies.buffer import ReplayBuffer
from kdc_edge.train.strategies.registry import STRATEGIES
from kdc_edge.train.strategies.replay import CaptionReplay
from kdc_edge.train.strategies.weights import ElasticWeights
from tests.train.test_loop import TASKS, config, logged, weights

STEPS = 2


@pytest.fixture(autouse=True)
def _few_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "FISHER_SAMPLES", 2)


def settings(strategy: StrategyName, steps: int = STEPS) -> TrainConfig:
    return config(strategy=strategy, steps=steps, eval_steps=1, replay=3, samples=6, ewc_weight=1e4)


def follow(trainer: Trainer, total: int | None = None) -> StepDone:
    """The event of step number `total`, after which the run stops; the last one's of a run to its end."""
    last = None
    for event in trainer.run():
        if isinstance(event, StepDone):
            last = event
            if event.total == total:
                break
    assert last is not None
    return last


@pytest.mark.parametrize("strategy", ["captions", "ewc", "lwf"])
def test_what_is_remembered_is_in_the_saved_state(tmp_path: Path, strategy: StrategyName) -> None:
    """A run that is stopped in its second task and resumed ends with the weights and the log of one that is not."""
    trainer = Trainer(settings(strategy), tmp_path / "whole")
    done = follow(trainer, STEPS + 1)
    student = 4 * sum(p.numel() for p in trainer.student.network.parameters())
    captions = sum(len(caption.encode()) for caption in trainer.replay.captions)
    sizes = {"captions": captions, "ewc": 2 * student, "lwf": student}
    assert 0 < sizes[strategy] == trainer.strategy.size_bytes == 1e6 * done.replay_mb
    assert done.replayed == (0 if strategy == "ewc" else 0.5)
    assert ("ewc" in done.losses) == (strategy == "ewc")
    in_use = trainer.strategy.state_dict()
    trainer.save()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    follow(trainer)
    follow(Trainer(settings(strategy), tmp_path / "cut", resume=True))
    found = weights(tmp_path / "cut")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(tmp_path / "whole").items())
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    extend_run(tmp_path / "cut", settings(strategy, STEPS + 1))  # more steps go on from what was remembered before
    kept = under("strategy/", load_state(tmp_path / "cut")[1])
    assert in_use.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in in_use.items())


@pytest.mark.parametrize("strategy", ["captions", "generative"])
def test_images_of_remembered_captions_are_the_teachers_or_the_earlier_students(
    tmp_path: Path, strategy: StrategyName
) -> None:
    trainer = Trainer(settings(strategy), tmp_path / "run")
    kept = trainer.strategy
    assert isinstance(kept, CaptionReplay)
    latents = trainer.teacher.latents(TASKS[0])
    for p in trainer.student.ema.shadow_params:
        p.mul_(1.5)  # neither the teacher nor the network under training
    kept.remember(TASKS[0], latents, trainer.generator)
    assert [mean.shape for mean, _ in kept.buffer.latents.shards] == [(3, 1, 0)]
    before = trainer.generator.get_state()
    kept.begin_task(1, trainer.generator)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().set_state(before)))
    painter = trainer.unet() if strategy == "generative" else trainer.teacher.unet
    images = trainer.teacher.generator(painter)(kept.buffer.captions, seed=seed)
    mean, std = encode_images(trainer.teacher.vae, images)
    found = kept.buffer.latents.take(torch.arange(3))
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], std)
    kept.remember(TASKS[1], trainer.teacher.latents(TASKS[1]), trainer.generator)
    assert len(kept.buffer) == 3
    assert all(mean.numel() == 0 for mean, _ in kept.buffer.latents.shards)


def test_elastic_weights_are_pulled_by_the_fisher_information(tmp_path: Path) -> None:
    """F is the mean square of single gradients, and the penalty's gradient is that of its formula."""
    trainer = Trainer(settings("ewc"), tmp_path / "run")
    kept, latents = trainer.strategy, trainer.teacher.latents(TASKS[0])
    assert isinstance(kept, ElasticWeights)
    generator = torch.Generator().set_state(trainer.generator.get_state())
    kept.remember(TASKS[0], latents, trainer.generator)
    own = dict(trainer.student.network.named_parameters())
    squares = {name: torch.zeros_like(p) for name, p in own.items()}
    for _ in range(2):
        batch = draw_batch(
            replace(trainer.config, batch_size=1), latents, ReplayBuffer(0),
            timesteps=trainer.objective.draw_timesteps, generator=generator,
        )  # fmt: skip
        loss = trainer.objective(trainer.student.network, batch, trainer.teacher.embed(batch.captions))["total"]
        for (name, _), gradient in zip(own.items(), torch.autograd.grad(loss, list(own.values())), strict=True):
            squares[name] += gradient.square() / 2
    for name, square in squares.items():
        torch.testing.assert_close(kept.fisher[name], square)
    with torch.no_grad():
        for p in own.values():
            p += 0.01 * torch.randn(p.shape, generator=generator)
            p.grad = torch.ones_like(p)
    penalty = sum((0.5e4 * kept.fisher[n] * (p - kept.anchor[n]).square()).sum() for n, p in own.items())
    expected = torch.autograd.grad(penalty, list(own.values()))
    assert isinstance(penalty, torch.Tensor)
    assert kept.add_penalty()["ewc"] == pytest.approx(penalty.item(), rel=1e-4)
    for p, gradient in zip(own.values(), expected, strict=True):
        torch.testing.assert_close(p.grad, 1 + gradient)


def test_what_another_strategy_did_not_keep_is_refused(tmp_path: Path) -> None:
    follow(Trainer(replace(settings("captions"), tasks=TASKS[:1]), tmp_path / "first"))
    for strategy, line in (("replay", "kept captions alone"), ("ewc", "kept no Fisher information")):
        more = replace(settings(strategy), tasks=TASKS[1:])  # type: ignore[arg-type]
        joined = continue_run(tmp_path / "first", tmp_path / strategy, more)
        with pytest.raises(InputError, match=line):
            Trainer(joined, tmp_path / strategy, resume=True)


def test_the_choices_are_the_registry() -> None:
    assert get_args(StrategyName) == tuple(STRATEGIES)

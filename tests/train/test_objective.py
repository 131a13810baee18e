"""Objectives by name: one registered from outside trains, saves and resumes like the built-in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from kdc_edge.errors import InputError
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.train.data.batch import Batch, add_noise
from kdc_edge.train.loop import Trainer
from kdc_edge.train.losses import mean_squared_error
from kdc_edge.train.objective import Objective, Setup
from kdc_edge.train.objectives import OBJECTIVES
from kdc_edge.train.stepping import StepDone
from tests.train.test_loop import TASKS, config

GRID = (99, 499, 999)


class OnAGrid(Objective):
    """Denoising on three timesteps, with a bin and a term of its own, a teacher without caption and a count."""

    binned_term = "denoising"
    bins = len(GRID)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.grid = torch.tensor(GRID, device=setup.device)
        self.calls = torch.zeros((), dtype=torch.long)
        self.drawn: list[int] = []

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        found = self.grid.cpu()[torch.randint(len(GRID), (count,), generator=generator)]
        self.drawn += found.tolist()
        return found

    def bin_of(self, timestep: Tensor) -> Tensor:
        return torch.searchsorted(self.grid, timestep)

    def __call__(self, student: nn.Module, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        noisy, target = add_noise(batch, self.alphas_cumprod, prediction_type=self.schedule.prediction_type)
        with torch.no_grad():
            null = self.setup.embed([""] * len(batch))
            teacher_pred = self.setup.teacher(noisy, batch.timestep, null).sample
            assert not student(noisy, batch.timestep, text).sample.requires_grad
        student_pred = student(noisy, batch.timestep, text).sample
        terms = {
            "denoising": mean_squared_error(student_pred, target),
            "unconditional": mean_squared_error(student_pred, teacher_pred),
        }
        return terms | {"total": terms["denoising"] + 0.1 * terms["unconditional"]}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"calls": self.calls}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        super().load_state_dict(tensors)
        self.calls = tensors["calls"].clone()


def test_an_objective_registered_from_outside_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "grid", OnAGrid)
    two_steps = config(tasks=TASKS[:1], steps=2)
    trainer = Trainer(replace(two_steps, objective="grid"), tmp_path / "run")
    before = {n: p.clone() for n, p in trainer.student.network.named_parameters()}
    event = next(iter(trainer.run()))
    assert isinstance(event, StepDone)
    assert set(event.losses) == {"denoising", "unconditional", "total"}
    assert any(not torch.equal(p, before[n]) for n, p in trainer.student.network.named_parameters())
    assert isinstance(trainer.objective, OnAGrid)
    first = trainer.objective.drawn[: two_steps.batch_size]  # the second step's are drawn ahead
    drawn = [first.count(t) for t in GRID]
    assert [value is None for value in event.by_timestep] == [count == 0 for count in drawn]
    mean = sum((value or 0.0) * count for value, count in zip(event.by_timestep, drawn, strict=True)) / sum(drawn)
    assert mean == pytest.approx(event.losses["denoising"], rel=1e-5)
    trainer.save()

    resumed = Trainer(replace(two_steps, objective="grid"), tmp_path / "run", resume=True)
    for _ in resumed.run():
        pass
    assert isinstance(resumed.objective, OnAGrid)
    assert resumed.objective.calls == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["total"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "checkpoint" / "unet").is_dir()


def test_an_unknown_objective_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--objective 'magic' is unknown.* from distillation, phased"):
        Trainer(config(objective="magic"), tmp_path / "run")


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_targets_are_those_of_diffusers(prediction_type: str, zero_snr: bool) -> None:
    """As in diffusers' training scripts, up to the last timestep, which zero terminal SNR leaves without signal."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    settings |= {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    theirs = DDPMScheduler(**settings)
    ours = NoiseSchedule.from_config({"_class_name": "DDPMScheduler", **settings})
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr
    torch.manual_seed(0)
    sample, noise, timestep = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.tensor([0, 1, 500, 998, 999])
    batch = Batch(sample, noise, timestep, torch.zeros(5, dtype=torch.bool), [""] * 5)
    alphas_cumprod = torch.tensor(ours.alphas_cumprod, dtype=torch.float32)
    noisy, target = add_noise(batch, alphas_cumprod, prediction_type=ours.prediction_type)
    velocity = theirs.get_velocity(sample, noise, timestep)
    wanted = {"epsilon": noise, "sample": sample, "v_prediction": velocity}[prediction_type]
    torch.testing.assert_close(noisy, theirs.add_noise(sample, noise, timestep), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target, wanted, rtol=1e-5, atol=1e-5)

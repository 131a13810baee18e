"""Distillation: every preset can be trained, and what has weight 0 is not computed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from kdc_edge.errors import InputError
from kdc_edge.presets import PRESETS, Preset, find_preset
from kdc_edge.train import networks
from kdc_edge.train.config import LossWeights
from kdc_edge.train.data.batch import Batch
from kdc_edge.train.loop import Trainer
from kdc_edge.train.objectives.distillation import Distillation, FeatureTap, pair_blocks
from kdc_edge.train.stepping import StepDone
from tests.train.test_loop import TASKS, config

STAGES: tuple[int, ...] = tuple(find_preset("garden-teacher").unet["block_out_channels"])  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_every_preset_takes_two_steps(preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the garden's teacher, which has SD 1.x's arrangement in small, with its channels."""

    def narrow(name: str, _option: str = "--student") -> Preset:
        wide = find_preset(name)
        channels = STAGES[: len(wide.unet["block_out_channels"])]  # type: ignore[arg-type]
        return replace(wide, unet={**wide.unet, "block_out_channels": channels})

    monkeypatch.setattr(networks, "find_preset", narrow)

    trainer = Trainer(config(student=preset.name, tasks=TASKS[:1], batch_size=2, samples=2), tmp_path / "run")
    events = list(itertools.islice(trainer.run(), 2))
    assert all(isinstance(event, StepDone) and event.losses["feature"] >= 0 for event in events)


def on_meta(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**find_preset(name).unet)


def test_blocks_are_paired_as_in_bk_sdm() -> None:
    teacher = on_meta("sd1-teacher")
    shallow = {f"down_blocks.{i}": f"down_blocks.{i}" for i in range(3)}
    shallow |= {f"up_blocks.{i}": f"up_blocks.{i + 1}" for i in range(3)}
    assert pair_blocks(teacher, on_meta("bk-tiny")) == shallow
    assert pair_blocks(teacher, on_meta("kdc-420m")) == shallow  # its mid block works at twice the resolution
    same = {f"{side}_blocks.{i}": f"{side}_blocks.{i}" for side in ("down", "up") for i in range(4)}
    assert pair_blocks(teacher, on_meta("kdc-482m")) == same
    assert pair_blocks(teacher, on_meta("sd1-teacher")) == same | {"mid_block": "mid_block"}


def test_features_before_a_downsampler_are_those_of_the_last_attention() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**find_preset("garden-teacher").unet)
    tap = FeatureTap(unet, ["down_blocks.2", "down_blocks.1"], before_downsampler=["down_blocks.2"])
    seen: list[torch.Tensor] = []
    attention = unet.get_submodule("down_blocks.2.attentions.1")
    attention.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    with torch.no_grad():
        unet(torch.randn(1, 4, 16, 16), 5, torch.randn(1, 77, 128))
    assert torch.equal(tap.features["down_blocks.2"], seen[0])
    assert tap.features["down_blocks.2"].shape == (1, 80, 4, 4)
    assert tap.features["down_blocks.1"].shape == (1, 64, 4, 4)  # after its own


def test_terms_of_weight_0_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = LossWeights(output=0, soft=0, feature=0)
    trainer = Trainer(config(tasks=TASKS[:1], loss=alone), tmp_path / "run")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(trainer.teacher.unet, "forward", refuse)
    event = next(iter(trainer.run()))
    assert isinstance(event, StepDone)
    assert set(event.losses) == {"task", "total"}
    assert event.losses["task"] == event.losses["total"]
    assert isinstance(trainer.objective, Distillation)
    assert trainer.objective.student_tap.features == {}

    trainer = Trainer(config(tasks=TASKS[:1], loss=LossWeights(task=0, soft=0, feature=0)), tmp_path / "other")
    batch: Batch = trainer.draw_batch(trainer.teacher.latents(TASKS[0]))
    terms = trainer.objective(trainer.student.prepared, batch, trainer.teacher.embed(batch.captions))
    assert set(terms) == {"output", "total"}
    event = next(iter(trainer.run()))
    assert isinstance(event, StepDone)
    assert event.by_timestep  # of the total, where there is no denoising term


def test_no_loss_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="every loss has weight 0"):
        LossWeights(task=0, output=0, soft=0, feature=0)

"""The phased objective: jumps against diffusers' DDIM, the grid, the loss on a network that is perfect already."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from kdc_edge.cli.project import find_checkpoint
from kdc_edge.cli.train import _said_of_weights
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.image import psnr_db
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.request import Request, made_for
from kdc_edge.runtimes import open_pipeline
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import FewSteps, TrainConfig
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.loop import Trainer
from kdc_edge.train.objectives.phased import Grid, Jump, Phased, phase_ends, pseudo_huber
from kdc_edge.train.runs.continuing import begin_stage
from kdc_edge.train.runs.states import load_state
from kdc_edge.train.stepping import StepDone
from tests.train.test_loop import TASKS, config, weights

CPU = torch.device("cpu")


def ddim(prediction_type: str, phases: int) -> DDIMScheduler:
    found = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False,
    )  # fmt: skip
    found.set_timesteps(phases)
    return found


@pytest.mark.parametrize("phases", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_jumps_between_phase_ends_are_diffusers_trailing_ddim(phases: int, prediction_type: str) -> None:
    theirs = ddim(prediction_type, phases)
    ends = phase_ends(phases)
    assert theirs.timesteps.tolist() == ends[:0:-1]
    jump = Jump(NoiseSchedule(prediction_type=prediction_type), CPU)
    generator = torch.Generator().manual_seed(0)
    for high, low in zip(ends[:0:-1], ends[-2::-1], strict=True):
        x, prediction = torch.randn((2, 2, 4, 8, 8), generator=generator)
        expected = theirs.step(prediction, high, x).prev_sample
        torch.testing.assert_close(jump(x, prediction, torch.tensor([high] * 2), torch.tensor([low] * 2)), expected)


def test_every_grid_point_is_drawn_as_often_and_leads_down_to_its_phases_end() -> None:
    grid = Grid(phases=4, points=5)
    assert grid.timesteps().tolist() == [-1, *range(49, 1000, 50)]
    t, u, z = grid.place(torch.arange(1000), grid.timesteps())
    assert torch.unique(t, return_counts=True)[1].tolist() == [50] * 20
    assert (u < t).all()
    assert (z <= u).all()
    assert {(int(a), int(b)) for a, b in zip(t, z, strict=True) if a in (49, 249, 299, 999)} == {
        (49, -1), (249, -1), (299, 249), (999, 749)
    }  # fmt: skip


@pytest.mark.parametrize("phases", [0, 3, 7])
def test_phases_that_ddim_would_step_past_are_refused(phases: int) -> None:
    with pytest.raises(InputError, match=r"--phases .* use 1, 2, 4, 5, 8, 10"):
        phase_ends(phases)


def test_more_grid_points_than_timesteps_are_refused() -> None:
    with pytest.raises(InputError, match="use fewer"):
        Grid(phases=4, points=251)


def test_the_loss_is_quadratic_near_zero_and_linear_far_away() -> None:
    near, far, zero = torch.full((1, 2), 1e-4), torch.full((1, 2), 10.0), torch.zeros((1, 2))
    assert pseudo_huber(near, zero, 0.03).item() == pytest.approx(1e-8 / 0.06, rel=1e-2)
    assert pseudo_huber(far, zero, 0.03).item() == pytest.approx(10 - 0.03, rel=1e-3)
    assert pseudo_huber(far, far, 0.03).item() == 0


def few_steps(**changes: object) -> TrainConfig:
    return config(objective="phased", few_steps=FewSteps(phases=2, grid_points=2, huber=0.03), **changes)


@pytest.fixture(scope="module")
def stage(two_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few-step stage after a run of two tasks; beside it, `killed`: its folder as a kill would have left it."""
    run = tmp_path_factory.mktemp("runs") / "stage"
    trainer = Trainer(begin_stage(two_tasks, run, few_steps(steps=2)), run, resume=True)
    for event in trainer.run():
        if isinstance(event, StepDone) and event.total == 3:
            trainer.save()
            shutil.copytree(run, run.with_name("killed"))
    return run


def test_a_stage_begins_with_the_runs_average_and_memory(two_tasks: Path, tmp_path: Path) -> None:
    settings = begin_stage(two_tasks, tmp_path / "stage", few_steps())
    assert [t.name for t in settings.tasks] == ["flowers", "butterflies"]
    trainer = Trainer(settings, tmp_path / "stage", resume=True)
    expected = weights(two_tasks)
    assert all(torch.equal(t, expected[n]) for n, t in trainer.student.network.state_dict().items())
    assert set(trainer.replay.tasks) == {"flowers", "butterflies"}
    assert _said_of_weights(trainer) == "garden-student: 396 weights from the saved state, teacher garden-teacher"
    shared = {path.relative_to(tmp_path / "stage") for path in (tmp_path / "stage" / "cache").rglob("*.safetensors")}
    assert shared
    assert all((two_tasks / path).samefile(tmp_path / "stage" / path) for path in shared)
    event = next(iter(trainer.run()))
    assert {p.relative_to(trainer.run_folder) for p in trainer.run_folder.glob("cache/*/*.safetensors")} == shared
    assert isinstance(event, StepDone)
    assert set(event.losses) == {"phased", "total"}
    assert len(event.by_timestep) == 2  # a value a phase


@pytest.mark.parametrize(
    ("budget", "kept"), [({"replay": 18, "strategy": "captions"}, 18), ({"replay_mb": 0.04}, 9), ({}, 6)]
)
def test_a_larger_replay_budget_of_a_stage_is_filled_from_all_its_tasks(
    two_tasks: Path, tmp_path: Path, budget: dict[str, object], kept: int
) -> None:
    """Before its first step; the run kept 6 of 24, with which the stage goes on where it has the same budget."""
    settings = begin_stage(two_tasks, tmp_path / "stage", few_steps(steps=1, **budget))
    trainer = Trainer(settings, tmp_path / "stage", resume=True)
    next(iter(trainer.run()))
    assert len(trainer.replay) == kept
    assert set(trainer.replay.tasks) == {"flowers", "butterflies"}
    before = set(load_state(two_tasks)[2].keys.tolist())
    assert (set(trainer.replay.keys.tolist()) == before) == (not budget)


def test_a_stage_has_checkpoints_of_its_own_and_the_teacher_that_is_given(two_tasks: Path, tmp_path: Path) -> None:
    """The run's are not sampled in few steps; a teacher's folder may have moved."""
    moved = shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher")
    assert begin_stage(two_tasks, tmp_path / "stage", few_steps(teacher=moved)).teacher == moved
    with pytest.raises(InputError, match="has no checkpoint of --task flowers: it has none yet"):
        find_checkpoint(tmp_path / "stage", "flowers")
    with pytest.raises(InputError, match="is not the run's garden-student"):
        begin_stage(two_tasks, tmp_path / "other", few_steps(student="garden-teacher"))


def test_a_stage_of_a_run_whose_data_is_gone_is_refused_at_once(two_tasks: Path, tmp_path: Path) -> None:
    shutil.copytree(two_tasks, tmp_path / "run")
    tasks = (TASKS[0], Task(TASKS[1].name, f"imagefolder:{tmp_path / 'gone'}"))
    (tmp_path / "run" / "config.json").write_text(json.dumps(config(tasks=tasks).as_json()))
    with pytest.raises(InputError, match="gone is no folder"):
        begin_stage(tmp_path / "run", tmp_path / "stage", few_steps())
    assert not (tmp_path / "stage").exists()


def test_the_checkpoint_says_how_it_is_sampled_and_diffusers_makes_its_images(stage: Path) -> None:
    model = read_model(stage / "checkpoint")
    request = made_for(model, Request("a red flower", seed=3))
    assert (request.sampler, request.steps, request.guidance) == ("ddim", 2, 1.0)
    assert "2 steps of DDIM, guidance 1" in json.loads((stage / "results.json").read_text("utf-8"))["conditions"]
    ours = open_pipeline(stage / "checkpoint")
    pipe = StableDiffusionPipeline.from_pretrained(stage / "checkpoint").to(torch.float32)
    assert type(pipe.scheduler) is DDIMScheduler
    pipe.set_progress_bar_config(disable=True)
    for steps in (2, 4):
        theirs = pipe(
            "a red flower", num_inference_steps=steps, guidance_scale=1.0, generator=torch.Generator().manual_seed(3),
            output_type="np",
        ).images[0]  # fmt: skip
        image = ours.generate(replace(request, steps=steps))
        assert psnr_db(image, (theirs * 255).round().astype(np.uint8)) > 50


def test_an_interrupted_stage_ends_with_the_same_weights(stage: Path) -> None:
    cut = stage.with_name("killed")
    for _ in Trainer(TrainConfig.load(cut), cut, resume=True).run():
        pass
    expected = weights(stage)
    assert all(torch.equal(t, expected[n]) for n, t in weights(cut).items())


def test_gradients_reach_the_student_alone_and_a_previous_student_teaches_what_is_replayed(
    two_tasks: Path, tmp_path: Path
) -> None:
    settings = begin_stage(two_tasks, tmp_path / "stage", few_steps())
    trainer = Trainer(settings, tmp_path / "stage", resume=True)
    objective, network = trainer.objective, trainer.student.network
    assert isinstance(objective, Phased)
    batch = trainer.draw_batch(trainer.teacher.latents(TASKS[0]))
    assert batch.replayed.any()
    text = trainer.teacher.embed(batch.captions)
    loss = objective(network, batch, text)["total"]
    loss.mean().backward()
    assert all(p.grad is None for p in trainer.teacher.unet.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    objective.replay_from(network.state_dict())
    taught = objective(network, batch, text)["total"]
    # A student that is its own previous one makes the very jumps that it is asked for.
    assert torch.allclose(taught[batch.replayed], torch.zeros(()), atol=1e-6)
    assert torch.equal(taught[~batch.replayed], loss[~batch.replayed])


def test_fewer_phases_continue_from_more(stage: Path, tmp_path: Path) -> None:
    fewer = replace(few_steps(steps=1), few_steps=FewSteps(phases=1, grid_points=2))
    settings = begin_stage(stage, tmp_path / "one", fewer)
    for _ in Trainer(settings, tmp_path / "one", resume=True).run():
        pass
    assert made_for(read_model(tmp_path / "one" / "checkpoint"), Request("")).steps == 1


def test_a_run_may_start_from_a_checkpoint_of_its_own_shape(two_tasks: Path, tmp_path: Path) -> None:
    trainer = Trainer(few_steps(start=two_tasks / "checkpoint"), tmp_path / "started")
    expected = weights(two_tasks)
    assert all(torch.equal(t, expected[n]) for n, t in trainer.student.network.state_dict().items())
    assert f"396 of 396 weights from {two_tasks / 'checkpoint'}, teacher" in _said_of_weights(trainer)
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):  # a run is no checkpoint
        Trainer(few_steps(start=two_tasks), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="has a U-Net of another shape than --student"):
        Trainer(few_steps(start=GARDEN_TEACHER), tmp_path / "other")

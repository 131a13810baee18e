"""More tasks after the last one, with the memory of the earlier ones; distillation from an earlier student."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.train.continuing import continue_run
from kdc_edge.train.loop import StepDone, Trainer
from kdc_edge.train.objective import Batch, Stopwatch
from tests.train.test_loop import TASKS, config, weights


def finish(trainer: Trainer) -> list[StepDone]:
    return [event for event in trainer.run() if isinstance(event, StepDone)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one task."""
    run = tmp_path_factory.mktemp("runs") / "first"
    finish(Trainer(config(tasks=TASKS[:1]), run))
    return run


def test_a_continued_run_is_the_run_that_had_all_tasks_from_the_start(first: Path, tmp_path: Path) -> None:
    joined = continue_run(first, tmp_path / "then", config(tasks=TASKS[1:]))
    assert [t.name for t in joined.tasks] == ["flowers", "butterflies"]
    trainer = Trainer(joined, tmp_path / "then", resume=True)
    assert set(trainer.replay.tasks) == {"flowers"}
    finish(trainer)
    finish(Trainer(config(), tmp_path / "whole"))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "then")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    results = json.loads((tmp_path / "then" / "results.json").read_text())
    assert [len(row) for row in results["prompt_accuracy"]] == [1, 2]
    assert results["forgetting_max_minus_last"] is not None
    assert (
        "## Trained on\n\n1. flowers: `garden:flowers`\n2. butterflies:"
        in (tmp_path / "then" / "checkpoint" / "README.md").read_text()
    )


def test_what_cannot_be_continued_is_named(first: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run with saved states"):
        continue_run(tmp_path, tmp_path / "then", config())
    with pytest.raises(InputError, match="is not the run's garden-student"):
        continue_run(first, tmp_path / "then", config(student="garden-teacher"))
    with pytest.raises(InputError, match="same name"):
        continue_run(first, tmp_path / "then", config(tasks=TASKS[:1]))
    half = Trainer(config(tasks=TASKS[:1]), tmp_path / "half")
    next(iter(half.run()))
    half.save()
    with pytest.raises(CheckpointError, match="is not finished"):
        continue_run(tmp_path / "half", tmp_path / "then", config(tasks=TASKS[1:]))
    assert not (tmp_path / "then").exists()


def test_replayed_samples_are_distilled_from_the_student_of_before_the_task(first: Path, tmp_path: Path) -> None:
    """With itself as the earlier student, the student's output loss is nothing on replayed samples alone."""
    trainer = Trainer(config(tasks=TASKS[:1]), tmp_path / "run")
    trainer.student.eval()
    batch = trainer._draw(trainer.latents(TASKS[0]))
    mixed = Batch(batch.sample, batch.noise, batch.timestep, torch.tensor([True, False, True, False]), batch.captions)
    watch = Stopwatch(torch.device("cpu"))

    def output_losses() -> torch.Tensor:
        with torch.no_grad():
            terms = trainer.objective(trainer.net, mixed, trainer.embed(mixed.captions), watch=watch)
        return terms["output"] + terms["feature"]

    from_teacher = output_losses()
    trainer.objective.replay_from(trainer.twin(trainer.student.state_dict()).eval())
    found = output_losses()
    assert found[mixed.replayed].max() < 1e-8
    torch.testing.assert_close(found[~mixed.replayed], from_teacher[~mixed.replayed], rtol=1e-3, atol=1e-6)
    assert set(watch.seconds) == {"teacher", "student"}

    joined = continue_run(first, tmp_path / "then", config(tasks=TASKS[1:], replay_teacher="student"))
    student_taught = Trainer(joined, tmp_path / "then", resume=True)
    finish(student_taught)
    assert student_taught.objective.earlier is not None


def test_a_replay_weight_of_zero_leaves_replayed_samples_without_gradient(tmp_path: Path) -> None:
    trainer = Trainer(config(tasks=TASKS[:1], replay_weight=0.0, learning_rate=0.1), tmp_path / "run")
    batch = trainer._draw(trainer.latents(TASKS[0]))
    replayed = Batch(batch.sample, batch.noise, batch.timestep, torch.ones(4, dtype=torch.bool), batch.captions)
    trainer._descend(replayed, TASKS[0])
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in trainer.student.parameters())


def test_a_budget_in_megabytes_is_the_buffers(tmp_path: Path) -> None:
    trainer = Trainer(config(tasks=TASKS[:1], replay_mb=0.02), tmp_path / "run")
    finish(trainer)
    assert 15_000 < trainer.replay.size_bytes <= 20_000
    quarters = [json.loads(line)["quarters"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.shape(quarters) == (3, 4)

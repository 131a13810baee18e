"""Finished runs that tests of several files read, continue and compare with; not to be written to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kdc_edge.train.loop import Trainer

KILLED_AFTER = (2, 3, 4)  # steps: in the first task, at its end, in the second


@pytest.fixture(scope="session")
def two_tasks_trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Of `two_tasks`, when it was done.

    Beside the run lie its folders as a kill would have left them, `killed-N` after N steps.
    """
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.stepping import StepDone
    from tests.train.test_loop import config

    run = tmp_path_factory.mktemp("runs") / "two-tasks"
    trainer = Trainer(config(save_every=1), run)
    for event in trainer.run():
        if isinstance(event, StepDone) and event.total in KILLED_AFTER:
            shutil.copytree(run, run.with_name(f"killed-{event.total}"))
    return trainer


@pytest.fixture(scope="session")
def two_tasks(two_tasks_trainer: Trainer) -> Path:
    """A finished run of two tasks, which saved its state at every step."""
    return two_tasks_trainer.run_folder


@pytest.fixture(scope="session")
def one_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the first of them."""
    from kdc_edge.train.loop import Trainer
    from tests.train.test_loop import TASKS, config

    run = tmp_path_factory.mktemp("runs") / "one-task"
    for _ in Trainer(config(tasks=TASKS[:1]), run).run():
        pass
    return run

"""The contract of a strategy against forgetting: what a run remembers of earlier tasks, and how it trains with that.

    class Nothing(Strategy):                # a task is trained as if it were the only one
        def remember(self, task, latents, generator): ...

    STRATEGIES["nothing"] = Nothing         # train/strategies/registry.py has the table

A strategy may keep samples in its buffer, which every batch has a share of; teach samples by the EMA student from the
previous task; and hold the weights back. What it keeps beside the buffer is in `state_dict`, so that resume is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdc_edge.train.strategies.buffer import ReplayBuffer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data.batch import Batch
    from kdc_edge.train.data.latents import Latents
    from kdc_edge.train.data.tasks import Task
    from kdc_edge.train.networks import Learning


class Strategy:
    """What is here are the defaults: an empty buffer, and nothing else. All methods are collective."""

    keeps_samples = False  # in the buffer, within the budget of the settings

    def __init__(self, config: TrainConfig, accelerator: Accelerator, learning: Learning) -> None:
        self.config, self.accelerator = config, accelerator
        self.teacher, self.student, self.objective = learning.teacher, learning.student, learning.objective
        budget = None if config.replay_mb is None else int(config.replay_mb * 1e6)
        capacity = config.replay if budget is None else None
        self.buffer = ReplayBuffer(
            capacity if self.keeps_samples else 0, capacity_bytes=budget, policy=config.replay_policy
        )
        self._fills_buffer = False

    def begin_task(self, number: int, generator: torch.Generator) -> None:
        """Before the first step of task `number`, counted from 0."""
        if number == 0 and self._fills_buffer:
            for task in self.config.tasks:
                self.remember(task, self.teacher.latents(task), generator)
        if number and self.config.replay_teacher == "student":
            self._teach_by_student()

    def mark_replayed(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with `replayed` at every sample that counts as one of earlier tasks."""
        del generator
        return batch

    def new_samples(self, batch: Batch) -> int:
        """How many samples of a batch were drawn from the task itself."""
        return int((~batch.replayed).sum())

    def add_penalty(self) -> dict[str, float]:
        """Change the gradients before the optimizer's step; loss terms for the log."""
        return {}

    def remember(self, task: Task, latents: Latents, generator: torch.Generator) -> None:
        """After the last step of a task."""

    @property
    def size_bytes(self) -> int:
        """What is kept for the sake of earlier tasks, beside the student itself."""
        return self.buffer.size_bytes

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the buffer."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], buffer: ReplayBuffer, *, tasks: int) -> None:
        """Restore what a run kept that has finished so many `tasks`, within this run's own budget.

        A few-step stage has finished none of its tasks, but has the data of all: a larger budget than the earlier run's
        is filled from them. Raises InputError where another strategy kept it and this one needs more.
        """
        del tensors
        own = self.buffer
        self._fills_buffer = tasks == 0 and own.may_hold_more_than(buffer)
        if self._fills_buffer:
            return
        buffer.limit(own.capacity, capacity_bytes=own.capacity_bytes, policy=own.policy)
        self.buffer = buffer

    def _teach_by_student(self) -> None:
        """Let what is replayed be distilled from the EMA student from the previous task."""
        with self.student.averaged():
            self.objective.replay_from(self.student.full_weights())

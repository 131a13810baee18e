"""One optimizer step on a global batch: each process computes its share of it, in micro-batches.

stepper = Stepper(config, accelerator, teacher, student, objective, watch)
losses, by_timestep = stepper(stepper.load(batch), rate=1e-4, name="step 1 of flowers")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from kdc_edge.errors import KdcError
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch
from kdc_edge.train.data.transfer import to_device
from kdc_edge.train.distributed import Student
from kdc_edge.train.graphs import Graphs
from kdc_edge.train.networks import Teacher
from kdc_edge.train.objective import Objective, Stopwatch


@dataclass(frozen=True)
class StepDone:
    task: str
    step: int  # 1-based, of the task
    steps: int
    total: int  # steps of all tasks so far
    losses: dict[str, float]  # every term unweighted, and their weighted total
    by_timestep: list[float | None]  # the objective's binned term, the least noisy bin first; None where none was drawn
    learning_rate: float
    samples_per_sec: float
    replayed: float  # share of the batch
    replay_mb: float  # size of the buffer


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch on the device."""

    batch: Batch
    text: Tensor  # (B, 77, D), of its captions
    weight: Tensor  # (B,), of each sample's loss


class Stepper:
    """The parts of a run that a step needs. Calling it is collective."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, teacher: Teacher, student: Student, objective: Objective,
        watch: Stopwatch,
    ) -> None:  # fmt: skip
        self.config, self.accelerator = config, accelerator
        self.teacher, self.student, self.objective, self.watch = teacher, student, objective, watch
        self._graphs = Graphs(self._compute_tensors, student.network.parameters()) if config.cuda_graphs else None

    def load(self, batch: Batch) -> list[MicroBatch]:
        """This process's micro-batches of a global batch, on the device."""
        device, loaded = self.accelerator.device, []
        for number in self._numbers():
            mine = batch.micro_batch(number, self._micro_batches)
            weight = torch.where(mine.replayed, self.config.replay_weight, 1.0)
            loaded.append(MicroBatch(mine.to(device), self.teacher.embed(mine.captions), to_device(weight, device)))
        return loaded

    def __call__(
        self, micro_batches: Sequence[MicroBatch], *, rate: float, name: str,
        add_penalty: Callable[[], dict[str, float]] = dict, meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, float], list[float | None]]:  # fmt: skip
        """Every loss term of the whole batch, and the objective's binned term by timestep bin.

        `add_penalty` changes the gradients before the optimizer's step and gives terms of its own. `meanwhile` runs
        when all of the step's work is under way on the device.
        Raises KdcError, which names the step, where the loss is no number.
        """
        accelerator, config, objective = self.accelerator, self.config, self.objective
        sums: dict[str, Tensor] = {}
        by_bin = torch.zeros(2, objective.bins, device=accelerator.device)  # summed binned term, and count
        self.student.begin_step(rate)
        for i, micro_batch in enumerate(micro_batches):
            mine, last = micro_batch.batch, i == len(micro_batches) - 1
            with nullcontext() if last else accelerator.no_sync(self.student.prepared):
                terms = self._compute(micro_batch)
            sums = {n: sums.get(n, 0) + t.mean() / config.accumulate for n, t in terms.items()}
            bins, binned = objective.bin_of(mine.timestep), terms[objective.binned_term]
            by_bin[0].index_add_(0, bins, binned)
            by_bin[1].index_add_(0, bins, torch.ones_like(binned))
        with self.watch("optimizer"):
            penalty = add_penalty()
            self.student.end_step()
            means = accelerator.reduce(torch.stack(list(sums.values())), "mean")
            total = accelerator.reduce(by_bin, "sum")
        with self.watch("data"):
            meanwhile()
        with self.watch("optimizer"):
            # The one wait for the device in a step, when all of the step's work is under way.
            found = torch.cat([means, total.flatten()]).tolist()
        losses = dict(zip(sums, found, strict=False))
        if not math.isfinite(losses["total"]):
            raise KdcError(
                f"the loss is no number at {name}: begin a new run with a lower --learning-rate, which a resumed one"
                " cannot have"
            )
        by_timestep = zip(found[-2 * objective.bins : -objective.bins], found[-objective.bins :], strict=True)
        return losses | penalty, [t / n if n else None for t, n in by_timestep]

    def _compute(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        """Forward and backward; the loss terms (B,)."""
        if self._graphs is None:
            return self._add_gradients(micro_batch)
        batch = micro_batch.batch
        with self.watch("teacher and student"):
            return self._graphs(
                batch.sample, batch.noise, batch.timestep, batch.replayed, micro_batch.text, micro_batch.weight
            )

    def _compute_tensors(
        self, sample: Tensor, noise: Tensor, timestep: Tensor, replayed: Tensor, text: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        captions = [""] * len(sample)  # `text` has them
        return self._add_gradients(MicroBatch(Batch(sample, noise, timestep, replayed, captions), text, weight))

    def _add_gradients(self, micro_batch: MicroBatch) -> dict[str, Tensor]:
        terms = self.objective(self.student.prepared, micro_batch.batch, micro_batch.text)
        with self.watch("student"):
            self.accelerator.backward((terms["total"] * micro_batch.weight).mean() / self.config.accumulate)
        return {name: term.detach() for name, term in terms.items()}

    def own_samples(self) -> list[int]:
        """The numbers of the samples of a batch that this process computes."""
        of = self._micro_batches
        return [i for number in self._numbers() for i in range(number, self.config.batch_size, of)]

    @property
    def _micro_batches(self) -> int:
        processes: int = self.accelerator.num_processes
        return processes * self.config.accumulate

    def _numbers(self) -> range:
        """The numbers of this process's micro-batches."""
        first = self.accelerator.process_index * self.config.accumulate
        return range(first, first + self.config.accumulate)

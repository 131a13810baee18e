"""Earlier tasks are kept by the weights that learnt them, without any of their samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdc_edge.errors import InputError
from kdc_edge.train.distributed import full_tensor, shard_like, under
from kdc_edge.train.strategies.buffer import ReplayBuffer
from kdc_edge.train.strategies.strategy import Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data.batch import Batch
    from kdc_edge.train.data.latents import Latents
    from kdc_edge.train.data.tasks import Task
    from kdc_edge.train.networks import Learning

FISHER_SAMPLES = 64  # of a task, one gradient each


class ElasticWeights(Strategy):
    """Elastic weight consolidation: w/2 sum_i F_i (theta_i - theta*_i)^2 (Kirkpatrick et al., arXiv 1612.00796).

    theta* are the weights at the end of the previous task; F is the diagonal of the empirical Fisher information, the
    mean square of single samples' gradients of the objective, summed over tasks (arXiv 1805.06370, section 3, without
    decay). The penalty's gradient is added before the gradients are clipped.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator, learning: Learning) -> None:
        super().__init__(config, accelerator, learning)
        self.fisher: dict[str, Tensor] = {}  # of the student's weights, sharded as they are
        self.anchor: dict[str, Tensor] = {}

    def add_penalty(self) -> dict[str, float]:
        if not self.fisher:
            return {}
        weight, scale = self.config.ewc_weight, self._loss_scale()
        total = torch.zeros((), device=self.accelerator.device)
        for name, p in self.student.network.named_parameters():
            moved = p.detach() - self.anchor[name]
            pull = self.fisher[name] * moved
            total += full_tensor((pull * moved).sum()).to(total)
            if p.grad is not None:
                p.grad.add_(pull, alpha=weight * scale)
        return {"ewc": 0.5 * weight * float(total)}

    def remember(self, task: Task, latents: Latents, generator: torch.Generator) -> None:
        from kdc_edge.train.data.batch import draw_batch

        del task
        single, found = replace(self.config, batch_size=1, epochs=False), dict[str, Tensor]()
        for _ in range(FISHER_SAMPLES):
            batch = draw_batch(
                single, latents, ReplayBuffer(0), timesteps=self.objective.draw_timesteps, generator=generator
            ).to(self.accelerator.device)
            self.student.zero_grad()
            losses = self.objective(self.student.prepared, batch, self.teacher.embed(batch.captions))["total"]
            self.accelerator.backward(losses.mean())
            scale = self._loss_scale()
            for name, p in self.student.network.named_parameters():
                squared = (torch.zeros_like(p) if p.grad is None else p.grad / scale).detach().square()
                found[name] = found[name] + squared / FISHER_SAMPLES if name in found else squared / FISHER_SAMPLES
        self.student.zero_grad()
        self.fisher = {n: f + self.fisher[n] if n in self.fisher else f for n, f in found.items()}
        self.anchor = {n: p.detach().clone() for n, p in self.student.network.named_parameters()}

    def _loss_scale(self) -> float:
        """By which fp16 gradients are multiplied."""
        return 1.0 if self.accelerator.scaler is None else float(self.accelerator.scaler.get_scale())

    @property
    def size_bytes(self) -> int:
        return sum(4 * t.numel() for kept in (self.fisher, self.anchor) for t in kept.values())

    def state_dict(self) -> dict[str, Tensor]:
        kept = {"fisher": self.fisher, "anchor": self.anchor}
        return {f"{kind}/{n}": full_tensor(t) for kind, tensors in kept.items() for n, t in tensors.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], buffer: ReplayBuffer, *, tasks: int) -> None:
        super().load_state_dict(tensors, buffer, tasks=tasks)
        own = dict(self.student.network.named_parameters())
        self.fisher, self.anchor = (
            {n: shard_like(own[n], t.to(own[n].device)) for n, t in under(f"{kind}/", tensors).items()}
            for kind in ("fisher", "anchor")
        )
        if tasks and not self.fisher:
            raise InputError(
                "the run kept no Fisher information of its tasks: ewc has to be a run's --strategy from the start"
            )


class WithoutForgetting(Strategy):
    """Learning without forgetting (Li and Hoiem, arXiv 1606.09282): the earlier student teaches a share of new samples.

    Of these samples, `replay_ratio` of a batch, the targets are the EMA student's from the previous task instead of the
    teacher's.
    """

    def begin_task(self, number: int, generator: torch.Generator) -> None:
        del generator
        if number:
            self._teach_by_student()

    def mark_replayed(self, batch: Batch, generator: torch.Generator) -> Batch:
        from kdc_edge.train.data.batch import replayed_count

        if self.objective.previous_student is None:
            return batch
        old = replayed_count(len(batch), self.config.replay_ratio, generator)
        return replace(batch, replayed=torch.arange(len(batch)) >= len(batch) - old)

    def new_samples(self, batch: Batch) -> int:
        return len(batch)

    @property
    def size_bytes(self) -> int:
        previous = self.objective.previous_student
        return 0 if previous is None else sum(p.numel() * p.element_size() for p in previous.parameters())

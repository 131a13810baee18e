"""The contract of a training objective: the losses that a step computes, sample by sample.

    class Denoising(Objective):
        def __call__(self, student, batch, text):
            noisy, target = add_noise(batch, self.alphas_cumprod, prediction_type="epsilon")
            loss = mean_squared_error(student(noisy, batch.timestep, text).sample, target)
            return {"task": loss, "total": loss}                    # each (B,)

    OBJECTIVES["denoising"] = Denoising                             # train/objectives/__init__.py has the table
    Trainer(replace(config, objective="denoising"), run)

An objective owns whatever else it needs: how timesteps are drawn, how its loss is told apart by timestep, and the
networks it keeps between steps, which it saves and restores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from kdc_edge.manifest import Model
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch

PREVIOUS_STUDENT = "previous_student/"  # prefix of its weights in an objective's state


class Stopwatch:
    """Seconds by section. On a GPU the sections are true only when `exact`, which waits for the device."""

    def __init__(self, *, exact: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.exact = exact

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds[section] = self.seconds.get(section, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.exact and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return perf_counter()


@dataclass(frozen=True)
class Setup:
    """The parts of a run that an objective is made from."""

    config: TrainConfig
    teacher: UNet2DConditionModel  # frozen, on the device
    student: UNet2DConditionModel  # as built, before the launch wraps it: for its blocks' names and hooks
    schedule: NoiseSchedule
    embed: Callable[[Sequence[str]], Tensor]  # captions -> text embeddings (N, 77, D); "" is the unconditional one
    frozen_student: Callable[[Mapping[str, Tensor]], UNet2DConditionModel]  # a frozen copy with these weights
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    watch: Stopwatch = field(default_factory=Stopwatch)  # sections "teacher" and "student"


class Objective(ABC):
    """A callable (student, batch, text) -> loss terms. What is here are the defaults that an objective may override."""

    binned_term = "task"  # the term that is logged by timestep bin
    bins = 4  # forgetting differs between timesteps
    same_work = True  # at every step, whatever is drawn, and all of it on the device: for --cuda-graphs

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.schedule = setup.schedule
        self.alphas_cumprod = torch.tensor(setup.schedule.alphas_cumprod, dtype=torch.float32).to(setup.device)
        self.previous_student: UNet2DConditionModel | None = None

    @classmethod  # noqa: B027 - most have nothing to refuse
    def check(cls, config: TrainConfig, model: Model) -> None:
        """Raise InputError for settings that do not fit the teacher, before any work."""

    def ships(self, model: Model) -> Model:
        """The model that students of this objective are: the teacher's, unless scheduler or sampling change."""
        return model

    @abstractmethod
    def __call__(self, student: nn.Module, batch: Batch, text: Tensor) -> dict[str, Tensor]:
        """Loss terms of each sample, (B,), unweighted, and `total`, whose mean is minimised.

        `student` is the network to call: the launch's wrapper while training. `text` (B, 77, D) embeds the captions.
        """

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Training timesteps (count,): uniform."""
        return torch.randint(self.schedule.num_train_timesteps, (count,), generator=generator)

    def bin_of(self, timestep: Tensor) -> Tensor:
        """The bin, 0 to `bins` - 1, of each timestep (B,): equal parts, the least noisy first."""
        return timestep * self.bins // self.schedule.num_train_timesteps

    def replay_from(self, weights: Mapping[str, Tensor]) -> None:
        """Take replayed samples' targets from the EMA student from the previous task, which has these weights."""
        self.previous_student = self.setup.frozen_student(weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs of this objective."""
        if self.previous_student is None:
            return {}
        return {PREVIOUS_STUDENT + n: t for n, t in self.previous_student.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        weights = {n.removeprefix(PREVIOUS_STUDENT): t for n, t in tensors.items() if n.startswith(PREVIOUS_STUDENT)}
        if weights:
            self.replay_from(weights)

"""What a training run is asked to do, and what of it cannot be.

config = TrainConfig(teacher=folder, student="kdc-482m", tasks=(parse_task("flowers=garden:flowers"),))
learning_rate(config, step=0)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kdc_edge.errors import InputError
from kdc_edge.train.data import Task
from kdc_edge.train.losses import LossWeights


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. Fields are the command line's flags."""

    teacher: Path
    student: str  # a preset
    tasks: tuple[Task, ...]
    steps: int = 300  # of each task
    batch_size: int = 16
    samples: int = 2000  # pictures of each task
    learning_rate: float = 1e-3
    replay: int = 500  # samples that the buffer holds; 0 = no replay
    replay_ratio: float = 0.5  # of a batch, once there is something to replay
    seed: int = 0
    loss: LossWeights = field(default_factory=LossWeights)
    caption_dropout: float = 0.1  # of the captions are emptied, for classifier-free guidance
    ema_decay: float = 0.995
    mixed_precision: str = "auto"  # "no", "bf16"; auto takes bf16 on CUDA (on CPUs it is slower at garden size)
    device: str = "auto"
    save_every: int = 100  # steps
    eval_pictures: int = 32  # of each task, after each task

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "samples", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is too few: use 1 or more")
        if self.replay < 0:
            raise InputError(f"--replay {self.replay} is negative: use 0 for none")
        for name in ("replay_ratio", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is out of range: use 0 to below 1")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"--learning-rate {self.learning_rate} is out of range: 1e-5 to 1e-3 is usual")
        if self.eval_pictures < 2:
            raise InputError(f"--eval-pictures {self.eval_pictures} is too few: use 2 or more")
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise InputError(f"--mixed-precision {self.mixed_precision!r} is unknown: choose from auto, no, bf16")
        if not self.tasks:
            raise InputError("there is nothing to learn: give at least one --task NAME=SOURCE")
        if len({t.name for t in self.tasks}) < len(self.tasks):
            raise InputError("two tasks have the same name: every --task needs its own")

    def as_json(self) -> dict[str, object]:
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over a tenth of a task, then a cosine down to a twentieth of the peak."""
    warmup = max(1, config.steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def check_same(config: TrainConfig, saved: dict[str, object]) -> None:
    """Refuse to resume with another configuration than the run was started with."""
    now = config.as_json()
    for name, value in now.items():
        if saved.get(name) != value and name not in ("save_every", "device"):
            flag = name.replace("_", "-")
            raise InputError(
                f"--{flag} is {value} and the run was started with {saved.get(name)}: resume with the same settings"
            )

"""What a training run is asked to do, and what of it cannot be.

config = TrainConfig(teacher=folder, student="kdc-482m", tasks=(parse_task("flowers=garden:flowers"),))
learning_rate(config, step=0)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import read_json
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.losses import LossWeights
from kdc_edge.train.replay import POLICIES

CHOICES = {
    "mixed_precision": ("auto", "no", "bf16", "fp16"),
    "schedule": ("cosine", "constant"),
    "optimizer": ("adamw", "adamw8bit"),
    "replay_policy": POLICIES,
    "replay_teacher": ("teacher", "student"),
    "log_with": ("none", "tensorboard", "wandb", "trackio"),
}
# What may differ between the run that was interrupted and the one that goes on: none of it changes the weights.
FREE_TO_CHANGE = ("save_every", "keep", "device", "log_with", "sample_every", "metric_weights", "cache")


@dataclass(frozen=True)
class TrainConfig:
    """What a run does. Fields are the command line's flags."""

    teacher: Path
    student: str  # a preset
    tasks: tuple[Task, ...]
    steps: int = 300  # of each task
    batch_size: int = 16  # samples a step, over all processes
    accumulate: int = 1  # parts in which a process computes its share of a batch, one after the other
    samples: int | None = None  # images of each task; all where None (2,000 of the garden)
    resolution: int | None = None  # pixels a side; the teacher's own where None
    inherit: bool = True  # start from the teacher's weights
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # or "constant"
    warmup: int | None = None  # steps; a tenth of a task where None
    optimizer: str = "adamw"  # or "adamw8bit", of bitsandbytes
    replay: int = 500  # samples that the buffer holds; 0 = no replay
    replay_mb: float | None = None  # the buffer's budget in megabytes; takes the place of `replay`
    replay_policy: str = "reservoir"  # or "balanced"
    replay_ratio: float = 0.5  # of a batch, once there is something to replay
    replay_weight: float = 1.0  # of a replayed sample's loss
    replay_teacher: str = "teacher"  # or "student": replayed samples are distilled from the student before the task
    seed: int = 0
    loss: LossWeights = field(default_factory=LossWeights)
    caption_dropout: float = 0.1  # of the captions are emptied, for classifier-free guidance
    ema_decay: float = 0.995
    mixed_precision: str = "auto"  # "no", "bf16", "fp16"; auto takes bf16 on CUDA (on CPUs it is slower at garden size)
    gradient_checkpointing: bool = False  # compute activations twice, keep few
    channels_last: bool = False
    compile: bool = False
    device: str = "auto"
    save_every: int = 100  # steps
    keep: int = 2  # saved states, the newest
    sample_every: int = 0  # steps between sample sheets; 0 = none
    log_with: str = "tensorboard"  # or "none", "wandb", "trackio"
    eval_images: int = 32  # of each task, after each task
    metric_weights: Path | None = None  # folder with the weight files of FID, LPIPS and the CLIP score
    cache: Path | None = None  # of latents and embeddings; in the run's folder where None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "samples", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{flag(name)} {value} is too few: use 1 or more")
        for name in ("replay", "replay_mb", "replay_weight", "sample_every", "warmup"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"{flag(name)} {value} is negative: use 0 for none")
        for name in ("replay_ratio", "caption_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{flag(name)} {getattr(self, name)} is out of range: use 0 to below 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{flag(name)} {getattr(self, name)!r} is unknown: choose from {', '.join(choices)}")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"--learning-rate {self.learning_rate} is out of range: 1e-5 to 1e-3 is usual")
        if self.eval_images < 2:
            raise InputError(f"--eval-images {self.eval_images} is too few: use 2 or more")
        if not self.tasks:
            raise InputError("there is nothing to learn: give at least one --task NAME=SOURCE")
        if len({t.name for t in self.tasks}) < len(self.tasks):
            raise InputError("two tasks have the same name: every --task needs its own")

    @classmethod
    def load(cls, run: Path) -> TrainConfig:
        """The configuration that a run was started with; raises CheckpointError where there is none."""
        saved = read_json(run / "config.json", CheckpointError)
        unknown = saved.keys() - {f.name for f in fields(cls)}
        if unknown or not {"teacher", "student", "tasks"} <= saved.keys():
            raise CheckpointError(f"{run / 'config.json'} is no run's configuration: start anew")
        paths = {name: Path(str(saved[name])) for name in ("teacher", "metric_weights", "cache") if saved.get(name)}
        try:
            tasks = tuple(Task(**task) for task in saved["tasks"])  # type: ignore[attr-defined]
            loss = LossWeights(**saved.get("loss", {}))  # type: ignore[arg-type]
            return cls(**(saved | paths | {"tasks": tasks, "loss": loss}))  # type: ignore[arg-type]
        except TypeError as error:
            raise CheckpointError(f"{run / 'config.json'} is no run's configuration: {error}") from None

    def as_json(self) -> dict[str, object]:
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]


def flag(name: str) -> str:
    """The command line's name of a field."""
    return f"--{name.replace('_', '-')}"


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up over a tenth of a task, then a cosine down to a twentieth of the peak (or none).

    A function of the step alone: a resumed run needs no scheduler's state. diffusers' cosine falls to zero, which
    wastes a short task's last steps.
    """
    warmup = max(1, config.steps // 10) if config.warmup is None else config.warmup
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def check_same(config: TrainConfig, saved: dict[str, object]) -> None:
    """Refuse to resume with another configuration than the run was started with."""
    now = config.as_json()
    for name, value in now.items():
        if saved.get(name) != value and name not in FREE_TO_CHANGE:
            raise InputError(
                f"{flag(name)} is {value} and the run was started with {saved.get(name)}: resume with the same settings"
            )

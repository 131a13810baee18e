"""The settings of a training run, declared once each: the class of every flag, key, check and table of settings.

config = TrainConfig(teacher=folder, student="kdc-482m", tasks=(parse_task("flowers=garden:flowers"),))
learning_rate(config, step=0)
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import read_json
from kdc_edge.presets import DECODERS
from kdc_edge.settings import Settings, setting, settings_of
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.garden.assets import where_it_is

StrategyName = Literal["replay", "captions", "generative", "ewc", "lwf"]  # train/strategies/registry.py
ReplayPolicy = Literal["reservoir", "balanced"]
Quality = Literal[
    "auto", "prompt_accuracy", "kid", "clip_score", "loss", "lpips", "exact", "judge_frechet", "judge_kernel", "fid"
]


@dataclass(frozen=True)
class LossWeights(Settings):
    """The weight of each loss term."""

    task: float = setting(1.0, "Weight of the denoising loss.", "Distillation", option="weight_task", ge=0)
    output: float = setting(1.0, "Weight of the output-level loss.", "Distillation", option="weight_output", ge=0)
    soft: float = setting(1.0, "Weight of the soft-target loss.", "Distillation", option="weight_soft", ge=0)
    feature: float = setting(0.1, "Weight of the block-feature loss.", "Distillation", option="weight_feature", ge=0)
    temperature: float = setting(2.0, "Temperature T of the soft targets.", "Distillation", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.task or self.output or self.soft or self.feature):
            raise InputError("every loss has weight 0: give one of --weight-task, --weight-output, --weight-soft more")


@dataclass(frozen=True)
class FewSteps(Settings):
    """N jumps without guidance. See train/objectives/phased.py and, for the last two settings, distribution.py."""

    phases: int = setting(4, "Phases, which are the steps of sampling: 1, 2, 4, 5, 8 or 10.", "Few steps", ge=1)
    guidance: float = setting(4.5, "Guidance scale that the student learns.", "Few steps", ge=1, le=100)
    grid_points: int = setting(5, "Steps of the teacher in each phase.", "Few steps", ge=1, le=1000)
    huber: float = setting(1e-3, "Width of the pseudo-Huber loss around zero.", "Few steps", gt=0)
    score_updates: int = setting(
        3, "Steps of the score network a step of the student, in distribution matching.", "Few steps", ge=1
    )
    score_learning_rate: float = setting(1e-5, "Learning rate of the score network.", "Few steps", gt=0, lt=1)


@dataclass(frozen=True)
class TaskConfig(Settings):
    """A training on tasks. `free` settings do not change the weights and may change when it is resumed."""

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise InputError("there is nothing to learn: give at least one --task NAME=SOURCE")
        if len({t.name for t in self.tasks}) < len(self.tasks):
            raise InputError("two tasks have the same name: every --task needs its own")

    @classmethod
    def load(cls, run: Path) -> Self:
        """The configuration that a run was started with; raises CheckpointError where there is none."""
        path = run / "config.json"
        try:
            return cls.from_json(read_json(path, CheckpointError))
        except InputError as error:
            raise CheckpointError(f"{path} is no run's configuration: {error}") from None


@dataclass(frozen=True)
class TrainConfig(TaskConfig):
    """A training run of a student."""

    teacher: Path = setting(
        MISSING, "A diffusers folder, a .safetensors file, a hub id, or `garden`, the one that ships.", "Student"
    )
    student: str = setting("garden-student", "A preset: see kdc-edge init -h.", "Student")
    recipe: str | None = setting(None, "Published settings: kdc-diff, bk-sdm, sd-finetune, garden.", "Student")
    start: Path | None = setting(None, "Checkpoint whose U-Net the student starts from.", "Student")
    inherit: bool = setting(True, "Start from the teacher's weights.", "Student")

    samples: int | None = setting(None, "Images of each task; all by default, 2,000 of the garden.", "Data", ge=1)
    resolution: int | None = setting(None, "Image side in pixels; the teacher's by default.", "Data", ge=1)
    crop: Literal["center", "random"] = setting("center", "Square that an image is cut to.", "Data")
    buckets: bool = setting(False, "Group images by aspect ratio instead of cutting squares.", "Data")
    noise_offset: float = setting(
        0.0, "Weight of additional noise that is constant over a channel.", "Data", ge=0, lt=1
    )
    epochs: bool = setting(False, "Draw every new sample once an epoch, instead of at random from all.", "Data")
    caption_dropout: float = setting(0.1, "Share of captions emptied, for guidance.", "Data", ge=0, lt=1)
    cache: Path | None = setting(None, "Folder of encoded latents; the run's own by default.", "Data", free=True)

    steps: int = setting(300, "Steps of each task.", "Optimization", ge=1)
    batch_size: int = setting(16, "Samples a step, over all processes.", "Optimization", ge=1)
    accumulate: int = setting(1, "Micro-batches of a process in each step.", "Optimization", ge=1)
    learning_rate: float = setting(1e-3, "Peak learning rate; 1e-5 to 1e-3 is usual.", "Optimization", gt=0, lt=1)
    schedule: Literal["cosine", "constant"] = setting("cosine", "Learning rate schedule.", "Optimization")
    warmup: int | None = setting(None, "Warm-up steps; a tenth of a task by default.", "Optimization", ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", "adamw8bit needs bitsandbytes.", "Optimization")
    beta1: float = setting(0.9, "Decay of the gradients' mean in AdamW.", "Optimization", ge=0, lt=1)
    beta2: float = setting(0.999, "Decay of the gradients' square in AdamW.", "Optimization", ge=0, lt=1)
    weight_decay: float = setting(0.01, "Weight decay of AdamW.", "Optimization", ge=0, lt=1)
    ema_decay: float = setting(0.995, "Decay of the EMA of the weights, which is kept.", "Optimization", ge=0, lt=1)
    seed: int = setting(0, "Seed of all randomness.", "Optimization", ge=0, lt=2**63)

    snr_gamma: float | None = setting(
        None,
        "Min-SNR weighting of the denoising loss with this gamma, e.g. 5 (arXiv 2303.09556).",
        "Distillation",
        gt=0,
    )
    objective: str = setting(
        "distillation", "distillation; phased for few steps, then distribution for one or two.", "Distillation"
    )
    loss: LossWeights = LossWeights()
    few_steps: FewSteps = FewSteps()

    strategy: StrategyName = setting(
        "replay",
        "Against forgetting: replay of latents; captions, which the teacher makes images of, or the student"
        " (generative); a penalty on changed weights (ewc); the earlier student as a teacher (lwf).",
        "Replay",
    )
    ewc_weight: float = setting(10_000.0, "Weight of the penalty of ewc.", "Replay", ge=0)
    replay: int = setting(500, "Samples kept of earlier tasks; 0 for no replay.", "Replay", ge=0)
    replay_mb: float | None = setting(None, "Megabytes kept of earlier tasks, instead of --replay.", "Replay", ge=0)
    replay_policy: ReplayPolicy = setting("reservoir", "Uniform over all samples, or over tasks.", "Replay")
    replay_ratio: float = setting(0.5, "Share of samples that are replayed, on average.", "Replay", ge=0, lt=1)
    replay_weight: float = setting(1.0, "Weight of a replayed sample's loss.", "Replay", ge=0)
    replay_teacher: Literal["teacher", "student"] = setting(
        "teacher", "Who teaches replayed samples: the teacher, or the EMA student from the previous task.", "Replay"
    )

    eval_images: int = setting(32, "Images of each task, after each task.", "Evaluation", ge=2)
    eval_steps: int = setting(12, "Steps of DPM-Solver++ 2M for these images.", "Evaluation", ge=1, le=1000)
    eval_guidance: float = setting(4.0, "Their guidance scale.", "Evaluation", ge=1, le=100)
    metric_weights: Path | None = setting(None, "Folder of FID, LPIPS and CLIP weights.", "Evaluation", free=True)
    quality: Quality = setting(
        "auto", "Metric of R in the summary; auto takes what the run has, or the first it can.", "Evaluation", free=True
    )
    baselines: bool = setting(True, "Measure the teacher and the untrained student too.", "Evaluation", free=True)
    sample_every: int = setting(0, "Steps between sheets of samples; 0 for none.", "Evaluation", free=True, ge=0)

    device: str = setting("auto", "auto, cpu, cuda or mps.", "Performance", free=True)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = setting(
        "auto", "Compute dtype; auto takes bf16 on CUDA, fp32 elsewhere.", "Performance"
    )
    gradient_checkpointing: bool = setting(False, "Less memory, a third more work.", "Performance")
    channels_last: bool = setting(False, "Memory layout for tensor cores.", "Performance")
    compile: bool = setting(False, "Compile the blocks of both networks.", "Performance")
    cuda_graphs: bool = setting(False, "Launch a step's kernels as one, for small batches.", "Performance", free=True)

    own_noise: bool = setting(
        False, "Seed the noise of each sample by itself, so that a process draws its share alone.", "Performance"
    )

    save_every: int = setting(100, "Steps between saved states.", "Run", free=True, ge=1)
    keep: int = setting(2, "Saved states kept, the newest.", "Run", free=True, ge=1)
    task_checkpoints: bool = setting(True, "Keep a checkpoint of each task, in RUN/checkpoints.", "Run", free=True)
    log_with: Literal["none", "tensorboard", "wandb", "trackio"] = setting(
        "tensorboard", "Tracker of losses and sample sheets.", "Run", free=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuda_graphs and self.gradient_checkpointing:
            raise InputError("--cuda-graphs and --gradient-checkpointing exclude each other: use one")
        if self.cuda_graphs and (self.strategy == "lwf" or self.replay_teacher == "student"):
            raise InputError(
                "--cuda-graphs does the same at every step, and an earlier student teaches some samples alone: give"
                " --no-cuda-graphs with --strategy lwf and --replay-teacher student"
            )
        if self.buckets and self.epochs:
            raise InputError("--buckets and --epochs exclude each other: a batch of one shape has no order of an epoch")

    @classmethod
    def from_json(cls, document: object) -> Self:
        found = super().from_json(document)
        return replace(found, teacher=where_it_is(found.teacher))


@dataclass(frozen=True)
class DecoderConfig(TaskConfig):
    """The distillation of a checkpoint's VAE decoder into a small one."""

    checkpoint: Path  # --from
    preset: str | None = setting(
        None, f"{', '.join(p.name for p in DECODERS)}; by default the first that fits the VAE.", "Decoder"
    )
    samples: int | None = setting(None, "Images of each task; all by default, 2,000 of the garden.", "Data", ge=1)
    cache: Path | None = setting(
        None, "Folder of encoded latents; the checkpoint's run's by default.", "Data", free=True
    )

    steps: int = setting(1000, "Training steps.", "Optimization", ge=1)
    batch_size: int = setting(16, "Images a step.", "Optimization", ge=1)
    learning_rate: float = setting(1e-3, "Peak learning rate; 1e-4 to 2e-3 is usual.", "Optimization", gt=0, lt=1)
    perceptual: float = setting(
        0.1, "Weight of the perceptual loss: the judge's features on the garden, else LPIPS.", "Optimization", ge=0
    )
    extrapolated: float | None = setting(
        None, "Share of latents that are extrapolated, to those of few-step students; 0.5 for such a student, else 0.",
        "Optimization", ge=0, le=1,
    )  # fmt: skip
    seed: int = setting(0, "Seed of all randomness.", "Optimization", ge=0, lt=2**63)

    eval_images: int = setting(32, "Images of each task, at the end.", "Evaluation", free=True, ge=2)
    metric_weights: Path | None = setting(None, "Folder of LPIPS weights.", "Evaluation")

    device: str = setting("auto", "auto, cpu, cuda or mps.", "Performance", free=True)
    mixed_precision: Literal["auto", "no", "bf16"] = setting(
        "auto", "Compute dtype; auto takes bf16 on CUDA, fp32 elsewhere.", "Performance"
    )
    save_every: int = setting(100, "Steps between saved states.", "Run", free=True, ge=1)

    @classmethod
    def from_json(cls, document: object) -> Self:
        found = super().from_json(document)
        return replace(found, checkpoint=where_it_is(found.checkpoint))


# Settings of a few-step stage by the objective and the preset's family, where none are given by hand. Garden:
# docs/few-steps.md; sd1: taken over from public recipes of both methods, not measured here.
FEW_STEP_STAGE: dict[str, dict[str, dict[str, Any]]] = {
    "phased": {
        "garden": {
            "steps": 80, "learning_rate": 3e-4, "warmup": 20, "ema_decay": 0.98, "caption_dropout": 0.0, "huber": 0.03,
            "grid_points": 5,
        },
        "sd1": {
            "steps": 3000, "learning_rate": 1e-5, "warmup": 100, "ema_decay": 0.99, "caption_dropout": 0.0,
            "huber": 1e-3, "grid_points": 10,
        },
    },
    "distribution": {
        "garden": {
            "steps": 70, "learning_rate": 1e-4, "warmup": 20, "ema_decay": 0.98, "caption_dropout": 0.0,
            "score_learning_rate": 3e-4, "cuda_graphs": False,
        },
        "sd1": {
            "steps": 1000, "learning_rate": 1e-5, "warmup": 100, "ema_decay": 0.99, "caption_dropout": 0.0,
            "score_learning_rate": 1e-5, "cuda_graphs": False,
        },
    },
}  # fmt: skip


def learning_rate(config: TrainConfig | DecoderConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to a part of the peak (or none).

    The warm-up is a tenth of a task and the part a twentieth; for a decoder a twentieth of the steps and a hundredth.
    A function of the step alone: a resumed run needs no scheduler's state. diffusers' cosine falls to zero, which
    wastes a short task's last steps.
    """
    if isinstance(config, DecoderConfig):
        warmup, last = max(1, config.steps // 20), 0.01
    else:
        warmup = max(1, config.steps // 10) if config.warmup is None else config.warmup
        last = 1.0 if config.schedule == "constant" else 0.05
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * progress)))


def check_same(config: TaskConfig, saved: dict[str, object]) -> None:
    """Refuse to resume with another configuration than the run was started with, but for a teacher that has moved."""
    before = config.from_json(saved)
    pairs = [(s.option, s.of(config), s.of(before)) for s in settings_of(type(config)) if not s.free]
    tasks, learnt = (" ".join(map(str, c.tasks)) for c in (config, before))
    for option, now, then in [*pairs, ("--task", tasks, learnt)]:
        if now != then and not (option == "--teacher" and not then.exists()):
            raise InputError(f"{option} is {now} and the run was started with {then}: resume with the same settings")

"""kdc-edge train: distil a student over a sequence of tasks."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kdc_edge.cli.project import LATEST, Config, need_training, new_run, point_latest, say
from kdc_edge.errors import InputError

if TYPE_CHECKING:
    from kdc_edge.train.loop import Trainer


def train(
    teacher: Annotated[str, Option(help="A diffusers folder, a hub id, or `garden`, the one that ships.")] = "garden",
    student: Annotated[str, Option(help="A preset: see kdc-edge init -h.")] = "garden-student",
    task: Annotated[
        list[str] | None, Option(metavar="NAME=SOURCE", help="A task, in order; e.g. flowers=garden:flowers.")
    ] = None,
    steps: Annotated[int, Option(help="Steps of each task.")] = 300,
    batch_size: Annotated[int, Option(help="Samples a step.")] = 16,
    samples: Annotated[int, Option(help="Pictures of each task.")] = 2000,
    learning_rate: Annotated[float, Option(help="Peak of the cosine.")] = 1e-3,
    replay: Annotated[int, Option(help="Samples kept of earlier tasks; 0 for none.")] = 500,
    replay_ratio: Annotated[float, Option(help="Share of a batch that is replayed.")] = 0.5,
    weight_task: Annotated[float, Option(help="Weight of the denoising loss.")] = 1.0,
    weight_output: Annotated[float, Option(help="Weight of the output-level loss.")] = 1.0,
    weight_soft: Annotated[float, Option(help="Weight of the soft-target loss.")] = 1.0,
    weight_feature: Annotated[float, Option(help="Weight of the block-feature loss.")] = 0.1,
    temperature: Annotated[float, Option(help="Of the soft targets.")] = 2.0,
    ema_decay: Annotated[float, Option(help="Of the weights' moving average, which is what is kept.")] = 0.995,
    mixed_precision: Annotated[str, Option(help="auto, no or bf16.")] = "auto",
    device: Annotated[str, Option(help="auto, cpu, cuda, mps.")] = "auto",
    seed: Annotated[int, Option(help="Of everything random.")] = 0,
    save_every: Annotated[int, Option(help="Steps between saved states.")] = 100,
    eval_pictures: Annotated[int, Option(help="Pictures of each task, after each task.")] = 32,
    out: Annotated[Path | None, Option(help="The run's folder; the next one in runs/ when not given.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with --out, or with the latest run.")] = False,
    config: Config = None,
) -> None:
    """Distil a student from a teacher, task after task, with latent replay."""
    need_training("kdc-edge train")
    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data import parse_task
    from kdc_edge.train.folders import find_teacher
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.losses import LossWeights

    if task is None:
        task = ["flowers=garden:flowers", "butterflies=garden:butterflies"]
        say(f"no task given{'' if config else ' and no kdc-edge.toml here'}: taking the garden, {' '.join(task)}")
    if resume and out is None and not LATEST.exists():
        raise InputError("there is no run to resume in runs/: start without --resume")
    run = out or (LATEST.resolve() if resume else new_run())
    settings = TrainConfig(
        teacher=find_teacher(teacher), student=student, tasks=tuple(parse_task(t) for t in task), steps=steps,
        batch_size=batch_size, samples=samples, learning_rate=learning_rate, replay=replay,
        replay_ratio=replay_ratio, seed=seed, ema_decay=ema_decay, mixed_precision=mixed_precision, device=device,
        save_every=save_every, eval_pictures=eval_pictures,
        loss=LossWeights(weight_task, weight_output, weight_soft, weight_feature, temperature),
    )  # fmt: skip
    trainer = Trainer(settings, run, resume=resume)
    point_latest(run)
    inherited = sum(source is not None for source in trainer.inherited.values())
    say(f"{student}: {inherited} of {len(trainer.inherited)} weights inherited from {teacher}")
    say(f"on {trainer.device}, into {run}")
    if resume and trainer.position.total:
        say(f"going on after step {trainer.position.total}")
    _follow(trainer)
    typer.echo(run / "checkpoint")


def _follow(trainer: Trainer) -> None:
    """Consume the run: progress on the terminal; SIGTERM saves the state and stops."""
    from kdc_edge.cli.progress import Progress
    from kdc_edge.train.loop import StepDone

    stop = False

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_sigterm)
    total = trainer.config.steps * len(trainer.config.tasks)
    with Progress(total, done=trainer.position.total) as progress:
        for event in trainer.run():
            if isinstance(event, StepDone):
                progress.step(
                    event.total,
                    f"{event.task} loss {event.losses['total']:.4f} {event.samples_per_sec:.0f} samples/s",
                )
            else:
                found = ", ".join(f"{n} {s.accuracy:.3f} (exact {s.exact:.2f})" for n, s in event.scores.items())
                progress.say(f"after {event.task}: prompt accuracy {found}")
            if stop:
                trainer.save()
                progress.say(f"stopped; go on with kdc-edge train --resume --out {trainer.run_folder}")
                raise typer.Exit(143)

"""kdc-edge train: distil a student over a sequence of tasks."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from kdc_edge.cli.project import LATEST, Config, need_training, new_run, point_latest, say
from kdc_edge.errors import InputError

if TYPE_CHECKING:
    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.loop import Trainer

LOSS_FLAGS = ("weight_task", "weight_output", "weight_soft", "weight_feature", "temperature")
NOT_SETTINGS = (
    "context", "teacher", "task", "caption", "out", "resume", "continue_from", "dry_run", "benchmark", "config",
)  # fmt: skip


def train(
    context: typer.Context,
    teacher: Annotated[str, Option(help="A diffusers folder, a hub id, or `garden`, the one that ships.")] = "garden",
    student: Annotated[str, Option(help="A preset: see kdc-edge init -h.")] = "garden-student",
    task: Annotated[
        list[str] | None, Option(metavar="NAME=SOURCE", help="A task, in order; e.g. flowers=garden:flowers.")
    ] = None,
    caption: Annotated[
        list[str] | None, Option(metavar="[TASK=]TEMPLATE", help='E.g. "a photo of a {name}, a type of flower".')
    ] = None,
    steps: Annotated[int, Option(help="Steps of each task.")] = 300,
    batch_size: Annotated[int, Option(help="Samples a step, over all processes.")] = 16,
    accumulate: Annotated[int, Option(help="Parts in which a batch is computed one after the other.")] = 1,
    samples: Annotated[int | None, Option(help="Images of each task; all of them (of the garden 2,000).")] = None,
    resolution: Annotated[int | None, Option(help="Pixels a side; the teacher's own.")] = None,
    inherit: Annotated[bool, Option(help="Start from the teacher's weights.")] = True,
    learning_rate: Annotated[float, Option(help="The peak.")] = 1e-3,
    schedule: Annotated[str, Option(help="Of the learning rate: cosine or constant.")] = "cosine",
    warmup: Annotated[int | None, Option(help="Steps; a tenth of a task.")] = None,
    optimizer: Annotated[str, Option(help="adamw or adamw8bit.")] = "adamw",
    replay: Annotated[int, Option(help="Samples kept of earlier tasks; 0 for none.")] = 500,
    replay_mb: Annotated[float | None, Option(help="Megabytes kept of earlier tasks, instead of --replay.")] = None,
    replay_policy: Annotated[str, Option(help="reservoir (uniform over all) or balanced (alike of each task).")] = (
        "reservoir"
    ),
    replay_ratio: Annotated[float, Option(help="Share of a batch that is replayed.")] = 0.5,
    replay_weight: Annotated[float, Option(help="Weight of a replayed sample's loss.")] = 1.0,
    replay_teacher: Annotated[
        str, Option(help="Who teaches replayed samples: teacher, or student (the one of before the task).")
    ] = "teacher",
    weight_task: Annotated[float, Option(help="Weight of the denoising loss.")] = 1.0,
    weight_output: Annotated[float, Option(help="Weight of the output-level loss.")] = 1.0,
    weight_soft: Annotated[float, Option(help="Weight of the soft-target loss.")] = 1.0,
    weight_feature: Annotated[float, Option(help="Weight of the block-feature loss.")] = 0.1,
    temperature: Annotated[float, Option(help="Of the soft targets.")] = 2.0,
    caption_dropout: Annotated[float, Option(help="Share of captions that are emptied, for guidance.")] = 0.1,
    ema_decay: Annotated[float, Option(help="Of the weights' moving average, which is what is kept.")] = 0.995,
    mixed_precision: Annotated[str, Option(help="auto, no, bf16 or fp16.")] = "auto",
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory, a third more work.")
    ] = False,
    channels_last: Annotated[bool, Option("--channels-last", help="Memory layout for tensor cores.")] = False,
    compile: Annotated[bool, Option("--compile", help="Compile both networks' blocks.")] = False,
    device: Annotated[str, Option(help="auto, cpu, cuda, mps.")] = "auto",
    seed: Annotated[int, Option(help="Of everything random.")] = 0,
    save_every: Annotated[int, Option(help="Steps between saved states.")] = 100,
    keep: Annotated[int, Option(help="Saved states kept, the newest.")] = 2,
    sample_every: Annotated[int, Option(help="Steps between sheets of samples; 0 for none.")] = 0,
    log_with: Annotated[str, Option(help="tensorboard, wandb, trackio or none.")] = "tensorboard",
    eval_images: Annotated[int, Option(help="Images of each task, after each task.")] = 32,
    metric_weights: Annotated[Path | None, Option(help="Folder with the weight files of FID, LPIPS, CLIP.")] = None,
    cache: Annotated[Path | None, Option(help="Folder of encoded latents; the run's own.")] = None,
    out: Annotated[Path | None, Option(help="The run's folder; the next one in runs/ when not given.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with --out, or with the latest run.")] = False,
    continue_from: Annotated[
        Path | None, Option(metavar="RUN", help="Add --task to a finished run, with its memory of the earlier ones.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan: steps, memory, disk; train nothing.")] = False,
    benchmark: Annotated[int, Option(metavar="N", help="Measure N steps and stop; nothing is kept.")] = 0,
    config: Config = None,
) -> None:
    """Distil a student from a teacher, task after task, with latent replay."""
    flags = dict(locals())
    need_training("kdc-edge train")
    from kdc_edge.train.checkpoint import find_teacher
    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data.tasks import parse_tasks
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.losses import LossWeights
    from kdc_edge.train.runs import continue_run

    if resume and out is None and not LATEST.exists():
        raise InputError("there is no run to resume in runs/: start without --resume")
    run = out or (LATEST.resolve() if resume else new_run())
    if task is None and not (resume and (run / "config.json").is_file()):
        if continue_from:
            raise InputError("--continue-from needs a --task NAME=SOURCE to add to the run")
        task = ["flowers=garden:flowers", "butterflies=garden:butterflies"]
        say(f"no task given{'' if config else ' and no kdc-edge.toml here'}: taking the garden, {' '.join(task)}")
    if resume and (run / "config.json").is_file():
        settings = _saved_settings(context, flags, run)
    else:
        given = {k: v for k, v in flags.items() if k not in (*LOSS_FLAGS, *NOT_SETTINGS)}
        loss = LossWeights(weight_task, weight_output, weight_soft, weight_feature, temperature)
        tasks = parse_tasks(task or (), caption or ())
        settings = TrainConfig(teacher=find_teacher(teacher), tasks=tasks, loss=loss, **given)
    if dry_run:
        from kdc_edge.train.tools.plan import make_plan

        typer.echo("\n".join(make_plan(settings).lines()))
        return
    if benchmark:
        _benchmark(settings, benchmark)
        return
    if continue_from:
        settings, resume = continue_run(continue_from, run, settings), True
    trainer = Trainer(settings, run, resume=resume, say=say)
    if trainer.view.is_main_process:
        _announce(trainer, run)
    _follow(trainer)
    if trainer.view.is_main_process:
        typer.echo(run / "checkpoint")


def _saved_settings(context: typer.Context, flags: dict[str, Any], run: Path) -> TrainConfig:
    """What the run was started with; a flag given by hand is taken, and refused later where it would change the run."""
    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data.tasks import parse_tasks

    saved = TrainConfig.load(run)
    by_hand = {
        name: value
        for name, value in flags.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    changes: dict[str, Any] = {k: v for k, v in by_hand.items() if k not in (*LOSS_FLAGS, *NOT_SETTINGS)}
    losses = {k.removeprefix("weight_"): v for k, v in by_hand.items() if k in LOSS_FLAGS}
    if losses:
        changes["loss"] = replace(saved.loss, **losses)
    if "task" in by_hand:
        changes["tasks"] = parse_tasks(by_hand["task"], by_hand.get("caption") or ())
    return replace(saved, **changes)


def _announce(trainer: Trainer, run: Path) -> None:
    config, view = trainer.config, trainer.view
    point_latest(run)
    teacher = config.teacher.name
    say(f"{config.student}: {view.inherited_tensors} of {view.student_tensors} weights inherited from {teacher}")
    say(f"on {view.device}{f' x {view.processes}' if view.processes > 1 else ''}, into {run}")
    if trainer.position.total:
        say(f"going on after step {trainer.position.total}")
    for line in view.not_measured:
        say(f"not measured: {line}")


def _benchmark(settings: TrainConfig, steps: int) -> None:
    """Measure and print; the run's folder is temporary."""
    import tempfile

    from kdc_edge.train.tools.benchmark import measure_run

    with tempfile.TemporaryDirectory(prefix="kdc-edge-") as folder:
        typer.echo("\n".join(measure_run(settings, Path(folder) / "run", steps).lines()))


def _follow(trainer: Trainer) -> None:
    """Consume the run: progress on the terminal; SIGTERM saves the state and stops."""
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.train.loop import StepDone

    stop = False

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_sigterm)
    total = trainer.config.steps * len(trainer.config.tasks)
    if not trainer.view.is_main_process:
        for _ in trainer.run():
            if trainer.any_process(stop):
                trainer.save()
                raise typer.Exit(143)
        return
    with ProgressBar(total, done=trainer.position.total) as progress:
        for event in trainer.run():
            if isinstance(event, StepDone):
                progress.step(
                    event.total,
                    f"{event.task} loss {event.losses['total']:.4f} {event.samples_per_sec:.0f} samples/s",
                )
            else:
                for name, score in event.scores.items():
                    found = ", ".join(f"{k} {v:.3f}" for k, v in score.values.items())
                    progress.say(f"after {event.task}: {name}: {found}")
            if trainer.any_process(stop):
                trainer.save()
                progress.say(f"stopped; go on with kdc-edge train --resume --out {trainer.run_folder}")
                raise typer.Exit(143)

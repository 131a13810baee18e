"""kdc-edge train: distil a student over a sequence of tasks."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from kdc_edge.cli.options import EmbeddingFiles, LoraFiles, PredictionType, Vae
from kdc_edge.cli.project import LATEST, Config, give_back, need_training, new_run, point_latest, say, take_run
from kdc_edge.cli.settings import Given, flags
from kdc_edge.errors import InputError, KdcError
from kdc_edge.files import sole_writer
from kdc_edge.settings import arguments, settings_of
from kdc_edge.train.config import FEW_STEP_STAGE, TrainConfig

if TYPE_CHECKING:
    from kdc_edge.train.data.tasks import Task
    from kdc_edge.train.loop import Trainer


@flags(TrainConfig, teacher="garden")
def train(
    given: Given[TrainConfig],
    task: Annotated[
        list[str] | None, Option(metavar="NAME=SOURCE", help="A task, in order; e.g. flowers=garden:flowers.")
    ] = None,
    caption: Annotated[
        list[str] | None, Option(metavar="[TASK=]TEMPLATE", help='E.g. "a photo of a {name}, a type of flower".')
    ] = None,
    out: Annotated[Path | None, Option(help="The run's folder; the next one in runs/ when not given.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with --out, or with the latest run.")] = False,
    continue_from: Annotated[
        Path | None, Option(metavar="RUN", help="Add --task to a finished run; its replay buffer is kept.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan: steps, memory, disk; train nothing.")] = False,
    benchmark: Annotated[int, Option(metavar="N", help="Measure N steps and stop; nothing is kept.")] = 0,
    vae: Vae = None,
    lora: LoraFiles = None,
    embedding: EmbeddingFiles = None,
    prediction_type: PredictionType = None,
    config: Config = None,
) -> None:
    """Distil a student from a teacher, task after task, with latent replay."""
    from kdc_edge.checkpoints import Additions
    from kdc_edge.train.data.tasks import parse_tasks
    from kdc_edge.train.teachers import find_teacher

    given = _with_recipe(given, given.typed if resume or continue_from else given.named)
    if (resume or continue_from) and "task" not in given.typed:  # those of kdc-edge.toml are of new runs
        task = None
    more = False  # steps for a run
    if resume and continue_from:
        raise InputError("--resume goes on with a run, --continue-from begins another one behind it: give one of them")
    if resume and out is None and not LATEST.exists():
        raise InputError("there is no run to resume in runs/: start without --resume")
    run = out or (LATEST.resolve() if resume else new_run())
    if resume and not (run / "config.json").is_file():
        raise InputError(f"{run} holds no run to resume, it has no config.json: start without --resume")
    if resume:  # a flag given by hand is refused later where it changes the run
        learnt: dict[str, Any] = {"tasks": parse_tasks(task, caption or ())} if task else {}
        settings = given.change(given.kind.load(run), **learnt)
        more = settings.steps > given.kind.load(run).steps
    elif continue_from:
        settings = _continued(given, continue_from, parse_tasks(task or (), caption or ()))
    else:
        if task is None:
            task = ["flowers=garden:flowers", "butterflies=garden:butterflies"]
            say(f"no task given{'' if config else ' and no kdc-edge.toml here'}: taking the garden, {' '.join(task)}")
        given = _family_defaults(given)
        settings = given.make(tasks=parse_tasks(task, caption or ()))
        settings = replace(settings, **arguments(settings, _stage_defaults(given, settings)))
    additions = Additions.parse(vae, lora, embedding, prediction_type)
    if (resume or continue_from) and "teacher" not in given.typed:  # the run's teacher has them already
        additions = Additions()
    settings = replace(settings, teacher=find_teacher(str(settings.teacher), additions, say=say))
    need_training("kdc-edge train")
    learns = bool(continue_from and task)
    if dry_run:
        _dry_run(settings, run, resume=resume, more=more, source=continue_from, learns=learns)
        return
    if benchmark:
        _benchmark(settings, benchmark)
        return
    with ExitStack() as held:
        if out is None and not resume and "RANK" not in os.environ:  # processes of a launch must agree on the place
            run = take_run()
            held.callback(give_back, run)
        _train(settings, run, held, resume=resume, more=more, source=continue_from, learns=learns)


def _train(
    settings: TrainConfig, run: Path, held: ExitStack, *, resume: bool, more: bool, source: Path | None, learns: bool
) -> None:
    """Train in a folder that is this command's alone, as long as `held` lasts, once it holds a run."""
    from kdc_edge.train.distributed import make_accelerator, on_main_process
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.runs.continuing import begin_stage, continue_run, extend_run

    main, lock = os.environ.get("RANK", "0") == "0", sole_writer(run)
    if main and resume:
        held.enter_context(lock)
    if source:
        prepare = continue_run if learns else begin_stage
        write_once = partial(on_main_process, make_accelerator(settings, run))
        settings = prepare(source, run, settings, write_once=write_once)
    if more:
        accelerator = make_accelerator(settings, run)
        accelerator.wait_for_everyone()  # all have seen that it is more before one writes
        on_main_process(accelerator, lambda: extend_run(run, settings))
        say(_said_of_more(settings))
    try:
        trainer = Trainer(settings, run, resume=resume or source is not None, say=say)
    except KdcError:
        if source and main:  # the folder was made just now
            shutil.rmtree(run)
        raise
    if main and not resume:
        held.enter_context(lock)
    if trainer.view.is_main_process:
        _announce(trainer, run)
    _follow(trainer)
    if trainer.view.is_main_process:
        typer.echo(run / "checkpoint")


def _with_recipe(given: Given[TrainConfig], named: frozenset[str]) -> Given[TrainConfig]:
    """What is given, with the settings of the recipe, if it is named; a line says their source."""
    from kdc_edge.train.recipes import find_recipe

    if "recipe" not in named or given.values["recipe"] is None:
        return given
    recipe = find_recipe(given.values["recipe"])
    say(f"recipe {recipe.name}: {recipe.source}")
    return given.under(recipe.settings)


def _family_defaults(given: Given[TrainConfig]) -> Given[TrainConfig]:
    """What is given, with the defaults for students of this size; they are printed."""
    from kdc_edge.presets import find_preset
    from kdc_edge.train.recipes import FAMILY_DEFAULTS

    if "recipe" in given.named or given.values["objective"] in FEW_STEP_STAGE:
        return given
    family = find_preset(given.values["student"], "--student").family
    found = {name: value for name, value in FAMILY_DEFAULTS[family].items() if name not in given.named}
    for name, value in found.items():
        say(f"--{name.replace('_', '-')} {value}, for a student of this size")
    return given.under(found)


def _continued(given: Given[TrainConfig], run: Path, tasks: tuple[Task, ...]) -> TrainConfig:
    """The run's own settings, changed by those of the command line and of a few-step stage; changes are printed.

    With `tasks` the run learns more; without, another objective goes over its tasks.
    """
    from kdc_edge.presets import find_preset

    saved = given.kind.load(run)
    settings = saved
    stage = None if tasks else FEW_STEP_STAGE.get(given.values["objective"])
    few_steps = {"objective", "phases"} if saved.objective in FEW_STEP_STAGE else {"objective"}
    if not tasks and not few_steps & given.typed:
        raise InputError("--continue-from needs a --task NAME=SOURCE to add, or an --objective for another stage")
    if stage:
        settings = replace(settings, **arguments(settings, stage[find_preset(saved.student, "--student").family]))
    settings = given.change(settings, **({"tasks": tasks} if tasks else {}))
    for s in settings_of(given.kind):
        if s.of(settings) != s.of(saved):
            say(f"{s.option} {s.of(settings)} (the run had {s.of(saved)})")
    return settings


def _dry_run(settings: TrainConfig, run: Path, *, resume: bool, more: bool, source: Path | None, learns: bool) -> None:
    """Print the plan, or refuse what the run would refuse; nothing is written."""
    from kdc_edge.train.loop import check_run
    from kdc_edge.train.runs.continuing import begin_stage, continue_run
    from kdc_edge.train.tools.plan import make_plan

    left = len(settings.tasks) if learns else None
    if source:
        prepare = continue_run if learns else begin_stage
        settings = prepare(source, run, settings, write_once=lambda _: None)
    asked = replace(settings, steps=settings.load(run).steps) if more else settings
    check_run(asked, run, resume=resume)
    for one in settings.tasks[-left:] if left else settings.tasks:  # nothing is needed of the earlier run's tasks
        one.open()
    if os.environ.get("RANK", "0") == "0":
        typer.echo("\n".join(make_plan(settings, tasks=left).lines()))


def _said_of_more(settings: TrainConfig) -> str:
    """Whether more steps end where a longer run would have."""
    name, steps = settings.tasks[-1].name, settings.steps
    if settings.schedule == "constant" and settings.warmup is not None:
        return f"{name} goes on to step {steps}, as a run of {steps} steps would have"
    return (
        f"{name} goes on to step {steps} by the learning rates of a run of {steps} steps, which the steps so far did"
        " not have: it ends elsewhere than that run (--schedule constant with a --warmup would not)"
    )


def _stage_defaults(given: Given[TrainConfig], settings: TrainConfig) -> dict[str, Any]:
    """The settings of a few-step stage for a run that begins with it, where no others are given."""
    from kdc_edge.presets import find_preset

    if settings.objective not in FEW_STEP_STAGE:
        return {}
    stage = FEW_STEP_STAGE[settings.objective][find_preset(settings.student, "--student").family]
    defaults = {s.name: s.default for s in settings_of(given.kind)}
    found = {n: v for n, v in stage.items() if n not in given.typed and given.values[n] == defaults[n]}
    for name, value in found.items():
        say(f"--{name.replace('_', '-')} {value}, for few steps")
    return found


def _announce(trainer: Trainer, run: Path) -> None:
    view = trainer.view
    point_latest(run)
    say(_said_of_weights(trainer))
    say(f"on {view.device}{f' x {view.processes}' if view.processes > 1 else ''}, into {run}")
    if (done := trainer.position.total) and done == trainer.position.end(trainer.config):
        say(f"all {done} steps are done: to go on give more --steps, or a --task with --continue-from {run}")
    elif done:
        say(f"going on after step {done}")
    for line in view.not_measured:
        say(f"not measured: {line}")


def _said_of_weights(trainer: Trainer) -> str:
    """Where the student's weights come from."""
    from kdc_edge.hub import label

    config, view, position = trainer.config, trainer.view, trainer.position
    teacher = label(config.teacher)
    if position.total or position.origin is None:  # a stage begins with the weights of another run
        return f"{config.student}: {view.student_tensors} weights from the saved state, teacher {teacher}"
    source = f"inherited from {teacher}" if config.start is None else f"from {config.start}, teacher {teacher}"
    return f"{config.student}: {view.inherited_tensors} of {view.student_tensors} weights {source}"


def _benchmark(settings: TrainConfig, steps: int) -> None:
    """Measure and print; the run's folder is temporary."""
    from kdc_edge.train.distributed import make_accelerator, temporary_folder
    from kdc_edge.train.tools.benchmark import measure_run

    settings = replace(settings, log_with="none")
    accelerator = make_accelerator(settings, Path())
    with temporary_folder(accelerator) as folder:
        speed = measure_run(settings, folder / "run", steps)
    if accelerator.is_main_process:
        typer.echo("\n".join(speed.lines()))


def _follow(trainer: Trainer) -> None:
    """Consume the run: progress on the terminal; SIGTERM saves the state and stops."""
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.train.stepping import StepDone

    stop = False

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_sigterm)
    if not trainer.view.is_main_process:
        for _ in trainer.run():
            if trainer.any_process(stop):
                trainer.save()
                raise typer.Exit(143)
        return
    with ProgressBar(trainer.position.end(trainer.config), done=trainer.position.total) as progress:
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

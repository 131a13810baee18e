"""kdc-edge train-decoder: a small decoder distilled from a checkpoint's VAE."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from kdc_edge.cli.options import Vae
from kdc_edge.cli.project import RUNS, Config, need_training, run_of, say
from kdc_edge.cli.settings import Given, flags
from kdc_edge.errors import InputError
from kdc_edge.files import sole_writer
from kdc_edge.train.config import DecoderConfig, TrainConfig

if TYPE_CHECKING:
    from kdc_edge.train.tools.decoder import DecoderTrainer

GARDEN = ("flowers=garden:flowers", "butterflies=garden:butterflies", "fish=garden:fish")


@flags(DecoderConfig)
def train_decoder(
    given: Given[DecoderConfig],
    checkpoint: Annotated[
        str | None, Option("--from", metavar="CHECKPOINT", help="A folder, a .safetensors file, a hub id, or `garden`.")
    ] = None,
    task: Annotated[
        list[str] | None,
        Option(metavar="NAME=SOURCE", help="A task; those of the checkpoint's run by default, or all of the garden."),
    ] = None,
    caption: Annotated[list[str] | None, Option(metavar="[TASK=]TEMPLATE", help="As in kdc-edge train.")] = None,
    out: Annotated[Path | None, Option(help="The output's folder; runs/decoder-PRESET when not given.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with --out.")] = False,
    vae: Vae = None,
    config: Config = None,
) -> None:
    """Distil the VAE's decoder into a small one, for kdc-edge export --decoder."""
    del config
    from kdc_edge.checkpoints import Additions
    from kdc_edge.diffusers_folder import read_model
    from kdc_edge.presets import find_decoder
    from kdc_edge.train.teachers import find_teacher

    if checkpoint is None and not (resume and out):
        raise InputError("no checkpoint given: train-decoder needs --from CHECKPOINT, or --resume with --out")
    if checkpoint is None:
        folder = given.kind.load(_claimed(out)).checkpoint
    else:
        folder = find_teacher(checkpoint, Additions(vae=vae), say=say)
    need_training("kdc-edge train-decoder")
    from kdc_edge.train.data.tasks import parse_tasks
    from kdc_edge.train.tools.decoder import DecoderTrainer

    chosen = find_decoder(given.values["preset"], read_model(folder).vae_scale)
    home = out or RUNS / f"decoder-{chosen.name}"
    if resume:  # a flag given by hand is refused later where it changes the training
        learnt: dict[str, Any] = {"tasks": parse_tasks(task, caption or ())} if task else {}
        settings = given.change(given.kind.load(_claimed(home)), checkpoint=folder, **learnt)
    else:
        settings = replace(_new(given, folder, task, caption), preset=chosen.name)
    with ExitStack() as held:
        if resume:
            held.enter_context(sole_writer(home))
        trainer = DecoderTrainer(settings, home, resume=resume, say=say)
        if not resume:  # it is there now
            held.enter_context(sole_writer(home))
        parameters = sum(p.numel() for p in trainer.decoder.parameters())
        say(f"{trainer.preset.name}: {trainer.preset.description}, {parameters:,} parameters, to {home}")
        if trainer.step == settings.steps:
            say(f"all {trainer.step} steps are done: for more of them begin anew, with another --out")
        elif trainer.step:
            say(f"going on after step {trainer.step}")
        _follow(trainer)
        _report(trainer)
        typer.echo(home / "decoder")


def _claimed(home: Path | None) -> Path:
    """A folder that a training was started in; raises InputError for another one."""
    if home is None or not (home / "config.json").is_file():
        raise InputError(f"{home} holds no training to resume, it has no config.json: start without --resume")
    return home


def _new(given: Given[DecoderConfig], folder: Path, task: list[str] | None, caption: list[str] | None) -> DecoderConfig:
    """The settings of a new training: tasks and cached latents of the checkpoint's run where it has one."""
    from kdc_edge.train.data.tasks import parse_tasks
    from kdc_edge.train.teachers import GARDEN_TEACHER

    run = run_of(folder)
    if task is None and run is None and folder.resolve() != GARDEN_TEACHER.resolve():
        raise InputError("this checkpoint belongs to no run: say what to decode, e.g. --task flowers=garden:flowers")
    tasks = TrainConfig.load(run).tasks if task is None and run else parse_tasks(task or GARDEN, caption or ())
    settings = given.make(tasks=tasks, checkpoint=folder)
    own_cache = run / "cache" if run and (run / "cache").is_dir() else None
    return replace(settings, cache=settings.cache or own_cache)


def _follow(trainer: DecoderTrainer) -> None:
    """Progress on the terminal; SIGTERM saves the state and stops."""
    from kdc_edge.cli.progress import ProgressBar

    stop = False

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_sigterm)
    with ProgressBar(trainer.config.steps, done=trainer.step) as progress:
        for done in trainer.run():
            text = f"loss {done.losses['total']:.4f} {done.psnr_db:.1f} dB {done.samples_per_sec:.0f} samples/s"
            progress.step(done.step, text)
            if stop:
                trainer.save()
                progress.say(f"stopped; go on with kdc-edge train-decoder --resume and --out {trainer.out}")
                raise typer.Exit(143)


def _report(trainer: DecoderTrainer) -> None:
    results = trainer.results
    for name, found in results["psnr_db"].items():
        say(f"{name}: {found:.1f} dB against the VAE's decoder, on encoded images it was not trained on")
    for name, found in results["prompt_accuracy"].items():
        say(
            f"{name}: prompt accuracy {found['small']:.3f}, with the VAE's decoder {found['vae']:.3f};"
            f" {found['psnr_db']:.1f} dB on the generated images"
        )
    say(f"the VAE's images above the small decoder's: {trainer.out / 'sheet.png'}")

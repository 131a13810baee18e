"""kdc-edge eval: how good a checkpoint's images are, task by task, and what each exported precision keeps of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from kdc_edge.cli.options import EmbeddingFiles, Json, LoraFiles, PredictionType, Vae
from kdc_edge.cli.project import LATEST, Config, bundles_in, need_training, run_of, say
from kdc_edge.errors import CheckpointError, InputError, KdcError

if TYPE_CHECKING:
    from kdc_edge.train.data.tasks import Task
    from kdc_edge.train.quality.evaluate import Asked, Evaluated

IMAGES = 64  # of each task


def evaluate(
    what: Annotated[Path | None, Argument(help="A run, or a checkpoint; the latest run.")] = None,
    task: Annotated[
        list[str] | None, Option(metavar="NAME=SOURCE", help="A task to measure; the run's own by default.")
    ] = None,
    caption: Annotated[list[str] | None, Option(metavar="[TASK=]TEMPLATE", help="As in kdc-edge train.")] = None,
    bundles: Annotated[
        list[Path] | None,
        Option(
            metavar="DIR",
            help="Bundles of this checkpoint, or a folder of them: measure the forgetting that a precision adds.",
        ),
    ] = None,
    images: Annotated[
        int | None,
        Option(help=f"Images of each task. Default: as many as the run kept of its data, {IMAGES} of the garden."),
    ] = None,
    teacher: Annotated[str | None, Option(help="Compare with this checkpoint's images (LPIPS).")] = None,
    metric_weights: Annotated[Path | None, Option(help="Folder with the weight files of FID, LPIPS, CLIP.")] = None,
    steps: Annotated[
        int | None, Option(help="Steps of the sampler; 12, or a few-step student's own, when not given.")
    ] = None,
    guidance: Annotated[
        float | None, Option(help="Guidance scale; 4, or a few-step student's own, when not given.")
    ] = None,
    scheduler: Annotated[
        str | None,
        Option(help="As in kdc-edge generate; DPM-Solver++ 2M, or a few-step student's own, when not given."),
    ] = None,
    seed: Annotated[int, Option(help="Seed of the noise.")] = 7,
    vae: Vae = None,
    lora: LoraFiles = None,
    embedding: EmbeddingFiles = None,
    prediction_type: PredictionType = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Measure a checkpoint: on the garden offline, on other data by the metrics whose weight files are here."""
    del config
    need_training("kdc-edge eval")
    from kdc_edge.checkpoints import Additions, open_checkpoint
    from kdc_edge.diffusers_folder import hash_checkpoint, read_model
    from kdc_edge.request import refuse_inpainting
    from kdc_edge.train.quality.evaluate import evaluate_tasks, open_generator
    from kdc_edge.train.quality.metrics import ImageMetrics
    from kdc_edge.train.quality.precisions import refuse_strangers
    from kdc_edge.train.teachers import find_teacher

    if images is not None and images < 2:
        raise InputError(f"--images {images} is too few: use 2 or more")
    checkpoint, run = _find(what)
    checkpoint = open_checkpoint(checkpoint, Additions.parse(vae, lora, embedding, prediction_type), say=say)
    refuse_inpainting(read_model(checkpoint), "kdc-edge eval")
    folders = [folder for given in bundles or () for folder in bundles_in(given)]
    if folders:
        refuse_strangers(folders, hash_checkpoint(checkpoint))
    tasks = _tasks(run, task, caption)
    metrics = ImageMetrics(metric_weights)
    if any(not t.source.startswith("garden:") for t in tasks):
        for line in metrics.missing():
            say(f"not measured: {line}")
    side = read_model(checkpoint).image_size  # of the teacher's images too: LPIPS compares them one with the other
    open_ = partial(open_generator, steps=steps, guidance=guidance, sampler=scheduler)
    measure = partial(
        evaluate_tasks, tasks=_asked(checkpoint, None if task else run, tasks, images), metrics=metrics,
        teacher=open_(find_teacher(teacher), side=side) if teacher else None, seed=seed,
    )  # fmt: skip
    generator = open_(checkpoint, tell=say)
    own = measure(generator)
    document: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "metric": _common_metric(own),
        "scores": _values(own),
        "quality": _quality(own),
        "bundles": [_beside(folder, own, lambda folder: measure(open_(folder))) for folder in folders],
        "run": _history(run),
        "conditions": f"{_counts(own)} images a task, {generator.conditions}, seed {seed}",
    }
    typer.echo(json.dumps(document, indent=2) if as_json else "\n".join(_lines(document)))


def _beside(
    folder: Path, own: Mapping[str, Evaluated], measure: Callable[[Path], Mapping[str, Evaluated]]
) -> dict[str, Any]:
    """A bundle beside its checkpoint; where it cannot be run, the reason."""
    from kdc_edge.bundle import Bundle
    from kdc_edge.hub import label
    from kdc_edge.train.quality.precisions import compare

    found: dict[str, Any] = {"name": label(folder), "folder": str(folder)}
    found["size_bytes"] = Bundle.open(folder).size_bytes
    say(f"evaluating {folder}")
    try:
        other = measure(folder)
    except KdcError as error:
        return {**found, "failure": str(error)}
    return {
        **found,
        "scores": _values(other),
        "quality": _quality(other),
        **asdict(compare(own, other)),
        "failure": None,
    }


def _values(evaluated: Mapping[str, Evaluated]) -> dict[str, dict[str, float]]:
    return {name: found.score.values for name, found in evaluated.items()}


def _quality(evaluated: Mapping[str, Evaluated]) -> dict[str, float]:
    """A row of R."""
    return {name: found.score.quality for name, found in evaluated.items()}


def _common_metric(evaluated: Mapping[str, Evaluated]) -> str:
    """What R is made of: "prompt_accuracy", "-kid"; several where tasks differ."""
    return ", ".join(dict.fromkeys(found.score.metric for found in evaluated.values()))


def _find(what: Path | None) -> tuple[Path, Path | None]:
    """The checkpoint, and the run that it belongs to."""
    from kdc_edge.hub import local

    if what is None and not LATEST.exists():
        raise InputError("no finished run in runs/: name a run or a checkpoint, or make one with kdc-edge train")
    what = local(what) if what else LATEST.resolve()
    checkpoint = what / "checkpoint" if (what / "checkpoint").is_dir() else what
    if (what / "config.json").is_file() and checkpoint == what:
        resume = f"kdc-edge train --resume --out {shlex.quote(str(what))}"
        raise InputError(f"{what} is not finished, it has no checkpoint: {resume} first")
    return checkpoint, run_of(checkpoint)


def _tasks(run: Path | None, task: list[str] | None, caption: list[str] | None) -> tuple[Task, ...]:
    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data.tasks import parse_tasks

    if task:
        return parse_tasks(task, caption or ())
    if caption:
        raise InputError("--caption is for the tasks of --task: name them too")
    if run is None:
        raise InputError("this checkpoint belongs to no run: say what to ask for, e.g. --task flowers=garden:flowers")
    return TrainConfig.load(run).tasks


def _asked(checkpoint: Path, run: Path | None, tasks: tuple[Task, ...], images: int | None) -> dict[str, Asked]:
    """What is asked of each task: a run's own tasks need nothing but what it kept."""
    from kdc_edge.diffusers_folder import hash_checkpoint, read_model
    from kdc_edge.train.quality.evaluate import ask
    from kdc_edge.train.quality.evaluation_set import ask_as_kept

    size = read_model(checkpoint).image_size
    if run is None:
        return {task.name: ask(task, images or IMAGES, size=size) for task in tasks}
    vae = hash_checkpoint(checkpoint / "vae")
    found = {t.name: ask_as_kept(run, t, images, size=size, vae_sha256=vae, usual=IMAGES) for t in tasks}
    for name, asked in found.items():
        if len(asked.prompts) < (images or 0):
            say(f"{name}: {len(asked.prompts)} images: the run kept no more, or there are no more")
    return found


def _counts(evaluated: Mapping[str, Evaluated]) -> str:
    """Images of each task: "32", or "32, 64" where tasks differ."""
    return ", ".join(dict.fromkeys(str(len(found.images)) for found in evaluated.values()))


def _history(run: Path | None) -> dict[str, Any] | None:
    """R and what follows from it, as the run left them; None where there is none that can be read."""
    if run is None or not (run / "results.json").is_file():
        return None
    from kdc_edge.files import read_json

    found: dict[str, Any] = read_json(run / "results.json", CheckpointError)
    if not {"tasks", "metric", "average", "backward_transfer", "forgetting_max_minus_last"} <= found.keys():
        say(f"{run / 'results.json'} is of another kdc-edge: the run's history is left out")
        return None
    return found


def _lines(document: dict[str, Any]) -> list[str]:
    lines = [
        f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        for task, values in document["scores"].items()
    ]
    if document["bundles"]:
        lines += _by_precision(document)
    history = document["run"]
    if history:
        lines += [f"over the run, {history['metric']}:"]
        lines += [
            f"  after {task}: " + ", ".join("-" if v is None else f"{v:.4g}" for v in row)
            for task, row in zip(history["tasks"], history[history["metric"]], strict=True)
        ]
        for name in ("average", "backward_transfer", "forgetting_max_minus_last"):
            if history[name] is not None:
                lines.append(f"  {name.replace('_', ' ')} {history[name]:.4g}")
    return [*lines, f"({document['conditions']})"]


def _by_precision(document: dict[str, Any]) -> list[str]:
    """R's last row for the checkpoint and for every bundle, as a table."""
    from rich.markup import escape
    from rich.table import Table

    from kdc_edge.bench.tables import plain_text
    from kdc_edge.text import megabytes

    table = Table(box=None, pad_edge=False, collapse_padding=True, padding=(0, 2))
    table.add_column("", overflow="fold")
    for header in (*document["quality"], "forgets more", "image PSNR", "size"):
        table.add_column(escape(header), justify="right", overflow="fold")
    table.add_row("checkpoint", *_cells(document["quality"]))
    for row in (row for row in document["bundles"] if not row["failure"]):
        facts = (_more(row["added_forgetting"]), _similar(row), megabytes(row["size_bytes"]))
        table.add_row(escape(row["name"]), *_cells(row["quality"]), *facts)
    failed = [f"{row['name']}: not measured: {row['failure']}" for row in document["bundles"] if row["failure"]]
    lines = plain_text(table, failed).splitlines()
    title = f"the last row of R by precision, {document['metric']}, from the same prompts and noise:"
    return [title, *(f"  {line}" for line in lines)]


def _cells(quality: Mapping[str, float]) -> list[str]:
    return [f"{value:.4g}" for value in quality.values()]


def _more(loss: dict[str, Any] | None) -> str:
    """What is added to forgetting: "0.004 ± 0.006, noise" is less than two standard errors."""
    if loss is None:
        return "-"
    spread = "" if loss["stderr"] is None else f" ± {loss['stderr']:.4f}"
    return f"{loss['mean']:+.4f}{spread}{', noise' if loss['within_noise'] and loss['mean'] else ''}"


def _similar(row: dict[str, Any]) -> str:
    """ "equal", or the median and the worst PSNR: "41.2 dB, worst 30.1"."""
    from kdc_edge.text import decibels

    if row["worst_psnr_db"] is None:
        return "equal"
    return f"{decibels(row['psnr_db'])}, worst {row['worst_psnr_db']:.1f}"

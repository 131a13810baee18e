"""kdc-edge eval: how good a checkpoint's pictures are, task by task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from kdc_edge.cli.project import LATEST, Config, need_training, say
from kdc_edge.errors import InputError

if TYPE_CHECKING:
    from kdc_edge.train.data import Task


def evaluate(
    what: Annotated[Path | None, Argument(help="A run, or a checkpoint; the latest run.")] = None,
    task: Annotated[
        list[str] | None, Option(metavar="NAME=SOURCE", help="What to ask for; the run's own tasks.")
    ] = None,
    caption: Annotated[list[str] | None, Option(metavar="[TASK=]TEMPLATE", help="As in kdc-edge train.")] = None,
    pictures: Annotated[int, Option(help="Of each task.")] = 64,
    teacher: Annotated[str | None, Option(help="Compare with this checkpoint's pictures (LPIPS).")] = None,
    metric_weights: Annotated[Path | None, Option(help="Folder with the weight files of FID, LPIPS, CLIP.")] = None,
    steps: Annotated[int, Option(help="Of DPM-Solver++ 2M.")] = 12,
    guidance: Annotated[float, Option(help="Guidance scale.")] = 4.0,
    seed: Annotated[int, Option(help="Of the noise.")] = 7,
    as_json: Annotated[bool, Option("--json", help="One JSON document.")] = False,
    config: Config = None,
) -> None:
    """Measure a checkpoint: of the garden offline, of other data with what weight files are here."""
    del config
    need_training("kdc-edge eval")
    from kdc_edge.train.evaluate import evaluate_checkpoint
    from kdc_edge.train.folders import find_teacher
    from kdc_edge.train.metrics import PictureMetrics

    if pictures < 2:
        raise InputError(f"--pictures {pictures} is too few: use 2 or more")
    checkpoint, run = _find(what)
    tasks = _tasks(run, task, caption)
    metrics = PictureMetrics(metric_weights)
    if any(not t.source.startswith("garden:") for t in tasks):
        for line in metrics.missing():
            say(f"not measured: {line}")
    scores = evaluate_checkpoint(
        checkpoint, tasks, pictures=pictures, metrics=metrics, teacher=find_teacher(teacher) if teacher else None,
        seed=seed, steps=steps, guidance=guidance,
    )  # fmt: skip
    document: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "scores": {name: score.values for name, score in scores.items()},
        "run": _history(run),
        "conditions": f"{pictures} pictures a task, DPM-Solver++ 2M {steps} steps, guidance {guidance:g}, seed {seed}",
    }
    typer.echo(json.dumps(document, indent=2) if as_json else "\n".join(_lines(document)))


def _find(what: Path | None) -> tuple[Path, Path | None]:
    """The checkpoint, and the run that it belongs to."""
    if what is None and not LATEST.exists():
        raise InputError("no finished run in runs/: name a run or a checkpoint, or make one with kdc-edge train")
    what = what or LATEST.resolve()
    checkpoint = what / "checkpoint" if (what / "checkpoint").is_dir() else what
    if (what / "config.json").is_file() and checkpoint == what:
        raise InputError(f"{what} is not finished, it has no checkpoint: kdc-edge train --resume --out {what} first")
    return checkpoint, checkpoint.parent if (checkpoint.parent / "config.json").is_file() else None


def _tasks(run: Path | None, task: list[str] | None, caption: list[str] | None) -> tuple[Task, ...]:
    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data import parse_tasks

    if task:
        return parse_tasks(task, caption or ())
    if run is None:
        raise InputError("this checkpoint belongs to no run: say what to ask for, e.g. --task flowers=garden:flowers")
    return TrainConfig.load(run).tasks


def _history(run: Path | None) -> dict[str, Any] | None:
    """R and what follows from it, as the run left them."""
    if run is None or not (run / "results.json").is_file():
        return None
    from kdc_edge.errors import CheckpointError
    from kdc_edge.files import read_json

    return read_json(run / "results.json", CheckpointError)


def _lines(document: dict[str, Any]) -> list[str]:
    lines = [
        f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        for task, values in document["scores"].items()
    ]
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

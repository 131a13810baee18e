"""kdc-edge quickstart: the whole path on the garden, and a page that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kdc_edge.cli.project import command_line, need_export, need_training, say
from kdc_edge.cli.settings import Given, flags
from kdc_edge.train.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from kdc_edge.bench.record import Report
    from kdc_edge.bundle import Bundle
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.request import Request
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.quality.evaluate import Score


@flags(TrainConfig, "steps", "batch_size", "samples", "eval_images", "seed", steps=250, samples=1200, eval_images=48)
def quickstart(
    given: Given[TrainConfig],
    out: Annotated[Path, Option(help="A new folder for runs, bundles and report.html.")] = Path("quickstart"),
    repeats: Annotated[int | None, Option(help="Of each benchmark; as in kdc-edge bench.")] = None,
) -> None:
    """Train two tasks with and without replay, export, prove, generate, bench: one HTML report."""
    need_training("kdc-edge quickstart")
    need_export("kdc-edge quickstart")
    from kdc_edge.files import atomic_folder
    from kdc_edge.train.data.tasks import Task
    from kdc_edge.train.teachers import find_teacher

    config = given.make(
        teacher=find_teacher("garden"),
        tasks=(Task("flowers", "garden:flowers"), Task("butterflies", "garden:butterflies")),
        save_every=given.values["steps"], log_with="none", keep=1, baselines=False,
    )  # fmt: skip
    with atomic_folder(out) as work:
        _make(config, work, out, repeats)
    typer.echo(out / "report.html")


def _make(config: TrainConfig, work: Path, out: Path, repeats: int | None) -> None:
    """Everything, in `work`, which becomes `out`."""
    from kdc_edge.bench.record import to_json
    from kdc_edge.cli.quickstart_report import Story, write_report
    from kdc_edge.files import write_atomic
    from kdc_edge.image import grid, save_png
    from kdc_edge.train.checkpoint import GARDEN_TEACHER
    from kdc_edge.train.data.sources import GardenSource
    from kdc_edge.train.quality.evaluate import EVALUATION, evaluation_scenes

    trained = _train(config, work / "runs")
    checkpoints = {
        "teacher": GARDEN_TEACHER,
        "student": trained.kept.run_folder / "checkpoint",
        "student without replay": trained.bare.run_folder / "checkpoint",
    }
    bundles = _export(checkpoints["student"], work / "bundles")

    scenes = [evaluation_scenes(GardenSource((s,)), 4)[i] for s in ("flower", "butterfly") for i in range(4)]
    requests = [replace(EVALUATION, prompt=s.caption, seed=config.seed + i) for i, s in enumerate(scenes)]
    images = _generate(checkpoints | {f"bundle {b.root.name}": b.root for b in bundles}, requests)
    folders = [checkpoints["student"], *(b.root for b in bundles)]
    report = _bench(folders, replace(requests[0], steps=20), repeats)
    rows = tuple(replace(row, folder=str(out / Path(row.folder).relative_to(work))) for row in report.rows)
    report = replace(report, rows=rows)
    write_atomic(work / "bench.json", to_json(report))

    shown = [p for name in ("teacher", "student", "bundle onnx-fp16") for p in images[name]]
    save_png(work / "images.png", grid(shown, len(requests)).repeat(2, axis=0).repeat(2, axis=1), None)
    story = Story(
        config=config, teacher_scores=trained.teacher_scores,
        runs={"with replay": trained.kept, "without replay": trained.bare}, prompts=[s.caption for s in scenes],
        conditions=requests[0].conditions, images=images, bundles=bundles, bench=report,
    )  # fmt: skip
    write_report(work / "report.html", story)


@dataclass(frozen=True)
class Trained:
    """The runs with and without replay, and the teacher's own scores by task."""

    kept: Trainer
    bare: Trainer
    teacher_scores: Mapping[str, Score]


def _train(config: TrainConfig, folder: Path) -> Trained:
    """The first task is the same with and without replay, so it is trained once and the runs part after it."""
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.runs import branch_run

    with ProgressBar(3 * config.steps) as progress:
        kept = Trainer(config, folder / "replay")
        teacher_scores = kept.evaluate(teacher=True)
        progress.say("teacher: prompt accuracy " + ", ".join(f"{n} {s.quality:.3f}" for n, s in teacher_scores.items()))
        _follow(kept, progress, "student", until_task=1)
        without = replace(config, replay=0)
        branch_run(kept.run_folder, folder / "no-replay", without)
        bare = Trainer(without, folder / "no-replay", resume=True)
        _follow(kept, progress, "with replay", until_task=2)
        _follow(bare, progress, "without replay", until_task=2)
    return Trained(kept, bare, teacher_scores)


def _follow(trainer: Trainer, progress: ProgressBar, name: str, *, until_task: int) -> None:
    """Consume a run until so many of its tasks are done."""
    from kdc_edge.train.loop import StepDone

    for event in trainer.run():
        if isinstance(event, StepDone):
            progress.step(progress.done + 1, f"{name}: {event.task} loss {event.losses['total']:.3f}")
        else:
            found = ", ".join(f"{n} {s.quality:.3f}" for n, s in event.scores.items())
            progress.say(f"{name}: after {event.task}, prompt accuracy {found}")
            if len(trainer.position.matrix) == until_task < len(trainer.config.tasks):
                return


def _export(checkpoint: Path, folder: Path) -> list[Bundle]:
    """The student in 32 and 16 bits, each proved and verified."""
    from kdc_edge.export.targets import ExportRequest, export_checkpoint

    bundles = []
    for precision in ("fp32", "fp16"):
        say(f"exporting to onnx-{precision} and proving it")
        out = folder / f"onnx-{precision}"
        bundle = export_checkpoint(ExportRequest(checkpoint, out, "onnx", precision, command=command_line()))
        bundle.verify()
        bundles.append(bundle)
    return bundles


def _generate(folders: Mapping[str, Path], requests: Sequence[Request]) -> dict[str, list[np.ndarray]]:
    """Each model's images of the requests, uint8 (H, W, 3)."""
    from kdc_edge.runtimes import open_pipeline

    images = {}
    for name, folder in folders.items():
        say(f"generating with {name}")
        pipeline = open_pipeline(folder)
        images[name] = [pipeline.generate(request) for request in requests]
    return images


def _bench(folders: Sequence[Path], request: Request, repeats: int | None) -> Report:
    """Measure each in fresh processes."""
    from kdc_edge.bench.case import Case
    from kdc_edge.bench.record import Report, here
    from kdc_edge.bench.runner import measure_in_fresh_process

    rows = []
    for folder in folders:
        say(f"measuring {folder.name}")
        rows.append(measure_in_fresh_process(Case(folder, request, repeats)).row)
    return Report(here(), tuple(rows), command=command_line())

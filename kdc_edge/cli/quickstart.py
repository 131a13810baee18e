"""kdc-edge quickstart: the whole path on the garden, and a page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kdc_edge.cli.project import command_line, need_export, need_training, say


def quickstart(
    out: Annotated[Path, Option(help="A new folder for runs, bundles and report.html.")] = Path("quickstart"),
    steps: Annotated[int, Option(help="Training steps of each task.")] = 250,
    batch_size: Annotated[int, Option(help="Samples a step.")] = 16,
    samples: Annotated[int, Option(help="Images of each task.")] = 1200,
    eval_images: Annotated[int, Option(help="Images of each task, after each task.")] = 48,
    repeats: Annotated[int | None, Option(help="Of each benchmark; as in kdc-edge bench.")] = None,
    seed: Annotated[int, Option(help="Of everything random.")] = 0,
) -> None:
    """Train two tasks with and without replay, export, prove, generate, bench: one HTML report."""
    need_training("kdc-edge quickstart")
    need_export("kdc-edge quickstart")
    from dataclasses import replace

    from kdc_edge.bench.record import Report as BenchReport
    from kdc_edge.bench.record import here, to_json
    from kdc_edge.bench.runner import measure_in_fresh_process
    from kdc_edge.cli.progress import Progress
    from kdc_edge.cli.quickstart_report import Story, write_report
    from kdc_edge.export.targets import ExportRequest, export_checkpoint
    from kdc_edge.files import refuse_foreign_folder, write_atomic
    from kdc_edge.image import grid, save_png
    from kdc_edge.runtimes import open_pipeline
    from kdc_edge.train.checkpoint import GARDEN_TEACHER
    from kdc_edge.train.config import TrainConfig
    from kdc_edge.train.data.sources import GardenSource
    from kdc_edge.train.data.tasks import Task
    from kdc_edge.train.loop import StepDone, Trainer
    from kdc_edge.train.quality.evaluate import EVALUATION, evaluation_scenes
    from kdc_edge.train.runs import branch_run

    refuse_foreign_folder(out, None)
    config = TrainConfig(
        teacher=GARDEN_TEACHER, student="garden-student",
        tasks=(Task("flowers", "garden:flowers"), Task("butterflies", "garden:butterflies")),
        steps=steps, batch_size=batch_size, samples=samples, eval_images=eval_images, seed=seed, save_every=steps,
        log_with="none", keep=1,
    )  # fmt: skip

    def follow(trainer: Trainer, progress: Progress, name: str, *, until_task: int) -> None:
        """Consume a run until so many of its tasks are done."""
        for event in trainer.run():
            if isinstance(event, StepDone):
                progress.step(progress.done + 1, f"{name}: {event.task} loss {event.losses['total']:.3f}")
            else:
                found = ", ".join(f"{n} {s.quality:.3f}" for n, s in event.scores.items())
                progress.say(f"{name}: after {event.task}, prompt accuracy {found}")
                if len(trainer.position.matrix) == until_task < len(config.tasks):
                    return

    # The first task is the same with and without replay, so it is trained once and the runs part after it.
    with Progress(3 * steps) as progress:
        kept = Trainer(config, out / "runs" / "replay")
        teacher_scores = kept.evaluate(teacher=True)
        progress.say("teacher: prompt accuracy " + ", ".join(f"{n} {s.quality:.3f}" for n, s in teacher_scores.items()))
        follow(kept, progress, "student", until_task=1)
        without = replace(config, replay=0)
        branch_run(kept.run_folder, out / "runs" / "no-replay", without)
        bare = Trainer(without, out / "runs" / "no-replay", resume=True)
        follow(kept, progress, "with replay", until_task=2)
        follow(bare, progress, "without replay", until_task=2)

    checkpoint = kept.run_folder / "checkpoint"
    bundles = []
    for precision in ("fp32", "fp16"):
        say(f"exporting to onnx-{precision} and proving it")
        folder = out / "bundles" / f"onnx-{precision}"
        request = ExportRequest(checkpoint, folder, "onnx", precision, command=command_line())
        bundles.append(export_checkpoint(request))
        bundles[-1].verify()

    scenes = [evaluation_scenes(GardenSource((s,)), 4)[i] for s in ("flower", "butterfly") for i in (0, 1, 3)]
    requests = [replace(EVALUATION, prompt=s.caption, seed=seed + i) for i, s in enumerate(scenes)]
    images = {}
    sources = {
        "teacher": GARDEN_TEACHER,
        "student": checkpoint,
        "student without replay": bare.run_folder / "checkpoint",
    }
    for name, folder in (sources | {f"bundle {b.root.name}": b.root for b in bundles}).items():
        say(f"generating with {name}")
        pipeline = open_pipeline(folder)
        images[name] = [pipeline.generate(r) for r in requests]

    rows = []
    for folder in (checkpoint, *(b.root for b in bundles)):
        say(f"measuring {folder.name}")
        found = measure_in_fresh_process(folder, replace(requests[0], steps=20), repeats=repeats, warmup=1)
        rows.append(found.row)
    environment = here()
    write_atomic(out / "bench.json", to_json(BenchReport(environment, tuple(rows), command=command_line())))
    shown = [p for name in ("teacher", "student", "bundle onnx-fp16") for p in images[name]]
    save_png(out / "images.png", grid(shown, len(requests)).repeat(2, axis=0).repeat(2, axis=1), None)
    story = Story(
        config=config, teacher_scores=teacher_scores, runs={"with replay": kept, "without replay": bare},
        prompts=[s.caption for s in scenes], conditions=requests[0].conditions, images=images,
        bundles=bundles, rows=rows, environment=environment,
    )  # fmt: skip
    write_report(out / "report.html", story)
    typer.echo(out / "report.html")

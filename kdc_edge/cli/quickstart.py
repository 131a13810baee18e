"""kdc-edge quickstart: the whole path on the garden, and a page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kdc_edge.cli.project import command_line, need_export, need_training, say
from kdc_edge.cli.settings import Given, flags
from kdc_edge.train.config import TrainConfig


@flags(TrainConfig, "steps", "batch_size", "samples", "eval_images", "seed", steps=250, samples=1200, eval_images=48)
def quickstart(
    given: Given[TrainConfig],
    out: Annotated[Path, Option(help="A new folder for runs, bundles and report.html.")] = Path("quickstart"),
    repeats: Annotated[int | None, Option(help="Of each benchmark; as in kdc-edge bench.")] = None,
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
    from kdc_edge.export.onnx.export import export_onnx
    from kdc_edge.files import refuse_foreign_folder, write_atomic
    from kdc_edge.image import grid, save_png
    from kdc_edge.pipeline import Request
    from kdc_edge.runtimes import open_pipeline
    from kdc_edge.train.checkpoint import GARDEN_TEACHER
    from kdc_edge.train.continuing import branch
    from kdc_edge.train.data.sources import GardenSource
    from kdc_edge.train.data.tasks import Task
    from kdc_edge.train.loop import StepDone, Trainer
    from kdc_edge.train.quality.evaluate import evaluation_scenes

    refuse_foreign_folder(out, None)
    config = given.make(
        teacher=GARDEN_TEACHER, tasks=(Task("flowers", "garden:flowers"), Task("butterflies", "garden:butterflies")),
        save_every=given.values["steps"], log_with="none", keep=1,
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
    with Progress(3 * config.steps) as progress:
        kept = Trainer(config, out / "runs" / "replay")
        teacher_scores = {t.name: kept.score(kept.generator_of(kept.teacher), t) for t in config.tasks}
        progress.say("teacher: prompt accuracy " + ", ".join(f"{n} {s.quality:.3f}" for n, s in teacher_scores.items()))
        follow(kept, progress, "student", until_task=1)
        bare = branch(kept.run_folder, out / "runs" / "no-replay", replace(config, replay=0))
        follow(kept, progress, "with replay", until_task=2)
        follow(bare, progress, "without replay", until_task=2)

    checkpoint = kept.run_folder / "checkpoint"
    bundles = []
    for precision in ("fp32", "fp16"):
        say(f"exporting to onnx-{precision} and proving it")
        bundles.append(
            export_onnx(checkpoint, out / "bundles" / f"onnx-{precision}", precision=precision, command=command_line())
        )
        bundles[-1].verify()

    scenes = [evaluation_scenes(GardenSource((s,)), 4)[i] for s in ("flower", "butterfly") for i in (0, 1, 3)]
    requests = [Request(s.caption, steps=12, guidance=4.0, seed=config.seed + i) for i, s in enumerate(scenes)]
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
        prompts=[s.caption for s in scenes], images=images, bundles=bundles, rows=rows, environment=environment,
    )  # fmt: skip
    write_report(out / "report.html", story)
    typer.echo(out / "report.html")

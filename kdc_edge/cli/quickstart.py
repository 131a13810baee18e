"""kdc-edge quickstart: the whole path on the garden, and a page that shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kdc_edge.cli.project import command_line, need_export, need_training, say
from kdc_edge.cli.settings import Given, flags
from kdc_edge.train.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from kdc_edge.bench.case import Case
    from kdc_edge.bench.runner import Measured
    from kdc_edge.request import Request

SHOWN = 4  # images of each task on the page


@flags(
    TrainConfig, "steps", "batch_size", "samples", "eval_images", "eval_steps", "seed",
    steps=250, samples=1200, eval_images=48,
)  # fmt: skip
def quickstart(
    given: Given[TrainConfig],
    out: Annotated[Path, Option(help="A new folder for runs, bundles and report.html.")] = Path("quickstart"),
    repeats: Annotated[int, Option(min=1, help="Images that each row of the benchmark measures.")] = 10,
) -> None:
    """Train two tasks with and without replay, few steps, a small decoder; export, prove, bench: one HTML report."""
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


def _make(config: TrainConfig, work: Path, out: Path, repeats: int) -> None:
    """Everything, in `work`, which becomes `out`."""
    from kdc_edge.bench.case import Case
    from kdc_edge.bench.record import Report, here, to_json
    from kdc_edge.bundle import Bundle
    from kdc_edge.cli.quickstart_report import Story, write_report
    from kdc_edge.cli.quickstart_training import export, train
    from kdc_edge.files import write_atomic
    from kdc_edge.image import grid, save_png
    from kdc_edge.train.quality.evaluate import evaluation_request

    bundles = work / "bundles"
    trained = train(config, work / "runs", bundles / "onnx-fp16")
    student, bundle = trained.kept.checkpoint, Bundle.open(bundles / "onnx-fp16")
    say("exporting few-steps and proving it")
    small = export(trained.few_steps.checkpoint, bundles / "few-steps", command_line(), trained.decoder)

    shown, others = _prompts(config)
    requests = [
        replace(evaluation_request(config), prompt=prompt, seed=config.seed + i) for i, prompt in enumerate(shown)
    ]
    folders = {"teacher": config.teacher, "student": student, "student without replay": trained.bare.checkpoint}
    images = {name: _generate(name, folder, requests) for name, folder in folders.items()}
    guided = Case(bundle.root, replace(requests[0], steps=20), repeats, prompts=(*shown, *others))
    unguided = replace(requests[0], sampler="ddim", guidance=1.0)
    compared = [guided, *(replace(guided, folder=small.root, request=replace(unguided, steps=n)) for n in (4, 2))]
    measured = _bench([replace(guided, folder=student, prompts=()), *compared])
    few_images = {
        f"{found.row.name}, {found.row.steps} steps": list(found.prompt_images[: len(shown)])  # of the same noise
        for found in measured
        if found.row.prompt_quality and found.prompt_images is not None
    }
    rows = [replace(m.row, folder=str(out / Path(m.row.folder).relative_to(work))) for m in measured]
    report = Report(here(), tuple(rows), command=command_line())
    write_atomic(work / "bench.json", to_json(report))

    cells = [p for pixels in (images["teacher"], images["student"], *few_images.values()) for p in pixels]
    save_png(work / "images.png", grid(cells, len(shown)).repeat(2, axis=0).repeat(2, axis=1), None)
    story = Story(
        config=config, trained=trained, prompts=shown, conditions=requests[0].conditions, images=images,
        few_images=few_images, bundles=[bundle, small], bench=report,
    )  # fmt: skip
    write_report(work / "report.html", story)


def _generate(name: str, folder: Path, requests: Sequence[Request]) -> list[np.ndarray]:
    """A model's images of the requests, uint8 (H, W, 3)."""
    from kdc_edge.runtimes import open_pipeline

    say(f"generating with {name}")
    pipeline = open_pipeline(folder)
    return [pipeline.generate(request) for request in requests]


def _prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """Captions that the runs were evaluated on: up to four a task, which the page shows, and half of the others."""
    from kdc_edge.train.quality.evaluate import ask

    captions = [ask(task, config.eval_images, size=64).prompts for task in config.tasks]
    shown = [caption for found in captions for caption in found[:: max(1, len(found) // SHOWN)][:SHOWN]]
    return shown, [caption for found in captions for caption in found if caption not in shown][::2]


def _bench(cases: Sequence[Case]) -> list[Measured]:
    """Measure each in fresh processes, and judge the images of its prompts."""
    from kdc_edge.bench.runner import measure_in_fresh_process
    from kdc_edge.cli.prompt_quality import open_scorer

    measured = []
    for case in cases:
        say(f"measuring {case.folder.name}, {case.request.steps} steps")
        found = measure_in_fresh_process(case)
        if found.prompt_images is not None and case.prompts:
            quality = open_scorer(case.prompts, None)(found.prompt_images)
            found = replace(found, row=replace(found.row, prompt_quality=quality))
        measured.append(found)
    return measured

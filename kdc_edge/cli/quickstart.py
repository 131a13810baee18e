"""kdc-edge quickstart: the whole path on the garden, and a page that shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kdc_edge.cli.project import command_line, need_export, need_training, say
from kdc_edge.cli.settings import Given, flags
from kdc_edge.settings import arguments
from kdc_edge.train.config import FEW_STEP_STAGE, DecoderConfig, TrainConfig

if TYPE_CHECKING:
    import numpy as np

    from kdc_edge.bench.case import Case
    from kdc_edge.bench.runner import Measured
    from kdc_edge.bundle import Bundle
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.request import Request
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.quality.evaluate import Score
    from kdc_edge.train.tools.decoder import DecoderTrainer

SHOWN = 4  # images of each task on the page
DECODER_BATCH = 8  # images
DECODER_IMAGES = 8  # of each task, which the small decoder is judged by


@flags(TrainConfig, "steps", "batch_size", "samples", "eval_images", "seed", steps=250, samples=1200, eval_images=48)
def quickstart(
    given: Given[TrainConfig],
    out: Annotated[Path, Option(help="A new folder for runs, bundles and report.html.")] = Path("quickstart"),
    repeats: Annotated[int | None, Option(help="Of each benchmark; as in kdc-edge bench.")] = None,
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


def _make(config: TrainConfig, work: Path, out: Path, repeats: int | None) -> None:
    """Everything, in `work`, which becomes `out`."""
    from kdc_edge.bench.case import Case
    from kdc_edge.bench.record import Report, here, to_json
    from kdc_edge.cli.quickstart_report import Story, write_report
    from kdc_edge.files import write_atomic
    from kdc_edge.image import grid, save_png
    from kdc_edge.train.quality.evaluate import EVALUATION

    trained = _train(config, work / "runs")
    student = trained.kept.run_folder / "checkpoint"
    bundle = _export(student, work / "bundles" / "onnx-fp16")
    few_steps = trained.few_steps.run_folder / "checkpoint"
    small = _export(few_steps, work / "bundles" / "few-steps", trained.decoder.out / "decoder")

    shown, others = _prompts(config)
    requests = [replace(EVALUATION, prompt=prompt, seed=config.seed + i) for i, prompt in enumerate(shown)]
    folders = {
        "teacher": config.teacher, "student": student,
        "student without replay": trained.bare.run_folder / "checkpoint",
    }  # fmt: skip
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
        config=config, teacher_scores=trained.teacher_scores,
        runs={"with replay": trained.kept, "without replay": trained.bare}, few_steps=trained.few_steps,
        decoder=trained.decoder, prompts=shown, conditions=requests[0].conditions, images=images,
        few_images=few_images, bundles=[bundle, small], bench=report,
    )  # fmt: skip
    write_report(work / "report.html", story)


@dataclass(frozen=True)
class Trained:
    """The runs with and without replay, what follows the former, and the teacher's own scores by task."""

    kept: Trainer
    bare: Trainer
    few_steps: Trainer
    decoder: DecoderTrainer
    teacher_scores: Mapping[str, Score]


def _train(config: TrainConfig, folder: Path) -> Trained:
    """All trainings, two at a time: the student with replay and its few steps; the decoder and the one without replay.

    The first task is the same with and without replay, so it is trained once and the runs part after it.
    """
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.train.loop import Trainer
    from kdc_edge.train.runs.continuing import begin_stage, branch_run
    from kdc_edge.train.tools.decoder import DecoderTrainer

    stage = replace(config, **arguments(config, FEW_STEP_STAGE["phased"]["garden"]), objective="phased")
    stage = replace(stage, steps=max(1, config.steps // 4))
    without = replace(config, replay=0)
    decoding = DecoderConfig(
        tasks=config.tasks, checkpoint=config.teacher, samples=config.samples, steps=3 * config.steps // 2,
        batch_size=DECODER_BATCH, learning_rate=2e-3, seed=config.seed,
        eval_images=min(DECODER_IMAGES, config.eval_images), save_every=3 * config.steps // 2,
    )  # fmt: skip
    kept = Trainer(config, folder / "replay")
    cache = kept.run_folder / "cache"
    for task in config.tasks:
        kept.teacher.latents(task)  # encoded once, for all trainings
    decoder = DecoderTrainer(decoding, folder / "decoder")
    shutil.copytree(cache, decoder.out / "cache")
    total = 3 * config.steps + 2 * stage.steps + decoding.steps
    with ProgressBar(total) as progress, _two_at_a_time() as beside:
        watch = _Watch(progress)
        try:
            decoded = beside.submit(watch.decoder, decoder)
            watch.run(kept, "student", until_task=1)
            branch_run(kept.run_folder, folder / "no-replay", without)
            bare = Trainer(without, folder / "no-replay", resume=True)
            taught = beside.submit(watch.teacher, bare)
            forgot = beside.submit(watch.run, bare, "without replay", until_task=2)
            watch.run(kept, "with replay", until_task=2)
            begin_stage(kept.run_folder, folder / "few-steps", stage)
            shutil.copytree(cache, folder / "few-steps" / "cache")
            few_steps = Trainer(stage, folder / "few-steps", resume=True)
            watch.run(few_steps, "few steps", until_task=2)
            decoded.result()
            teacher_scores = taught.result()
            forgot.result()
        finally:
            watch.stopped.set()
    return Trained(kept, bare, few_steps, decoder, teacher_scores)


@contextmanager
def _two_at_a_time() -> Iterator[ThreadPoolExecutor]:
    """A thread beside this one, each with half of the processor's cores.

    A training on all cores waits at every layer for the slowest of them: on a busy machine it loses most of its speed.
    """
    import torch

    cores = torch.get_num_threads()
    half = max(1, cores // 2)
    torch.set_num_threads(half)
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(half,)) as beside:
            yield beside
    finally:
        torch.set_num_threads(cores)


class _Watch:
    """Consumes the trainings of two threads on one progress bar; `stopped` ends them where they are."""

    def __init__(self, progress: ProgressBar) -> None:
        self.progress, self.stopped, self._lock = progress, Event(), Lock()

    def say(self, what: str, scores: Mapping[str, Score]) -> None:
        self.progress.say(f"{what}: prompt accuracy " + ", ".join(f"{n} {s.quality:.3f}" for n, s in scores.items()))

    def _step(self, text: str) -> None:
        with self._lock:
            self.progress.step(self.progress.done + 1, text)

    def run(self, trainer: Trainer, name: str, *, until_task: int) -> None:
        """Until so many tasks of the run are done."""
        from kdc_edge.train.stepping import StepDone

        for event in trainer.run():
            if self.stopped.is_set():
                return
            if isinstance(event, StepDone):
                self._step(f"{name}: {event.task} loss {event.losses['total']:.3f}")
            else:
                self.say(f"{name}, after {event.task}", event.scores)
                if len(trainer.position.matrix) == until_task < len(trainer.config.tasks):
                    return

    def teacher(self, trainer: Trainer) -> Mapping[str, Score]:
        scores = trainer.evaluate(teacher=True)
        self.say("teacher", scores)
        return scores

    def decoder(self, trainer: DecoderTrainer) -> None:
        """To its end."""
        for event in trainer.run():
            if self.stopped.is_set():
                return
            self._step(f"decoder: {event.psnr_db:.1f} dB")
        found = ", ".join(f"{task} {db:.1f} dB" for task, db in trainer.results["psnr_db"].items())
        self.progress.say(f"small decoder, against the VAE's: {found}")


def _export(checkpoint: Path, out: Path, decoder: Path | None = None) -> Bundle:
    """An ONNX bundle in 16 bits, proved and verified."""
    from kdc_edge.export.targets import ExportRequest, export_checkpoint

    say(f"exporting {out.name} and proving it")
    request = ExportRequest(checkpoint, out, "onnx", "fp16", decoder=decoder, command=command_line())
    bundle = export_checkpoint(request)
    bundle.verify()
    return bundle


def _generate(name: str, folder: Path, requests: Sequence[Request]) -> list[np.ndarray]:
    """A model's images of the requests, uint8 (H, W, 3)."""
    from kdc_edge.runtimes import open_pipeline

    say(f"generating with {name}")
    pipeline = open_pipeline(folder)
    return [pipeline.generate(request) for request in requests]


def _prompts(config: TrainConfig) -> tuple[list[str], list[str]]:
    """The captions that the runs were evaluated on: up to four of each task, which the page shows, and the others."""
    from kdc_edge.train.quality.evaluate import ask

    captions = [ask(task, config.eval_images, size=64).prompts for task in config.tasks]
    shown = [caption for found in captions for caption in found[:: max(1, len(found) // SHOWN)][:SHOWN]]
    return shown, [caption for found in captions for caption in found if caption not in shown]


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

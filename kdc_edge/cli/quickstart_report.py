"""The quickstart's page: what was done and what came of it, composed from the report's blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from kdc_edge.bench.page import benchmark_blocks
from kdc_edge.bench.record import Report, Row
from kdc_edge.bench.tables import time_text
from kdc_edge.bundle import Bundle
from kdc_edge.cli.quickstart_training import Run, Trained
from kdc_edge.files import write_atomic
from kdc_edge.presets import DECODERS
from kdc_edge.report.charts import line_chart
from kdc_edge.report.html import (
    Section,
    bullets,
    data_table,
    heat_table,
    image_grid,
    page,
    paragraph,
    side_by_side,
    tiles,
)
from kdc_edge.text import megabytes
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.quality.matrix import average, forgetting

LOSSES = {
    "total": "weighted total",
    "task": "task",
    "output": "output",
    "soft": "soft targets",
    "feature": "features",
}


@dataclass(frozen=True)
class Story:
    """Everything that the page tells."""

    config: TrainConfig
    trained: Trained
    prompts: Sequence[str]
    conditions: str  # of the images
    images: Mapping[str, Sequence[np.ndarray]]
    few_images: Mapping[str, Sequence[np.ndarray]]  # by the rows of the benchmark that `few_rows` gives
    bundles: Sequence[Bundle]
    bench: Report

    @property
    def runs(self) -> Mapping[str, Run]:
        return {"with replay": self.trained.kept, "without replay": self.trained.bare}


def write_report(path: Path, story: Story) -> None:
    kept = story.runs["with replay"]
    share = average(kept.position.matrix) / np.mean(list(story.trained.teacher.values()))
    sections = [
        Section("In short", [_headline(story, float(share))]),
        Section("Images", _images(story)),
        Section("Few steps", _few_steps(story)),
        Section("Learning", _learning(story)),
        Section("Remembering", _remembering(story)),
        Section("The proof", _proof(story)),
        Section("Speed and size", benchmark_blocks(story.bench.rows, story.bench.environment)),
    ]
    lead = (
        "A student was distilled from the garden's teacher on flowers, then on butterflies, with and without replaying"
        " the flowers' latents, then for few steps without guidance, with a small decoder; exported to ONNX; proved"
        " equal to PyTorch; and benchmarked."
    )
    write_atomic(path, page("kdc-edge quickstart", sections, lead=lead))


def _headline(story: Story, share: float) -> Markup:
    sizes = kept_parameters(story)
    many, few, *_ = few_rows(story)
    lost = {name: forgetting(t.position.matrix) or 0.0 for name, t in story.runs.items()}
    return tiles(
        [
            (f"{share:.0%}", "of the teacher's prompt accuracy is kept by the student"),
            (f"{sizes[1] / sizes[0]:.0%}", "of the teacher's U-Net weights"),
            (f"{lost['with replay']:.3f}", f"forgotten with replay ({lost['without replay']:.3f} without)"),
            (megabytes(story.bundles[0].size_bytes), "for the whole fp16 bundle"),
            (_a_second(few), f"images a second in {few.steps} steps ({_a_second(many)} in {many.steps} guided steps)"),
        ]
    )


def kept_parameters(story: Story) -> tuple[int, int]:
    """Parameters of the teacher's and of the student's U-Net."""
    view = story.trained.view
    return view.teacher_parameters, view.student_parameters


def _images(story: Story) -> list[Markup]:
    return [
        paragraph(f"The same prompts from the same noise: {story.conditions}."),
        image_grid(list(story.images.items()), story.prompts),
    ]


def few_rows(story: Story) -> Sequence[Row]:
    """The rows of the benchmark that are compared: 20 guided steps, then fewer."""
    return story.bench.rows[1:]


def _a_second(row: Row) -> str:
    return "–" if row.image_sec is None else f"{1 / row.image_sec:.1f}"


def _few_steps(story: Story) -> list[Markup]:
    many, few, *_ = few_rows(story)
    stage, decoder = story.trained.few_steps, story.trained.decoder_results
    (parameters,) = (preset.parameters for preset in DECODERS if preset.name == decoder["preset"])
    db = np.mean(list(decoder["psnr_db"].values()))
    cells = []
    for row in few_rows(story):
        values = row.prompt_quality.values if row.prompt_quality else {}
        calls = row.steps * (2 if row.guidance > 1 else 1)
        sampling = f"{row.steps} steps, guidance {row.guidance:g}" if row.guidance > 1 else f"{row.steps} steps"
        quality = [f"{values[key]:.3f}" if key in values else "–" for key in ("prompt_accuracy", "exact")]
        cells.append((f"{row.name}, {sampling}", str(calls), time_text(row.image_sec), _a_second(row), *quality))
    return [
        paragraph(
            f"A second stage of {stage.steps} steps a task teaches the student to make an image in {few.steps}"
            f" steps without guidance, which calls the U-Net {few.steps} times instead of {2 * many.steps}; fewer steps"
            f" may be asked of the same bundle. A small decoder ({parameters / 1e6:.2f} million parameters,"
            f" {decoder['steps']} steps) takes the place of the VAE's: {db:.1f} dB between their images."
        ),
        data_table(
            ("bundle", "U-Net calls", "time", "images a second", "prompt accuracy", "every attribute right"), cells
        ),
        image_grid(list(story.few_images.items()), story.prompts),
        paragraph(
            f"The few-step student with the VAE's decoder: prompt accuracy {average(stage.position.matrix):.3f}. All"
            f" figures of quality are of the same prompts, half of them of combinations that nobody was trained on.",
            small=True,
        ),
    ]


def _learning(story: Story) -> list[Markup]:
    c = story.config
    blocks = [
        paragraph(
            f"{c.steps} steps of {c.batch_size} samples a task. The student starts with the teacher's weights where a"
            " layer survives, and learns from the noise itself, from the teacher's prediction, from its softened"
            " distribution over channels, and from the features of its eight blocks."
        )
    ]
    for name, run in story.runs.items():
        records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        series = {label: _smooth([(r["total"], r["losses"][key]) for r in records]) for key, label in LOSSES.items()}
        blocks.append(line_chart(series, title=f"Losses {name}", x_label="step", y_label="loss", log_y=True))
    return [blocks[0], side_by_side(*blocks[1:])]


def _smooth(points: list[tuple[float, float]], window: int = 15) -> list[tuple[float, float]]:
    """Running means: single steps are too noisy to read."""
    values = np.array([y for _, y in points])
    width = min(window, len(values))
    means = np.convolve(values, np.ones(width) / width, mode="valid")
    return [(points[i + width - 1][0], float(m)) for i, m in enumerate(means)]


def _remembering(story: Story) -> list[Markup]:
    names = [t.name for t in story.config.tasks]
    tables, lines = [], []
    for name, run in story.runs.items():
        matrix = run.position.matrix
        rows = [("teacher", list(story.trained.teacher.values()))]
        rows += [(f"after {task}", [v or 0.0 for v in row]) for task, row in zip(names, matrix, strict=True)]
        tables.append(heat_table(names, rows, title=f"Prompt accuracy {name}", digits=3))
        exact = [(values or {})["exact"] for values in run.position.values[-1]]
        lines.append(
            f"{name}: forgetting {forgetting(matrix):.3f} (maximum minus last); every attribute right at the end:"
            + "".join(f" {task} {value:.0%}" for task, value in zip(names, exact, strict=True))
        )
    count = story.config.eval_images
    return [
        side_by_side(*tables),
        bullets(lines),
        paragraph(
            f"Prompt accuracy: the share of asked attributes that the judge finds in {count} images a task, half of"
            f" them of combinations that nobody was trained on. A share from {count} images with five attributes each"
            f" is good to about {100 * 0.5 / np.sqrt(5 * count):.0f} points.",
            small=True,
        ),
    ]


def _proof(story: Story) -> list[Markup]:
    rows = []
    found: dict[str, None] = {}  # conditions, each once
    for bundle in story.bundles:
        assert bundle.manifest.parity is not None
        for check in bundle.manifest.parity.checks:
            rows.append((bundle.root.name, check.what, check.text, f"{check.threshold_db:.0f} dB"))
        found[f"Reference: {bundle.manifest.parity.reference}. {bundle.manifest.parity.conditions}"] = None
    return [
        data_table(("bundle", "what", "PSNR against PyTorch", "at least"), rows),
        *(paragraph(conditions, small=True) for conditions in found),
    ]

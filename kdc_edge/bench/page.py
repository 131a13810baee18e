"""A report in every format; as one HTML page: the decision, charts, images, every number, conditions, the raw data.

    render(report, "md")
    benchmark_page(report, images)                          # images[i] belongs to report.rows[i], or is None
    benchmark_page(report, images, budget=Budget(max_sec=10, min_psnr_db=30))

Where nobody gave a budget, the decision is for images that differ from PyTorch's by little (30 dB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from markupsafe import Markup

from kdc_edge.bench.budget import Budget, Decision, decide, quality_db, quality_text
from kdc_edge.bench.record import Environment, Report, Row, Timing, to_json
from kdc_edge.bench.reference import image_key
from kdc_edge.bench.tables import (
    RANDOM,
    as_markdown,
    as_text,
    columns,
    conditions,
    notes,
    rows_as_csv,
    time_text,
    unit_of,
)
from kdc_edge.bench.values import Shown, show
from kdc_edge.formats import GOOD_PSNR_DB
from kdc_edge.presets import PRESETS
from kdc_edge.report.charts import stacked_bars
from kdc_edge.report.html import (
    AMPLIFIED,
    Card,
    Section,
    bullets,
    command,
    data_table,
    downloads,
    folded,
    image_cards,
    page,
    paragraph,
    side_by_side,
    tiles,
)
from kdc_edge.report.scatter import Axis, Point, scatter_chart
from kdc_edge.text import megabytes

ReportFormat = Literal["table", "md", "csv", "json", "html"]
Images = Sequence[np.ndarray | None]  # uint8 (N, H, W, 3) a row, one a prompt

GOOD = Budget(min_psnr_db=GOOD_PSNR_DB)
MB = 1e-6  # a byte
# The stages of an image's time, under the names of their sums.
STAGE_GROUPS = {
    "text": ("tokenize", "text_encoder"),
    "U-Net, first step": ("unet_first_step",),
    "U-Net, other steps": ("unet_step",),
    "scheduler": ("scheduler",),
    "decoder": ("vae_decoder",),
    "PNG": ("png",),
}


def render(report: Report, format: ReportFormat, images: Images = ()) -> str:
    """The report as text in one of the formats; the page shows the rows' images."""
    if format == "json":
        return to_json(report)
    if format == "csv":
        return rows_as_csv(report.rows)
    if format == "html":
        return benchmark_page(report, images)
    return (as_markdown if format == "md" else as_text)(show(report.rows), report.environment)


def benchmark_page(report: Report, images: Images = (), *, budget: Budget = GOOD, more: Sequence[str] = ()) -> str:
    """The whole document; `more` are lines for the decision's section. Rows are in the order of their time."""
    decision = decide(report.rows, budget)
    shown = _fastest_first(show(report.rows, images))
    sections = [
        Section("In short", _in_short(shown, decision, more)),
        Section("Speed, memory, size, quality", _scatters(shown, decision)),
        Section("Where the time goes", _bars(shown)),
        Section("Images", _images(shown)),
        Section("Every row", _table(shown, decision)),
        Section("Conditions", [bullets(_conditions(report))]),
        Section("Data", _data(report)),
    ]
    machine = f"{report.environment.processor}, {report.environment.cores or 'unknown'} cores"
    words = [*map(_model, report.rows), *map(_image_size, report.rows), machine]
    subject = ", ".join(dict.fromkeys(filter(None, words)))
    return page(
        decision.title, [section for section in sections if section.blocks], lead=decision.sentence, subject=subject
    )


def benchmark_blocks(rows: Sequence[Row], environment: Environment) -> list[Markup]:
    """Charts, table and conditions, for a section of another report."""
    shown, decision = show(rows), decide(rows, GOOD)
    return [
        *_scatters(shown, decision),
        *_bars(shown),
        *_table(shown, decision),
        paragraph("How it was measured", small=True),
        bullets(conditions(rows, environment), small=True),
    ]


def _fastest_first(shown: Sequence[Shown]) -> list[Shown]:
    """By time; what has none stays in its order at the end."""
    return sorted(shown, key=lambda s: math.inf if s.row.image_sec is None else s.row.image_sec)


def _model(row: Row) -> str:
    """The preset's name, or the size of the U-Net: "kdc-482m", "860M parameters"; whether it is random; or nothing."""
    if row.unet_parameters is None:
        return ""
    names = [preset.name for preset in PRESETS if preset.unet_parameters == row.unet_parameters]
    name = names[0] if names else f"{row.unet_parameters / 1e6:.3g}M parameters"
    return f"{name} with random weights" if row.random_weights else name


def _image_size(row: Row) -> str:
    return f"{row.width} × {row.height} in {row.steps} steps" if row.width and row.height else ""


def _in_short(shown: Sequence[Shown], decision: Decision, more: Sequence[str]) -> list[Markup]:
    blocks: list[Markup] = []
    if (row := decision.row) is not None:
        figures = [
            (time_text(row.image_sec), "for an image"),
            (_megabytes(row.peak_rss_bytes), "of memory at the peak"),
            (_megabytes(row.size_bytes), "on disk"),
            (quality_text(row), "against PyTorch"),
        ]
        blocks += [tiles(figures), command(decision.command or "")]
    random = [RANDOM] if any(s.row.random_weights for s in shown) else []
    lines = [*random, *more, *_superlatives(shown), *_warnings([s.row for s in shown])]
    return [*blocks, bullets(lines)] if lines else blocks


def _warnings(rows: Sequence[Row]) -> list[str]:
    """In a line each what `notes` tells row by row."""
    failed = sum(row.failure is not None for row in rows)
    disturbed = sum(bool(row.disturbance and row.disturbance.verdict) for row in rows)
    lines = [f"{failed} of {len(rows)} rows could not be measured: see every row."] if failed else []
    return lines + (
        [f"The machine was disturbed in {disturbed} of {len(rows)} rows: see every row."] if disturbed else []
    )


def _superlatives(shown: Sequence[Shown]) -> list[str]:
    """The best in each respect, where there is something to compare."""
    measured = [s for s in shown if s.row.timings and s.row.target]
    if len(measured) < 2:
        return []

    def best(title: str, key: Callable[[Row], float | None], text: Callable[[float | None], str]) -> str:
        found = min(measured, key=lambda s: key(s.row) or math.inf)
        return f"{title}: {found.label}, {text(key(found.row))}."

    return [
        best("Fastest", lambda row: row.image_sec, time_text),
        best("Least memory", lambda row: row.peak_rss_bytes, _megabytes),
        best("Smallest", lambda row: row.size_bytes, _megabytes),
    ]


def _scatters(shown: Sequence[Shown], decision: Decision) -> list[Markup]:
    """Memory over time, and quality over size."""
    if not any(s.row.timings for s in shown):
        return []
    budget = decision.budget
    time_unit, sec = unit_of(s.row.image_sec for s in shown)
    speed, quality = [], []
    for s in shown:
        row = s.row
        # The colour says the target, so that the name need not.
        group, name = _group(row), s.label.removeprefix(f"{row.target}-")
        chosen = decision.met and row is decision.row
        if row.image_sec is not None and row.peak_rss_bytes is not None:
            speed.append(Point(name, row.image_sec * sec, row.peak_rss_bytes * MB, group, chosen))
        db = quality_db(row)  # of what cannot run here, too: its export has proved it
        if row.target is not None and row.size_bytes is not None and db is not None and math.isfinite(db):
            quality.append(Point(name, row.size_bytes * MB, db, group, chosen))
    groups = list(dict.fromkeys(_group(s.row) for s in shown))
    charts = [
        scatter_chart(
            speed,
            title="Time and memory: the lower left is best",
            x=Axis(f"time for an image, {time_unit}", _scaled(budget.max_sec, sec), "the most time allowed"),
            y=Axis("peak memory, MB", _scaled(budget.max_memory_bytes, MB), "the most memory allowed"),
            groups=groups,
        ),
        scatter_chart(
            quality,
            title="Size and quality: the upper left is best",
            x=Axis("size on disk, MB", _scaled(budget.max_size_bytes, MB), "the largest size allowed"),
            y=Axis("PSNR to PyTorch, dB", budget.min_psnr_db, f"at least {budget.min_psnr_db or 0:g} dB", linear=True),
            groups=groups,
        ),
    ]
    bundles = [s for s in shown if s.row.target is not None]
    blocks = [side_by_side(*charts)]
    if equal := [s.label for s in bundles if quality_db(s.row) == math.inf]:
        line = f"Equal to the reference to the last bit, so not in the chart of quality: {', '.join(equal)}."
        blocks.append(paragraph(line, small=True))
    if proved := [s.label for s in bundles if s.row.psnr is None and s.row.parity]:
        line = f"In the chart of quality by the proof of their export, which made other images: {', '.join(proved)}."
        blocks.append(paragraph(line, small=True))
    return blocks


def _group(row: Row) -> str:
    return row.target or row.engine or ""


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _bars(shown: Sequence[Shown]) -> list[Markup]:
    """An image's time by stage, and what comes before the first one."""
    measured = [(s.label, s.row.timings) for s in shown if s.row.timings]
    if not measured:
        return []
    warm = {
        label: {
            name: sum(sum(stage.samples_sec) for part in stages if (stage := getattr(t, part)))
            / len(t.end_to_end.samples_sec)
            for name, stages in STAGE_GROUPS.items()
        }
        for label, t in measured
    }
    cold = {}
    for label, t in measured:
        load, compiled = t.load.median_sec, _once(t.compile)
        rest = max(t.cold.median_sec - load - compiled, 0.0)
        cold[label] = {"load": load, "compile": compiled, "the rest, with the first image": rest}
    blocks = []
    for title, bars in (("An image, warm, mean", warm), ("From the start to the first image", cold)):
        unit, scale = unit_of(sum(parts.values()) for parts in bars.values())
        scaled = {label: {part: sec * scale for part, sec in parts.items()} for label, parts in bars.items()}
        blocks.append(stacked_bars(scaled, title=title, unit=unit))
    return [side_by_side(*blocks)]


def _once(timing: Timing | None) -> float:
    return 0.0 if timing is None else timing.median_sec


def _images(shown: Sequence[Shown]) -> list[Markup]:
    """An image of every row, each of another prompt, beside its difference to the reference's of the same request."""
    references = {image_key(s.row): s.pixels for s in shown if s.row.reference and s.pixels is not None}
    cards: list[Card] = []
    several = any(s.row.more_prompts for s in shown)
    for s in shown:
        if s.pixels is None:
            continue
        reference: Sequence[np.ndarray] = () if s.row.reference else list(references.get(image_key(s.row), ()))
        # The next prompt, of those that the reference has shown too where there is one.
        n = len(cards) % (min(len(s.pixels), len(reference)) or len(s.pixels))
        same = n < len(reference) and reference[n].shape == s.pixels[n].shape
        note = "the reference" if s.row.reference else quality_text(s.row)
        if s.row.random_weights:
            note += ", random weights"
        if several:
            note += f"; “{(s.row.prompt, *s.row.more_prompts)[n]}”"
        cards.append(Card(s.label, note, s.pixels[n], reference[n] if same else None))
    if not cards:
        return []
    prompts = dict.fromkeys(s.row.prompt for s in shown if s.pixels is not None)
    line = f"{'; '.join(f'“{prompt}”' for prompt in prompts)}, from the same noise."
    if several:
        line = (
            "An image of each, of one prompt after the other, from the same noise; PSNR is the worst of all prompts'."
        )
    if any(card.reference is not None for card in cards):
        line += f" Beside each image is its difference to the reference's, {AMPLIFIED} times as strong; black is equal."
    if any(s.row.random_weights for s in shown):
        line += f" {RANDOM}"
    return [paragraph(line), image_cards(cards)]


def _table(shown: Sequence[Shown], decision: Decision) -> list[Markup]:
    """The measured rows, the chosen one marked; why others were not measured is folded away."""
    measured = [s for s in shown if s.row.failure is None]
    found = columns(measured)
    cells = list(zip(*(column.cells for column in found), strict=True))
    chosen = [i for i, s in enumerate(measured) if decision.met and s.row is decision.row]
    blocks = [data_table([column.header for column in found], cells, marked=chosen)] if cells else []
    if lines := notes(measured):
        blocks.append(bullets(lines, small=True))
    if failed := notes([s for s in shown if s.row.failure is not None]):
        blocks.append(folded(f"{len(failed)} of {len(shown)} rows were not measured", failed))
    return blocks


def _conditions(report: Report) -> list[str]:
    lines = [f"Measured {report.created}."]
    if report.command:
        lines.append(f"Command: {report.command}")
    return [*conditions(report.rows, report.environment), *lines]


def _data(report: Report) -> list[Markup]:
    return [
        paragraph("Everything that was measured, with all samples; the names are explained in docs/bench-schema.md."),
        downloads(
            [("bench.json", "application/json", to_json(report)), ("bench.csv", "text/csv", rows_as_csv(report.rows))]
        ),
    ]


def _megabytes(size_bytes: float | None) -> str:
    return "unknown" if size_bytes is None else megabytes(size_bytes)

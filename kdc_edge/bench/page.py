"""A benchmark as one HTML page: the verdict first, then charts, images, every number, conditions, and the raw data.

    html = benchmark_page(report, images)                   # images[i] belongs to report.rows[i], or is None
    html = benchmark_page(report, images, budget=Budget(max_sec=10, min_psnr_db=30))

Where nobody gave a budget, the verdict is for images that differ from PyTorch's by little (30 dB).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from kdc_edge.bench.budget import Budget, choose, generate_command, nearest, quality_db, shortfalls
from kdc_edge.bench.record import Environment, Report, Row, Timing, to_json
from kdc_edge.bench.reference import image_key
from kdc_edge.bench.tables import byte_unit_of, bytes_text, columns, conditions, notes, rows_as_csv, time_text, unit_of
from kdc_edge.bench.values import labels, values
from kdc_edge.formats import GOOD_PSNR_DB
from kdc_edge.report.html import (
    AMPLIFIED,
    Card,
    Html,
    Section,
    bullets,
    command,
    data_table,
    downloads,
    image_cards,
    page,
    paragraph,
    side_by_side,
    stacked_bars,
    tiles,
)
from kdc_edge.report.scatter import Axis, Point, scatter_chart

Images = Sequence[np.ndarray | None]  # uint8 (H, W, 3), one a row

GOOD = Budget(min_psnr_db=GOOD_PSNR_DB)
# What an image's time is made of: its name, and the stages that it sums up.
PARTS = {
    "text": ("tokenize", "text_encoder"),
    "U-Net, first step": ("unet_first_step",),
    "U-Net, other steps": ("unet_step",),
    "scheduler": ("scheduler",),
    "decoder": ("vae_decoder",),
    "PNG": ("png",),
}


def benchmark_page(report: Report, images: Images = (), *, budget: Budget = GOOD, more: Sequence[str] = ()) -> str:
    """The whole document; `more` are lines for the verdict's section."""
    rows = report.rows
    title, lead = verdict(rows, budget)
    sections = [
        Section("In short", _in_short(rows, budget, more)),
        Section("Speed, memory, size, quality", _scatters(rows, budget)),
        Section("Where the time goes", _bars(rows)),
        Section("Images", _images(rows, images)),
        Section("Every row", _table(rows)),
        Section("Conditions", [bullets(_conditions(report))]),
        Section("Data", _data(report)),
    ]
    return page(title, [section for section in sections if section.blocks], lead=lead)


def benchmark_blocks(rows: Sequence[Row], environment: Environment) -> list[Html]:
    """Charts, table and conditions, for a section of another report."""
    return [
        *_scatters(rows, GOOD),
        *_bars(rows),
        *_table(rows),
        paragraph("How it was measured", small=True),
        bullets(conditions(rows, environment), small=True),
    ]


def verdict(rows: Sequence[Row], budget: Budget) -> tuple[str, str]:
    """A headline and a sentence: which row to take on this machine, or that there is none."""
    named = dict(zip(map(id, rows), labels(rows), strict=True))
    chosen = choose(rows, budget)
    if chosen is not None:
        found = values(chosen)
        facts = [f"{time_text(found['end_to_end_sec'])} an image"]
        if found["peak_rss_bytes"] is not None:
            facts.append(f"{bytes_text(found['peak_rss_bytes'])} of memory at the peak")
        facts += [f"{bytes_text(found['size_bytes'])} on disk", f"{_db(chosen)} against PyTorch"]
        headline = f"{named[id(chosen)]}: {time_text(found['end_to_end_sec'])}, {bytes_text(found['peak_rss_bytes'])}"
        return headline, f"For this machine and {budget.describe()}: {named[id(chosen)]}, {', '.join(facts)}."
    close = nearest(rows, budget)
    if close is None:
        return "Nothing could be measured", "Every row failed; the reasons stand below."
    missed = ", ".join(s.words for s in shortfalls(close, budget))
    return f"Nothing meets {budget.describe()}", f"The nearest on this machine: {named[id(close)]}, {missed}."


def _in_short(rows: Sequence[Row], budget: Budget, more: Sequence[str]) -> list[Html]:
    shown = choose(rows, budget) or nearest(rows, budget)
    blocks: list[Html] = []
    if shown is not None:
        found = values(shown)
        figures = [
            (time_text(found["end_to_end_sec"]), "for an image"),
            (bytes_text(found["peak_rss_bytes"]), "of memory at the peak"),
            (bytes_text(found["size_bytes"]), "on disk"),
            (_db(shown), "against PyTorch"),
        ]
        blocks += [tiles(figures), command(generate_command(shown))]
    lines = [*more, *_superlatives(rows), *_warnings(rows)]
    return [*blocks, bullets(lines)] if lines else blocks


def _warnings(rows: Sequence[Row]) -> list[str]:
    """In a line each what `notes` tells row by row."""
    failed = sum(row.failure is not None for row in rows)
    noisy = sum(bool(row.disturbance and row.disturbance.verdict) for row in rows)
    lines = [f"{failed} of {len(rows)} rows could not be measured: see every row."] if failed else []
    return lines + ([f"The machine was noisy in {noisy} of {len(rows)} rows: see every row."] if noisy else [])


def _superlatives(rows: Sequence[Row]) -> list[str]:
    """The best in each respect, where there is something to compare."""
    measured = [(label, row) for label, row in zip(labels(rows), rows, strict=True) if row.timings and row.target]
    if len(measured) < 2:
        return []

    def best(what: str, key: Callable[[Row], float | None], show: Callable[[float | None], str]) -> str:
        label, row = min(measured, key=lambda pair: key(pair[1]) or math.inf)
        return f"{what}: {label}, {show(key(row))}."

    return [
        best("Fastest", lambda row: values(row)["end_to_end_sec"], time_text),
        best("Least memory", lambda row: row.peak_rss_bytes, bytes_text),
        best("Smallest", lambda row: row.size_bytes, bytes_text),
    ]


def _scatters(rows: Sequence[Row], budget: Budget) -> list[Html]:
    """Memory over time, and quality over size."""
    chosen = choose(rows, budget)
    named = [(label, row, values(row)) for label, row in zip(labels(rows), rows, strict=True)]
    if not any(row.timings for row in rows):
        return []
    time_unit, sec = unit_of(found["end_to_end_sec"] or 0.0 for _, _, found in named)
    memory_unit, memory = byte_unit_of(found["peak_rss_bytes"] for _, _, found in named)
    size_unit, size = byte_unit_of(found["size_bytes"] for _, _, found in named)
    speed, quality = [], []
    for label, row, found in named:
        # The colour says the target, so that the name need not.
        group, label = row.target or row.engine or "", label.removeprefix(f"{row.target}-")
        stands_out = row is chosen
        if found["end_to_end_sec"] is not None and found["peak_rss_bytes"] is not None:
            x, y = found["end_to_end_sec"] * sec, found["peak_rss_bytes"] * memory
            speed.append(Point(label, x, y, group, stands_out))
        db = quality_db(row)  # of what cannot run here, too: its export has proved it
        if row.target is not None and found["size_bytes"] is not None and db is not None and math.isfinite(db):
            quality.append(Point(label, found["size_bytes"] * size, db, group, stands_out))
    groups = list(dict.fromkeys(row.target or row.engine or "" for row in rows))
    charts = [
        scatter_chart(
            speed,
            title="Time and memory: the lower left is best",
            x=Axis(f"time for an image, {time_unit}", _scaled(budget.max_sec, sec), "the most time allowed"),
            y=Axis(f"peak memory, {memory_unit}", _scaled(budget.max_memory_bytes, memory), "the most memory allowed"),
            groups=groups,
        ),
        scatter_chart(
            quality,
            title="Size and quality: the upper left is best",
            x=Axis(f"size on disk, {size_unit}", _scaled(budget.max_size_bytes, size), "the largest size allowed"),
            y=Axis("PSNR to PyTorch, dB", budget.min_psnr_db, f"at least {budget.min_psnr_db or 0:g} dB", linear=True),
            groups=groups,
        ),
    ]
    equal = [label for label, row, _ in named if row.target is not None and quality_db(row) == math.inf]
    blocks = [side_by_side(*charts)]
    if equal:
        line = f"Equal to the reference to the last bit, so not in the chart of quality: {', '.join(equal)}."
        blocks.append(paragraph(line, small=True))
    if proved := [label for label, row, found in named if row.target and found["psnr"] is None and row.parity]:
        line = f"In the chart of quality by the proof of their export, which made other images: {', '.join(proved)}."
        blocks.append(paragraph(line, small=True))
    return blocks


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _bars(rows: Sequence[Row]) -> list[Html]:
    """An image's time by stage, and what comes before the first one."""
    measured = [(label, row.timings) for label, row in zip(labels(rows), rows, strict=True) if row.timings]
    if not measured:
        return []
    warm = {
        label: {
            part: sum(sum(stage.samples_sec) for name in stages if (stage := getattr(t, name)))
            / len(t.end_to_end.samples_sec)
            for part, stages in PARTS.items()
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


def _images(rows: Sequence[Row], images: Images) -> list[Html]:
    """Every row's image beside its difference to the reference's of the same request."""
    made = [(label, row, p) for label, row, p in zip(labels(rows), rows, images, strict=False) if p is not None]
    references = {image_key(row): pixels for _, row, pixels in made if row.reference}
    cards = []
    for label, row, pixels in made:
        reference = None if row.reference else references.get(image_key(row))
        same = reference is not None and reference.shape == pixels.shape
        note = "the reference" if row.reference else _db(row)
        cards.append(Card(label, note, pixels, reference if same else None))
    if not cards:
        return []
    prompts = list(dict.fromkeys(row.prompt for _, row, _ in made))
    said = "; ".join(f"“{prompt}”" for prompt in prompts)
    line = f"{said}, from the same noise."
    if references:
        line += f" Beside each image is its difference to the reference's, {AMPLIFIED} times as strong; black is equal."
    return [paragraph(line), image_cards(cards)]


def _table(rows: Sequence[Row]) -> list[Html]:
    found = columns(rows)
    cells = list(zip(*(column.cells for column in found), strict=True))
    lines = notes(rows)
    blocks = [data_table([column.header for column in found], cells)] if cells else []
    return [*blocks, bullets(lines, small=True)] if lines else blocks


def _conditions(report: Report) -> list[str]:
    lines = [f"Measured {report.created}."]
    if report.command:
        lines.append(f"Command: {report.command}")
    return [*conditions(report.rows, report.environment), *lines]


def _data(report: Report) -> list[Html]:
    return [
        paragraph("Everything that was measured, with all samples; the names are explained in docs/bench-schema.md."),
        downloads(
            [("bench.json", "application/json", to_json(report)), ("bench.csv", "text/csv", rows_as_csv(report.rows))]
        ),
    ]


def _db(row: Row) -> str:
    db = quality_db(row)
    return "unknown" if db is None else "equal" if db == math.inf else f"{db:.1f} dB"

"""Rows of a benchmark for people and for programs: a terminal table, Markdown, CSV, JSON, or one HTML page.

    print(render(Report(here(), rows), "md"))
    Console().print(table(rows))                  # the same table in colour, for a terminal

The conditions stand below every table: machine, size, steps, guidance, sampler, seed, repeats, warm-up,
what each precision means, versions. Each column of times has one unit. record.py describes the JSON.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdc_edge.bench.record import Environment, Report, Row, to_json
from kdc_edge.bench.values import METRICS, count_threads, labels, timing, values
from kdc_edge.errors import InputError
from kdc_edge.formats import find_format

Format = Literal["table", "md", "csv", "json", "html"]
UNKNOWN = "–"
TABLE_COLUMNS = 120  # characters, where the text goes to no terminal

STAGES = {
    "load": "Load",
    "compile": "Compile",
    "cold": "Cold",
    "tokenize": "Tokens",
    "text_encoder": "Text",
    "unet_first_step": "First step",
    "unet_step": "Step",
    "scheduler": "Scheduler",
    "vae_decoder": "VAE",
    "png": "PNG",
    "end_to_end": "Image",
}


@dataclass(frozen=True)
class Column:
    header: str
    cells: tuple[str, ...]


def render(report: Report, format: Format, images: Sequence[np.ndarray | None] = ()) -> str:
    """The report as text in one of the formats; the page shows the rows' images, uint8 (H, W, 3)."""
    rows, environment = report.rows, report.environment
    if format == "json":
        return to_json(report)
    if format == "csv":
        return rows_as_csv(rows)
    if format == "md":
        return _markdown(rows, environment)
    if format == "html":
        from kdc_edge.bench.page import benchmark_page  # which is made of what stands here

        return benchmark_page(report, images)
    console = Console(file=io.StringIO(), width=TABLE_COLUMNS, force_terminal=False)
    console.print(table(rows))
    for line in (*notes(rows), *conditions(rows, environment)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def table(rows: Sequence[Row]) -> Table:
    """For a terminal; the failures and conditions are lines of their own."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names, engines, *numbers = columns(rows)
    found.add_column("Bundle", overflow="fold")  # the engine stands below the name: numbers need the width
    for column in numbers:
        found.add_column(column.header.replace(",", "").replace(" ", "\n"), justify="right", no_wrap=True)
    for name, engine, *cells in zip(names.cells, engines.cells, *(column.cells for column in numbers), strict=True):
        found.add_row(f"{escape(name)}\n[dim]{escape(engine)}[/dim]", *cells)
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader has to know of single rows: why they failed, and where the machine was noisy."""
    named = list(zip(labels(rows), rows, strict=True))
    return [f"{label} was not measured: {row.failure}" for label, row in named if row.failure] + [
        f"{label}: {row.disturbance.verdict}." for label, row in named if row.disturbance and row.disturbance.verdict
    ]


def conditions(rows: Sequence[Row], environment: Environment) -> list[str]:
    """What a reader needs to know to compare the numbers, line by line."""
    if not rows:
        return []
    timed = [row for row in rows if row.timings] or rows
    processes = _span(len(row.timings.cold.samples_sec) for row in rows if row.timings) or "1"
    fresh = "a fresh process" if processes == "1" else f"{processes} fresh processes"
    size = _values(f"{row.width} × {row.height}" for row in rows if row.width and row.height) or "unknown size"
    lines = [
        f"Image: {size} pixels, {_values(row.steps for row in rows)} steps, "
        f"guidance {_values(f'{row.guidance:g}' for row in rows)}, "
        f"sampler {_values(row.sampler for row in rows)}, "
        f"seed {_values(row.seed for row in rows)}.",
        f"Times are medians of {_span(row.repeats for row in timed)} images after "
        f"{_span(row.warmup for row in timed)} for warm-up, each row in {fresh}, from the prompt to the PNG; "
        "p90 is the 90th percentile; the step column leaves each image's first step out. Cold is the first image "
        "from the start of the process, with everything that it loads.",
        "Peak memory is the most resident memory of a process, loading included. Parity is the PSNR of "
        "whole images against PyTorch in 32 bits as the export proved it; “exact” where they were equal.",
    ]
    if references := _values(row.psnr.reference for row in rows if row.psnr):
        lines.append(f"PSNR compares the image, made from the same noise, with that of {references}.")
    if asked := _values(row.prompt_quality.prompts for row in rows if row.prompt_quality):
        lines.append(f"{asked} prompts, an image each, for {_values(_metrics(rows).values())}.")
    formats = {(row.target, row.precision) for row in rows if row.target and row.precision}
    lines += [
        f"{target}-{precision}: {does}." for target, precision in sorted(formats) if (does := _does(target, precision))
    ]
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    machine = f"{environment.processor}, {environment.cores or 'unknown'} cores"
    return [
        *lines,
        f"Machine: {machine}, {environment.memory_bytes / 2**30:.1f} GiB, {environment.os}.",
        f"Software: Python {environment.python}, {versions}.",
    ]


def columns(rows: Sequence[Row]) -> list[Column]:
    """The table: what every row is, and what was measured."""

    def timed(header: str, pick: Callable[[Row], float | None]) -> Column:
        found = [pick(row) for row in rows]
        unit, scale = unit_of(v for v in found if v is not None)
        return Column(f"{header}, {unit}", tuple(UNKNOWN if v is None else digits(v * scale) for v in found))

    def known(header: str, name: str) -> list[Column]:
        """A column only where some row has the value."""
        found = [values(row)[name] for row in rows]
        cells = tuple(UNKNOWN if v is None else digits(v) for v in found)
        return [Column(header, cells)] if any(v is not None for v in found) else []

    stages = ("cold", "text_encoder", "unet_first_step", "unet_step", "vae_decoder", "end_to_end")
    return [
        Column("Bundle", tuple(labels(rows))),
        Column("Engine", tuple(_engine(row) for row in rows)),
        Column("Size, MB", tuple(_megabytes(row.size_bytes) for row in rows)),
        *(timed(STAGES[s], lambda row, s=s: _median(row, s)) for s in stages),  # type: ignore[misc]
        timed("p90", lambda row: row.timings.end_to_end.p90_sec if row.timings else None),
        Column("Peak, MB", tuple(_megabytes(row.peak_rss_bytes) for row in rows)),
        *known("Energy, J", "energy_joules"),
        Column("PSNR, dB", tuple(_psnr(row) for row in rows)),
        Column("Parity, dB", tuple(_parity(row) for row in rows)),
        *(column for name, title in _metrics(rows).items() for column in known(title.capitalize(), name)),
    ]


def _metrics(rows: Sequence[Row]) -> dict[str, str]:
    """What was measured on prompts, in words."""
    found = {name for row in rows if row.prompt_quality for name in row.prompt_quality.values}
    return {name: name.replace("_", " ") for name in METRICS if name in found and name != "exact"}


def unit_of(values_sec: Iterable[float]) -> tuple[str, float]:
    """One unit for all of them, and what a second is in it."""
    return ("ms", 1000.0) if max(values_sec, default=0.0) < 1 else ("s", 1.0)


def byte_unit_of(counts: Iterable[float | None]) -> tuple[str, float]:
    """The same for bytes, in the decimal units that budgets and disks are measured in."""
    return ("GB", 1e-9) if max((c for c in counts if c is not None), default=0.0) >= 1e9 else ("MB", 1e-6)


def time_text(sec: float | None) -> str:
    """One time with its unit: "249 ms", "14.0 s"."""
    if sec is None:
        return UNKNOWN
    unit, scale = unit_of([sec])
    return f"{digits(sec * scale)} {unit}"


def bytes_text(count: float | None) -> str:
    """One size with its unit: "137 MB", "1.50 GB"."""
    if count is None:
        return UNKNOWN
    unit, scale = byte_unit_of([count])
    return f"{digits(count * scale)} {unit}"


def _median(row: Row, stage: str) -> float | None:
    found = timing(row, stage)
    return None if found is None else found.median_sec


def digits(value: float) -> str:
    """Three significant digits, all digits before the point."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _megabytes(size_bytes: int | None) -> str:
    return UNKNOWN if size_bytes is None else digits(size_bytes / 1e6)


def _psnr(row: Row) -> str:
    if row.psnr is None:
        return "reference" if row.reference else UNKNOWN
    return "exact" if row.psnr.db is None else f"{row.psnr.db:.1f}"


def _parity(row: Row) -> str:
    if row.parity is None:
        return UNKNOWN
    return "exact" if row.parity.psnr_db is None else f"{row.parity.psnr_db:.1f}"


def _engine(row: Row) -> str:
    threads = count_threads(row.threads) if row.threads else None
    return ", ".join(part for part in (row.engine, row.device, threads, row.compute_dtype) if part) or UNKNOWN


def _does(target: str, precision: str) -> str | None:
    try:
        return find_format(target, precision).description
    except InputError:  # a report from a newer kdc-edge
        return None


def _values(found: Iterable[object]) -> str:
    """The distinct values in order: "20", or "20 / 8" where rows differ."""
    return " / ".join(dict.fromkeys(str(value) for value in found))


def _span(found: Iterable[int]) -> str:
    """From the least to the most: "20", or "5 to 28" where rows differ; empty for none."""
    counts = sorted(set(found))
    return " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))


def rows_as_csv(rows: Sequence[Row]) -> str:
    """A line a row, full precision, unknown as an empty field; an infinite PSNR is that of equal images."""
    plain = (
        "name",
        "folder",
        "target",
        "precision",
        "engine",
        "device",
        "threads",
        "low_memory",
        "provider",
        "compute_dtype",
        "steps",
        "guidance",
        "guidance_mode",
        "sampler",
        "width",
        "height",
        "seed",
        "repeats",
        "warmup",
        "prompt",
        "negative_prompt",
        "prompt_sha256",
        "checkpoint_sha256",
        "reference",
    )
    lines = []
    for row in rows:
        line: dict[str, object] = {name: getattr(row, name) for name in plain}
        line |= values(row)
        for stage in STAGES:
            found = timing(row, stage)
            line[f"{stage}_p90_sec"] = found.p90_sec if found else None
            line[f"{stage}_std_sec"] = found.std_sec if found else None
        line["psnr_reference"] = row.psnr.reference if row.psnr else None
        line["noise"] = row.disturbance.verdict if row.disturbance else None
        line["failure"] = row.failure
        lines.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else list(plain), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _markdown(rows: Sequence[Row], environment: Environment) -> str:
    found = columns(rows)
    cells = list(zip(*(column.cells for column in found), strict=True))
    text = markdown_table([column.header for column in found], cells, words=(0, 1))
    lines = [f"- {_markdown_text(line)}" for line in (*notes(rows), *conditions(rows, environment))]
    return "\n".join([text, *lines]) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int]) -> str:
    """A table whose columns stand at the right, but those numbered in `words`."""
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join("---" if number in words else "---:" for number in range(len(header))) + "|",
        *("| " + " | ".join(_markdown_text(cell) for cell in cells) + " |" for cells in rows),
    ]
    return "\n".join(lines) + "\n"


def _markdown_text(text: str) -> str:
    """One line, with nothing in it that Markdown or HTML would read as its own."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\|<>`*_[]" else letter for letter in line)

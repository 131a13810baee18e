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

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdc_edge.bench.page import Html, Section, bar_chart, bullets, data_table, page, paragraph
from kdc_edge.bench.record import Environment, Report, Row, Timing, to_json
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
    "end_to_end": "Picture",
}


@dataclass(frozen=True)
class _Column:
    header: str
    cells: tuple[str, ...]


def render(report: Report, format: Format) -> str:
    """The report as text in one of the formats."""
    rows, environment = report.rows, report.environment
    if format == "json":
        return to_json(report)
    if format == "csv":
        return _csv(rows)
    if format == "md":
        return _markdown(rows, environment)
    if format == "html":
        return page("Benchmark", [Section("Results", benchmark_blocks(rows, environment))])
    console = Console(file=io.StringIO(), width=TABLE_COLUMNS, force_terminal=False)
    console.print(table(rows))
    for line in (*failures(rows), *conditions(rows, environment)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def table(rows: Sequence[Row]) -> Table:
    """For a terminal; the failures and conditions are lines of their own."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names, engines, *numbers = _columns(rows)
    found.add_column("Bundle", overflow="fold")  # the engine stands below the name: numbers need the width
    for column in numbers:
        found.add_column(column.header.replace(",", "").replace(" ", "\n"), justify="right", no_wrap=True)
    for name, engine, *cells in zip(names.cells, engines.cells, *(column.cells for column in numbers), strict=True):
        found.add_row(f"{escape(name)}\n[dim]{escape(engine)}[/dim]", *cells)
    return found


def benchmark_blocks(rows: Sequence[Row], environment: Environment) -> list[Html]:
    """The table, a chart of the time a picture takes, and the conditions, for an HTML report."""
    columns = _columns(rows)
    cells = list(zip(*(column.cells for column in columns), strict=True))
    blocks = [data_table([column.header for column in columns], cells)]
    if failed := failures(rows):
        blocks.append(bullets(failed))
    times = {row.name: row.timings.end_to_end.median_sec for row in rows if row.timings}
    if times:
        unit, scale = _unit(times.values())
        scaled = {name: sec * scale for name, sec in times.items()}
        blocks.append(bar_chart(scaled, title="Time for one picture, median", unit=unit))
    return [
        *blocks,
        paragraph("How it was measured", small=True),
        bullets(conditions(rows, environment), small=True),
    ]


def failures(rows: Sequence[Row]) -> list[str]:
    return [f"{row.name} failed: {row.failure}" for row in rows if row.failure]


def conditions(rows: Sequence[Row], environment: Environment) -> list[str]:
    """What a reader needs to know to compare the numbers, line by line."""
    if not rows:
        return []
    size = _values(f"{row.width} × {row.height}" for row in rows if row.width and row.height) or "unknown size"
    lines = [
        f"Picture: {size} pixels, {_values(row.steps for row in rows)} steps, "
        f"guidance {_values(f'{row.guidance:g}' for row in rows)}, "
        f"sampler {_values(row.sampler for row in rows)}, "
        f"seed {_values(row.seed for row in rows)}.",
        f"Times are medians of {_values(row.repeats for row in rows)} pictures after "
        f"{_values(row.warmup for row in rows)} for warm-up, each bundle in a fresh process; p90 is the 90th "
        "percentile; the step column leaves each picture's first step out.",
        "Peak memory is the most resident memory of that process, loading included. Parity is the PSNR of "
        "whole pictures against PyTorch in 32 bits; “exact” where they were equal.",
    ]
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


def _columns(rows: Sequence[Row]) -> list[_Column]:
    def timed(header: str, pick: Callable[[Row], float | None]) -> _Column:
        values = [pick(row) for row in rows]
        unit, scale = _unit(v for v in values if v is not None)
        return _Column(f"{header}, {unit}", tuple(UNKNOWN if v is None else digits(v * scale) for v in values))

    stages = ("load", "text_encoder", "unet_first_step", "unet_step", "vae_decoder", "end_to_end")
    return [
        _Column("Bundle", tuple(row.name for row in rows)),
        _Column("Engine", tuple(_engine(row) for row in rows)),
        _Column("Size, MiB", tuple(_mib(row.size_bytes) for row in rows)),
        *(timed(STAGES[s], lambda row, s=s: _median(row, s)) for s in stages),  # type: ignore[misc]
        timed("p90", lambda row: row.timings.end_to_end.p90_sec if row.timings else None),
        _Column("Peak, MiB", tuple(_mib(row.peak_rss_bytes) for row in rows)),
        _Column("Parity, dB", tuple(_parity(row) for row in rows)),
    ]


def _unit(values_sec: Iterable[float]) -> tuple[str, float]:
    """One unit for all of them, and what a second is in it."""
    return ("ms", 1000.0) if max(values_sec, default=0.0) < 1 else ("s", 1.0)


def _timing(row: Row, stage: str) -> Timing | None:
    found: Timing | None = getattr(row.timings, stage, None)
    return found


def _median(row: Row, stage: str) -> float | None:
    timing = _timing(row, stage)
    return None if timing is None else timing.median_sec


def digits(value: float) -> str:
    """Three significant digits, all digits before the point."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _mib(size_bytes: int | None) -> str:
    return UNKNOWN if size_bytes is None else digits(size_bytes / 2**20)


def _parity(row: Row) -> str:
    if row.parity is None:
        return UNKNOWN
    return "exact" if row.parity.psnr_db is None else f"{row.parity.psnr_db:.1f}"


def _engine(row: Row) -> str:
    threads = f"{row.threads} threads" if row.threads else None
    return ", ".join(part for part in (row.engine, row.device, threads) if part) or UNKNOWN


def _does(target: str, precision: str) -> str | None:
    try:
        return find_format(target, precision).does
    except InputError:  # a report from a newer kdc-edge
        return None


def _values(values: Iterable[object]) -> str:
    """The distinct values in order: "20", or "20 / 8" where rows differ."""
    return " / ".join(dict.fromkeys(str(value) for value in values))


def _csv(rows: Sequence[Row]) -> str:
    """A line a row, full precision, unknown as an empty field."""
    plain = (
        "name",
        "folder",
        "target",
        "precision",
        "engine",
        "device",
        "threads",
        "size_bytes",
        "steps",
        "guidance",
        "sampler",
        "width",
        "height",
        "seed",
        "repeats",
        "warmup",
        "prompt",
        "negative_prompt",
    )
    lines = []
    for row in rows:
        line: dict[str, object] = {name: getattr(row, name) for name in plain}
        line["parity_psnr_db"] = row.parity.psnr_db if row.parity else None
        line["parity_threshold_db"] = row.parity.threshold_db if row.parity else None
        for stage in STAGES:
            timing = _timing(row, stage)
            line[f"{stage}_median_sec"] = timing.median_sec if timing else None
            line[f"{stage}_p90_sec"] = timing.p90_sec if timing else None
        line["peak_rss_bytes"], line["failure"] = row.peak_rss_bytes, row.failure
        lines.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else list(plain), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _markdown(rows: Sequence[Row], environment: Environment) -> str:
    columns = _columns(rows)
    lines = [
        "| " + " | ".join(column.header for column in columns) + " |",
        "|" + "|".join("---" if number < 2 else "---:" for number in range(len(columns))) + "|",
    ]
    for cells in zip(*(column.cells for column in columns), strict=True):
        lines.append("| " + " | ".join(_markdown_text(cell) for cell in cells) + " |")
    lines.append("")
    lines += [f"- {_markdown_text(line)}" for line in (*failures(rows), *conditions(rows, environment))]
    return "\n".join(lines) + "\n"


def _markdown_text(text: str) -> str:
    """One line, with nothing in it that Markdown or HTML would read as its own."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\|<>`*_[]" else letter for letter in line)

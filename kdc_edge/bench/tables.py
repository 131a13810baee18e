"""Rows of a benchmark as a terminal table, Markdown and CSV. page.py has the function for every format.

    shown = show(rows)
    print(as_markdown(shown, here()))
    Console().print(table(shown))                 # the same table in colour, for a terminal

The conditions stand below every table: machine, size, steps, guidance, sampler, seed, repeats, warm-up,
the meaning of each precision, versions. Each column of times has one unit. record.py describes the JSON.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from kdc_edge.bench.record import Environment, Row
from kdc_edge.bench.values import METRICS, Shown, count_threads, timing, values
from kdc_edge.errors import InputError
from kdc_edge.formats import find_format
from kdc_edge.text import csv_cell, decibels, gigabytes, markdown_table

UNKNOWN = "–"
TABLE_COLUMNS = 120  # characters, where the text goes to no terminal
NAME_COLUMNS = 40  # of a bundle's name; a longer one has more lines

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


def as_text(shown: Sequence[Shown], environment: Environment) -> str:
    """The table, notes and conditions without colours; the table is wider than 120 characters where it has to be."""
    return plain_text(table(shown), [*notes(shown), *conditions([s.row for s in shown], environment)], whole=True)


def as_markdown(shown: Sequence[Shown], environment: Environment) -> str:
    found = columns(shown)
    head = [column.header for column in found]
    cells = zip(*(map(markdown_text, column.cells) for column in found), strict=True)
    text = markdown_table(head, cells, align="ll" + "r" * (len(head) - 2))
    lines = [*notes(shown), *conditions([s.row for s in shown], environment)]
    return "\n".join([text, *(f"- {markdown_text(line)}" for line in lines)]) + "\n"


def plain_text(table: Table, lines: Iterable[str], *, whole: bool = False) -> str:
    """A table and the lines below it, as a terminal without colours shows them; `whole` cuts no number."""
    console = Console(file=io.StringIO(), width=TABLE_COLUMNS, force_terminal=False)
    if whole:
        console.width = max(TABLE_COLUMNS, Measurement.get(console, console.options.update(width=1000), table).minimum)
    with console.capture() as captured:
        console.print(table)
        for line in lines:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def table(shown: Sequence[Shown]) -> Table:
    """For a terminal; the failures and conditions are lines of their own."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    names, engines, *numbers = columns(shown)
    found.add_column("Bundle", overflow="fold", max_width=NAME_COLUMNS)  # the engine below it: numbers need the width
    for column in numbers:
        found.add_column(column.header.replace(",", "").replace(" ", "\n"), justify="right", no_wrap=True)
    for name, engine, *cells in zip(names.cells, engines.cells, *(column.cells for column in numbers), strict=True):
        found.add_row(f"{escape(name)}\n[dim]{escape(engine)}[/dim]", *cells)
    return found


RANDOM = "The weights are random: time, memory and equality are measured, and the images are noise."


def notes(shown: Sequence[Shown]) -> list[str]:
    """What a reader has to know of single rows: why they failed, and where the machine was disturbed."""
    failed = [f"{s.label} was not measured: {s.row.failure}" for s in shown if s.row.failure]
    disturbed = [(s.label, s.row.disturbance.verdict) for s in shown if s.row.disturbance]
    return failed + [f"{label}: {verdict}." for label, verdict in disturbed if verdict]


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
        "whole images against PyTorch in 32 bits as the export proved it; “equal” where no pixel differs.",
    ]
    if any(row.random_weights for row in rows):
        lines.insert(0, RANDOM)
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
        f"Machine: {machine}, {gigabytes(environment.memory_bytes)}, {environment.os}.",
        f"Software: Python {environment.python}, {versions}.",
    ]


def columns(shown: Sequence[Shown]) -> list[Column]:
    """The table: what every row is, and what was measured."""
    rows = [s.row for s in shown]
    numbers = [values(row) for row in rows]

    def known(header: str, name: str) -> list[Column]:
        """A column only where some row has the value."""
        found = [one[name] for one in numbers]
        cells = tuple(UNKNOWN if v is None else digits(v) for v in found)
        return [Column(header, cells)] if any(v is not None for v in found) else []

    stages = ("cold", "text_encoder", "unet_first_step", "unet_step", "vae_decoder", "end_to_end")
    return [
        Column("Bundle", tuple(s.label for s in shown)),
        Column("Engine", tuple(_engine(row) for row in rows)),
        *_own(rows),
        Column("Size, MB", tuple(_megabytes(row.size_bytes) for row in rows)),
        *(_timed(STAGES[stage], [one[f"{stage}_sec"] for one in numbers]) for stage in stages),
        _timed("p90", [row.timings.end_to_end.p90_sec if row.timings else None for row in rows]),
        Column("Peak, MB", tuple(_megabytes(row.peak_rss_bytes) for row in rows)),
        *known("Energy, J", "energy_joules"),
        Column("PSNR, dB", tuple("reference" if row.reference and not row.psnr else _db(row.psnr_db) for row in rows)),
        Column("Parity, dB", tuple(_db(row.parity_db) for row in rows)),
        *(column for name, title in _metrics(rows).items() for column in known(title.capitalize(), name)),
    ]


def _own(rows: Sequence[Row]) -> list[Column]:
    """Steps, sampler and guidance, which a bundle may have of its own, where bundles differ in them.

    Where the rows of one bundle differ, their labels say it.
    """
    groups = [[row for row in rows if row.folder == folder] for folder in {row.folder for row in rows}]
    measured = [row for row in rows if row.timings is not None]
    return [
        Column(header, tuple(show(row) for row in rows))
        for header, name, show in (
            ("Steps", "steps", lambda row: str(row.steps)),
            ("Sampler", "sampler", lambda row: row.sampler),
            ("Guidance", "guidance", lambda row: f"{row.guidance:g}"),
        )
        if _differ(measured, name) and not any(_differ(group, name) for group in groups)
    ]


def _differ(rows: Sequence[Row], name: str) -> bool:
    return len({getattr(row, name) for row in rows}) > 1


def _timed(header: str, found_sec: Sequence[float | None]) -> Column:
    unit, scale = unit_of(found_sec)
    return Column(f"{header}, {unit}", tuple(UNKNOWN if v is None else digits(v * scale) for v in found_sec))


def _metrics(rows: Sequence[Row]) -> dict[str, str]:
    """What was measured on prompts, in words."""
    found = {name for row in rows if row.prompt_quality for name in row.prompt_quality.values}
    return {name: name.replace("_", " ") for name in METRICS if name in found and name != "exact"}


def unit_of(values_sec: Iterable[float | None]) -> tuple[str, float]:
    """One unit for all of them, and what a second is in it."""
    return ("ms", 1000.0) if max((v for v in values_sec if v is not None), default=0.0) < 1 else ("s", 1.0)


def time_text(sec: float | None) -> str:
    """One time with its unit: "249 ms", "14.0 s"."""
    if sec is None:
        return UNKNOWN
    unit, scale = unit_of([sec])
    return f"{digits(sec * scale)} {unit}"


def digits(value: float) -> str:
    """Three significant digits, all digits before the point."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def _megabytes(size_bytes: int | None) -> str:
    return UNKNOWN if size_bytes is None else digits(size_bytes / 1e6)


def _db(psnr_db: float | None) -> str:
    """The number alone, for a column whose header has the unit."""
    return UNKNOWN if psnr_db is None else decibels(psnr_db).removesuffix(" dB")


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


CSV_NAMES = (
    "name", "folder", "target", "precision", "engine", "device", "threads", "low_memory", "provider", "compute_dtype",
    "steps", "guidance", "guidance_mode", "sampler", "width", "height", "seed", "repeats", "warmup", "prompt",
    "negative_prompt", "prompt_sha256", "checkpoint_sha256", "reference",
)  # fmt: skip


def rows_as_csv(rows: Sequence[Row]) -> str:
    """A line a row, full precision, unknown as an empty field; an infinite PSNR is that of equal images."""
    lines = []
    for row in rows:
        line: dict[str, object] = {name: getattr(row, name) for name in CSV_NAMES}
        line |= values(row)
        for stage in STAGES:
            found = timing(row, stage)
            line[f"{stage}_p90_sec"] = found.p90_sec if found else None
            line[f"{stage}_std_sec"] = found.std_sec if found else None
        line["psnr_reference"] = row.psnr.reference if row.psnr else None
        line["disturbance"] = row.disturbance.verdict if row.disturbance else None
        line["failure"] = row.failure
        lines.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else CSV_NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in line.items()} for line in lines)
    return out.getvalue()


def markdown_text(text: str) -> str:
    """One line, with nothing in it that Markdown or HTML would read as its own; `markdown_table` escapes "|"."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\<>`*_[]" else letter for letter in line)

"""Two reports side by side, for people and for programs: a terminal table, Markdown, CSV or JSON.

print(render_changes(compare(old, new), "table"))
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdc_edge.bench.compare import Change
from kdc_edge.bench.tables import TABLE_COLUMNS, UNKNOWN, digits, markdown_table
from kdc_edge.errors import InputError

HEADER = ("Row", "What", "Old", "New", "Ratio", "95 % interval", "Verdict")
TITLES = {
    "end_to_end_sec": "image",
    "unet_step_sec": "U-Net step",
    "vae_decoder_sec": "decoder",
    "cold_sec": "cold",
    "peak_rss_bytes": "peak memory",
    "size_bytes": "size",
    "energy_joules": "energy",
}
UNITS = {"_sec": ("s", 1.0), "_bytes": ("MB", 1e-6), "_joules": ("J", 1.0)}
NOTE = (
    "Ratios are new / old of the medians; an interval that holds 1, or a difference below 5 % from fewer than three"
    " processes a side, is within the noise. Measure a bundle several times in one report to see smaller differences."
)


def render_changes(changes: Sequence[Change], format: str) -> str:
    """The changes as text; raises InputError for a format that there is not."""
    if format == "json":
        return json.dumps([asdict(change) for change in changes], indent=2, allow_nan=False) + "\n"
    if format == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, [f.name for f in fields(Change)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(change) for change in changes)
        return out.getvalue()
    rows = [_cells(change) for change in changes]
    if format == "md":
        return f"{markdown_table(HEADER, rows, words=(0, 1, 6))}\n{NOTE}\n"
    if format != "table":
        raise InputError(f"--compare has no --format {format}: choose from table, md, csv, json")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, header in enumerate(HEADER):
        table.add_column(header, justify="left" if number in (0, 1, 6) else "right", overflow="fold")
    for cells in rows:
        table.add_row(*map(escape, cells))
    console = Console(file=io.StringIO(), width=TABLE_COLUMNS, force_terminal=False)
    console.print(table)
    console.print(NOTE, highlight=False)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO from above
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _cells(change: Change) -> tuple[str, ...]:
    interval = UNKNOWN if change.low is None else f"{change.low:.2f} to {change.high:.2f}"
    return (
        change.what,
        TITLES.get(change.value, change.value),
        _with_unit(change.old, change.value),
        _with_unit(change.new, change.value),
        UNKNOWN if change.ratio is None else f"{change.ratio:.3f}",
        interval,
        change.verdict,
    )


def _with_unit(value: float | None, name: str) -> str:
    if value is None:
        return UNKNOWN
    unit, scale = next(found for end, found in UNITS.items() if name.endswith(end))
    return f"{digits(value * scale)} {unit}"

"""Two reports side by side: ratios with their spread, and whether a difference is more than chance.

    changes = compare(read_report(Path("old.json")), read_report(Path("new.json")))
    print(render_changes(changes, "table"))

Rows belong together when they are the same thing: target, precision, engine, device, threads and request; the name
decides where that is not enough. Rows of one report that are alike are processes of one measurement.

A ratio of times is new / old of the medians; its interval is the middle 95 % of 2000 bootstrap draws (Efron 1979) from
all samples: first among the processes, then within each. What one process differs from the next is not in the samples
of one, so differences below 5 % do not count unless both sides have three. A row counts as one process, for it does not
tell the samples of several apart.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from kdc_edge.bench.record import Report, Row
from kdc_edge.bench.tables import UNKNOWN, digits, markdown_text, plain_text
from kdc_edge.bench.values import count_threads, timing, values
from kdc_edge.errors import unknown_choice
from kdc_edge.text import csv_cell, markdown_table, megabytes

DRAWS = 2000
MIDDLE = (2.5, 97.5)  # percentiles
MIN_DIFFERENCE = 0.05
MIN_PROCESSES = 3  # from which on the interval alone decides
TIMED = {"end_to_end": "image", "unet_step": "U-Net step", "vae_decoder": "decoder", "cold": "cold"}
SIZES = {"peak_rss_bytes": "peak memory", "size_bytes": "size", "energy_joules": "energy"}
TITLES = {f"{stage}_sec": title for stage, title in TIMED.items()} | SIZES
HEADER = ("Row", "What", "Old", "New", "Ratio", "95 % interval", "Verdict")
NOTE = (
    "Ratios are new / old of the medians; an interval that holds 1, or a difference below 5 % from fewer than three"
    " rows a side, is within the noise. Name a bundle three times in one report to see smaller differences."
)


@dataclass(frozen=True)
class Change:
    """One value of one row, before and after; None where it is not known."""

    what: str  # the row
    value: str  # "end_to_end_sec", "peak_rss_bytes"
    old: float | None
    new: float | None
    ratio: float | None  # new / old
    low: float | None  # of the 95 % interval of the ratio; None for values without samples enough
    high: float | None
    verdict: str


def compare(old: Report, new: Report) -> list[Change]:
    """Every value of every row that is in one of the reports, in the order of the old one."""
    changes = []
    for before, after in _pairs(_grouped(old.rows), _grouped(new.rows)):
        what = _name((before or after)[0])
        if not before or not after:
            missing = "the new report" if not after else "the old report"
            changes.append(Change(what, "", None, None, None, None, None, f"not in {missing}"))
            continue
        failed = [f"{side}: {row.failure}" for side, rows in (("old", before), ("new", after)) for row in rows[:1]
                  if row.failure]  # fmt: skip
        if failed:
            changes.append(Change(what, "", None, None, None, None, None, "; ".join(failed)))
            continue
        changes += [_time(what, stage, before, after) for stage in TIMED]
        changes += [_size(what, value, before, after) for value in SIZES]
    return [c for c in changes if not c.value or c.old is not None or c.new is not None]


def ratio_interval(old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The 95 % interval of new / old of the medians of processes' samples; None where a side has one sample in all."""
    if sum(map(len, old)) < 2 or sum(map(len, new)) < 2:
        return None
    rng = np.random.default_rng(0)
    low, high = np.percentile(_medians(new, rng) / _medians(old, rng), MIDDLE)
    return float(low), float(high)


def _medians(processes: Sequence[Sequence[float]], rng: np.random.Generator) -> np.ndarray:
    """(DRAWS,) medians of processes' medians, drawn anew with replacement on both levels."""
    drawn = [np.median(rng.choice(np.array(p), (DRAWS, len(processes), len(p))), axis=2) for p in processes]
    medians = np.stack(drawn)  # (process, draw, place)
    chosen = rng.integers(len(processes), size=(DRAWS, len(processes)))
    draws, places = np.indices(chosen.shape)
    return np.asarray(np.median(medians[chosen, draws, places], axis=1))


def _time(what: str, stage: str, old: Sequence[Row], new: Sequence[Row]) -> Change:
    samples = [[found.samples_sec for row in side if (found := timing(row, stage))] for side in (old, new)]
    name = f"{stage}_sec"
    if not all(samples):
        return Change(what, name, None, None, None, None, None, "not measured on both sides")
    before, after = (float(np.median([np.median(s) for s in side])) for side in samples)
    if before <= 0:
        return Change(what, name, before, after, None, None, None, "too short to compare")
    ratio, interval = after / before, ratio_interval(*samples)
    if interval is None:
        return Change(what, name, before, after, ratio, None, None, "one sample a side: its spread is not known")
    few = min(map(len, samples)) < MIN_PROCESSES
    within = interval[0] <= 1 <= interval[1] or (few and abs(ratio - 1) < MIN_DIFFERENCE)
    verdict = "within the noise" if within else ("slower" if ratio > 1 else "faster")
    sides = (("old", old), ("new", new))
    disturbed = [side for side, rows in sides if any(r.disturbance and r.disturbance.verdict for r in rows)]
    if disturbed and not within:
        verdict += f", but the machine was disturbed ({' and '.join(disturbed)})"
    return Change(what, name, before, after, ratio, *interval, verdict)


def _size(what: str, name: str, old: Sequence[Row], new: Sequence[Row]) -> Change:
    before, after = (max((v for row in side if (v := values(row)[name]) is not None), default=None)
                     for side in (old, new))  # fmt: skip
    if not before or after is None:
        return Change(what, name, before, after, None, None, None, "not known on both sides")
    ratio = after / before
    verdict = "within 1 %" if abs(ratio - 1) < 0.01 else ("more" if ratio > 1 else "less")
    return Change(what, name, before, after, ratio, None, None, verdict)


Grouped = dict[tuple[Hashable, str], list[Row]]


def _grouped(rows: Sequence[Row]) -> Grouped:
    found: Grouped = {}
    for row in rows:
        found.setdefault((_key(row), row.name), []).append(row)
    return found


def _pairs(old: Grouped, new: Grouped) -> list[tuple[list[Row], list[Row]]]:
    """Rows of the same thing and name; then those of the same thing, where there is one such left on each side."""
    taken: set[tuple[Hashable, str]] = set()
    pairs = []
    for key, rows in old.items():
        match: tuple[Hashable, str] | None = key if key in new else None
        if match is None:
            same = [k for k in new if k[0] == key[0] and k not in old]
            alone = [k for k in old if k[0] == key[0] and k not in new] == [key]
            match = same[0] if len(same) == 1 and alone else None
        if match is not None:
            taken.add(match)
        pairs.append((rows, new[match] if match else []))
    return pairs + [([], rows) for key, rows in new.items() if key not in taken]


def _key(row: Row) -> Hashable:
    return (
        row.target, row.precision, row.engine, row.device, row.threads, row.low_memory, row.prompt_sha256, row.steps,
        row.guidance, row.guidance_mode, row.guidance_interval, row.sampler, row.width, row.height, row.seed,
    )  # fmt: skip


def _name(row: Row) -> str:
    threads = f", {count_threads(row.threads)}" if row.threads else ""
    return f"{row.name}, {row.steps} steps of {row.sampler}{threads}"


def render_changes(changes: Sequence[Change], format: str) -> str:
    """The changes as text; raises UsageError for a format that there is not."""
    if format == "json":
        return json.dumps([asdict(change) for change in changes], indent=2, allow_nan=False) + "\n"
    if format == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, [f.name for f in fields(Change)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in asdict(change).items()} for change in changes)
        return out.getvalue()
    rows = [_cells(change) for change in changes]
    if format == "md":
        escaped = ([markdown_text(cell) for cell in cells] for cells in rows)
        return f"{markdown_table(HEADER, escaped, align='llrrrrl')}\n{NOTE}\n"
    if format != "table":
        raise unknown_choice("--format", format, ("table", "md", "csv", "json"), f"--compare has no --format {format}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for header in HEADER:
        words = header in ("Row", "What", "Verdict")
        table.add_column(header, justify="left" if words else "right", overflow="fold")
    for cells in rows:
        table.add_row(*map(escape, cells))
    return plain_text(table, [NOTE])


def _cells(change: Change) -> tuple[str, ...]:
    return (
        change.what,
        TITLES.get(change.value, change.value),
        _with_unit(change.old, change.value),
        _with_unit(change.new, change.value),
        UNKNOWN if change.ratio is None else f"{change.ratio:.3f}",
        UNKNOWN if change.low is None else f"{change.low:.2f} to {change.high:.2f}",
        change.verdict,
    )


def _with_unit(value: float | None, name: str) -> str:
    if value is None:
        return UNKNOWN
    if name.endswith("_bytes"):
        return megabytes(value)
    return f"{digits(value)} {'s' if name.endswith('_sec') else 'J'}"

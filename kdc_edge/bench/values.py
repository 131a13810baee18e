"""The numbers of a row under the names that CSV, limits and comparisons know; labels; limits that decide an exit code.

values(row)["unet_step_sec"], values(row)["psnr"]        # medians; None where unknown
[shown.label for shown in show(rows)]
broken_limits([Limit.parse("psnr=30", "under")], show(rows))
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from kdc_edge.bench.record import Row, Timing, Timings
from kdc_edge.errors import InputError, unknown_choice

STAGES = tuple(f.name for f in fields(Timings))
METRICS = ("prompt_accuracy", "exact", "clip_score")
NAMED: dict[str, Callable[[Any], str]] = {  # what can differ between rows of one bundle, as a label says it
    "engine": str,
    "device": str,
    "threads": lambda threads: count_threads(threads),
    "low_memory": lambda _: "low memory",
    "steps": lambda steps: f"{steps} steps",
    "sampler": str,
    "guidance_mode": str,
    "guidance": lambda guidance: f"guidance {guidance:g}",
}
NAMES = (
    *(f"{stage}_sec" for stage in STAGES), "size_bytes", "peak_rss_bytes", "peak_pss_bytes", "energy_joules",
    "psnr", "parity", *METRICS,
)  # fmt: skip


def timing(row: Row, stage: str) -> Timing | None:
    """None where the row failed, or has no such stage."""
    found: Timing | None = getattr(row.timings, stage, None)
    return found


def values(row: Row) -> dict[str, float | None]:
    """Medians of the stages (`end_to_end_sec`), bytes, joules, and qualities; an equal image's PSNR is infinite."""
    found: dict[str, float | None] = {}
    for stage in STAGES:
        measured = timing(row, stage)
        found[f"{stage}_sec"] = measured.median_sec if measured else None
    found |= {
        "size_bytes": row.size_bytes,
        "peak_rss_bytes": row.peak_rss_bytes,
        "peak_pss_bytes": row.peak_pss_bytes,
        "energy_joules": row.energy_joules,
        "psnr": row.psnr_db,
        "parity": row.parity_db,
    }
    found |= {name: row.prompt_quality.values.get(name) if row.prompt_quality else None for name in METRICS}
    return found


def count_threads(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row, no two the same: of its folder, and what differs between rows of one name."""
    folders: dict[str, set[str]] = {}
    for row in rows:
        folders.setdefault(row.name, set()).add(row.folder)
    names = [row.name if len(folders[row.name]) == 1 else row.folder for row in rows]
    differing = [
        name
        for name in NAMED
        if any(len({getattr(r, name) for r, n in zip(rows, names, strict=True) if n == one}) > 1 for one in set(names))
    ]
    found = [
        ", ".join([name, *(NAMED[d](value) for d in differing if (value := getattr(row, d)))])
        for row, name in zip(rows, names, strict=True)
    ]
    many, seen = Counter(found), Counter[str]()
    for i, label in enumerate(found):
        seen[label] += 1
        if many[label] > 1:
            found[i] = f"{label} ({seen[label]})"
    return found


@dataclass(frozen=True)
class Shown:
    """A row as tables and pages show it."""

    row: Row
    label: str  # no two the same
    pixels: np.ndarray | None = None  # uint8 (N, H, W, 3), one a prompt


def show(rows: Sequence[Row], images: Sequence[np.ndarray | None] = ()) -> list[Shown]:
    """The rows with their labels and, where there are any, their images: images[i] belongs to rows[i]."""
    return [
        Shown(row, label, pixels)
        for row, label, pixels in zip(rows, labels(rows), images or [None] * len(rows), strict=True)
    ]


@dataclass(frozen=True)
class Limit:
    """What a value may not be: `psnr` under 30, `end_to_end_sec` over 10."""

    name: str
    side: Literal["under", "over"]
    bound: float

    @classmethod
    def parse(cls, text: str, side: Literal["under", "over"]) -> Limit:
        """'psnr=30'; raises InputError."""
        name, _, bound = text.partition("=")
        if name not in NAMES:
            raise unknown_choice("", name, NAMES, f"--fail-{side} {text!r:.80}: {name!r:.80} is not measured")
        try:
            number = float(bound)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise InputError(f"--fail-{side} {text!r} is not understood: use {name}=30 or the like")
        return cls(name, side, number)

    def broken_by(self, shown: Shown) -> Iterator[str]:
        """A line where the row's value breaks the limit, or is not known; the reference is not compared with itself."""
        row = shown.row
        if row.failure is not None or (row.reference and self.name == "psnr"):
            return
        value = values(row)[self.name]
        if value is None:
            yield f"{shown.label}: {self.name} is not known"
        elif (self.side == "under" and value < self.bound) or (self.side == "over" and value > self.bound):
            yield f"{shown.label}: {self.name} is {value:.4g}, {self.side} {self.bound:g}"


def broken_limits(limits: Sequence[Limit], rows: Sequence[Shown]) -> list[str]:
    """A line for each limit that is not kept; a row that failed keeps none."""
    failed = [f"{shown.label}: {shown.row.failure}" for shown in rows if shown.row.failure and limits]
    return failed + [line for shown in rows for limit in limits for line in limit.broken_by(shown)]

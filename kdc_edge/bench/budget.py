"""Which row to ship: the cheapest that meets a budget, the nearest where none does. Nothing is measured here.

    decision = decide(rows, Budget(max_sec=10, min_psnr_db=30))
    decision.title, decision.sentence, decision.command

Cheapest, in this order: the most steps (an image of fewer steps is another image, and its PSNR, which compares with
the same steps in PyTorch, does not tell how much worse), the sampler named first, the least time, the least peak
memory, the smallest folder. Times within 5 % of the least count as equal.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from kdc_edge.bench.record import Row
from kdc_edge.bench.tables import time_text
from kdc_edge.bench.values import labels
from kdc_edge.text import decibels, megabytes

EQUAL_TIME = 1.05


@dataclass(frozen=True)
class Budget:
    """What a device or its user allows; None where anything goes."""

    max_size_bytes: int | None = None  # of the folder
    max_sec: float | None = None  # for an image from the prompt to the PNG, warm, median
    max_memory_bytes: int | None = None  # the process's peak, loading included
    min_psnr_db: float | None = None  # of the image against PyTorch's from the same noise, steps and sampler

    def describe(self) -> str:
        """'at most 300 MB, at most 10 s, at least 30 dB'."""
        words = [f"at most {megabytes(self.max_size_bytes)} on disk"] if self.max_size_bytes is not None else []
        words += [f"at most {self.max_sec:g} s an image"] if self.max_sec is not None else []
        words += [f"at most {megabytes(self.max_memory_bytes)} of memory"] if self.max_memory_bytes is not None else []
        words += [f"at least {self.min_psnr_db:g} dB"] if self.min_psnr_db is not None else []
        return ", ".join(words) or "no limit"


@dataclass(frozen=True)
class Shortfall:
    """A limit that a row misses."""

    factor: float  # above 1; infinite where the value is not known
    words: str  # "12.3 s where at most 10 s are asked"


def quality_db(row: Row) -> float | None:
    """PSNR of the image, infinite for an equal one; a reference's own is its export's proof. None: not known."""
    if row.psnr is None and row.reference and row.parity is None:
        return math.inf
    return row.parity_db if row.psnr is None else row.psnr_db


def quality_text(row: Row) -> str:
    """'equal', '41.2 dB' or 'unknown'."""
    db = quality_db(row)
    return "unknown" if db is None else decibels(db)


def shortfalls(row: Row, budget: Budget) -> list[Shortfall]:
    """What a measured row misses; none where it meets the budget. Decibels count as amplitudes: 6 dB are twice."""
    missed = []
    for name, value, most, show in (
        ("size_bytes", row.size_bytes, budget.max_size_bytes, megabytes),
        ("end_to_end_sec", row.image_sec, budget.max_sec, time_text),
        ("peak_rss_bytes", row.peak_rss_bytes, budget.max_memory_bytes, megabytes),
    ):
        if most is not None and value is None:
            missed.append(Shortfall(math.inf, f"{name} is not known"))
        elif most is not None and value is not None and value > most:
            missed.append(Shortfall(value / most, f"{show(value)} where at most {show(most)} are asked"))
    if budget.min_psnr_db is not None:
        db = quality_db(row)
        if db is None:
            missed.append(Shortfall(math.inf, "the quality is not known: there is no reference"))
        elif db < budget.min_psnr_db:
            factor = 10 ** ((budget.min_psnr_db - db) / 20)
            missed.append(Shortfall(factor, f"{db:.1f} dB where at least {budget.min_psnr_db:g} dB are asked"))
    return missed


def choose(rows: Sequence[Row], budget: Budget) -> Row | None:
    """The cheapest of the bundles that meet the budget; checkpoints are references, not choices."""
    good = [row for row in _bundles(rows) if not shortfalls(row, budget)]
    if not good:
        return None
    steps = max(row.steps for row in good)
    sampler = next(row.sampler for row in good if row.steps == steps)
    good = [row for row in good if (row.steps, row.sampler) == (steps, sampler)]
    least_sec = min(row.image_sec or math.inf for row in good)
    equal = [row for row in good if (row.image_sec or math.inf) <= EQUAL_TIME * least_sec]
    return min(equal, key=lambda row: (row.peak_rss_bytes or math.inf, row.size_bytes or math.inf))


def nearest(rows: Sequence[Row], budget: Budget) -> Row | None:
    """The bundle whose worst shortfall is the smallest; None where nothing was measured."""
    return min(
        _bundles(rows), key=lambda row: max((s.factor for s in shortfalls(row, budget)), default=1.0), default=None
    )


def _bundles(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.timings is not None and row.target is not None]


@dataclass(frozen=True)
class Decision:
    """The row to take on this machine, or the nearest where nothing meets the budget."""

    budget: Budget
    row: Row | None  # None where nothing was measured
    label: str | None  # the row's
    missed: tuple[Shortfall, ...]  # what the nearest misses

    @property
    def met(self) -> bool:
        return self.row is not None and not self.missed

    @property
    def title(self) -> str:
        if self.row is None:
            return "Nothing could be measured"
        if self.missed:
            return f"Nothing meets {self.budget.describe()}"
        peak = self.row.peak_rss_bytes
        facts = [time_text(self.row.image_sec), *([] if peak is None else [megabytes(peak)])]
        return f"{self.label}: {', '.join(facts)}"

    @property
    def sentence(self) -> str:
        row = self.row
        if row is None:
            return "Every row failed; the reasons stand below."
        if self.missed:
            return f"The nearest on this machine: {self.label}, {', '.join(s.words for s in self.missed)}."
        facts = [f"{time_text(row.image_sec)} an image"]
        facts += [] if row.peak_rss_bytes is None else [f"{megabytes(row.peak_rss_bytes)} of memory at the peak"]
        facts += [] if row.size_bytes is None else [f"{megabytes(row.size_bytes)} on disk"]
        facts.append(f"{quality_text(row)} against PyTorch")
        return f"For this machine and {self.budget.describe()}: {self.label}, {', '.join(facts)}."

    @property
    def command(self) -> str | None:
        """What makes the row's image again."""
        return None if self.row is None else generate_command(self.row)


def decide(rows: Sequence[Row], budget: Budget) -> Decision:
    row = choose(rows, budget) or nearest(rows, budget)
    label = next((name for name, other in zip(labels(rows), rows, strict=True) if other is row), None)
    return Decision(budget, row, label, () if row is None else tuple(shortfalls(row, budget)))


def generate_command(row: Row) -> str:
    """The kdc-edge generate command that makes an image as this row did."""
    words = ["kdc-edge", "generate", row.prompt, "--bundle", row.folder]
    words += ["--steps", str(row.steps), "--scheduler", row.sampler, "--guidance", f"{row.guidance:g}"]
    options = {
        "--guidance-mode": row.guidance_mode,
        "--guidance-interval": None if row.guidance_interval == (0.0, 1.0) else
        f"{row.guidance_interval[0]:g}:{row.guidance_interval[1]:g}",
        "--negative-prompt": row.negative_prompt or None,
        "--seed": row.seed or None,
        "--width": row.width,
        "--height": row.height,
        "--device": row.device,
        "--threads": row.threads,
    }  # fmt: skip
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    words += ["--low-memory"] if row.low_memory else []
    if set("()[]\\") & set(row.prompt + row.negative_prompt):  # a benchmark takes brackets as text
        words.append("--plain-prompt")
    return shlex.join(words)

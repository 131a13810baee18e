"""Which row to ship: what meets a budget, the cheapest of it, the nearest where nothing does, and what to measure next.

    budget = Budget(max_sec=10, min_psnr_db=30)
    choose(rows, budget)                       # a Row, or None
    nearest(rows, budget)                      # the row that misses by the smallest factor

Cheapest, in this order: the most steps (an image of fewer steps is another image, and its PSNR, which compares with
the same steps in PyTorch, does not tell how much worse), the sampler named first, the least time, the least peak
memory, the smallest folder. Times within 5 % of the least count as equal. Pure functions: nothing is measured here.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdc_edge.bench.record import Row
from kdc_edge.bench.tables import bytes_text, time_text
from kdc_edge.bench.values import values
from kdc_edge.pipeline import GuidanceMode

EQUAL_TIME = 1.05
HOPELESS_TIME = 1.25  # times the budget, by what the same bundle took for more steps: not measured any more


@dataclass(frozen=True)
class Budget:
    """What a device or its user allows; None where anything goes."""

    max_size_bytes: int | None = None  # of the folder
    max_sec: float | None = None  # for an image from the prompt to the PNG, warm, median
    max_memory_bytes: int | None = None  # the process's peak, loading included
    min_psnr_db: float | None = None  # of the image against PyTorch's from the same noise, steps and sampler

    def describe(self) -> str:
        """'at most 300 MB, at most 10 s, at least 30 dB'."""
        words = [f"at most {bytes_text(self.max_size_bytes)} on disk"] if self.max_size_bytes is not None else []
        words += [f"at most {self.max_sec:g} s an image"] if self.max_sec is not None else []
        words += [f"at most {bytes_text(self.max_memory_bytes)} of memory"] if self.max_memory_bytes is not None else []
        words += [f"at least {self.min_psnr_db:g} dB"] if self.min_psnr_db is not None else []
        return ", ".join(words) or "no limit"


@dataclass(frozen=True)
class Shortfall:
    """A limit that a row misses."""

    factor: float  # above 1; infinite where the value is not known
    words: str  # "12.3 s where at most 10 s are asked"


def quality_db(row: Row) -> float | None:
    """PSNR of the image, infinite for an equal one; a reference's own is its export's proof. None: not known."""
    found = values(row)
    if found["psnr"] is None and row.reference and row.parity is None:
        return math.inf
    return found["psnr"] if found["psnr"] is not None else found["parity"]


def shortfalls(row: Row, budget: Budget) -> list[Shortfall]:
    """What a measured row misses; none where it meets the budget. Decibels count as amplitudes: 6 dB are twice."""
    found = values(row)
    missed = []
    for name, most, show in (
        ("size_bytes", budget.max_size_bytes, bytes_text),
        ("end_to_end_sec", budget.max_sec, time_text),
        ("peak_rss_bytes", budget.max_memory_bytes, bytes_text),
    ):
        value = found[name]
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
    sampler = next(row.sampler for row in rows if row in good and row.steps == steps)
    good = [row for row in good if (row.steps, row.sampler) == (steps, sampler)]
    least_sec = min(_sec_of(row) for row in good)
    equal = [row for row in good if _sec_of(row) <= EQUAL_TIME * least_sec]
    return min(equal, key=lambda row: (row.peak_rss_bytes or math.inf, row.size_bytes or math.inf))


def nearest(rows: Sequence[Row], budget: Budget) -> Row | None:
    """The bundle whose worst shortfall is the smallest; None where nothing was measured."""
    return min(
        _bundles(rows), key=lambda row: max((s.factor for s in shortfalls(row, budget)), default=1.0), default=None
    )


def _bundles(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.timings is not None and row.target is not None]


def _sec_of(row: Row) -> float:
    return values(row)["end_to_end_sec"] or math.inf


# What to measure next.


@dataclass(frozen=True)
class Offer:
    """A bundle that could be chosen, by what is known before it runs."""

    folder: Path
    size_bytes: int
    parity_db: float | None  # the export's proof; infinite for equal images


@dataclass(frozen=True)
class Mode:
    """How the U-Net is called, from the fastest to the most thrifty."""

    guidance_mode: GuidanceMode
    low_memory: bool


MODES = (Mode("batched", False), Mode("sequential", False), Mode("sequential", True))


@dataclass(frozen=True)
class Candidate:
    folder: Path
    steps: int
    sampler: str
    mode: Mode


def in_order(offers: Sequence[Offer], budget: Budget) -> list[Offer]:
    """The promising first, for a search that may be cut short: proved good enough, then small."""
    floor = budget.min_psnr_db or -math.inf
    return sorted(offers, key=lambda o: (o.parity_db is None or o.parity_db < floor, o.size_bytes))


def too_large(offer: Offer, budget: Budget) -> str | None:
    """Why it need not be measured."""
    if budget.max_size_bytes is None or offer.size_bytes <= budget.max_size_bytes:
        return None
    return f"{bytes_text(offer.size_bytes)} where at most {bytes_text(budget.max_size_bytes)} are asked"


def next_candidate(
    offers: Sequence[Offer],
    steps: Sequence[int],
    samplers: Sequence[str],
    modes: Sequence[Mode],
    budget: Budget,
    tried: Mapping[Candidate, Row],
) -> Candidate | None:
    """What to measure after what was `tried`; None when the answer is known.

    The most steps come first, then the samplers in their order; a level that has a row within the budget is the last.
    Within it every bundle is measured, and in the next, more thrifty mode only where memory was what it missed. What
    more steps have shown to take too much memory, or far too much time, is left out.
    """
    offers = [offer for offer in in_order(offers, budget) if too_large(offer, budget) is None]
    for count in sorted(set(steps), reverse=True):
        for sampler in samplers:
            for offer in offers:
                for mode in modes:
                    candidate = Candidate(offer.folder, count, sampler, mode)
                    if candidate not in tried and _hopeless_time(candidate, budget, tried):
                        break
                    if candidate not in tried and not _hopeless_memory(candidate, budget, tried):
                        return candidate
                    if candidate in tried and not _misses_memory(tried[candidate], budget):
                        break
            level = [row for c, row in tried.items() if (c.steps, c.sampler) == (count, sampler)]
            if choose(level, budget) is not None:
                return None
    return None


def _misses_memory(row: Row, budget: Budget) -> bool:
    """Is a more thrifty mode worth trying?"""
    if row.failure is not None:
        return "memory" in row.failure
    most, peak = budget.max_memory_bytes, row.peak_rss_bytes
    return most is not None and peak is not None and peak > most


def _hopeless_memory(candidate: Candidate, budget: Budget, tried: Mapping[Candidate, Row]) -> bool:
    """Memory does not depend on the number of steps."""
    return any(_misses_memory(row, budget) for row in _alike(candidate, tried))


def _hopeless_time(candidate: Candidate, budget: Budget, tried: Mapping[Candidate, Row]) -> bool:
    most = budget.max_sec
    expected = [sec for row in _alike(candidate, tried) if (sec := expected_sec(row, candidate.steps)) is not None]
    return most is not None and bool(expected) and min(expected) > HOPELESS_TIME * most


def _alike(candidate: Candidate, tried: Mapping[Candidate, Row]) -> Iterator[Row]:
    """Rows of the same bundle in the same mode."""
    for other, row in tried.items():
        if (other.folder, other.mode) == (candidate.folder, candidate.mode):
            yield row


def expected_sec(row: Row, steps: int) -> float | None:
    """What an image of so many steps would take, from one of `row.steps`; None where its steps were not timed."""
    if row.timings is None or row.timings.unet_step is None:
        return None
    return row.timings.end_to_end.median_sec - (row.steps - steps) * row.timings.unet_step.median_sec


def generate_command(row: Row, prompt: str | None = None) -> str:
    """The kdc-edge generate command that makes an image as this row did."""
    words = ["kdc-edge", "generate", row.prompt if prompt is None else prompt, "--bundle", row.folder]
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
    return shlex.join([*words, *(["--low-memory"] if row.low_memory else [])])

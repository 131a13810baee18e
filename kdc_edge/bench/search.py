"""What to measure until it is known which bundle meets a budget.

request = Request("a red flower")
candidates = [Candidate.of(b, request) for b in matching_bundles(Path("bundles"), FORMATS, [], tell=print)]
for state in search(candidates, Case(Path(), request), steps=[20, 12], budget=Budget(max_sec=10)):
    print(state.rows[-1].name)
decide(state.rows, budget)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdc_edge.bench.budget import Budget, choose
from kdc_edge.bench.case import Case, reference_case
from kdc_edge.bench.record import Row
from kdc_edge.bench.reference import compare_images
from kdc_edge.bench.runner import Measured, Tell, run
from kdc_edge.bundle import Bundle, find_bundles
from kdc_edge.errors import KdcError
from kdc_edge.formats import Format
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.request import GuidanceMode, Request
from kdc_edge.samplers import make_sampler
from kdc_edge.text import megabytes

TOO_SLOW = 1.25  # times the budget, by what the same bundle took for more steps: not measured any more


@dataclass(frozen=True)
class Candidate:
    """A bundle that could be chosen, by what is known before it runs."""

    folder: Path
    size_bytes: int
    parity_db: float | None  # the export's proof; infinite for equal images
    request: Request  # the image to make, with the bundle's own steps and sampler where no others are asked for

    @classmethod
    def of(cls, bundle: Bundle, request: Request) -> Candidate:
        check = bundle.manifest.image_parity
        parity_db = None if check is None else math.inf if check.psnr_db is None else check.psnr_db
        return cls(bundle.root, bundle.size_bytes, parity_db, request)


@dataclass(frozen=True)
class Mode:
    """How the U-Net is called, from the fastest to the most thrifty."""

    guidance_mode: GuidanceMode
    low_memory: bool


MODES = (Mode("batched", False), Mode("sequential", False), Mode("sequential", True))


@dataclass(frozen=True)
class Trial:
    """One measurement of a candidate."""

    folder: Path
    steps: int
    sampler: str
    mode: Mode


def in_order(candidates: Sequence[Candidate], budget: Budget) -> list[Candidate]:
    """The promising first, for a search that may be cut short: proved good enough, then small."""
    floor = budget.min_psnr_db or -math.inf
    return sorted(candidates, key=lambda c: (c.parity_db is None or c.parity_db < floor, c.size_bytes))


def too_large(candidate: Candidate, budget: Budget) -> str | None:
    """Why it need not be measured."""
    if budget.max_size_bytes is None or candidate.size_bytes <= budget.max_size_bytes:
        return None
    return f"{megabytes(candidate.size_bytes)} where at most {megabytes(budget.max_size_bytes)} are asked"


def next_trial(
    candidates: Sequence[Candidate],
    steps: Sequence[int],
    samplers: Sequence[str],
    modes: Sequence[Mode],
    budget: Budget,
    tried: Mapping[Trial, Row],
) -> Trial | None:
    """What to measure after what was `tried`; None when the answer is known.

    The most steps come first, then the samplers in their order; a level that has a row within the budget is the last.
    Within it every bundle is measured, and in the next, more thrifty mode only where memory was what it missed. What
    more steps have shown to take too much memory, or far too much time, is left out. Without `steps`, or `samplers`,
    every bundle is measured with its own.
    """
    fitting = [candidate for candidate in in_order(candidates, budget) if too_large(candidate, budget) is None]
    counts: Sequence[int | None] = sorted(set(steps), reverse=True) or (None,)
    for count in counts:
        for sampler in samplers or (None,):
            asked = {c.folder: (count or c.request.steps, sampler or c.request.sampler) for c in fitting}
            for candidate in fitting:
                for mode in modes:
                    trial = Trial(candidate.folder, *asked[candidate.folder], mode)
                    if trial not in tried and _too_slow(trial, budget, tried):
                        break
                    if trial not in tried and not _too_much_memory(trial, budget, tried):
                        return trial
                    if trial in tried and not _misses_memory(tried[trial], budget):
                        break
            level = [row for t, row in tried.items() if asked.get(t.folder) == (t.steps, t.sampler)]
            if choose(level, budget) is not None:
                return None
    return None


def _misses_memory(row: Row, budget: Budget) -> bool:
    """Is a more thrifty mode worth trying?"""
    if row.failure is not None:
        return "memory" in row.failure
    most, peak = budget.max_memory_bytes, row.peak_rss_bytes
    return most is not None and peak is not None and peak > most


def _too_much_memory(trial: Trial, budget: Budget, tried: Mapping[Trial, Row]) -> bool:
    """Memory does not depend on the number of steps."""
    return any(_misses_memory(row, budget) for row in _alike(trial, tried))


def _too_slow(trial: Trial, budget: Budget, tried: Mapping[Trial, Row]) -> bool:
    most = budget.max_sec
    expected = [sec for row in _alike(trial, tried) if (sec := expected_sec(row, trial.steps)) is not None]
    return most is not None and bool(expected) and min(expected) > TOO_SLOW * most


def _alike(trial: Trial, tried: Mapping[Trial, Row]) -> Iterator[Row]:
    """Rows of the same bundle in the same mode."""
    for other, row in tried.items():
        if (other.folder, other.mode) == (trial.folder, trial.mode):
            yield row


def expected_sec(row: Row, steps: int) -> float | None:
    """What an image of so many steps would take, from one of `row.steps`; None where its steps were not timed."""
    if row.timings is None or row.timings.unet_step is None:
        return None
    saved = _unet_calls(row.sampler, row.steps) - _unet_calls(row.sampler, steps)
    return row.timings.end_to_end.median_sec - saved * row.timings.unet_step.median_sec


def _unet_calls(sampler: str, steps: int) -> int:
    """Heun's method calls the U-Net twice a step."""
    return len(make_sampler(sampler, NoiseSchedule(), steps).timesteps)


@dataclass(frozen=True)
class SearchState:
    """What is known so far."""

    rows: list[Row]  # with their PSNR
    measured: list[Measured]  # the same, with the images
    over: bool = False  # nothing was measured since the last one, and nothing will be
    complete: bool = False  # for nothing is left that could change the answer; else the time was used up


def matching_bundles(
    folder: Path, wanted: Sequence[Format], checkpoints: Sequence[str], *, tell: Callable[[str], None]
) -> list[Bundle]:
    """The bundles of these formats and of the checkpoints with these hashes (of any without one), in order of name.

    `tell` is called with a line for each bundle that is left out for its damage or its checkpoint.
    """
    names, found = {row.name for row in wanted}, []
    for path in find_bundles(folder):
        try:
            bundle = Bundle.open(path)
        except KdcError as error:
            tell(f"left out: {error}")
            continue
        if bundle.manifest.name not in names:
            continue
        if checkpoints and bundle.manifest.provenance.checkpoint_sha256 not in checkpoints:
            tell(f"left out: {path} was exported from another checkpoint")
        else:
            found.append(bundle)
    return found


def first_level(
    candidates: Sequence[Candidate],
    base: Case,
    steps: Sequence[int],
    samplers: Sequence[str],
    budget: Budget,
    reference: Path | None,
) -> list[Case]:
    """What `search` measures where some of it meets the budget in the first mode, for the length of a progress bar."""
    cases: list[Case] = []
    for candidate in (c for c in in_order(candidates, budget) if too_large(c, budget) is None):
        own = candidate.request
        request = replace(
            own, steps=max(steps, default=own.steps), sampler=next(iter(samplers), own.sampler), guidance_mode=None
        )
        if reference is not None and request not in [case.request for case in cases]:
            cases.append(_reference_case(reference, request, base))
        cases.append(replace(base, folder=candidate.folder, request=request))
    return cases


def _reference_case(checkpoint: Path, request: Request, base: Case) -> Case:
    """PyTorch's images, which are not timed."""
    return reference_case(checkpoint, request, base.more_prompts, engine="torch", threads=base.threads)


def search(
    candidates: Sequence[Candidate],
    base: Case,
    *,
    steps: Sequence[int] = (),
    budget: Budget,
    samplers: Sequence[str] = (),
    modes: Sequence[Mode] = MODES,
    reference: Path | None = None,
    budget_sec: float | None = None,
    tell: Tell = lambda *_: None,
) -> Iterator[SearchState]:
    """Measure one bundle after the other as `base` says, until the answer is known or `budget_sec` seconds are over.

    What is asked of a bundle is its candidate's request, with each of `steps` and `samplers` in turn where there are
    any; the rest is as in `base`. `reference` is the checkpoint: PyTorch makes its image once for each number of steps
    and sampler. Without it the most precise bundle measured is the reference. Every step gives all rows so far, for
    whoever is interrupted; `tell` is `run`'s.
    """
    end = None if budget_sec is None else time.monotonic() + budget_sec
    measured: list[Measured] = []
    trials: list[Trial | None] = []  # of `measured`; None for a reference
    levels = set()
    requests = {candidate.folder: candidate.request for candidate in candidates}
    while True:
        rows = compare_images(measured)
        tried = {t: row for t, row in zip(trials, rows, strict=True) if t is not None}
        todo = next_trial(candidates, steps, samplers, modes, budget, tried)
        left = None if end is None else end - time.monotonic()
        if todo is None or (left is not None and left <= 0):
            yield SearchState(rows, measured, over=True, complete=todo is None)
            return
        request = replace(
            requests[todo.folder], steps=todo.steps, sampler=todo.sampler, guidance_mode=todo.mode.guidance_mode
        )
        level = (todo.steps, todo.sampler)
        if reference is not None and level not in levels:
            case, todo = _reference_case(reference, request, base), None
        else:
            case = replace(base, folder=todo.folder, request=request, low_memory=todo.mode.low_memory)
        levels.add(level)
        measured += run([case], budget_sec=left, tell=tell)
        trials.append(todo)
        yield SearchState(compare_images(measured), list(measured))

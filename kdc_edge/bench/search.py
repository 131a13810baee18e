"""Measuring until it is known which bundle meets a budget: budget.py decides what, grid.py measures.

    for found in search(offers, request, steps=[20, 12], budget=Budget(max_sec=10, min_psnr_db=30)):
        print(found.rows[-1].name)
    choose(found.rows, budget)

Every step gives all rows so far, so that whoever is interrupted keeps them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdc_edge.bench.budget import MODES, Budget, Candidate, Mode, Offer, next_candidate
from kdc_edge.bench.grid import Case, run
from kdc_edge.bench.record import Row
from kdc_edge.bench.reference import compare_images
from kdc_edge.bench.runner import OPENER, Measured
from kdc_edge.pipeline import Request


@dataclass(frozen=True)
class Found:
    """What is known so far."""

    rows: list[Row]  # with their PSNR
    measured: list[Measured]  # the same, with the images
    over: bool = False  # nothing was measured since the last one, and nothing will be
    complete: bool = False  # for nothing is left that could change the answer; else the time was used up


def search(
    offers: Sequence[Offer],
    request: Request,
    *,
    steps: Sequence[int],
    budget: Budget,
    samplers: Sequence[str] = (),
    modes: Sequence[Mode] = MODES,
    reference: Path | None = None,
    repeats: int | None = None,
    warmup: int = 1,
    device: str | None = None,
    threads: int | None = None,
    budget_sec: float | None = None,
    opener: str = OPENER,
) -> Iterator[Found]:
    """Measure one bundle after the other until the answer is known, or `budget_sec` seconds are over.

    `reference` is the checkpoint: PyTorch makes its image once for each number of steps and sampler. Without it the
    most precise bundle measured is the reference.
    """
    end = None if budget_sec is None else time.monotonic() + budget_sec
    measured: list[Measured] = []
    candidates: list[Candidate | None] = []  # of `measured`; None for a reference
    levels = set()

    def left() -> float | None:
        return None if end is None else end - time.monotonic()

    while True:
        rows = compare_images(measured)
        tried = {c: row for c, row in zip(candidates, rows, strict=True) if c is not None}
        todo = next_candidate(offers, steps, samplers or [request.sampler], modes, budget, tried)
        if todo is None or (left() or 1) <= 0:
            yield Found(rows, measured, over=True, complete=todo is None)
            return
        asked = replace(request, steps=todo.steps, sampler=todo.sampler, guidance_mode=todo.mode.guidance_mode)
        case = Case(
            todo.folder, asked, repeats, warmup, device=device, threads=threads, low_memory=todo.mode.low_memory
        )
        level = (todo.steps, todo.sampler)
        if reference is not None and level not in levels:
            case, todo = Case(reference, asked, 1, 0, engine="torch", threads=threads), None
        levels.add(level)
        measured += run([case], budget_sec=left(), opener=opener)
        candidates.append(todo)
        yield Found(compare_images(measured), list(measured))

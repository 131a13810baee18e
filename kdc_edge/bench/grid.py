"""Many measurements in a row: every combination of what was asked for, within a budget of time.

    cases = grid([Path("bundles/onnx-fp16")], Request("a red flower"), repeats=5, steps=[4, 20], threads=[1, 2])
    for found in run(cases, budget_sec=600):
        print(found.row.failure or found.row.timings.end_to_end.median_sec)

Whoever consumes `run` keeps the rows so far when it is interrupted; `not_measured` gives the others their reason.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdc_edge.bench.runner import OPENER, Measured, describe, measure_in_fresh_process
from kdc_edge.pipeline import GuidanceMode, Request

BASELINE = "torch:"


@dataclass(frozen=True)
class Case:
    """One row to be: what `measure_in_fresh_process` takes."""

    folder: Path
    request: Request
    repeats: int | None = None
    warmup: int = 1
    engine: str | None = None
    device: str | None = None
    threads: int | None = None
    low_memory: bool = False
    prompts: tuple[str, ...] = ()


def grid(
    what: Sequence[str | Path],
    request: Request,
    *,
    repeats: int | None = None,
    warmup: int = 1,
    engine: str | None = None,
    devices: Sequence[str | None] = (None,),
    threads: Sequence[int | None] = (None,),
    steps: Sequence[int] = (),
    samplers: Sequence[str] = (),
    guidance_modes: Sequence[GuidanceMode | None] = (),
    low_memory: bool = False,
    prompts: Sequence[str] = (),
) -> list[Case]:
    """Every combination, in the order in which they are given, the last named changing fastest.

    `what` are folders of bundles and checkpoints; "torch:CKPT" is a checkpoint too, whatever `engine` the others take.
    """
    cases = []
    for name, device, count, number, sampler, mode in itertools.product(
        what, devices, threads, steps or [request.steps], samplers or [request.sampler],
        guidance_modes or [request.guidance_mode],
    ):  # fmt: skip
        folder, own_engine = split_baseline(name)
        asked = replace(request, steps=number, sampler=sampler, guidance_mode=mode)
        cases.append(
            Case(folder, asked, repeats, warmup, own_engine or engine, device, count, low_memory, tuple(prompts))
        )
    return cases


def references(what: str | Path, cases: Sequence[Case]) -> list[Case]:
    """What makes, once and not to be timed, the image of each request in the cases."""
    folder, engine = split_baseline(what)
    requests = {replace(case.request, guidance_mode=None): None for case in cases}
    return [Case(folder, request, repeats=1, warmup=0, engine=engine) for request in requests]


def split_baseline(what: str | Path) -> tuple[Path, str | None]:
    """The folder, and the engine that "torch:" in front of it stands for."""
    text = str(what)
    return (Path(text.removeprefix(BASELINE)), "torch") if text.startswith(BASELINE) else (Path(what), None)


def run(
    cases: Sequence[Case],
    *,
    budget_sec: float | None = None,
    opener: str = OPENER,
) -> Iterator[Measured]:
    """Measure one after the other, each in a fresh process; one a case, whatever becomes of it.

    `budget_sec` bounds the whole: the case that exceeds it is ended, and the rest is not begun.
    """
    end = None if budget_sec is None else time.monotonic() + budget_sec
    for case in cases:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            yield not_measured(case, f"not reached: --budget-sec {budget_sec:g} was used up")
            continue
        found = measure_in_fresh_process(**vars(case), opener=opener, timeout_sec=left)
        if end is not None and time.monotonic() >= end and found.row.failure:
            reason = f"{found.row.failure}: --budget-sec {budget_sec:g} ended it"
            found = replace(found, row=replace(found.row, failure=reason))
        yield found


def not_measured(case: Case, reason: str) -> Measured:
    """A row without numbers, and why."""
    known = {name: value for name, value in vars(case).items() if name != "prompts"}
    return Measured(replace(describe(**known), failure=reason))

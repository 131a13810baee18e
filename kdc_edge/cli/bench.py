"""kdc-edge bench: how fast, how large, how equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from typer import Argument, Option

from kdc_edge.cli.options import (
    Check,
    Engine,
    Guidance,
    GuidanceInterval,
    LowMemory,
    guidance_modes,
    listed,
    make_request,
)
from kdc_edge.cli.project import Config, all_bundles, command_line, say
from kdc_edge.errors import InputError, KdcError, unknown_choice

if TYPE_CHECKING:
    from kdc_edge.bench.case import Case
    from kdc_edge.bench.record import Row
    from kdc_edge.bench.runner import Measured
    from kdc_edge.bench.values import Limit


def bench(
    context: typer.Context,
    bundles: Annotated[
        list[str] | None,
        Argument(help="Bundles, checkpoints, or torch:CKPT for PyTorch as the reference; all in bundles/ when none."),
    ] = None,
    prompt: Annotated[
        str | None, Option(help="What the images show. Not given: one of eight prompts after the other.")
    ] = None,
    steps: Annotated[
        str | None,
        Option(metavar="N[,N]", help="Steps of the sampler, in turn; 20, or a few-step student's own, when not given."),
    ] = None,
    guidance: Guidance = None,
    guidance_mode: Annotated[
        str | None,
        Option(metavar="MODE[,MODE]", help="batched, or sequential: two U-Net calls of half the activations."),
    ] = None,
    guidance_interval: GuidanceInterval = "0.0:1.0",
    scheduler: Annotated[
        str | None,
        Option(metavar="NAME[,NAME]", help="As in kdc-edge generate, in turn; the bundle's own when not given."),
    ] = None,
    seed: Annotated[int, Option(help="Seed of the initial noise.")] = 0,
    width: Annotated[int | None, Option(help="Pixels; the model's own when not given.")] = None,
    height: Annotated[int | None, Option(help="Pixels; the model's own when not given.")] = None,
    repeats: Annotated[
        int | None,
        Option(help="Images to measure, in one process. Not given: 5 or more, in three processes when they are short."),
    ] = None,
    warmup: Annotated[int, Option(help="Images before the measured ones.")] = 1,
    engine: Engine = None,
    device: Annotated[
        str | None,
        Option(metavar="NAME[,NAME]", help="Devices in turn; or one for each component, unet=GPU,text_encoder=CPU."),
    ] = None,
    threads: Annotated[str | None, Option(metavar="N[,N]", help="Threads of the engine.")] = None,
    low_memory: LowMemory = False,
    check: Check = True,
    budget_sec: Annotated[float | None, Option(help="Seconds for all rows; rows that are not reached say so.")] = None,
    reference: Annotated[
        str | None, Option(help="A bundle or checkpoint whose images the others are compared with.")
    ] = None,
    prompts: Annotated[
        Path | None,
        Option(help="File of prompts to score, one a line: prompt accuracy of garden captions, else the CLIP score."),
    ] = None,
    metric_weights: Annotated[Path | None, Option(help="Folder with the weight files of CLIP.")] = None,
    fail_under: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="Exit with 1 below a value, such as psnr=30.")
    ] = None,
    fail_over: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="Exit with 1 above a value, such as end_to_end_sec=10.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None, Option(metavar="OLD.json NEW.json", help="Compare two reports instead of measuring.")
    ] = None,
    format: Annotated[str, Option(help="table, md, json, csv or html.")] = "table",
    out: Annotated[Path | None, Option(help="Write to this file instead of stdout.")] = None,
    config: Config = None,
) -> None:
    """Measure bundles, each in a process of its own: latency by stage, memory, size, quality."""
    del config
    from kdc_edge.bench.case import Case, first_and_more, grid, references, with_own
    from kdc_edge.bench.page import ReportFormat, render
    from kdc_edge.bench.record import Report, here
    from kdc_edge.bench.reference import compare_images
    from kdc_edge.bench.values import Limit
    from kdc_edge.files import check_writable
    from kdc_edge.request import check_guidance

    if format not in get_args(ReportFormat):
        raise unknown_choice("--format", format, get_args(ReportFormat))
    if compare is not None:
        typed = (context.get_parameter_source(name) for name in ("bundles", "fail_under", "fail_over"))
        if any(source and source.name == "COMMANDLINE" for source in typed):  # kdc-edge.toml's are for measuring
            raise typer.BadParameter("--compare reads two reports: leave bundles, --fail-under and --fail-over out")
        _write(_compared(*compare, format), out)
        return
    if out:
        check_writable(out)
    limits = [Limit.parse(text, "under") for text in fail_under or ()]
    limits += [Limit.parse(text, "over") for text in fail_over or ()]
    if budget_sec is not None and not budget_sec > 0:
        raise InputError(f"--budget-sec {budget_sec:g} is no time: use a number of seconds above 0")
    if guidance is not None:
        check_guidance(guidance)
    score, asked = _scorer(prompts, metric_weights)
    first, more = first_and_more(prompt)
    request = make_request(
        first, guidance_mode=None, guidance_interval=guidance_interval, seed=seed, width=width,
        height=height, low_memory=low_memory,
    )  # fmt: skip
    single = device is None or "=" in device  # a device for each component, not one after the other
    base = Case(
        Path(), request, repeats, warmup, engine, device, low_memory=low_memory, check=check, prompts=tuple(asked),
        more_prompts=more,
    )  # fmt: skip
    cases = grid(
        bundles or all_bundles(),
        base,
        devices=[] if single else listed(device or "", "--device", str),
        threads=listed(threads, "--threads", int) if threads is not None else [],
        steps=listed(steps, "--steps", int) if steps is not None else [],
        samplers=listed(scheduler, "--scheduler", str) if scheduler is not None else [],
        guidance_modes=guidance_modes(guidance_mode) if guidance_mode else [],
    )
    said: set[str] = set()
    cases = [
        with_own(
            case, sampler=None if scheduler is None else case.request.sampler,
            steps=None if steps is None else case.request.steps, guidance=guidance, tell=lambda line: _once(line, said),
        )
        for case in cases
    ]  # fmt: skip
    others = references(reference, cases) if reference else []
    measured, interrupted = _measure(others, cases, budget_sec, score)
    found = measured[len(others) :]
    rows = compare_images(found, measured[: len(others)])
    report = Report(here(), tuple(rows), command=command_line())
    _write(render(report, cast(ReportFormat, format), [one.pixels for one in found]), out)
    if interrupted:
        say("interrupted: the rows so far are written")
        raise KeyboardInterrupt
    _check(rows, limits)


def _measure(
    others: Sequence[Case], cases: Sequence[Case], budget_sec: float | None, score: Callable[[Measured], Measured]
) -> tuple[list[Measured], bool]:
    """What was measured, the references first, and whether Ctrl-C ended it: then the rest has rows that say so."""
    from kdc_edge.bench.runner import not_measured, run
    from kdc_edge.bench.tables import time_text
    from kdc_edge.cli.progress import MeasuringBar

    todo = [*others, *cases]
    measured: list[Measured] = []
    try:
        with MeasuringBar(todo) as progress:
            for found in run(todo, budget_sec=budget_sec, tell=progress.tell):
                row = found.row
                if len(measured) < len(others) and row.failure:
                    raise KdcError(f"--reference {row.folder}: {row.failure}")
                measured.append(score(found))
                result = row.failure or f"{time_text(row.image_sec)} an image"
                progress.say(f"{len(measured)}/{len(todo)} {row.folder}: {result}")
    except KeyboardInterrupt:
        return measured + [not_measured(case, "interrupted") for case in todo[len(measured) :]], True
    return measured, False


def _once(line: str, said: set[str]) -> None:
    """Say a line that was not said before."""
    if line not in said:
        say(line)
        said.add(line)


def _check(rows: Sequence[Row], limits: Sequence[Limit]) -> None:
    """Raise KdcError where a limit is not kept, or nothing was measured."""
    from kdc_edge.bench.values import broken_limits, show

    if all(row.failure for row in rows):
        raise KdcError("nothing could be measured: see the reasons above")
    if broken := broken_limits(limits, show(rows)):
        raise KdcError(f"limits are not kept: {'; '.join(broken)}")


def _scorer(path: Path | None, weights: Path | None) -> tuple[Callable[[Measured], Measured], list[str]]:
    """What adds the quality on a file of prompts to a row, and these prompts."""
    if path is None:
        return (lambda found: found), []
    from dataclasses import replace

    from kdc_edge.cli.prompt_quality import open_scorer
    from kdc_edge.prompts import read_prompts

    prompts = read_prompts(path)
    score = open_scorer(prompts, weights)

    def scored(found: Measured) -> Measured:
        if found.prompt_images is None or not len(found.prompt_images):
            return found
        return replace(found, row=replace(found.row, prompt_quality=score(found.prompt_images)))

    return scored, prompts


def _compared(old: Path, new: Path, format: str) -> str:
    from kdc_edge.bench.compare import compare, render_changes
    from kdc_edge.bench.record import read_report

    return render_changes(compare(read_report(old), read_report(new)), format)


def _write(text: str, out: Path | None) -> None:
    from kdc_edge.files import write_atomic

    if out:
        write_atomic(out, text)
        typer.echo(out)
    else:
        typer.echo(text, nl=False)

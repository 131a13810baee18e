"""kdc-edge bench: how fast, how large, how equal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from typer import Argument, Option

from kdc_edge.cli.options import (
    Device,
    Engine,
    Guidance,
    GuidanceInterval,
    GuidanceModeOption,
    LowMemory,
    Threads,
    make_request,
)  # fmt: skip
from kdc_edge.cli.project import Config, all_bundles, command_line, say


def bench(
    bundles: Annotated[list[Path] | None, Argument(help="Bundles or checkpoints; all in bundles/ when none.")] = None,
    prompt: Annotated[str, Option(help="What the picture shows.")] = "a red flower with five petals",
    steps: Annotated[int, Option(help="Steps of the sampler.")] = 20,
    guidance: Guidance = 7.5,
    guidance_mode: GuidanceModeOption = None,
    guidance_interval: GuidanceInterval = "0.0:1.0",
    scheduler: Annotated[str, Option(help="As in kdc-edge generate.")] = "dpm++2m",
    seed: Annotated[int, Option(help="Of the initial noise.")] = 0,
    width: Annotated[int | None, Option(help="Pixels; the model's own when not given.")] = None,
    height: Annotated[int | None, Option(help="Pixels; the model's own when not given.")] = None,
    repeats: Annotated[int, Option(help="Pictures that count.")] = 5,
    warmup: Annotated[int, Option(help="Pictures before that, which do not count.")] = 1,
    engine: Engine = None,
    device: Device = None,
    threads: Threads = None,
    low_memory: LowMemory = False,
    format: Annotated[str, Option(help="table, md, json, csv or html.")] = "table",
    out: Annotated[Path | None, Option(help="Write to this file instead of stdout.")] = None,
    config: Config = None,
) -> None:
    """Measure bundles, each in a process of its own: latency by stage, memory, size, parity."""
    del config
    from kdc_edge.bench.process import measure_in_fresh_process
    from kdc_edge.bench.record import Report, Row, here
    from kdc_edge.bench.report import Format, render
    from kdc_edge.errors import InputError, KdcError
    from kdc_edge.files import write_atomic

    if format not in get_args(Format):
        raise InputError(f"--format {format!r} is unknown: choose from {', '.join(get_args(Format))}")
    request = make_request(
        prompt, steps=steps, guidance=guidance, guidance_mode=guidance_mode, guidance_interval=guidance_interval,
        seed=seed, sampler=scheduler, width=width, height=height, low_memory=low_memory,
    )  # fmt: skip
    rows: list[Row] = []
    for folder in bundles or all_bundles():
        row = measure_in_fresh_process(
            folder,
            request,
            repeats=repeats,
            warmup=warmup,
            engine=engine,
            device=device,
            threads=threads,
            low_memory=low_memory,
        ).row
        say(f"{folder}: {row.failure or 'measured'}")
        rows.append(row)
    text = render(Report(here(), tuple(rows), command=command_line()), cast(Format, format))
    if out:
        write_atomic(out, text)
        typer.echo(out)
    else:
        typer.echo(text, nl=False)
    if all(row.failure for row in rows):
        raise KdcError("nothing could be measured: see the reasons above")

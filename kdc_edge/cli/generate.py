"""kdc-edge generate: an image from a prompt."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from kdc_edge.cli.options import (
    Device,
    Engine,
    Exact,
    Guidance,
    GuidanceInterval,
    GuidanceModeOption,
    LowMemory,
    Threads,
    make_request,
)  # fmt: skip
from kdc_edge.cli.project import Config, best_bundle, say


def generate(
    prompt: Annotated[str, Argument(help="What the image shows.")],
    bundle: Annotated[
        Path | None,
        Option(help="A bundle, or a checkpoint (through torch); the smallest good one in bundles/ when not given."),
    ] = None,
    steps: Annotated[int, Option(help="Steps of the sampler.")] = 20,
    guidance: Guidance = 7.5,
    guidance_mode: GuidanceModeOption = None,
    guidance_interval: GuidanceInterval = "0.0:1.0",
    seed: Annotated[int, Option(help="Of the initial noise.")] = 0,
    scheduler: Annotated[
        str | None,
        Option(help="A sampler, such as dpm++2m-karras, euler-a, unipc or lcm; the checkpoint's own when not given."),
    ] = None,
    negative_prompt: Annotated[str, Option(help="What the image should not show.")] = "",
    width: Annotated[int | None, Option(help="Pixels; the model's own when not given.")] = None,
    height: Annotated[int | None, Option(help="Pixels; the model's own when not given.")] = None,
    out: Annotated[Path | None, Option(help="A PNG file; named after the prompt when not given.")] = None,
    engine: Engine = None,
    device: Device = None,
    threads: Threads = None,
    low_memory: LowMemory = False,
    cache: Annotated[
        Path | None, Option(help="A folder where the engine keeps what it compiles; none by default.")
    ] = None,
    exact: Exact = False,
    config: Config = None,
) -> None:
    """Generate an image, without PyTorch where a bundle is given."""
    del config
    from kdc_edge.cli.progress import Progress
    from kdc_edge.errors import InputError
    from kdc_edge.image import save_png
    from kdc_edge.pipeline import describe
    from kdc_edge.runtimes import open_pipeline
    from kdc_edge.samplers import DEFAULT_SAMPLER, sampler_for

    out = out or Path(f"{_slug(prompt)}-{seed}.png")
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out} is no PNG file: give it a name that ends in .png")
    if bundle is None:
        bundle = best_bundle()
        say(f"no bundle given: {bundle}, the smallest of good images that runs here")
    request = make_request(
        prompt, negative_prompt=negative_prompt, steps=steps, guidance=guidance, guidance_mode=guidance_mode,
        guidance_interval=guidance_interval, seed=seed, sampler=scheduler or DEFAULT_SAMPLER, width=width,
        height=height, low_memory=low_memory,
    )  # fmt: skip
    pipeline = open_pipeline(
        bundle, engine=engine, device=device, threads=threads, low_memory=low_memory, cache=cache, exact=exact
    )
    if scheduler is None:
        sampler, note = sampler_for(pipeline.model.scheduler)
        request = replace(request, sampler=sampler)
        if note:
            say(note)
    pipeline.check(request)
    if cut := pipeline.tokenizer.overflow(prompt):
        say(f"the prompt is longer than the model reads: left out is {cut[:80]!r}")
    pixels = None
    with Progress(steps) as progress:
        for done in pipeline.run(request):
            pixels = done.pixels
            if done.stage == "unet":
                progress.step(done.step, f"timestep {done.timestep}")
    assert pixels is not None
    save_png(out, pixels, describe(request, pixels, bundle.resolve().name))
    typer.echo(out)


def _slug(prompt: str) -> str:
    """A file name from a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "image"

"""kdc-edge generate: images from prompts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from kdc_edge.cli.options import (
    Check,
    Device,
    EmbeddingFiles,
    Engine,
    Exact,
    GuidanceInterval,
    GuidanceModeOption,
    LoraFiles,
    LowMemory,
    PredictionType,
    Threads,
    Vae,
    listed,
    make_request,
)  # fmt: skip
from kdc_edge.cli.project import Config, best_bundle, open_folder, say
from kdc_edge.errors import InputError
from kdc_edge.files import check_writable

if TYPE_CHECKING:
    from kdc_edge.image import Pixels
    from kdc_edge.request import Request

_CHANGE, _SAMPLING, _SIZE = "Change an image", "Sampling", "Size"  # groups of options
NAME_CHARS, NAME_BYTES = 60, 150  # of a prompt in a file's name
MAX_IMAGES = 10_000  # of each prompt: all requests are held at once


def generate(
    prompt: Annotated[str | None, Argument(help="What the image shows.")] = None,
    bundle: Annotated[
        Path | None,
        Option(
            "--bundle",
            "-b",
            help="A bundle, a checkpoint (through torch), or hf:OWNER/NAME\\[@REVISION] of the hub; the smallest good"
            " one in bundles/ when not given.",
        ),
    ] = None,
    prompts: Annotated[Path | None, Option(help="A text file with one prompt a line, instead of a prompt.")] = None,
    image: Annotated[
        Path | None,
        Option(
            help="An image to begin with, resized to the size asked for; needs a vae_encoder.", rich_help_panel=_CHANGE
        ),
    ] = None,
    mask: Annotated[
        Path | None, Option(help="With --image: white is repainted, black stays.", rich_help_panel=_CHANGE)
    ] = None,
    strength: Annotated[
        float | None,
        Option(
            help="With --image: the share of the steps that are taken, 0.8, or 1 with a mask. Lower changes less.",
            rich_help_panel=_CHANGE,
        ),
    ] = None,
    images: Annotated[
        int | None, Option("--images", "-n", help="Images of each prompt; 1, or one a seed, when not given.")
    ] = None,
    steps: Annotated[
        int | None,
        Option(
            "--steps", "-s", help="Steps of the sampler; 20, or those of a few-step student.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        Option(
            help="Guidance scale; 7.5, or a few-step student's. 1 for none, at half the cost.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    guidance_mode: GuidanceModeOption = None,
    guidance_interval: GuidanceInterval = "0.0:1.0",
    seed: Annotated[
        str,
        Option(
            help="Seed of the noise. One seed counts up from image to image; a list, 1,2,3, is used for each prompt."
        ),
    ] = "0",
    scheduler: Annotated[
        str | None,
        Option(
            help="A sampler, such as dpm++2m-karras, euler-a, unipc or lcm; the checkpoint's own when not given.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    negative_prompt: Annotated[str, Option(help="What the image should not show.")] = "",
    plain_prompt: Annotated[
        bool, Option("--plain-prompt", help="Take brackets as text; else (red:1.3) and \\[faint] are weights.")
    ] = False,
    width: Annotated[int | None, Option(help="Pixels; the model's own when not given.", rich_help_panel=_SIZE)] = None,
    height: Annotated[int | None, Option(help="Pixels; the model's own when not given.", rich_help_panel=_SIZE)] = None,
    out: Annotated[
        Path | None,
        Option(
            "--out",
            "-o",
            help="A PNG file, or a folder. When not given, or a folder: a new file named after prompt and seed.",
        ),
    ] = None,
    engine: Engine = None,
    device: Device = None,
    threads: Threads = None,
    low_memory: LowMemory = False,
    cache: Annotated[
        Path | None, Option(help="A folder where the engine keeps compiled networks; none by default.")
    ] = None,
    exact: Exact = False,
    check: Check = True,
    vae: Vae = None,
    lora: LoraFiles = None,
    embedding: EmbeddingFiles = None,
    prediction_type: PredictionType = None,
    config: Config = None,
) -> None:
    """Generate images, without PyTorch where a bundle is given."""
    del config
    from kdc_edge.checkpoints import Additions
    from kdc_edge.cli.progress import ProgressBar
    from kdc_edge.hub import label, local
    from kdc_edge.prompts import read_prompts
    from kdc_edge.request import describe, own_request
    from kdc_edge.runtimes import open_pipeline

    if (prompt is None) == (prompts is None):
        raise typer.BadParameter("give a prompt, or --prompts with a file of them")
    if image is None and (mask, strength) != (None, None):
        raise typer.BadParameter("--mask and --strength are for --image: give the image to change")
    texts = read_prompts(prompts) if prompts else [prompt or ""]
    wanted = list(prompts_and_seeds(texts, images, listed(seed, "--seed", int)))
    check_out(out, len(wanted))
    bundle = local(bundle) if bundle else None
    if bundle is None:
        bundle = best_bundle()
    bundle = open_folder(bundle, Additions.parse(vae, lora, embedding, prediction_type))
    request = make_request(
        "", negative_prompt=negative_prompt, guidance_mode=guidance_mode,
        guidance_interval=guidance_interval, width=width, height=height, low_memory=low_memory,
        weighted=not plain_prompt,
    )  # fmt: skip
    pipeline = open_pipeline(
        bundle, engine=engine, device=device, threads=threads, low_memory=low_memory, cache=cache, exact=exact,
        check=check,
    )  # fmt: skip
    request, note = own_request(pipeline.model, request, sampler=scheduler, steps=steps, guidance=guidance)
    if note:
        say(note)
    if image is not None:
        request = replace(request, edit=pipeline.read_edit(request, image, strength=strength, mask=mask))
    batches = pipeline.batches([replace(request, prompt=text, seed=number) for text, number in wanted])
    for text in texts:
        if left_out := pipeline.unread(replace(request, prompt=text)):
            say(left_out)
    made = 0
    with ProgressBar(request.steps * len(wanted)) as progress:
        for batch in batches:
            which = "" if len(wanted) == 1 else f"image {made + len(batch)} of {len(wanted)}, "
            for done in pipeline.run(*batch):
                if done.stage == "unet":
                    finished = request.steps * (made * done.steps + len(batch) * done.step) // done.steps
                    progress.step(finished, f"{which}timestep {done.timestep}")
                if done.pixels is not None:
                    asked = batch[done.step - 1]
                    typer.echo(_save(out, asked, done.pixels, describe(asked, done.pixels, label(bundle))))
                    if done.nsfw:
                        say(f"image {made + done.step} was blanked by the safety checker: try another seed or prompt")
            made += len(batch)


def prompts_and_seeds(prompts: list[str], images: int | None, seeds: list[int]) -> Iterator[tuple[str, int]]:
    """Prompt and seed of each image: one seed counts up over all, several hold for each prompt."""
    if images is not None and images < 1:
        raise InputError(f"--images {images} is too few: use 1 or more")
    if images is not None and images > MAX_IMAGES:
        raise InputError(f"--images {images} is too many: use {MAX_IMAGES} or fewer, and other seeds for more")
    if len(seeds) > 1:
        if images not in (None, len(seeds)):
            raise InputError(f"--images {images} and {len(seeds)} seeds contradict each other: leave one out")
        yield from ((prompt, seed) for prompt in prompts for seed in seeds)
        return
    repeated = [prompt for prompt in prompts for _ in range(images or 1)]
    yield from zip(repeated, range(seeds[0], seeds[0] + len(repeated)), strict=True)


def check_out(out: Path | None, images: int) -> None:
    """Raise InputError for a place that cannot take so many images."""
    if out is None or _is_folder(out):
        check_writable((out or Path()) / "image.png")
        return
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out} is no PNG file: give it a name that ends in .png, or name a folder")
    if images > 1:
        raise InputError(f"--out {out} is one file for {images} images: name a folder")
    check_writable(out)


def _is_folder(out: Path) -> bool:
    """Is it one, or a name to make one by? One that is there may have a point in its name."""
    return out.suffix.lower() != ".png" and (out.is_dir() or not (out.suffix or out.is_file()))


def _save(out: Path | None, asked: Request, pixels: Pixels, parameters: Mapping[str, object]) -> Path:
    """Write the image to the file `out`, or under a free name in the folder `out`; its path."""
    from kdc_edge.image import save_png

    if out and not _is_folder(out):
        save_png(out, pixels, parameters)
        return out
    while True:
        path = free_name(out or Path(), asked.prompt, asked.seed)
        with suppress(FileExistsError):  # another process was faster: the next name
            save_png(path, pixels, parameters, new=True)
            return path


def free_name(folder: Path, prompt: str, seed: int) -> Path:
    """A file that does not exist yet: "a-red-flower-1.png", then "a-red-flower-1-2.png"; letters of every script."""
    text = unicodedata.normalize("NFC", prompt.lower())
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()  # letters, marks, numbers
    short = "-".join(words)[:NAME_CHARS].encode()[:NAME_BYTES].decode(errors="ignore").strip("-")
    stem = f"{short or 'image'}-{seed}"
    path, count = folder / f"{stem}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.png"
    return path

"""kdc-edge fit: which export of a checkpoint meets a budget on this machine, by measuring."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from typer import Argument, Option

from kdc_edge.cli.options import Guidance, Json, listed, make_request
from kdc_edge.cli.project import BUNDLES, LATEST, Config, command_line, latest_checkpoint, need_export, say
from kdc_edge.errors import InputError, KdcError
from kdc_edge.formats import FORMATS, GOOD_PSNR_DB, Format

if TYPE_CHECKING:
    from kdc_edge.bench.budget import Budget, Offer
    from kdc_edge.bench.search import Found

WRITTEN = (".html", ".md", ".json", ".csv")
DEFINITIONS = (
    "Cheapest: the most steps; then the scheduler named first; then the least time, where 5 % count as equal; then the"
    " least memory.",
    "PSNR compares with PyTorch's image of the same steps, scheduler and noise: it tells what the export changed, not"
    " what fewer steps did.",
)


def fit(
    checkpoint: Annotated[
        Path | None, Argument(help="A diffusers folder; the latest run's, else the bundles as they are.")
    ] = None,
    max_size: Annotated[str | None, Option(metavar="SIZE", help="Of the bundle's folder, such as 300MB.")] = None,
    max_sec: Annotated[float | None, Option(help="For an image, warm, from the prompt to the PNG.")] = None,
    max_memory: Annotated[str | None, Option(metavar="SIZE", help="At the peak, such as 1GB.")] = None,
    min_psnr: Annotated[float, Option(help="Of the image against PyTorch's, in dB.")] = GOOD_PSNR_DB,
    formats: Annotated[
        str | None,
        Option(
            metavar="NAME[,NAME]",
            help="Such as onnx-fp16,openvino-int8; those that run here. `all`: what does not, too.",
        ),
    ] = None,
    bundles: Annotated[Path, Option(metavar="DIR", help="Where they are, and where exports go.")] = BUNDLES,
    export: Annotated[bool, Option("--export/--no-export", help="Make the bundles that are missing.")] = True,
    prompt: Annotated[str, Option(help="What the image shows.")] = "a red flower with five petals",
    steps: Annotated[str, Option(metavar="N[,N]", help="The most that the budget allows is taken.")] = "20",
    scheduler: Annotated[str, Option(metavar="NAME[,NAME]", help="In order of preference.")] = "dpm++2m",
    guidance: Guidance = 7.5,
    guidance_mode: Annotated[
        str, Option(metavar="MODE[,MODE]", help="sequential, and then low memory, where batched takes too much.")
    ] = "batched,sequential",
    device: Annotated[str | None, Option(help="See kdc-edge devices.")] = None,
    threads: Annotated[int | None, Option(help="Of the engine.")] = None,
    seed: Annotated[int, Option(help="Of the initial noise.")] = 0,
    repeats: Annotated[
        int | None,
        Option(help="Images that count, in one process. Not given: 5 or more, in three processes when they are short."),
    ] = None,
    warmup: Annotated[int, Option(help="Images before that, which do not count.")] = 1,
    budget_sec: Annotated[float | None, Option(help="For all measuring; then the best so far is named.")] = None,
    out: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="Write it too: .html the page, .md, or .json and .csv as of kdc-edge bench."),
    ] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Name the cheapest export that meets a budget on this machine, or the nearest where none does."""
    del config
    from kdc_edge.bench.budget import MODES, Budget
    from kdc_edge.bench.search import search
    from kdc_edge.noise_schedule import NoiseSchedule
    from kdc_edge.pipeline import GuidanceMode
    from kdc_edge.samplers import make_sampler

    for option, limit in (("--max-sec", max_sec), ("--budget-sec", budget_sec)):
        if limit is not None and not limit > 0:
            raise InputError(f"{option} {limit:g} is no time: use a number of seconds above 0")
    budget = Budget(_bytes("--max-size", max_size), max_sec, _bytes("--max-memory", max_memory), min_psnr)
    names = listed(guidance_mode, "--guidance-mode", str)
    if unknown := set(names) - set(get_args(GuidanceMode)):
        raise InputError(f"--guidance-mode {unknown.pop()!r} is unknown: use batched or sequential")
    counts, samplers = listed(steps, "--steps", int), listed(scheduler, "--scheduler", str)
    for count, sampler in itertools.product(counts, samplers):
        make_sampler(sampler, NoiseSchedule(), count)  # refuses what no pipeline can do, before anything is exported
    for path in out or ():
        if path.suffix not in WRITTEN:
            raise InputError(f"--out {path} is of no known kind: give it a name that ends in {', '.join(WRITTEN)}")
    request = make_request(
        prompt, guidance=guidance, guidance_mode=None, guidance_interval="0.0:1.0", seed=seed, low_memory=False
    )
    if checkpoint is None and LATEST.exists():
        checkpoint = latest_checkpoint()
        say(f"no checkpoint given: {checkpoint.resolve()}")
    wanted = _wanted(formats)
    offers = _offers(checkpoint, bundles, wanted, budget, export=export)
    reference = checkpoint if importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers") else None
    found, interrupted = None, False
    try:
        for found in search(
            offers, request, steps=counts, budget=budget, samplers=samplers,
            modes=[m for m in MODES if m.guidance_mode in names], reference=reference, repeats=repeats, warmup=warmup,
            device=device, threads=threads, budget_sec=budget_sec,
        ):  # fmt: skip
            if not found.over:
                _tell(found)
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted: the rows so far are kept")
    if found is not None and found.rows:
        _write(found, budget, out or (), as_json=as_json)
    if interrupted:
        raise KeyboardInterrupt
    _judge(found, budget)


def _bytes(option: str, text: str | None) -> int | None:
    from kdc_edge.files import parse_size

    return None if text is None else parse_size(text, option)


def _wanted(names: str | None) -> list[Format]:
    """The formats asked for; else those whose engine runs and measures here, and which need no budget of their own."""
    if names == "all":  # what runs elsewhere alone gets a row of its size and its proof
        return list(FORMATS)
    if names is not None:
        known = {row.name: row for row in FORMATS}
        asked = listed(names, "--formats", str)
        if unknown := [name for name in asked if name not in known]:
            raise InputError(f"--formats {unknown[0]!r} is unknown: choose from {', '.join(known)}, or all")
        return [known[name] for name in asked]
    return [row for row in FORMATS if row.precision != "mixed" and _measurable(row)]


def _measurable(row: Format) -> bool:
    from kdc_edge.runtimes.base import preferred_engine

    engine = preferred_engine(row)
    return not engine.reference and importlib.util.find_spec(engine.package) is not None


def _offers(
    checkpoint: Path | None, folder: Path, wanted: Sequence[Format], budget: Budget, *, export: bool
) -> list[Offer]:
    """The bundles of this checkpoint that run here, with those that are missing and could fit exported first."""
    from kdc_edge.bench.budget import too_large
    from kdc_edge.diffusers_folder import hash_checkpoint, read_model

    sha256 = None if checkpoint is None else hash_checkpoint(checkpoint)
    offers = _existing(folder, sha256, wanted)
    there = {name for name, _ in offers}
    if checkpoint is not None and export:
        weights = read_model(checkpoint).unet_parameters
        for row in (row for row in wanted if row.name not in there):
            if budget.max_size_bytes is not None and weights * row.bytes_per_weight > budget.max_size_bytes:
                say(f"{row.name}: not exported: its U-Net alone is larger than {budget.describe()}")
            elif made := _export(checkpoint, row, folder / row.name):
                offers.append((row.name, made))
    for name, offer in offers:
        if reason := too_large(offer, budget):
            say(f"{name}: not measured: {reason}")
    if not offers:
        raise InputError(f"there is nothing to measure: no bundle in {folder}/ of this checkpoint runs here")
    return [offer for _, offer in offers]


def _existing(folder: Path, sha256: str | None, wanted: Sequence[Format]) -> list[tuple[str, Offer]]:
    """Name and offer of each bundle of the checkpoint (of any, without a hash); others are named and left."""
    from kdc_edge.bundle import Bundle

    names, found = [row.name for row in wanted], []
    for path in sorted(p.parent for p in folder.glob("*/kdc-edge.json")):
        try:
            bundle = Bundle.open(path)
        except KdcError as error:
            say(f"left out: {error}")
            continue
        if bundle.manifest.name not in names:
            continue
        if sha256 is not None and bundle.manifest.provenance.checkpoint_sha256 != sha256:
            say(f"left out: {path} was exported from another checkpoint")
            continue
        found.append((bundle.manifest.name, _offer(bundle)))
    return found


def _offer(bundle: Any) -> Offer:
    from kdc_edge.bench.budget import Offer

    check = bundle.manifest.image_parity
    parity_db = None if check is None else math.inf if check.psnr_db is None else check.psnr_db
    return Offer(bundle.root, bundle.size_bytes, parity_db)


def _export(checkpoint: Path, row: Format, out: Path) -> Offer | None:
    """kdc-edge export in a process of its own, whose memory is free again before anything is measured."""
    from kdc_edge.bundle import Bundle

    need_export("exporting what is missing (or give --no-export)")
    if out.exists():
        say(f"{row.name}: not exported: {out} is another checkpoint's")
        return None
    say(f"exporting {row.name}")
    program = "from kdc_edge.cli import main; main()"
    options = ["export", checkpoint, "--target", row.target, "--precision", row.precision, "--out", out]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, *map(str, options)], env=environment, capture_output=True, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        say(f"{row.name}: not exported: {last.removeprefix('kdc-edge: ')}")
        return None
    return _offer(Bundle.open(out))


def _tell(found: Found) -> None:
    """One line about what was measured last."""
    from kdc_edge.bench.tables import time_text
    from kdc_edge.bench.values import labels, values

    row, label = found.rows[-1], labels(found.rows)[-1]
    say(f"{label}: {row.failure or time_text(values(row)['end_to_end_sec'])}")


def _write(found: Found, budget: Budget, out: Sequence[Path], *, as_json: bool) -> None:
    """The table and the answer, or one document; and files."""
    from kdc_edge.bench.budget import choose, generate_command, nearest, shortfalls
    from kdc_edge.bench.page import benchmark_page, verdict
    from kdc_edge.bench.record import Report, here
    from kdc_edge.bench.tables import Format as Written
    from kdc_edge.bench.tables import render
    from kdc_edge.bench.values import labels
    from kdc_edge.files import write_atomic

    report = Report(here(), tuple(found.rows), command=command_line())
    chosen, close = choose(found.rows, budget), nearest(found.rows, budget)
    shown = chosen or close
    unfinished = [] if found.complete else ["The search was cut short: something better may not have been measured."]
    title, sentence = verdict(found.rows, budget)
    for path in out:
        if path.suffix == ".html":
            images = [measured.pixels for measured in found.measured]
            text = benchmark_page(report, images, budget=budget, more=[*unfinished, *DEFINITIONS])
        else:
            text = render(report, cast(Written, path.suffix[1:]))
        if path.suffix == ".md":
            text = "\n\n".join([f"# {title}", " ".join([sentence, *unfinished, *DEFINITIONS]), text])
        write_atomic(path, text)
        say(f"written: {path}")
    if as_json:
        names = dict(zip(map(id, found.rows), labels(found.rows), strict=True))
        document = {
            "budget": asdict(budget),
            "met": chosen is not None,
            "choice": None if chosen is None else names[id(chosen)],
            "nearest": None if chosen is not None or close is None else names[id(close)],
            "missed": [] if chosen is not None or close is None else [s.words for s in shortfalls(close, budget)],
            "verdict": sentence,
            "command": None if shown is None else generate_command(shown),
            "complete": found.complete,
            "definitions": DEFINITIONS,
            "report": json.loads(render(report, "json")),
        }
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(render(report, "table"))
    for line in (*DEFINITIONS, *unfinished, sentence):
        typer.echo(line)
    if shown is not None:
        typer.echo(generate_command(shown))


def _judge(found: Found | None, budget: Budget) -> None:
    """Raise KdcError where nothing fits: the answer is written by then."""
    from kdc_edge.bench.budget import choose
    from kdc_edge.bench.page import verdict

    rows = [] if found is None else found.rows
    if choose(rows, budget) is None:
        title, sentence = verdict(rows, budget)
        raise KdcError(f"{title[0].lower()}{title[1:]}: {sentence[0].lower()}{sentence[1:]}")

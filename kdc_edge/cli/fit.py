"""kdc-edge fit: which export of a checkpoint meets a budget on this machine, by measuring."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer import Argument, Option

from kdc_edge.cli.options import Guidance, Json, guidance_modes, listed, make_request
from kdc_edge.cli.project import BUNDLES, LATEST, Config, command_line, latest_checkpoint, need_export, open_folder, say
from kdc_edge.errors import InputError, KdcError, unknown_choice
from kdc_edge.formats import FORMATS, GOOD_PSNR_DB, Format

if TYPE_CHECKING:
    from kdc_edge.bench.budget import Budget, Decision
    from kdc_edge.bench.search import Candidate, SearchState
    from kdc_edge.bundle import Bundle
    from kdc_edge.request import Request

FILES = (".html", ".md", ".json", ".csv")
DEFINITIONS = (
    "Cheapest: the most steps; then the scheduler named first; then the least time, where 5 % count as equal; then the"
    " least memory.",
    "PSNR compares with PyTorch's image of the same steps, scheduler and noise: it tells what the export changed, not"
    " what fewer steps did.",
)


def fit(
    checkpoints: Annotated[
        list[Path] | None,
        Argument(
            metavar="[CHECKPOINT]...",
            help="A diffusers folder or .safetensors file; the latest run's, else the bundles alone. Of several, such"
            " as a run's students of 20 and 4 steps, the bundles that are there.",
        ),
    ] = None,
    max_size: Annotated[
        str | None, Option(metavar="SIZE", help="Limit for the bundle's folder, such as 300MB.")
    ] = None,
    max_sec: Annotated[
        float | None, Option(help="Limit for a warm image's seconds, from the prompt to the PNG.")
    ] = None,
    max_memory: Annotated[str | None, Option(metavar="SIZE", help="Limit for the peak memory, such as 1GB.")] = None,
    min_psnr: Annotated[float, Option(help="Least PSNR of the image against PyTorch's, in dB.")] = GOOD_PSNR_DB,
    formats: Annotated[
        str | None,
        Option(
            metavar="NAME[,NAME]",
            help="Such as onnx-fp16,openvino-int8; those that run here by default, `all` for the others too.",
        ),
    ] = None,
    bundles: Annotated[Path, Option(metavar="DIR", help="Folder of the bundles; exports go there too.")] = BUNDLES,
    export: Annotated[bool, Option("--export/--no-export", help="Make the bundles that are missing.")] = True,
    prompt: Annotated[
        str | None, Option(help="What the images show. Not given: one of eight prompts after the other.")
    ] = None,
    steps: Annotated[
        str | None,
        Option(
            metavar="N[,N]",
            help="Counts to choose from, the largest first; 20, or a few-step student's own, when not given.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None, Option(metavar="NAME[,NAME]", help="In order of preference; the bundle's own when not given.")
    ] = None,
    guidance: Guidance = None,
    guidance_mode: Annotated[
        str,
        Option(
            metavar="MODE[,MODE]",
            help="Modes to try; sequential, and then --low-memory, only where batched takes too much memory.",
        ),
    ] = "batched,sequential",
    device: Annotated[str | None, Option(help="Device of the engine; see kdc-edge devices.")] = None,
    threads: Annotated[int | None, Option(help="Threads of the engine.")] = None,
    seed: Annotated[int, Option(help="Seed of the initial noise.")] = 0,
    repeats: Annotated[
        int | None,
        Option(help="Images to measure, in one process. Not given: 5 or more, in three processes when they are short."),
    ] = None,
    warmup: Annotated[int, Option(help="Images before the measured ones.")] = 1,
    budget_sec: Annotated[
        float | None, Option(help="Seconds for all measurements; the best so far is named then.")
    ] = None,
    out: Annotated[
        list[Path] | None,
        Option(metavar="FILE", help="Write a file too: .html (a page), .md, .json or .csv, as kdc-edge bench does."),
    ] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Name the cheapest export that meets a budget on this machine, or the nearest where none does."""
    del config
    from kdc_edge.bench.budget import Budget, decide
    from kdc_edge.bench.case import Case, first_and_more
    from kdc_edge.bench.search import MODES, first_level, search
    from kdc_edge.cli.progress import MeasuringBar
    from kdc_edge.files import check_writable
    from kdc_edge.hub import local
    from kdc_edge.noise_schedule import NoiseSchedule
    from kdc_edge.request import check_guidance
    from kdc_edge.samplers import DEFAULT_SAMPLER, make_sampler

    for option, limit in (("--max-sec", max_sec), ("--budget-sec", budget_sec)):
        if limit is not None and not 0 < limit < math.inf:
            raise InputError(f"{option} {limit:g} is no time: use a number of seconds above 0")
    if not math.isfinite(min_psnr):
        raise InputError(f"--min-psnr {min_psnr:g} is no number of decibels: use 30 or the like")
    budget = Budget(_bytes("--max-size", max_size), max_sec, _bytes("--max-memory", max_memory), min_psnr)
    allowed = guidance_modes(guidance_mode)
    counts = listed(steps, "--steps", int) if steps is not None else []
    samplers = listed(scheduler, "--scheduler", str) if scheduler is not None else []
    for count, sampler in itertools.product(counts or [1], samplers or [DEFAULT_SAMPLER]):
        make_sampler(sampler, NoiseSchedule(), count)  # an unknown one is refused before anything is exported
    if guidance is not None:
        check_guidance(guidance)
    for path in out or ():
        if path.suffix not in FILES:
            raise InputError(f"--out {path} is of no known kind: give it a name that ends in {', '.join(FILES)}")
        check_writable(path)
    first, more = first_and_more(prompt)
    request = make_request(first, guidance_mode=None, guidance_interval="0.0:1.0", seed=seed, low_memory=False)
    base = Case(Path(), request, repeats, warmup, device=device, threads=threads, more_prompts=more)
    sources = [open_folder(local(checkpoint)) for checkpoint in checkpoints or ()]
    if not sources and LATEST.exists():
        sources = [latest_checkpoint()]
        say(f"no checkpoint given: {sources[0].resolve()}")
    found = _bundles(sources, bundles, _wanted(formats), budget, export=export)
    candidates = _candidates(
        found, budget, request, sampler=next(iter(samplers), None), steps=next(iter(counts), None), guidance=guidance
    )
    own = sources[0] if len(sources) == 1 else None  # of several, a bundle's proof says how near it is to its own
    reference = own if importlib.util.find_spec("torch") and importlib.util.find_spec("diffusers") else None
    state, interrupted = None, False
    try:
        with MeasuringBar(first_level(candidates, base, counts, samplers, budget, reference)) as progress:
            for state in search(
                candidates, base, steps=counts, budget=budget, samplers=samplers,
                modes=[mode for mode in MODES if mode.guidance_mode in allowed], reference=reference,
                budget_sec=budget_sec, tell=progress.tell,
            ):  # fmt: skip
                if not state.over:
                    progress.say(_last_result(state))
    except KeyboardInterrupt:
        interrupted = True
        say("interrupted: the rows so far are kept")
    decision = decide(state.rows if state else [], budget)
    if state is not None and state.rows:
        _write(state, decision, out or (), as_json=as_json)
    if interrupted:
        raise KeyboardInterrupt
    if not decision.met:
        title, sentence = decision.title, decision.sentence
        raise KdcError(f"{title[0].lower()}{title[1:]}: {sentence[0].lower()}{sentence[1:]}")


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
            raise unknown_choice("--formats", unknown[0], [*known, "all"])
        return [known[name] for name in asked]
    return [row for row in FORMATS if row.precision != "mixed" and _measurable(row)]


def _measurable(row: Format) -> bool:
    from kdc_edge.runtimes.base import preferred_engine

    engine = preferred_engine(row)
    return not engine.reference and importlib.util.find_spec(engine.package) is not None


def _bundles(
    checkpoints: Sequence[Path], folder: Path, wanted: Sequence[Format], budget: Budget, *, export: bool
) -> list[Bundle]:
    """The bundles of these checkpoints that run here; those of a single one that are missing and could fit are made."""
    from kdc_edge.bench.search import matching_bundles
    from kdc_edge.bench.tables import time_text
    from kdc_edge.bundle import Bundle
    from kdc_edge.diffusers_folder import hash_checkpoint, read_model
    from kdc_edge.request import refuse_inpainting

    for checkpoint in checkpoints:
        refuse_inpainting(read_model(checkpoint), "kdc-edge fit")
    bundles = matching_bundles(folder, wanted, [hash_checkpoint(c) for c in checkpoints], tell=say)
    there = {bundle.manifest.name for bundle in bundles}
    if len(checkpoints) == 1 and export:
        (checkpoint,) = checkpoints
        weights = read_model(checkpoint).unet_parameters
        missing = [row for row in wanted if row.name not in there]
        for i, row in enumerate(missing, 1):
            out = folder / row.name
            if budget.max_size_bytes is not None and weights * row.bytes_per_weight > budget.max_size_bytes:
                say(f"{row.name}: not exported: its U-Net alone is larger than {budget.describe()}")
                continue
            need_export("exporting what is missing (or give --no-export)")
            if out.exists():
                say(f"{row.name}: not exported: {out} is another checkpoint's")
                continue
            say(f"exporting {row.name} ({i} of {len(missing)})")
            begin = time.monotonic()
            if failure := _export(checkpoint, row, out):
                say(f"{row.name}: not exported: {failure}")
            else:
                say(f"{row.name}: exported in {time_text(time.monotonic() - begin)}")
                bundles.append(Bundle.open(out))
    if not bundles:
        whose = "these checkpoints" if len(checkpoints) > 1 else "this checkpoint"
        raise InputError(f"there is nothing to measure: no bundle in {folder}/ of {whose} runs here")
    return bundles


def _candidates(bundles: Sequence[Bundle], budget: Budget, request: Request, **given: Any) -> list[Candidate]:
    """The bundles with what is asked of each: the values given, else its own, which are said where they need words."""
    from kdc_edge.bench.search import Candidate, too_large
    from kdc_edge.request import own_request

    candidates, notes = [], {}
    for bundle in bundles:
        own, note = own_request(bundle.manifest.model, request, **given)
        candidates.append(Candidate.of(bundle, own))
        if reason := too_large(candidates[-1], budget):
            say(f"{bundle.manifest.name}: not measured: {reason}")
        elif note:
            notes[note] = bundle.manifest.name
    for note, name in notes.items():
        say(f"{name}: {note}")
    return candidates


def _export(checkpoint: Path, row: Format, out: Path) -> str | None:
    """kdc-edge export in a child process, whose memory is free before anything is measured; why it failed."""
    from kdc_edge.processes import run_module
    from kdc_edge.text import last_line

    options = ["export", checkpoint, "--target", row.target, "--precision", row.precision, "--out", out]
    options += ["--config", os.devnull]  # [export] of a project is for one format, and may make it another checkpoint's

    def tell(line: str) -> None:
        if line and not line.startswith("kdc-edge: "):  # which is said as the reason
            say(f"{row.name}: {line}")

    done = run_module("kdc_edge", options, tell=tell)
    return last_line(done.stderr, "it said nothing").removeprefix("kdc-edge: ") if done.returncode else None


def _last_result(state: SearchState) -> str:
    """One line about what was measured last."""
    from kdc_edge.bench.tables import time_text
    from kdc_edge.bench.values import labels

    row, label = state.rows[-1], labels(state.rows)[-1]
    return f"{label}: {row.failure or time_text(row.image_sec)}"


def _write(state: SearchState, decision: Decision, out: Sequence[Path], *, as_json: bool) -> None:
    """The table and the decision, or one document; and files."""
    from kdc_edge.bench.page import ReportFormat, benchmark_page, render
    from kdc_edge.bench.record import Report, here
    from kdc_edge.files import write_atomic

    report = Report(here(), tuple(state.rows), command=command_line())
    unfinished = [] if state.complete else ["The search was cut short: something better may not have been measured."]
    for path in out:
        if path.suffix == ".html":
            images = [measured.pixels for measured in state.measured]
            text = benchmark_page(report, images, budget=decision.budget, more=[*unfinished, *DEFINITIONS])
        else:
            text = render(report, cast(ReportFormat, path.suffix[1:]))
        if path.suffix == ".md":
            text = "\n\n".join([f"# {decision.title}", " ".join([decision.sentence, *unfinished, *DEFINITIONS]), text])
        write_atomic(path, text)
        say(f"written: {path}")
    if as_json:
        document = {
            "budget": asdict(decision.budget),
            "met": decision.met,
            "choice": decision.label if decision.met else None,
            "nearest": None if decision.met else decision.label,
            "missed": [shortfall.words for shortfall in decision.missed],
            "verdict": decision.sentence,
            "command": decision.command,
            "complete": state.complete,
            "definitions": DEFINITIONS,
            "report": json.loads(render(report, "json")),
        }
        typer.echo(json.dumps(document, indent=2))
        return
    typer.echo(render(report, "table"))
    for line in (*DEFINITIONS, *unfinished, decision.sentence, *filter(None, [decision.command])):
        typer.echo(line)

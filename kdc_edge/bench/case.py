"""One measurement, from the command line to the row: what is measured, where it computes, which image, how often.

base = Case(Path("bundles/onnx-fp16"), Request("a red flower"), threads=2)
cases = grid(["bundles/onnx-fp16", "torch:runs/latest/checkpoint"], base, steps=[4, 20], threads=[1, 2])
describe(cases[0])                                # the Row before anything runs
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ConfigDict

from kdc_edge.bench.record import Row, text_sha256
from kdc_edge.bundle import Bundle, kind_of
from kdc_edge.checkpoints.assemble import is_single_file, open_checkpoint
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.formats import find_format
from kdc_edge.hardware import check_threads
from kdc_edge.hub import label, local
from kdc_edge.manifest import Model
from kdc_edge.request import GuidanceMode, Request, own_request, refuse_inpainting
from kdc_edge.text import encodable
from kdc_edge.weight_files import WEIGHTS, weights_of

TORCH = "torch:"  # in front of a checkpoint's folder
MIN_IMAGES = 5  # that count, where `repeats` is None
REFERENCE_SEC = 10.0  # in which a reference makes images of more prompts than the first
# What the images show in turn, where nobody gave a prompt: the garden draws them, and so does any other model.
PROMPTS = (
    "a red flower with five petals",
    "a blue fish with yellow stripes on a sand background",
    "a yellow butterfly with purple spots on a sky background",
    "a purple flower with eight petals and a white center on a grass background",
    "a plain orange butterfly on a dark background",
    "a pink flower with six petals and a yellow center on a sky background",
    "a white fish with red spots on a dark background",
    "a blue butterfly with white stripes on a sand background",
)


@dataclass(frozen=True)
class Case:
    """Raises InputError for counts that measure nothing, and for a request with latents of its own."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)  # for the request's latents, which are None

    folder: Path  # a bundle or a checkpoint
    request: Request
    repeats: int | None = None  # images that count; None: 5, and more until they fill two seconds
    warmup: int = 1  # images before that, which do not count
    engine: str | None = None  # None: the format's first
    device: str | None = None  # None: the engine's default
    threads: int | None = None  # None: the engine's default
    low_memory: bool = False  # one component in memory at a time, loaded within each image
    prompts: tuple[str, ...] = ()  # an image of each, from seeds that count up, after what is timed
    check: bool = True  # compare a bundle's files with the hashes of its manifest
    more_prompts: tuple[str, ...] = ()  # that the images after the first show in turn
    fill_sec: float = 0.0  # images of the prompts that are left are made too, in so many seconds

    def __post_init__(self) -> None:
        if self.repeats is not None and self.repeats < 1:
            raise InputError(f"--repeats {self.repeats} measures nothing: use 1 or more")
        if self.warmup < 0:
            raise InputError(f"--warmup {self.warmup} is negative: use 0 or more")
        check_threads(self.threads)
        for text in (str(self.folder), self.request.prompt, self.request.negative_prompt):
            if text != encodable(text):
                raise InputError(f"{text!r:.200} is no UTF-8, which a report is: name it otherwise")
        if self.request.latents is not None:
            raise InputError("a benchmark draws its noise from the seed: give no latents")

    def nth_request(self, n: int) -> Request:
        """The request of image n, counted from 0; their prompts take turns."""
        prompts = (self.request.prompt, *self.more_prompts)
        return replace(self.request, prompt=prompts[n % len(prompts)])

    @property
    def images(self) -> int:
        """How many images a process makes, at least."""
        return self.warmup + (MIN_IMAGES if self.repeats is None else self.repeats) + len(self.prompts)


def first_and_more(prompt: str | None) -> tuple[str, tuple[str, ...]]:
    """What the first image shows, and those after it in turn."""
    return (PROMPTS[0], PROMPTS[1:]) if prompt is None else (prompt, ())


def grid(
    folders: Sequence[str | Path],
    base: Case,
    *,
    devices: Sequence[str | None] = (),
    threads: Sequence[int | None] = (),
    steps: Sequence[int] = (),
    samplers: Sequence[str] = (),
    guidance_modes: Sequence[GuidanceMode | None] = (),
) -> list[Case]:
    """Every combination, in the order in which they are given, the last named changing fastest; the rest as in `base`.

    `folders` hold bundles and checkpoints; "torch:CKPT" is a checkpoint that torch runs, whatever `base.engine` is.
    """
    request = base.request
    cases = []
    opened = [split_engine(name) for name in folders]
    for (folder, engine), device, count, number, sampler, mode in itertools.product(
        opened, devices or [base.device], threads or [base.threads], steps or [request.steps],
        samplers or [request.sampler], guidance_modes or [request.guidance_mode],
    ):  # fmt: skip
        asked = replace(request, steps=number, sampler=sampler, guidance_mode=mode)
        cases.append(
            replace(base, folder=folder, request=asked, engine=engine or base.engine, device=device, threads=count)
        )
    return cases


def with_own(
    case: Case,
    *,
    sampler: str | None,
    steps: int | None,
    guidance: float | None,
    tell: Callable[[str], None] = lambda _: None,
) -> Case:
    """The case with the values given, else with those that its folder asks for, as kdc-edge generate takes them.

    `tell` is called with what is to be said of that. A folder that cannot be read stays as it is: its row says why.
    """
    try:
        request, note = own_request(
            model_of(case.folder), case.request, sampler=sampler, steps=steps, guidance=guidance
        )
    except KdcError:
        return case
    if note:
        tell(f"{case.folder}: {note}")
    return replace(case, request=request)


def model_of(folder: Path) -> Model:
    """The model of a bundle or checkpoint; raises BundleError or CheckpointError."""
    return read_model(folder) if kind_of(folder) == "checkpoint" else Bundle.open(folder).manifest.model


def references(what: str | Path, cases: Sequence[Case]) -> list[Case]:
    """The cases that make, not to be timed, the reference images of each request in `cases`."""
    folder, engine = split_engine(what)
    asked = dict.fromkeys((replace(case.request, guidance_mode=None), case.more_prompts) for case in cases)
    return [reference_case(folder, request, more, engine=engine) for request, more in asked]


def reference_case(
    folder: Path, request: Request, more_prompts: tuple[str, ...], *, engine: str | None, threads: int | None = None
) -> Case:
    """One image of the request; of more prompts too, where that takes a few seconds."""
    return Case(
        folder, request, 1, 0, engine, threads=threads, more_prompts=more_prompts, fill_sec=REFERENCE_SEC
    )  # fmt: skip


def split_engine(what: str | Path) -> tuple[Path, str | None]:
    """The folder, assembled where a single file is named, and the engine that "torch:" in front of it stands for."""
    text = str(what)
    folder, engine = (text.removeprefix(TORCH), "torch") if text.startswith(TORCH) else (text, None)
    place = local(folder)
    return open_checkpoint(place) if is_single_file(place) else place, engine


def describe(case: Case) -> Row:
    """The row before anything runs: the conditions, and what the folder says of itself, or why it cannot be read."""
    asked = {key: value for key, value in vars(case.request).items() if key not in ("latents", "edit", "weighted")}
    row = Row(
        name=label(case.folder),
        folder=str(case.folder),
        target=None,
        precision=None,
        checkpoint_sha256=None,
        size_bytes=None,
        parity=None,
        unet_parameters=None,
        engine=case.engine,
        device=case.device,
        threads=case.threads,
        low_memory=case.low_memory,
        prompt_sha256=text_sha256(case.request.prompt, case.request.negative_prompt),
        repeats=MIN_IMAGES if case.repeats is None else case.repeats,
        warmup=case.warmup,
        more_prompts=case.more_prompts,
        **asked,
    )
    try:
        return _with_folder(row, case.folder)
    except KdcError as error:
        return replace(row, failure=str(error))


def _with_folder(row: Row, folder: Path) -> Row:
    if kind_of(folder) != "checkpoint":
        bundle = Bundle.open(folder)
        manifest, model = bundle.manifest, bundle.manifest.model
        row = replace(
            row,
            target=manifest.target,
            precision=manifest.precision,
            checkpoint_sha256=manifest.provenance.checkpoint_sha256,
            engine=row.engine or find_format(manifest.target, manifest.precision).engines[0],
            size_bytes=bundle.size_bytes,
            parity=manifest.image_parity,
        )
    else:
        model = read_model(folder)
        size_bytes = sum(path.stat().st_size for part in WEIGHTS for path in weights_of(folder / part).files)
        row = replace(row, engine=row.engine or "torch", size_bytes=size_bytes)
    refuse_inpainting(model, "a benchmark")
    size = model.image_size
    return replace(
        row, unet_parameters=model.unet_parameters, random_weights=model.random_weights, width=row.width or size,
        height=row.height or size,
    )  # fmt: skip

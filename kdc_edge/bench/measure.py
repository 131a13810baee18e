"""A stopwatch around the pipeline's generator.

    found = measure(partial(open_pipeline, folder), Case(folder, Request("a red flower"), repeats=5))
    found.timings.end_to_end.median_sec

Peak memory and the first image belong to the process: runner.py gives each measurement a fresh one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from kdc_edge.bench.case import MIN_IMAGES, Case
from kdc_edge.bench.record import Disturbance, Timing, Timings
from kdc_edge.bench.sensors import Watch, peak_rss_bytes
from kdc_edge.components import Execution, SupportsExplain
from kdc_edge.errors import KdcError
from kdc_edge.image import encode_png
from kdc_edge.pipeline import Pipeline, Progress
from kdc_edge.request import Request

Laps = dict[str, list[float]]  # of one image, by stage
Tell = Callable[[str, float], None]  # gets what is computed now, and the finished share of the whole, from 0 to 1
MAX_IMAGES = 50  # that count, where `repeats` is None
FILL_SEC = 2.0  # that they fill at least: a disturbance of the machine can miss an image of 0.2 s
ONCE = ("tokenize", "text_encoder", "unet_first_step", "scheduler", "vae_decoder", "png", "end_to_end")


@dataclass(frozen=True)
class Measurement:
    """The measurements of one pipeline."""

    timings: Timings
    peak_rss_bytes: int | None  # of this process so far
    energy_joules: float | None  # per counted image
    disturbance: Disturbance
    provider: str | None
    compute_dtype: str | None
    pixels: np.ndarray  # uint8 (N, H, W, 3), the first image of each prompt
    prompt_images: np.ndarray  # uint8 (N, H, W, 3), one a prompt


def measure(
    open_pipeline: Callable[[], Pipeline],
    case: Case,
    *,
    started: float | None = None,
    tell: Tell = lambda *_: None,
) -> Measurement:
    """Open, run `case.warmup` images that do not count and `case.repeats` that do; every sample is kept. The images
    show the case's prompts in turn.

    `started` is when the process was (time.perf_counter), the call itself where None. `tell` is called between the laps
    of an image.
    """
    request = case.request
    tell("loading", 0.0)
    watch = whole = Watch()
    begin = perf_counter()
    pipeline = open_pipeline()
    loading = {"load": perf_counter() - begin}
    if not case.low_memory:
        tell("loading and compiling", 0.0)
        last = perf_counter()
        for progress in pipeline.prepare(request):
            now = perf_counter()
            loading[progress.stage] = loading.get(progress.stage, 0.0) + now - last
            last = now
    executions: dict[str, Execution] = {}
    images: list[Laps] = []
    shown: dict[str, np.ndarray] = {}  # by prompt, in their order
    cold_sec = 0.0

    def tell_step(share: float) -> None:
        tell(_image_name(case, len(images)), min((len(images) + share) / case.images, 1.0))

    while not _enough(images[case.warmup :], case):
        if len(images) == case.warmup:
            watch = Watch(earlier=whole)
        ready = perf_counter()
        tell_step(0.0)
        wanted = case.nth_request(len(images))
        laps, pixels = _time_image(pipeline, wanted, executions, tell_step)
        shown.setdefault(wanted.prompt, pixels)
        images.append(laps)
        if len(images) == 1:
            cold_sec = ready - (begin if started is None else started) + laps["end_to_end"][0]
        watch.look()
    laps = {stage: [s for p in images[case.warmup :] for s in p[stage]] for stage in images[0]}
    timings = Timings(
        load=_timing([loading["load"]]),
        compile=Timing.of([loading["compile"]] if "compile" in loading else []),
        cold=_timing([cold_sec]),
        unet_step=Timing.of(laps["unet_step"]),
        **{stage: _timing(laps[stage]) for stage in ONCE},
    )
    joules, peak = watch.energy_joules, peak_rss_bytes()
    prompt_images = []
    for i, prompt in enumerate(case.prompts):
        tell(f"image {i + 1} of {len(case.prompts)} prompts", (case.images - len(case.prompts) + i) / case.images)
        prompt_images.append(pipeline.generate(replace(request, prompt=prompt, seed=request.seed + i)))
    return Measurement(
        timings=timings,
        peak_rss_bytes=peak,
        energy_joules=None if joules is None else joules / len(laps["end_to_end"]),
        disturbance=watch.disturbance(laps["end_to_end"]),
        provider=_provider(executions),
        compute_dtype=executions["unet"].compute_dtype if "unet" in executions else None,
        pixels=np.stack(list(shown.values())),
        prompt_images=np.array(prompt_images, np.uint8).reshape(-1, *pixels.shape),
    )


def _enough(images: Sequence[Laps], case: Case) -> bool:
    """Do these images tell how long one takes, and are those of more prompts there that fit the time?"""
    spent = sum(laps["end_to_end"][0] for laps in images)
    if case.repeats is not None:
        one_more = spent * (1 + 1 / max(len(images), 1))
        return len(images) >= case.repeats and (len(images) > len(case.more_prompts) or one_more > case.fill_sec)
    filled = spent >= FILL_SEC
    return len(images) >= (MIN_IMAGES if filled else MAX_IMAGES)


def _image_name(case: Case, n: int) -> str:
    """The n-th image, counted from 0, for whoever waits; those that fill the time are more than planned."""
    number, planned = n - case.warmup + 1, case.images - case.warmup - len(case.prompts)
    of = f" of {planned}" if number <= planned else ""
    return f"image {number}{of}" if number > 0 else "warm-up image"


def _time_image(
    pipeline: Pipeline, request: Request, executions: dict[str, Execution], tell: Callable[[float], None]
) -> tuple[Laps, np.ndarray]:
    """The laps of one image, and the image; `executions` is filled with what the components' engines chose.

    `tell` is called with the share of the U-Net's steps that are done.
    """
    laps: Laps = {stage: [] for stage in (*ONCE, "unet_step")}
    pixels, whole_sec = None, 0.0
    last = perf_counter()
    for progress in pipeline.run(request):
        lap = perf_counter() - last
        laps[_stage(progress)].append(lap)
        whole_sec += lap
        pixels = progress.pixels
        if progress.stage in pipeline.components and progress.stage not in executions:
            component = pipeline.components[progress.stage]
            if isinstance(component, SupportsExplain):
                executions[progress.stage] = component.explain()
            del component  # a pipeline that is short of memory drops it before it loads the next
        if progress.stage == "unet":
            tell(progress.step / progress.steps)
        last = perf_counter()
    if pixels is None:
        raise KdcError("the pipeline ended without an image")
    last = perf_counter()
    encode_png(pixels)
    laps["png"].append(perf_counter() - last)
    laps["scheduler"] = [sum(laps["scheduler"])]
    laps["end_to_end"].append(whole_sec + laps["png"][0])
    return laps, pixels


def _stage(progress: Progress) -> str:
    if progress.stage != "unet":
        return progress.stage
    return "unet_first_step" if progress.step == 1 else "unet_step"


def _timing(samples_sec: list[float]) -> Timing:
    timing = Timing.of(samples_sec)
    assert timing is not None  # the pipeline yields this stage for every image
    return timing


def _provider(executions: dict[str, Execution]) -> str | None:
    """One for all, or by component: "text_encoder CPU, unet GPU"."""
    if len({execution.provider for execution in executions.values()}) == 1:
        return next(iter(executions.values())).provider
    return ", ".join(f"{name} {execution.provider}" for name, execution in executions.items()) or None

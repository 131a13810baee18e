"""The stopwatch against a clock that the test turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from kdc_edge.bench import measure as stopwatch
from kdc_edge.bench.case import Case
from kdc_edge.bench.measure import measure
from kdc_edge.bench.record import Timing
from kdc_edge.components import Execution
from kdc_edge.errors import InputError
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request
from tests.bench.rows import make_pipeline, timing

NOWHERE = Path("nowhere")  # of measurements whose pipeline is given


def test_laps_are_what_the_components_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now, images, steps = 100.0, 0, 0

    def work(component: str) -> None:
        """Image n takes n times as long; a first step 5, the others 2."""
        nonlocal now, images, steps
        if component == "text_encoder":
            images, steps = images + 1, 0
        steps += component == "unet"
        units = {"text_encoder": 1.0, "unet": 5.0 if steps == 1 else 2.0, "vae_decoder": 3.0}[component]
        now += units * images

    def opener() -> Pipeline:
        nonlocal now
        pipeline = make_pipeline(work)
        now += 7.0
        return pipeline

    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)
    found = measure(opener, Case(NOWHERE, Request("a red flower", steps=4, sampler="ddim"), repeats=3, warmup=1))
    timings = found.timings
    assert timings.load.samples_sec == (7.0,)
    assert timings.compile is None  # these components need none
    assert timings.cold.samples_sec == (7.0 + 1.0 + 5.0 + 3 * 2.0 + 3.0,)
    assert timings.scheduler.samples_sec == timings.png.samples_sec == (0.0, 0.0, 0.0)
    assert timings.tokenize.samples_sec == (0.0, 0.0, 0.0)
    assert timings.text_encoder.samples_sec == (2.0, 3.0, 4.0)  # the first image was for warm-up
    assert timings.unet_first_step.samples_sec == (10.0, 15.0, 20.0)
    assert timings.unet_step is not None
    assert timings.unet_step.samples_sec == (4.0,) * 3 + (6.0,) * 3 + (8.0,) * 3
    assert timings.vae_decoder.samples_sec == (6.0, 9.0, 12.0)
    assert timings.end_to_end.samples_sec == (30.0, 45.0, 60.0)
    assert timings.end_to_end.median_sec == 45.0
    assert timings.end_to_end.p90_sec == pytest.approx(57.0)
    assert found.pixels.shape == (1, 64, 64, 3)
    assert (found.pixels == found.pixels[0, 0, 0, 0]).all()


@pytest.mark.parametrize(("image_sec", "counted"), [(10.0, 5), (0.25, 8), (0.01, 50)])
def test_short_images_are_repeated_until_they_fill_two_seconds(
    image_sec: float, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def work(component: str) -> None:
        nonlocal now
        now += image_sec * (component == "vae_decoder")

    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)
    found = measure(partial(make_pipeline, work), Case(NOWHERE, Request("a", steps=1, sampler="ddim")))
    assert len(found.timings.end_to_end.samples_sec) == counted


class CompiledUnet:
    """An engine that compiles for each set of shapes, which takes 3 units, and computes in 1."""

    def __init__(self, wait: Callable[[float], None]) -> None:
        self._wait, self._known = wait, set[tuple[int, ...]]()

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if shapes["sample"] not in self._known:
            self._wait(3.0)
        self._known.add(shapes["sample"])

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        self.prepare({"sample": inputs["sample"].shape})
        self._wait(1.0)
        return inputs["sample"]

    def explain(self) -> Execution:
        return Execution("GPU", "bf16")


def test_compiling_is_apart_from_loading_and_from_images(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def wait(units: float) -> None:
        nonlocal now
        now += units

    def opener() -> Pipeline:
        wait(7.0)
        made = make_pipeline()
        made.components = {**made.components, "unet": CompiledUnet(wait)}
        return made

    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)
    request = Request("a", steps=4, guidance_interval=(0.0, 0.5), guidance_mode="batched", sampler="ddim")
    found = measure(opener, Case(NOWHERE, request, repeats=2, warmup=0), started=90.0)
    assert found.timings.load.samples_sec == (7.0,)
    assert found.timings.compile is not None
    assert found.timings.compile.samples_sec == (6.0,)  # for a batch of two, and of one
    assert found.timings.cold.samples_sec == (10.0 + 7.0 + 6.0 + 4.0,)
    assert found.timings.end_to_end.samples_sec == (4.0, 4.0)
    assert (found.provider, found.compute_dtype) == ("GPU", "bf16")


def test_the_samplers_arithmetic_is_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step takes 2 units, whatever the U-Net takes."""
    now = 100.0

    class Slow:
        timesteps = np.array([900, 500, 100])
        init_noise_sigma = 1.0
        first = 0

        def skip(self, steps: int) -> None:
            assert steps == 0

        def scale_model_input(self, sample: np.ndarray, i: int) -> np.ndarray:  # noqa: ARG002
            return sample

        def step(self, noise_pred: np.ndarray, i: int, sample: np.ndarray) -> np.ndarray:  # noqa: ARG002
            nonlocal now
            now += 2.0
            return sample

    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)
    monkeypatch.setattr("kdc_edge.pipeline.make_sampler", lambda *_, **__: Slow())
    timings = measure(make_pipeline, Case(NOWHERE, Request("a", steps=3), repeats=2, warmup=0)).timings
    assert timings.scheduler.samples_sec == timings.end_to_end.samples_sec == (6.0, 6.0)
    assert timings.unet_first_step.samples_sec == (0.0, 0.0)


def test_images_of_prompts_come_after_what_is_timed() -> None:
    case = Case(NOWHERE, Request("a", steps=2, seed=5), repeats=1, warmup=0, prompts=("b", "c"))
    found = measure(make_pipeline, case)
    assert len(found.timings.end_to_end.samples_sec) == 1
    expected = [make_pipeline().generate(Request(p, steps=2, seed=s)) for p, s in (("b", 5), ("c", 6))]
    np.testing.assert_array_equal(found.prompt_images, expected)
    assert measure(make_pipeline, dataclasses.replace(case, prompts=())).prompt_images.shape == (0, 64, 64, 3)


def test_the_images_show_the_prompts_in_turn() -> None:
    """No more images than without; a reference adds those that fit its time."""
    case = Case(NOWHERE, Request("a", steps=1, seed=5), repeats=3, warmup=1, more_prompts=("b", "c"))
    made = [make_pipeline().generate(Request(p, steps=1, seed=5)) for p in "abc"]
    assert [case.nth_request(n).prompt for n in range(4)] == ["a", "b", "c", "a"]
    found = measure(make_pipeline, case)
    assert len(found.timings.end_to_end.samples_sec) == 3
    np.testing.assert_array_equal(found.pixels, made)
    for fill_sec, count in ((0.0, 1), (100.0, 3)):
        reference = dataclasses.replace(case, repeats=1, warmup=0, fill_sec=fill_sec)
        np.testing.assert_array_equal(measure(make_pipeline, reference).pixels, made[:count])


def test_whoever_waits_is_told_what_is_measured_and_how_far() -> None:
    told: list[tuple[str, float]] = []
    case = Case(NOWHERE, Request("a", steps=2), repeats=2, warmup=1, prompts=("b",))
    measure(make_pipeline, case, tell=lambda text, share: told.append((text, share)))
    assert told == [
        ("loading", 0.0), ("loading and compiling", 0.0),
        ("warm-up image", 0.0), ("warm-up image", 0.125), ("warm-up image", 0.25),
        ("image 1 of 2", 0.25), ("image 1 of 2", 0.375), ("image 1 of 2", 0.5),
        ("image 2 of 2", 0.5), ("image 2 of 2", 0.625), ("image 2 of 2", 0.75),
        ("image 1 of 1 prompts", 0.75),
    ]  # fmt: skip


def test_images_beyond_the_plan_are_told_without_a_total() -> None:
    told: list[tuple[str, float]] = []
    measure(make_pipeline, Case(NOWHERE, Request("a", steps=1), warmup=0), tell=lambda *what: told.append(what))
    assert ("image 5 of 5", 0.8) in told
    assert told[-1] == ("image 50", 1.0)
    assert [share for _, share in told] == sorted(share for _, share in told)


def test_stages_add_up_to_the_end_to_end() -> None:
    timings = measure(make_pipeline, Case(NOWHERE, Request("a", steps=5), repeats=2, warmup=0)).timings
    assert timings.unet_step is not None
    stages = {k: v for k, v in vars(timings).items() if k not in ("load", "compile", "cold", "end_to_end")}
    assert set(stages) == {
        "tokenize", "text_encoder", "unet_first_step", "unet_step", "scheduler", "vae_decoder", "png",
    }  # fmt: skip
    assert all(min(stage.samples_sec) > 0 for stage in stages.values())
    total = sum(sum(stage.samples_sec) for stage in stages.values())
    assert total == pytest.approx(sum(timings.end_to_end.samples_sec), rel=1e-6)


def test_an_image_of_one_step_has_no_later_steps() -> None:
    case = Case(NOWHERE, Request("a", steps=1, sampler="ddim"), repeats=2, warmup=0)
    assert measure(make_pipeline, case).timings.unet_step is None


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_counts_out_of_range_are_refused(repeats: int, warmup: int) -> None:
    with pytest.raises(InputError, match=r"--(repeats|warmup)"):
        Case(NOWHERE, Request("a"), repeats=repeats, warmup=warmup)


def test_a_case_draws_its_own_noise() -> None:
    with pytest.raises(InputError, match="give no latents"):
        Case(NOWHERE, Request("a", latents=np.zeros((1, 4, 16, 16), np.float32)))


def test_statistics_are_numpys() -> None:
    samples = np.random.default_rng(0).random(17).tolist()
    made = timing(*samples)
    assert made.median_sec == np.sort(samples)[8]
    assert made.p90_sec == pytest.approx(np.quantile(samples, 0.9))
    assert made.std_sec == pytest.approx(np.std(samples, ddof=1))
    assert timing(0.5).std_sec is None
    assert Timing.of([]) is None

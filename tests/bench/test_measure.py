"""The stopwatch against a clock that the test turns, and failures as rows."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from kdc_edge.bench import measure as stopwatch
from kdc_edge.bench.case import Case
from kdc_edge.bench.measure import measure
from kdc_edge.bench.record import Timing
from kdc_edge.bench.runner import JOB, OUTCOME, Doing, Job, measure_in_fresh_process
from kdc_edge.bench.sensors import peak_rss_bytes
from kdc_edge.components import Execution
from kdc_edge.errors import InputError
from kdc_edge.manifest import Check, Manifest
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request
from tests.bench.rows import check, make_bundle, make_pipeline, timing

NOWHERE = Path("nowhere")  # of measurements whose pipeline is given
Opener = Callable[[str], None]
ROOT = Path(__file__).parents[2]


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


def test_the_parent_is_told_of_all_processes(tmp_path: Path, opener: Opener) -> None:
    opener("open_slow")
    told: list[tuple[Case, Doing]] = []
    case = Case(make_bundle(tmp_path / "b"), Request("a", steps=1, sampler="ddim"), warmup=0)
    measure_in_fresh_process(case, tell=lambda *what: told.append(what))
    assert {id(of) for of, _ in told} == {id(case)}
    loading = {doing.share for _, doing in told if doing.text == "loading"}
    assert loading == {0.0, 1 / 3, 2 / 3}
    shares = [doing.share for _, doing in told]
    assert shares == sorted(shares)


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


def test_a_job_is_the_same_in_the_child_process() -> None:
    request = Request("a", guidance_mode="sequential", guidance_interval=(0.0, 0.5), width=96)
    job = Job(Case(Path("b"), request, None, 2, "torch", "CPU", 3, True, ("x", "y")), 1.5, Path("out"))
    assert JOB.validate_json(JOB.dump_json(job)) == job


def test_statistics_are_numpys() -> None:
    samples = np.random.default_rng(0).random(17).tolist()
    made = timing(*samples)
    assert made.median_sec == np.sort(samples)[8]
    assert made.p90_sec == pytest.approx(np.quantile(samples, 0.9))
    assert made.std_sec == pytest.approx(np.std(samples, ddof=1))
    assert timing(0.5).std_sec is None
    assert Timing.of([]) is None


def test_peak_memory_is_a_high_water_mark() -> None:
    size_bytes = 60 * 2**20
    before = psutil.Process().memory_info().rss
    block = np.ones(size_bytes, np.uint8)
    del block
    peak = peak_rss_bytes()
    assert peak is not None
    assert before + size_bytes * 0.9 < peak <= psutil.virtual_memory().total


def test_peak_memory_is_what_the_kernel_gives_the_parent(tmp_path: Path, opener: Opener) -> None:
    """Within 5 % of ru_maxrss of the child, the number that /usr/bin/time -v prints.

    A small process stands between, because that number begins at the parent's size.
    """
    job = Job(Case(tmp_path, Request("a", steps=1), repeats=1, warmup=0, threads=1), 0.0, tmp_path)
    opener("open_large")
    (tmp_path / "job.json").write_bytes(JOB.dump_json(job))
    between = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'tests.bench.fake_worker'], stdin=open(sys.argv[1]), check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", between, str(tmp_path / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    theirs = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    ours = OUTCOME.validate_json((tmp_path / "result.json").read_bytes()).peak_rss_bytes
    assert ours == pytest.approx(theirs, rel=0.05)
    assert theirs > 200 * 2**20


def test_a_row_that_is_ended_says_what_memory_was_seen(tmp_path: Path, opener: Opener) -> None:
    opener("open_large_and_endless")
    case = Case(make_bundle(tmp_path / "b"), Request("a"), repeats=1, warmup=0)
    for sec in (3, 30):  # the second where the machine is so busy that the process has hardly begun
        found = measure_in_fresh_process(case, timeout_sec=sec)
        assert found.row.failure == f"not done after {sec} seconds"
        if (found.row.peak_pss_bytes or 0) > 200 * 2**20:
            break
    if sys.platform == "linux":
        assert found.row.peak_rss_bytes is not None
        assert found.row.peak_pss_bytes is not None
        assert 200 * 2**20 < found.row.peak_pss_bytes <= found.row.peak_rss_bytes


@pytest.mark.usefixtures("opener")
def test_a_bundle_in_its_own_process(tmp_path: Path) -> None:
    images = [check("unet", 20.0), check("image", None), check("image of seed 2", 51.7)]
    folder = make_bundle(tmp_path / "flowers", images)
    # The parent's size must not be taken for the child's: fill this process, then look at the row.
    block = np.ones(256 * 2**20, np.uint8)
    found = measure_in_fresh_process(Case(folder, Request("a", steps=2, width=96), repeats=2, threads=1))
    row, pixels = found.row, found.pixels
    assert row.failure is None
    assert row.timings is not None
    assert len(row.timings.end_to_end.samples_sec) == 2
    assert (row.name, row.target, row.precision, row.engine) == ("flowers", "onnx", "fp16", "onnxruntime")
    assert (row.width, row.height, row.size_bytes, row.threads) == (96, 64, 1000, 1)
    assert row.parity == images[2]
    assert row.peak_rss_bytes is not None
    assert 10 * 2**20 < row.peak_rss_bytes < block.nbytes
    assert pixels is not None
    assert pixels.shape == (1, 64, 96, 3)
    np.testing.assert_array_equal(pixels[0], make_pipeline().generate(Request("a", steps=2, width=96)))


@pytest.mark.usefixtures("opener")
def test_what_is_over_soon_is_measured_in_three_processes(tmp_path: Path) -> None:
    request = Request("a", steps=1, sampler="ddim")
    row = measure_in_fresh_process(Case(make_bundle(tmp_path / "b"), request, warmup=0)).row
    assert row.timings is not None
    assert len(row.timings.cold.samples_sec) == len(row.timings.load.samples_sec) == 3
    assert row.repeats == len(row.timings.end_to_end.samples_sec) == 3 * 50
    assert row.timings.unet_step is None


@pytest.mark.usefixtures("opener")
def test_without_time_for_another_process_one_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdc_edge.bench.runner.SHORT_SEC", 0.0)
    request = Request("a", steps=1, sampler="ddim")
    row = measure_in_fresh_process(Case(make_bundle(tmp_path / "b"), request, warmup=0)).row
    assert row.timings is not None
    assert len(row.timings.cold.samples_sec) == 1


@pytest.mark.parametrize(
    ("opened", "reason"),
    [
        ("open_refused", "^this engine refuses$"),
        ("open_too_large", "out of memory"),
        ("open_killed", "SIGKILL.*out of memory"),
        ("open_crash", "code 3: engine: illegal instruction"),
        ("open_broken", "ZeroDivisionError: inside the engine"),
    ],
)
def test_a_failing_child_becomes_a_row_with_its_reason(
    opened: str, reason: str, tmp_path: Path, opener: Opener
) -> None:
    opener(opened)
    found = measure_in_fresh_process(Case(make_bundle(tmp_path / "b"), Request("a"), repeats=1, warmup=0))
    row = found.row
    assert row.failure is not None
    assert re.search(reason, row.failure)
    assert (row.timings, found.pixels, found.prompt_images) == (None, None, None)
    assert (row.size_bytes, row.width) == (1000, 64)  # what the folder says of itself stays


def test_a_folder_that_is_no_bundle_becomes_a_row(tmp_path: Path) -> None:
    found = measure_in_fresh_process(Case(tmp_path / "nowhere", Request("a"), repeats=1, warmup=0))
    assert found.row.failure is not None
    assert "nowhere" in found.row.failure
    assert found.pixels is None


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path, opener: Opener) -> None:
    opener("open_endless")
    case = Case(make_bundle(tmp_path / "b"), Request("a"), repeats=1, warmup=0)
    found = measure_in_fresh_process(case, timeout_sec=0.2)
    assert found.row.failure == "not done after 0.2 seconds"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where this process was started with it ignored, as background jobs are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_child(tmp_path: Path, opener: Opener) -> None:
    opener("open_endless")
    folder = make_bundle(tmp_path / "b")
    seen: list[int] = []

    def interrupt() -> None:
        for _ in range(1000):
            if (folder / "pid").is_file() and (text := (folder / "pid").read_text("utf-8")):
                seen.append(int(text))
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        measure_in_fresh_process(Case(folder, Request("a"), repeats=1, warmup=0), timeout_sec=30)
    thread.join()
    assert seen
    assert not psutil.pid_exists(seen[0])


def test_the_worst_image_is_the_parity(tmp_path: Path) -> None:
    def worst(*checks: Check) -> Check | None:
        folder = make_bundle(tmp_path / str(len(list(tmp_path.iterdir()))), checks)
        return Manifest.model_validate_json((folder / "kdc-edge.json").read_text("utf-8")).image_parity

    assert worst(check("unet", 10.0)) is None
    assert worst(check("image", None)) == check("image", None)
    assert worst(check("image", None), check("image 2", 40.0), check("image", 50.0)) == check("image 2", 40.0)

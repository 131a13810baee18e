"""Measurements in fresh processes: peak memory, failures as rows, time limits, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from kdc_edge.bench.case import Case
from kdc_edge.bench.runner import JOB, OUTCOME, Doing, Job, measure_in_fresh_process
from kdc_edge.bench.sensors import peak_rss_bytes
from kdc_edge.manifest import Check, Manifest
from kdc_edge.request import Request
from tests.bench.rows import check, make_bundle, make_pipeline

Opener = Callable[[str], None]
ROOT = Path(__file__).parents[2]


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


def test_a_job_is_the_same_in_the_child_process() -> None:
    request = Request("a", guidance_mode="sequential", guidance_interval=(0.0, 0.5), width=96)
    job = Job(Case(Path("b"), request, None, 2, "torch", "CPU", 3, True, ("x", "y")), 1.5, Path("out"))
    assert JOB.validate_json(JOB.dump_json(job)) == job


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

"""No process and no folder outlives the command that made it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kdc_edge import files
from kdc_edge.files import temporary_folder
from kdc_edge.processes import run_module

ROOT = Path(__file__).parents[2]
BENCH = """
import sys
from pathlib import Path
from kdc_edge.bench import runner
from kdc_edge.bench.case import Case
from kdc_edge.request import Request
runner.WORKER = "tests.bench.fake_worker"
runner.measure_in_fresh_process(Case(Path(sys.argv[1]), Request("x")))
"""
EXPORT = """
import signal, sys
from kdc_edge.processes import run_module
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
run_module("tests.security.endless", sys.argv[1:])
"""


def until(found: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_what_a_child_says_is_told_line_by_line() -> None:
    told: list[str] = []
    done = run_module("base64", ["-?"], tell=told.append)  # Python's own, which refuses this
    assert done.returncode == 2
    assert "option -? not recognized" in told[0]
    assert told == done.stderr.splitlines()


@contextmanager
def parent(program: str, *arguments: object, temporary: Path, ready: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose child is at work, and where temporary files go for both."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "KDC_EDGE_TEST_OPENER": "open_endless"
    }  # fmt: skip
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, env=environment, cwd=ready.parent) as process:
        try:
            until(lambda: ready.exists() or process.poll() is not None, "the child did not begin")
            yield process
        finally:
            process.kill()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    assert found
    return found


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_a_benchmarks_worker_dies_with_its_parent_and_its_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.bench.rows import make_bundle

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    bundle = make_bundle(tmp_path / "onnx-fp16")
    with parent(BENCH, bundle, temporary=temporary, ready=bundle / "pid") as process:
        workers = children(process)
        (left,) = temporary.iterdir()
        with temporary_folder() as other:
            assert {left, other} == set(temporary.iterdir())  # the other's process lives
        process.send_signal(signal.SIGKILL)
        until(lambda: gone(workers), "the worker lives on")
    assert left.is_dir()
    with temporary_folder() as own:
        assert list(temporary.iterdir()) == [own]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("how", "beside"), [(signal.SIGKILL, [".out.part-new"]), (signal.SIGTERM, [])])
def test_the_export_that_fit_started_ends_with_it(tmp_path: Path, how: signal.Signals, beside: list[str]) -> None:
    folder = tmp_path / "bundles"
    ready = tmp_path / "began"
    with parent(EXPORT, folder / "out", ready, temporary=tmp_path, ready=ready) as process:
        exports = children(process)
        process.send_signal(how)
        until(lambda: gone(exports), "the export lives on")
        process.wait()
    assert [p.name for p in folder.iterdir()] == beside
    with files.atomic_folder(folder / "another"):
        pass
    assert [p.name for p in folder.iterdir()] == ["another"]


def test_other_folders_in_the_place_for_temporary_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = tmp_path / "kdc-edge-mine"
    kept.mkdir()
    (tmp_path / f"{files.TEMPORARY}link").symlink_to(kept)
    with temporary_folder() as folder:
        (folder / "a").mkdir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{files.TEMPORARY}link", "kdc-edge-mine"]

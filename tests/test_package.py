"""The package as it is built and imported: nothing missing from the wheel, nothing heavy on the device path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdc_edge

ROOT = Path(__file__).parent.parent
ROOMS = {
    "kdc_edge": "kdc_edge",
    "export": "kdc_edge/export",
    "runtimes": "kdc_edge/runtimes",
    "train": "kdc_edge/train",
}
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "numpy",
    "PIL",
    "onnxruntime",
    "openvino",
    "coremltools",
    "rich",
}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The distributions, kdc_edge and kdc_edge_garden."""
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a build leaves folders behind: not in the working tree
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True, text=True, cwd=ROOT,
    ).stdout.splitlines()  # fmt: skip
    for name in names:
        path = ROOT / name
        if not path.exists() and not path.is_symlink():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(path.readlink())
        else:
            target.write_bytes(path.read_bytes())
    code = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r})"
    for folder in (source, source / "train" / "assets"):
        subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, cwd=folder)
    return {path.name.split("-")[0]: path for path in out.glob("*.whl")}


@pytest.fixture
def wheel(wheels: dict[str, Path]) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheels["kdc_edge"])


def test_the_wheel_for_devices_is_small(wheels: dict[str, Path]) -> None:
    assert wheels["kdc_edge"].stat().st_size < 5_000_000


def test_the_gardens_weights_are_a_distribution_of_their_own(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Installed beside a wheel that has none, they are found; without them one line says what to install."""
    for name in ("kdc_edge", "kdc_edge_garden"):
        zipfile.ZipFile(wheels[name]).extractall(tmp_path / name)
    code = "from kdc_edge.train.teachers import find_teacher; print(find_teacher('garden'))"
    for folders, found in (
        (["kdc_edge", "kdc_edge_garden"], str(tmp_path / "kdc_edge_garden" / "kdc_edge_garden" / "garden-teacher")),
        (["kdc_edge"], "pip install 'kdc-edge[garden]'"),
    ):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(tmp_path / folder) for folder in folders)}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found in done.stdout + done.stderr


def test_every_module_and_asset_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {
        f"{inside}/{path.relative_to(ROOT / room).as_posix()}"
        for room, inside in ROOMS.items()
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not _through_link(path, ROOT / room)
        if not path.is_relative_to(ROOT / "train" / "assets")  # a distribution of its own
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {"kdc_edge/train/losses.py", "kdc_edge/py.typed", "kdc_edge/assets/clip-bpe/vocab.json"} <= found
    assert {"kdc_edge/report/page.html.j2", "kdc_edge/report/style.css"} <= found


def test_nothing_generic_lands_in_site_packages(wheel: zipfile.ZipFile) -> None:
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"kdc_edge"}


def test_the_wheel_has_the_packages_version(wheel: zipfile.ZipFile) -> None:
    assert f"kdc_edge-{kdc_edge.__version__}.dist-info/METADATA" in wheel.namelist()


@pytest.mark.parametrize("old", [True, False])
def test_make_setup_refuses_an_old_python_before_it_installs(tmp_path: Path, old: bool) -> None:
    """A stand-in interpreter: an old one fails the check, a new one gets as far as making the environment."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in\n--version) echo Python 3.9.2;;\n-c) exit {int(old)};;\n*) exit 7;;\nesac\n'
    )
    python.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert ("setup: kdc-edge needs Python 3.11 or newer" in done.stderr) == old
    assert ("Python 3.9.2" in done.stderr) == old
    assert ("creating .venv" in done.stdout) != old
    assert not (tmp_path / ".venv").exists()


def test_help_imports_neither_engine_nor_numpy() -> None:
    code = (
        "import sys, json\nfrom kdc_edge.cli.app import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print('\\n' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    loaded = set(json.loads(python(code).splitlines()[-1]))
    assert loaded.isdisjoint(HEAVY - {"rich"})


def test_the_device_path_imports_no_training_library() -> None:
    code = (
        "import sys, json\nimport kdc_edge.pipeline, kdc_edge.bench.tables, kdc_edge.bench.measure\n"
        "import kdc_edge.runtimes.onnxruntime, kdc_edge.runtimes.mil.evaluator, kdc_edge.cli.generate\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    assert set(json.loads(python(code))).isdisjoint({"torch", "diffusers", "transformers", "coremltools"})


def _through_link(path: Path, top: Path) -> bool:
    return any(parent.is_symlink() for parent in path.parents if top in parent.parents)

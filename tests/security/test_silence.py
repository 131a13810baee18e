"""Nothing is reported: no call to the network, and no file in a home or temporary folder but those asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Loaded by Python before anything else: what would reach out of the machine is written down, and does not happen.
CAUGHT = """
import os, socket
def note(what):
    with open(os.environ["CAUGHT"], "a") as log:
        log.write(what + "\\n")
    raise OSError(f"caught: {what}")
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, lambda *a, name=name, **k: note(f"{name}{a}"))
class Caught(socket.socket):
    def connect(self, address):
        note(f"connect({address})") if self.family != socket.AF_UNIX else super().connect(address)
    connect_ex = connect
    def sendto(self, *a):
        note(f"sendto{a[1:]}")
socket.socket = Caught
"""
ENGINES = "onnxruntime openvino nncf coremltools transformers diffusers datasets huggingface_hub openvino_tokenizers"
# coremltools, whose warnings are ours to keep back; then the others, which may say what they like.
IMPORTS = f"""
from pathlib import Path
from kdc_edge.runtimes.coreml_tools import load_coremltools
load_coremltools("a test")
said = Path("../said").read_text()
assert said == "", said
import {ENGINES.replace(" ", ", ")}
"""
PROGRAMS = {
    "generate": "main('generate', 'x', '--bundle', bundle, '--steps', '1', '--out', 'a.png')",
    "bench": "main('bench', bundle, '--steps', '1', '--repeats', '1', '--warmup', '0')",
    "export onnx": "main('export', checkpoint, '--precision', 'w8', '--no-verify')",
    "imports, export openvino": IMPORTS
    + "main('export', checkpoint, '--target', 'openvino', '--precision', 'w8', '--no-verify')",
}
MAIN = """
import sys
from kdc_edge.cli import main as run
checkpoint, bundle = sys.argv[1:]
def main(*arguments):
    sys.argv = ["kdc-edge", *arguments]
    run()
"""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.security if n == "export onnx" else ()) for n in PROGRAMS]
)
def test_nobody_is_told_and_nothing_is_left(name: str, checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    caught, log = tmp_path / "caught", tmp_path / "log"
    caught.mkdir()
    (caught / "sitecustomize.py").write_text(CAUGHT)
    folders = {n: tmp_path / n.lower() for n in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "WORK")}
    for folder in folders.values():
        folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{caught}:{ROOT}", "CAUGHT": str(log)}
    environment |= {"OMP_NUM_THREADS": "1", **{n: str(f) for n, f in folders.items()}}
    with (tmp_path / "said").open("w") as said:
        done = subprocess.run(
            [sys.executable, "-c", MAIN + PROGRAMS[name], str(checkpoint), str(bundle)],
            env=environment, cwd=folders.pop("WORK"), stdout=said, stderr=said, check=False,
        )  # fmt: skip
    assert done.returncode == 0, (tmp_path / "said").read_text("utf-8")
    assert (log.read_text("utf-8") if log.exists() else "") == ""
    assert [path for folder in folders.values() for path in folder.rglob("*") if path.is_file()] == []


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdc_edge.telemetry import switch_off

    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.delenv("DO_NOT_TRACK")
    switch_off()
    assert (os.environ["ORT_DISABLE_TELEMETRY"], os.environ["DO_NOT_TRACK"]) == ("0", "1")

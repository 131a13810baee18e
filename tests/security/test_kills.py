"""Exports and trainings killed at random moments: the place holds the old result or the new, and nothing is left over.

KDC_EDGE_KILLS=100 python -m pytest -m security tests/security/test_kills.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from kdc_edge.bundle import MANIFEST, Bundle
from kdc_edge.diffusers_folder import check_weights

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("KDC_EDGE_FUZZ_SEED", "16"))
KILLS = int(os.environ.get("KDC_EDGE_KILLS", "100"))
# One process that has all libraries in memory forks a command for each line of its input, and says how it ended.
SERVER = """
import os, sys, time
from pathlib import Path
import kdc_edge.export.onnx.export as onnx, kdc_edge.runtimes.onnxruntime, kdc_edge.export.parity
import kdc_edge.train.checkpoint, onnx_ir as ir, shutil
from kdc_edge.cli import main
traced = Path(sys.argv[1])
onnx.trace = lambda part, sizes=None: ir.load(traced / part.name / "model.onnx")  # a trace takes longer than all else
for line in sys.stdin:
    process = os.fork()
    if not process:
        sys.argv = ["kdc-edge", *line.split()]
        os.close(0)
        try:
            main()
        except SystemExit as end:
            os._exit(end.code)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


class Server:
    def __init__(self, cwd: Path, traced: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", SERVER, str(traced)]
        self.process = subprocess.Popen(
            command, cwd=cwd, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
        )  # fmt: skip

    def run(self, command: str, *, how: signal.Signals | None = None, after_sec: float = 0.0) -> int:
        """The exit code of a command, which gets the signal after so long, if it is there still."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        process = int(self._line())
        if how is not None:
            time.sleep(after_sec)
            with contextlib.suppress(ProcessLookupError):  # it was done
                os.kill(process, how)
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).strip().lstrip("-").isdigit():
            assert line, "the server is gone"
        return line

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def kill_at_random(folder: Path, checkpoint: Path, traced: Path, kills: int, seed: int, *, proof: bool) -> Counter[str]:
    """Kills of two kinds on an export that replaces and an `init`, counted by how the process ended."""
    rng, counts = random.Random(seed), Counter[str]()
    export = f"export {checkpoint} --precision fp16 {'--verify' if proof else '--no-verify'} --out bundles/out"
    init = "init --preset garden-student --from garden --out students/out"
    with Server(folder, traced) as server:
        begin = time.monotonic()
        assert server.run(export) == 0
        seconds = {export: time.monotonic() - begin}
        begin = time.monotonic()
        assert server.run(init) == 0
        seconds[init] = time.monotonic() - begin
        while counts.total() < kills:
            command = rng.choice((export, export, init))
            how = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            if rng.random() < 0.3:  # no old one to stay
                shutil.rmtree(folder / command.split()[-1], ignore_errors=True)
            there = (folder / command.split()[-1]).exists()
            code = server.run(command, how=how, after_sec=rng.uniform(0.02, seconds[command]))
            counts[f"{command.split()[0]} {how.name}: ended with {code}"] += 1
            _look(folder, command, there=there, code=code, killed=how == signal.SIGKILL)
        for command in (export, init):
            assert server.run(command) == 0
        assert sorted(p.name for parent in ("bundles", "students") for p in (folder / parent).iterdir()) == [
            "out",
            "out",
        ]
    return counts


def _look(folder: Path, command: str, *, there: bool, code: int, killed: bool) -> None:
    """The place is whole, or was and is empty; what a signal could be answered to has left nothing."""
    out = folder / command.split()[-1]
    if there or code == 0:
        Bundle.open(out).verify() if command.startswith("export") else check_weights(out)
    assert code in (0, -signal.SIGKILL, 130, 143)
    beside = sorted(p.name for p in out.parent.iterdir() if p.name != "out")
    assert beside in ([], [".out.part-new"]), beside
    assert killed or beside == [] or code == 0, (beside, code)
    for part in out.parent.glob(f".*/{MANIFEST}"):
        assert "--no-verify" in command or json.loads(part.read_text("utf-8"))["parity"], "a manifest before its proof"


def test_a_few_kills(checkpoint: Path, bundle_fp32: Path, tmp_path: Path) -> None:
    counts = kill_at_random(tmp_path, checkpoint, bundle_fp32, 4, SEED, proof=False)
    assert counts.total() == 4


@pytest.mark.security
def test_many_kills(checkpoint: Path, bundle_fp32: Path, tmp_path: Path) -> None:
    print(dict(sorted(kill_at_random(tmp_path, checkpoint, bundle_fp32, KILLS, SEED, proof=True).items())))

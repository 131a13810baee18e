"""Commands killed at random moments: the place holds the old result or the new, and nothing is left over.

KDC_EDGE_KILLS=300 python -m pytest -m security -s tests/security/test_kills.py
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from kdc_edge.bench.record import read_report
from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import check_weights
from kdc_edge.files import TEMPORARY, sha256
from kdc_edge.manifest import MANIFEST
from kdc_edge.train.runs.states import list_states, load_state
from tests.traced_module import FOLDER

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("KDC_EDGE_FUZZ_SEED", "16"))
KILLS = int(os.environ.get("KDC_EDGE_KILLS", "300"))
# One process that has all libraries in memory forks a command for each line of its input, and says how it ended. What
# a command leaves running becomes its child (prctl's PR_SET_CHILD_SUBREAPER), and is seen.
SERVER = """
import contextlib, ctypes, os, sys
from pathlib import Path
import kdc_edge.export.onnx.export as onnx, kdc_edge.runtimes.onnxruntime, kdc_edge.export.parity
import kdc_edge.train.checkpoint, kdc_edge.train.loop
from kdc_edge import presets, processes
from kdc_edge.cli import main
from tests.conftest import cached_trace
from tests.traced_module import FOLDER, python_module_with_traces, small_presets
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
onnx.trace = cached_trace(Path(os.environ[FOLDER]))  # a trace takes longer than all else
module = processes.python_module
exporting = ("kdc_edge", "kdc_edge.cli.quickstart_training")
presets.PRESETS = small_presets()  # as in the children
processes.python_module = lambda name: (python_module_with_traces if name in exporting else module)(name)
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
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    print(code, flush=True)
"""
TINY = "--steps 2 --batch-size 2 --samples 8 --eval-images 2"


class Server:
    def __init__(self, cwd: Path, traced: Path) -> None:
        self.temporary = cwd / "temporary"
        self.temporary.mkdir()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.temporary),
            FOLDER: str(traced),
        }  # fmt: skip
        self.log = (cwd / "log.txt").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER], cwd=cwd, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
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

    def left_over(self) -> list[str]:
        """Processes that outlive their command by more than a moment."""
        end = time.monotonic() + 5.0
        while True:
            found = psutil.Process(self.process.pid).children(recursive=True)
            alive = [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
            if not alive or time.monotonic() > end:
                return [str(p) for p in alive]
            time.sleep(0.02)

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
        self.log.close()


@dataclass(frozen=True)
class Subject:
    """A command that is killed. `whole` raises unless a result that is there is whole; it is given the place."""

    command: str
    out: str
    whole: Callable[[Path], object]
    share: int = 1  # of the kills
    again: str | None = None  # the command that goes on with what a kill left in `out`

    def typed(self, folder: Path) -> str:
        unfinished = self.again is not None and (folder / self.out / "config.json").is_file()
        return self.again if unfinished and self.again else self.command


def _sound_run(run: Path) -> None:
    """Whole states and checkpoint; the same weights as of a run that nobody killed, when it is done."""
    if list_states(run):
        load_state(run)
    if (run / "checkpoint").exists():
        check_weights(run / "checkpoint")
        weights = sha256(run / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
        kept = run.parent.parent / "weights.txt"
        if not kept.exists():
            kept.write_text(weights)
        assert kept.read_text() == weights, "a resumed run has other weights"


def _sound_demo(demo: Path) -> None:
    assert (demo / "report.html").read_text("utf-8").rstrip().endswith("</html>")
    assert all(row.failure is None for row in read_report(demo / "bench.json").rows)
    for name in ("onnx-fp16", "few-steps"):
        Bundle.open(demo / "bundles" / name).verify()


def _sound_fit(report: Path) -> None:
    assert all(row.failure is None for row in read_report(report).rows)
    for name in ("onnx-fp16", "onnx-w8"):
        Bundle.open(report.parent / "fitted" / name).verify()


def subjects(checkpoint: Path, bundle: Path, *, proof: bool) -> dict[str, Subject]:
    verify = "--verify" if proof else "--no-verify"
    train = f"train {TINY} --save-every 1 --replay 4 --log-with none --task a=garden:fish --task b=garden:flowers"
    return {
        "export": Subject(f"export {checkpoint} --precision fp16 {verify} --out bundles/out", "bundles/out",
                          lambda out: Bundle.open(out).verify(), 8),
        "init": Subject("init --preset garden-student --from garden --out students/out", "students/out",
                        check_weights, 2),
        "train": Subject(f"{train} --out runs/out", "runs/out", _sound_run, 7, again="train --resume --out runs/out"),
        "bench": Subject(f"bench {bundle} --steps 2 --repeats 1 --format json --out bench.json", "bench.json",
                         lambda out: read_report(out), 6),
        "fit": Subject(f"fit {checkpoint} --formats onnx-fp16,onnx-w8 --bundles fitted --steps 2 --repeats 1"
                       " --min-psnr 1 --out fit.json", "fit.json", _sound_fit, 3),
        "quickstart": Subject(f"quickstart --out demos/out {TINY} --repeats 1", "demos/out", _sound_demo, 3),
    }  # fmt: skip


def _hidden(folder: Path) -> set[str]:
    """What lies half written anywhere."""
    return {str(p.relative_to(folder)) for p in folder.rglob(".*") if not p.name.startswith(".latest")}


def _remove(place: Path) -> None:
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def kill_at_random(folder: Path, found: dict[str, Subject], traced: Path, kills: int, seed: int) -> Counter[str]:
    """Kills of three kinds, counted by how the process ended."""
    rng, counts, seconds = random.Random(seed), Counter[str](), {}
    with Server(folder, traced) as server:
        for name, subject in found.items():
            for _ in range(2 if name in ("fit", "quickstart") else 1):  # the first of these traces
                _remove(folder / subject.out)
                begin = time.monotonic()
                assert server.run(subject.command) == 0, (folder / "log.txt").read_text()[-2000:]
                seconds[name] = time.monotonic() - begin
            subject.whole(folder / subject.out)
        while _landed(counts) < kills:
            name = rng.choices(list(found), [s.share for s in found.values()])[0]
            begin = time.monotonic()
            if _kill_once(folder, server, name, found[name], rng, seconds[name], counts) == 0:
                seconds[name] = min(seconds[name], time.monotonic() - begin)  # the first may have computed what is kept
            if counts.total() % 10 == 0:
                print(_landed(counts), "of", counts.total(), time.strftime("%H:%M:%S"), flush=True)
        for name, subject in found.items():  # the next command of each
            command = subject.typed(folder)
            if command == subject.command and name in ("train", "quickstart"):
                _remove(folder / subject.out)
            code = server.run(command)
            assert code == 0, (name, (folder / "log.txt").read_text()[-2000:])
            subject.whole(folder / subject.out)
        assert server.left_over() == []
        assert _hidden(folder) == set()
        assert list(server.temporary.iterdir()) == []
    return counts


def _landed(counts: Counter[str]) -> int:
    """The signals that ended their command; the others came after its end."""
    return counts.total() - sum(n for case, n in counts.items() if case.endswith("with 0"))


def _kill_once(
    folder: Path, server: Server, name: str, subject: Subject, rng: random.Random, seconds: float, counts: Counter[str]
) -> int:
    """The exit code."""
    out, how = folder / subject.out, rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    if rng.random() < 0.3 or (name in ("train", "quickstart") and (out / "report.html").exists()):
        _remove(out)  # no old one to stay
    if name == "train" and (out / "checkpoint").exists():
        _remove(out)
    if name == "fit" and rng.random() < 0.5:
        _remove(folder / "fitted" / rng.choice(("onnx-fp16", "onnx-w8")))
    there, before, temporary = out.exists(), _hidden(folder), set(server.temporary.iterdir())
    code = server.run(subject.typed(folder), how=how, after_sec=rng.uniform(0.02, seconds))
    case = f"{name} {how.name}: ended with {code}"
    counts[case] += 1
    log = f"{case}: {(folder / 'log.txt').read_text(errors='replace')[-1500:]}"
    assert code in (0, -signal.SIGKILL, 130, 143), log
    assert "Traceback" not in log, log
    assert server.left_over() == [], case
    if out.exists() and not (name == "fit" and code != 0):
        subject.whole(out)
    assert code != 0 or out.exists(), case
    assert out.exists() or not there or name == "train", f"{case}: the old result is gone"
    new = {p for p in _hidden(folder) - before if not p.startswith("temporary/")}
    left = {p for p in server.temporary.iterdir() if p.name.startswith(TEMPORARY)} - temporary
    if how is not signal.SIGKILL or code == 0:
        assert new == set(), f"{case}: {new}"
        assert left == set(), f"{case}: {left}"
    assert len(list(server.temporary.glob(f"{TEMPORARY}*"))) <= 1, "the next command has not removed it"
    if "--no-verify" not in subject.command:
        for part in folder.glob(f"bundles/.*/{MANIFEST}"):
            assert json.loads(part.read_text("utf-8"))["parity"], "a manifest before its proof"
    return code


def test_a_few_kills(checkpoint: Path, bundle_fp32: Path, tmp_path: Path, traced_folder: Path) -> None:
    found = subjects(checkpoint, bundle_fp32, proof=False)
    few = {name: found[name] for name in ("export", "init")}
    assert kill_at_random(tmp_path, few, traced_folder, 2, SEED).total() >= 2


@pytest.mark.security
def test_many_kills(checkpoint: Path, bundle_fp32: Path, tmp_path: Path, traced_folder: Path) -> None:
    found = subjects(checkpoint, bundle_fp32, proof=True)
    print(dict(sorted(kill_at_random(tmp_path, found, traced_folder, KILLS, SEED).items())))

"""Runs that are killed (SIGKILL) at random moments and resumed, until so many kills were survived.

    python -m tests.cli.interrupted FOLDER MOMENTS SEED      # prints one JSON document

Libraries are imported once and every run is a fork: what is measured is the run, not Python's start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.loop import Trainer

CONFIG = TrainConfig(
    teacher=GARDEN_TEACHER, student="garden-student", steps=2, batch_size=2, samples=8, replay=4, eval_images=2,
    eval_steps=1, save_every=1, log_with="none", replay_teacher="student", replay_policy="balanced", baselines=False,
    tasks=(Task("flowers", "garden:flowers"), Task("fish", "garden:fish")),
)  # fmt: skip


def start(run: Path) -> int:
    """A process that trains `run` to its end, from wherever it stands."""
    process = os.fork()
    if process:
        return process
    try:
        for _ in Trainer(CONFIG, run, resume=True).run():
            pass
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def ended(process: int) -> int | None:
    """The exit code; None while it runs."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def main(folder: Path, moments: int, seed: int) -> None:
    rng = random.Random(seed)
    began = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(start(folder / "whole"), 0)[1]) == 0
    seconds = time.monotonic() - began
    kills, number, runs = [], 0, []
    while len(kills) < moments or not (runs[-1] / "checkpoint").is_dir():
        if not runs or (runs[-1] / "checkpoint").is_dir():
            runs.append(folder / f"cut-{number}")
            number += 1
        process, deadline = start(runs[-1]), time.monotonic() + rng.uniform(0.05, seconds)
        if len(kills) >= moments:
            deadline = float("inf")
        while (code := ended(process)) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            states = sorted(p.name for p in (runs[-1] / "state").glob("[0-9]*"))
            kills.append(states[-1] if states else None)
        else:
            assert code == 0, f"a resumed run ended with {code}"
    print(json.dumps({"kills": kills, "runs": [r.name for r in runs], "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

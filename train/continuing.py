"""Runs that go on from other runs: a branch with other settings, or more tasks after the last one.

bare = branch(kept.run_folder, Path("runs/bare"), replace(config, replay=0))
config = continue_run(Path("runs/001"), Path("runs/002"), config)       # then resume runs/002
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import refuse_foreign_folder, write_atomic
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.loop import Trainer
from kdc_edge.train.runs import list_states, load_state


def branch(source: Path, out: Path, config: TrainConfig) -> Trainer:
    """A second run that goes on from where `source` stands, with another configuration (e.g. without replay)."""
    refuse_foreign_folder(out, None)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("checkpoint", "results.json", ".*"))
    write_atomic(out / "config.json", json.dumps(config.as_json(), indent=2))
    return Trainer(config, out, resume=True)


def continue_run(source: Path, out: Path, config: TrainConfig) -> TrainConfig:
    """Prepare `out` to go on from the finished run `source` with the tasks of `config` after its own.

    The memory of the earlier tasks, the weights, their average and R come along; resume `out` with the configuration
    that is given back. Raises CheckpointError for a run that is not finished, InputError for another student.
    """
    if not list_states(source):
        raise CheckpointError(f"{source} is no run with saved states: name the folder of a run, such as runs/001")
    position, _, _ = load_state(source)
    saved = TrainConfig.load(source)
    if position.task < len(saved.tasks):
        raise CheckpointError(f"{source} is not finished: kdc-edge train --resume --out {source} first")
    if saved.student != config.student:
        raise InputError(f"--student {config.student} is not the run's {saved.student}: leave it as it was")
    joined = replace(config, tasks=(*saved.tasks, *config.tasks))
    refuse_foreign_folder(out, None)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copytree(list_states(source)[0], out / "state" / list_states(source)[0].name)
    if (source / "metrics.jsonl").is_file():
        shutil.copy(source / "metrics.jsonl", out)
    write_atomic(out / "config.json", json.dumps(joined.as_json(), indent=2))
    return joined

"""Saved states of a training run, and runs that go on from them.

    RUN/state/00000120-0/  state.json (position, scores), tensors.safetensors (weights, moving average, optimizer,
                           random state), replay.safetensors (the buffer)

    branch_run(Path("runs/kept"), Path("runs/bare"), replace(config, replay=0))      # then resume runs/bare
    config = continue_run(Path("runs/001"), Path("runs/002"), config)                # then resume runs/002

A state is everything that a resumed run needs to end with the uninterrupted one's weights. It is written beside its
place and renamed in; older ones are removed after that, so a kill at any moment leaves at least one whole state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import atomic_folder, read_json, refuse_foreign_folder, write_atomic
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.cache import Write, write_here
from kdc_edge.train.quality import evaluation_set
from kdc_edge.train.replay import ReplayBuffer


@dataclass
class Position:
    """Where a run stands. `total` counts the steps of all tasks, `step` those of task number `task`."""

    task: int = 0
    step: int = 0
    total: int = 0
    metric: str = ""  # what R[i][j] is; higher is better
    matrix: list[list[float | None]] = field(default_factory=list)  # R[i][j]; None where task j was not known yet
    values: list[list[dict[str, float] | None]] = field(default_factory=list)  # everything measured, in the same places
    settings: dict[str, dict[str, str]] = field(default_factory=dict)  # of each finished task: flag -> value
    prompts: dict[str, list[str]] = field(default_factory=dict)  # of each finished task: captions for an export


def save_state(run: Path, position: Position, tensors: dict[str, Tensor], replay: ReplayBuffer, *, keep: int) -> None:
    """Write the state of a run, then drop all but the newest `keep`. A task's end and the step before it are two.

    The same position twice is the same state: it is not written again, so that no moment is without it.
    """
    states = run / "state"
    out = states / f"{position.total:08d}-{position.task}"
    if not (out / "state.json").is_file():
        with atomic_folder(out, marker="state.json") as folder:
            save_file(
                {name: t.detach().contiguous().cpu() for name, t in tensors.items()},
                folder / "tensors.safetensors",
            )
            replay.save(folder / "replay.safetensors")
            write_atomic(folder / "state.json", json.dumps(asdict(position), indent=2))
    for old in list_states(run)[keep:]:
        shutil.rmtree(old)
    for half in states.glob(".*"):  # left by a kill in the middle of a write
        shutil.rmtree(half)


def list_states(run: Path) -> list[Path]:
    """Whole states, the newest first."""
    found = (p for p in (run / "state").glob("*") if not p.name.startswith("."))
    return sorted((p for p in found if (p / "state.json").is_file()), reverse=True)


def load_state(run: Path) -> tuple[Position, dict[str, Tensor], ReplayBuffer]:
    """The newest state of a run; raises CheckpointError when there is none or it is damaged."""
    states = list_states(run)
    if not states:
        raise CheckpointError(f"{run} holds no saved state to go on from")
    folder = states[0]
    try:
        position = Position(**read_json(folder / "state.json", CheckpointError))  # type: ignore[arg-type]
        tensors = load_file(folder / "tensors.safetensors")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} is damaged: {error}; remove it and resume from the one before") from None
    return position, tensors, ReplayBuffer.load(folder / "replay.safetensors")


def branch_run(source: Path, out: Path, config: TrainConfig) -> None:
    """Prepare `out` to go on from the newest state of `source` with another configuration, e.g. without replay."""
    refuse_foreign_folder(out, None)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("checkpoint", "results.json", ".*"))
    write_atomic(out / "config.json", json.dumps(config.as_json(), indent=2))


def begin_stage(
    source: Path, out: Path, config: TrainConfig, *, write_once: Callable[[Write], None] = write_here
) -> TrainConfig:
    """Prepare `out` for another objective over the tasks of the finished run `source`; then resume `out`.

    The student starts from the run's EMA weights, the replay buffer comes along, R starts anew. Of several processes
    one writes: see `cache_latents`.
    """
    saved, _ = _finished(source)
    _, tensors, replay = load_state(source)
    weights = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("ema/")}
    kept = {n: t for n, t in tensors.items() if n.startswith("student/")}  # also what no average is taken of
    start = {n: weights.get(n.partition("/")[2], t).clone() for n, t in kept.items()}  # a file holds no tensor twice
    start |= {f"ema/{n}": t for n, t in weights.items()}
    start["generator"] = torch.Generator().manual_seed(config.seed).get_state()
    joined = replace(config, tasks=saved.tasks, student=saved.student, teacher=saved.teacher)

    def write() -> None:
        refuse_foreign_folder(out, None)
        out.mkdir(parents=True, exist_ok=True)
        _take_along(source, out)
        save_state(out, Position(), start, replay, keep=1)
        write_atomic(out / "config.json", json.dumps(joined.as_json(), indent=2))

    write_once(write)
    return joined


def _take_along(source: Path, out: Path) -> None:
    """Copy what the tasks of a run are evaluated on."""
    if (source / evaluation_set.FOLDER).is_dir():
        shutil.copytree(source / evaluation_set.FOLDER, out / evaluation_set.FOLDER)


def _finished(run: Path) -> tuple[TrainConfig, Path]:
    """A finished run's configuration and newest state; raises CheckpointError for any other folder."""
    states = list_states(run)
    if not states:
        raise CheckpointError(f"{run} is no run with saved states: name the folder of a run, such as runs/001")
    saved = TrainConfig.load(run)
    if load_state(run)[0].task < len(saved.tasks):
        raise CheckpointError(f"{run} is not finished: kdc-edge train --resume --out {run} first")
    return saved, states[0]


def continue_run(
    source: Path, out: Path, config: TrainConfig, *, write_once: Callable[[Write], None] = write_here
) -> TrainConfig:
    """Prepare `out` to go on from the finished run `source` with the tasks of `config` after its own.

    The replay buffer, the weights, their moving average, R and what it is measured on come along: nothing else is
    needed of the earlier tasks. Resume `out` with the configuration that is given back. Of several processes one
    writes: see `cache_latents`. Raises CheckpointError for a run that is not finished, InputError for another student.
    """
    saved, state = _finished(source)
    if saved.student != config.student:
        raise InputError(f"--student {config.student} is not the run's {saved.student}: leave it as it was")
    joined = replace(config, tasks=(*saved.tasks, *config.tasks))

    def write() -> None:
        refuse_foreign_folder(out, None)
        out.mkdir(parents=True, exist_ok=True)
        _take_along(source, out)
        shutil.copytree(state, out / "state" / state.name)
        if (source / "metrics.jsonl").is_file():
            shutil.copy(source / "metrics.jsonl", out)
        write_atomic(out / "config.json", json.dumps(joined.as_json(), indent=2))

    write_once(write)
    return joined

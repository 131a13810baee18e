"""A training run's saved states: everything that a resumed run needs to end with the uninterrupted one's weights.

    RUN/state/00000120-0/  state.json (position, scores), tensors.safetensors (weights, moving average, optimizer,
                           random state), replay.safetensors (the buffer)

A state is written beside its place and renamed in; older ones are removed after that, so a kill at any moment
leaves at least one whole state.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from kdc_edge.errors import CheckpointError
from kdc_edge.files import atomic_folder, read_json, write_atomic
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

"""Saved states of a training run.

    RUN/state/00000120-0/  state.json (position, scores), tensors.safetensors (weights, moving average, optimizer,
                           random state), replay.safetensors (the buffer); at a task's end also the buffer and the
                           random state from before it, with which the task can be given more steps

A state is everything that a resumed run needs to end with the uninterrupted one's weights. It is written beside its
place and renamed in; older ones are removed after that, so a kill at any moment leaves at least one whole state.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdc_edge.errors import CheckpointError
from kdc_edge.files import atomic_folder, read_json, refuse_foreign_folder, write_atomic
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.distributed import on_main_process
from kdc_edge.train.strategies.buffer import ReplayBuffer
from kdc_edge.train.teachers import note_teacher

REPLAY_BEFORE = "replay-before.safetensors"
MODEL_FILE = "model.json"  # kdc_edge.manifest.Model: how the student is sampled
CHECKPOINTS = "checkpoints"  # RUN/checkpoints/TASK: the student after a task that was not the last


@dataclass
class Position:
    """Where a run stands. `total` counts the steps of all tasks, `step` those of task number `task`."""

    task: int = 0
    step: int = 0
    total: int = 0
    drawn: int = 0  # new samples of this task so far
    metric: str = ""  # what R[i][j] is; higher is better
    matrix: list[list[float | None]] = field(default_factory=list)  # R[i][j]; None where task j was not known yet
    values: list[list[dict[str, float] | None]] = field(default_factory=list)  # everything measured, in the same places
    errors: list[list[dict[str, float] | None]] = field(default_factory=list)  # standard errors, and `images`: how many
    by_class: list[list[dict[str, dict[str, float]]]] = field(default_factory=list)  # class -> means, as values
    baselines: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # "teacher" -> task -> values
    origin: dict[str, Any] | None = None  # settings that the student at step 0 follows from; None for another run's
    references: dict[str, str] = field(default_factory=dict)  # of each task: what images are compared with
    settings: dict[str, dict[str, str]] = field(default_factory=dict)  # of each finished task: flag -> value
    prompts: dict[str, list[str]] = field(default_factory=dict)  # of each finished task: captions for an export

    def end(self, config: TrainConfig) -> int:
        """What `total` will be when all tasks are learnt; those of a run that was continued had steps of their own."""
        return self.total - self.step + config.steps * (len(config.tasks) - self.task)


@dataclass(frozen=True)
class BeforeTaskEnd:
    """What a task's end changes, as it was before: more steps of the task go on from there."""

    generator: Tensor
    replay: ReplayBuffer
    drawn: int
    strategy: dict[str, Tensor] = field(default_factory=dict)  # its state_dict


def save_state(
    run: Path, position: Position, tensors: dict[str, Tensor], replay: ReplayBuffer, *, keep: int,
    before: BeforeTaskEnd | None = None,
) -> None:  # fmt: skip
    """Write the state of a run, then drop all but the newest `keep`. A task's end and the step before it are two.

    The same position twice is the same state: it is not written again, so that no moment is without it.
    """
    if before is not None:
        tensors = tensors | {"before/generator": before.generator, "before/drawn": torch.tensor(before.drawn)}
        tensors |= {f"before/strategy/{n}": t for n, t in before.strategy.items()}
    states = run / "state"
    out = states / f"{position.total:08d}-{position.task}"
    if not (out / "state.json").is_file():
        with atomic_folder(out, marker="state.json") as folder:
            save_file(
                {name: t.detach().contiguous().cpu() for name, t in tensors.items()},
                folder / "tensors.safetensors",
            )
            replay.save(folder / "replay.safetensors")
            if before is not None:
                before.replay.save(folder / REPLAY_BEFORE)
            write_atomic(folder / "state.json", json.dumps(asdict(position), indent=2))
    for old in list_states(run)[keep:]:
        old.rename(old.with_name(f".{old.name}"))  # one that is half removed is no state any more
    for half in states.glob(".*"):  # also what a kill in the middle of a write or of this left
        shutil.rmtree(half)


def list_states(run: Path) -> list[Path]:
    """Whole states, the newest first."""
    found = (p for p in (run / "state").glob("*") if not p.name.startswith("."))
    whole = (p for p in found if (p / "state.json").is_file())
    return sorted(whole, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)], reverse=True)  # 9 before 10


def load_state(run: Path) -> tuple[Position, dict[str, Tensor], ReplayBuffer]:
    """The newest state of a run, which may be going on; raises CheckpointError when there is none or it is damaged."""
    states = list_states(run)
    if not states:
        raise CheckpointError(f"{run} holds no saved state to go on from")
    folder = states[0]
    try:
        position = Position(**read_json(folder / "state.json", CheckpointError))  # type: ignore[arg-type]
        tensors = load_file(folder / "tensors.safetensors")
        return position, tensors, ReplayBuffer.load(folder / "replay.safetensors")
    except Exception as error:
        if list_states(run)[:1] != [folder]:  # a newer one was written, and this one removed, as it was read
            return load_state(run)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is damaged: {error}; remove it and resume from the one before") from None


def claim_run(run: Path, config: TrainConfig, accelerator: Accelerator, *, resume: bool) -> None:
    """Write a new run's configuration, or refuse a folder that is not this run's. Collective.

    What a kill in the middle of a write left is removed, and a teacher that has moved is noted; a run that was killed
    before its first state starts again.
    """
    path = run / "config.json"
    if resume and accelerator.is_main_process:
        for half in (*run.glob(".*.part-*"), *(run / CHECKPOINTS).glob(".*.part-*")):
            shutil.rmtree(half)
        for half in run.glob(".*.json.*"):
            half.unlink()
    if resume and path.is_file():
        saved = TrainConfig.load(run)
        if accelerator.is_main_process:
            if saved.teacher != config.teacher:  # which has moved: `check_same`
                write_atomic(path, json.dumps(replace(saved, teacher=config.teacher).as_json(), indent=2))
            note_teacher(run, config.teacher)
        return

    def claim() -> None:
        refuse_foreign_folder(run, None)
        write_atomic(path, json.dumps(config.as_json(), indent=2))
        note_teacher(run, config.teacher)

    accelerator.wait_for_everyone()  # all have looked before one writes
    on_main_process(accelerator, claim)


def cut_metrics(run: Path, total: int) -> None:
    """Drop what was logged after the state that the run goes on from, of `total` steps."""
    path = run / "metrics.jsonl"
    if path.is_file():
        write_atomic(path, "".join(path.read_text().splitlines(keepends=True)[:total]))

"""Runs that go on from another run's saved state: a branch, more tasks, another objective, more steps.

branch_run(Path("runs/kept"), Path("runs/bare"), replace(config, replay=0))      # then resume runs/bare
config = continue_run(Path("runs/001"), Path("runs/002"), config)                # then resume runs/002
extend_run(Path("runs/001"), replace(config, steps=600))                         # then resume runs/001
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import refuse_foreign_folder, write_atomic
from kdc_edge.train.config import FEW_STEP_STAGE, TrainConfig, check_same
from kdc_edge.train.data.cache import CACHE
from kdc_edge.train.distributed import under
from kdc_edge.train.processes import ALONE
from kdc_edge.train.quality import evaluation_set
from kdc_edge.train.runs.states import CHECKPOINTS, REPLAY_BEFORE, Position, list_states, load_state, save_state
from kdc_edge.train.strategies.buffer import ReplayBuffer

WriteOnce = Callable[[Callable[[], None]], None]


def branch_run(source: Path, out: Path, config: TrainConfig) -> None:
    """Prepare `out` to go on from the newest state of `source` with another configuration, e.g. without replay."""
    refuse_foreign_folder(out, None)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("checkpoint", CHECKPOINTS, "results.json", ".*"))
    write_atomic(out / "config.json", json.dumps(config.as_json(), indent=2))


def begin_stage(source: Path, out: Path, config: TrainConfig, *, write_once: WriteOnce = ALONE.once) -> TrainConfig:
    """Prepare `out` for another objective over the tasks of the finished run `source`; then resume `out`.

    The student starts from the run's EMA weights, its replay buffer and cache come along, R and the tasks' checkpoints
    start anew. Of several processes one writes: `write_once` is `Processes.once`. Raises CheckpointError for a run that
    is not finished, InputError for another student, and where the data of a task is gone, which the stage trains on.
    """
    saved, _ = _finished(source)
    _check_student(saved, config)
    for task in saved.tasks:
        task.open()
    _, tensors, replay = load_state(source)
    weights = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith("ema/")}
    kept = {n: t for n, t in tensors.items() if n.startswith("student/")}  # also what no average is taken of
    start = {n: weights.get(n.partition("/")[2], t).clone() for n, t in kept.items()}  # a file holds no tensor twice
    start |= {f"ema/{n}": t for n, t in weights.items()}
    start["generator"] = torch.Generator().manual_seed(config.seed).get_state()
    joined = replace(config, tasks=saved.tasks)

    def write() -> None:
        refuse_foreign_folder(out, None)
        out.mkdir(parents=True, exist_ok=True)
        _take_evaluation_sets(source, out)
        if joined.cache is None:
            _take_cache(source, out)
        save_state(out, Position(), start, replay, keep=1)
        write_atomic(out / "config.json", json.dumps(joined.as_json(), indent=2))

    write_once(write)
    return joined


def extend_run(run: Path, config: TrainConfig) -> None:
    """Let the last task of the finished run go on up to `config.steps`; then resume it.

    It ends with the weights of a run that asked for so many steps where the learning rate of a step does not depend on
    their number: --schedule constant with a --warmup. Raises CheckpointError for a run that is not finished, InputError
    for other changes.
    """
    saved, state = _finished(run)
    check_same(replace(config, steps=saved.steps), saved.as_json())
    if config.steps <= saved.steps:
        raise InputError(f"--steps {config.steps} is not more than the {saved.steps} that the run has done")
    if not (state / REPLAY_BEFORE).is_file():
        raise CheckpointError(f"{run} did not keep what more steps go on from: continue it with --continue-from")
    last = saved.tasks[-1].name
    position, tensors, _ = load_state(run)
    position = replace(
        position, task=position.task - 1, step=saved.steps, matrix=position.matrix[:-1], values=position.values[:-1],
        drawn=int(tensors.pop("before/drawn")),
        errors=position.errors[:-1], by_class=position.by_class[:-1],
        settings={n: s for n, s in position.settings.items() if n != last},
        prompts={n: p for n, p in position.prompts.items() if n != last},
    )  # fmt: skip
    before = under("before/", tensors)  # in place of what the task's end made of it
    tensors = {n: t for n, t in tensors.items() if not n.startswith(("before/", "strategy/"))} | before
    save_state(run, position, tensors, ReplayBuffer.load(state / REPLAY_BEFORE), keep=config.keep + 1)
    shutil.rmtree(state.rename(state.with_name(f".{state.name}")))
    write_atomic(run / "config.json", json.dumps(config.as_json(), indent=2))


def _take_evaluation_sets(source: Path, out: Path) -> None:
    """Copy what the tasks of a run are evaluated on."""
    if (source / evaluation_set.FOLDER).is_dir():
        shutil.copytree(source / evaluation_set.FOLDER, out / evaluation_set.FOLDER)


def _take_cache(source: Path, out: Path) -> None:
    """Link the encoded latents and captions of a run, each file of which is written once."""
    if (source / CACHE).is_dir():
        shutil.copytree(source / CACHE, out / CACHE, copy_function=_link, ignore=shutil.ignore_patterns(".*"))


def _take_checkpoints(source: Path, out: Path, saved: TrainConfig) -> None:
    """Link the checkpoints of a run's tasks, which never change."""
    kept = {task.name: source / CHECKPOINTS / task.name for task in saved.tasks[:-1]}
    kept[saved.tasks[-1].name] = source / "checkpoint"
    for name, checkpoint in kept.items():
        if checkpoint.is_dir():
            shutil.copytree(checkpoint, out / CHECKPOINTS / name, copy_function=_link)


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _check_student(saved: TrainConfig, config: TrainConfig) -> None:
    if saved.student != config.student:
        raise InputError(f"--student {config.student} is not the run's {saved.student}: leave it as it was")


def _sampling(config: TrainConfig) -> str:
    """The flags that decide how a run's students are sampled."""
    few = config.objective in FEW_STEP_STAGE
    return f"--objective {config.objective}{f' --phases {config.few_steps.phases}' if few else ''}"


def _finished(run: Path) -> tuple[TrainConfig, Path]:
    """A finished run's configuration and newest state; raises CheckpointError for any other folder."""
    states = list_states(run)
    if not states:
        raise CheckpointError(f"{run} is no run with saved states: name the folder of a run, such as runs/001")
    saved = TrainConfig.load(run)
    if load_state(run)[0].task < len(saved.tasks):
        raise CheckpointError(f"{run} is not finished: kdc-edge train --resume --out {shlex.quote(str(run))} first")
    return saved, states[0]


def continue_run(source: Path, out: Path, config: TrainConfig, *, write_once: WriteOnce = ALONE.once) -> TrainConfig:
    """Prepare `out` to go on from the finished run `source` with the tasks of `config` after its own.

    The replay buffer, the weights, their moving average, R and what it is measured on come along: nothing else is
    needed of the earlier tasks. Resume `out` with the configuration that is given back. Of several processes one
    writes, as in `begin_stage`. Raises CheckpointError for a run that is not finished, InputError for another student
    and for one that is sampled otherwise, whose quality is not to be compared with that of earlier tasks.
    """
    saved, state = _finished(source)
    _check_student(saved, config)
    if _sampling(saved) != _sampling(config):
        raise InputError(
            f"a --task is learnt with the run's own {_sampling(saved)}, not with {_sampling(config)}, for R compares"
            " one way of sampling: add the task first, then --continue-from that run with the --objective alone"
        )
    joined = replace(config, tasks=(*saved.tasks, *config.tasks))

    def write() -> None:
        refuse_foreign_folder(out, None)
        out.mkdir(parents=True, exist_ok=True)
        _take_evaluation_sets(source, out)
        _take_checkpoints(source, out, saved)
        shutil.copytree(state, out / "state" / state.name)
        if (source / "metrics.jsonl").is_file():
            shutil.copy(source / "metrics.jsonl", out)
        write_atomic(out / "config.json", json.dumps(joined.as_json(), indent=2))

    write_once(write)
    return joined

"""Experiments on the garden: strategies against forgetting, the effect of each loss term and of inherited weights.

    python -m kdc_edge.train.tools.experiments --out experiments            # everything; see --help for parts of it
    python -m kdc_edge.train.tools.experiments --out experiments --docs docs    # and docs/experiments.md with its plots

A grid is a list of cells (condition x seed), each a run in OUT/cells/NAME with its result.json. A cell that is done is
not run again, and one that was interrupted goes on, to the same weights. Runs of one seed that are alike until the
first task ends share it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch

from kdc_edge.errors import InputError, unknown_choice
from kdc_edge.files import read_json, write_atomic
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.config import LossWeights, TrainConfig
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.loop import Trainer
from kdc_edge.train.quality.evaluate import EVALUATION
from kdc_edge.train.runs.continuing import branch_run
from kdc_edge.train.tools.experiment_report import write_report

TASKS = tuple(Task(name, f"garden:{name}") for name in ("flowers", "butterflies", "fish"))
ALL = Task("all", "garden:flowers+butterflies+fish")

BASELINES = ("teacher", "student at step 0")  # the same whatever the seed
REPLAY = {"no replay": 0.0, "replay 1 %": 0.01, "replay 5 %": 0.05, "replay 20 %": 0.2, "all data jointly": None}
GARDEN_POSITIONS = 16 * 16  # of its latents: the authors' `batchmean` sums the soft term over them (train/losses.py)
LOSSES = {
    "task only": LossWeights(1, 0, 0, 0),
    "task + output": LossWeights(1, 1, 0, 0),
    "task + soft": LossWeights(1, 0, 1, 0),
    "task + features": LossWeights(1, 0, 0, 0.1),
    "all": LossWeights(),
    "task + soft, summed": LossWeights(1, 0, GARDEN_POSITIONS, 0),
    "all, soft summed": LossWeights(soft=GARDEN_POSITIONS),
}
STARTS = {"inherited": True, "random": False}
SHARE = 0.05  # of the images of the whole sequence, or of their captions, that a strategy may keep
NO_DISTILLATION = LossWeights(1, 0, 0, 0)
STRATEGIES: dict[str, dict[str, Any]] = {  # settings of the strategy
    "replay without distillation": {"loss": NO_DISTILLATION},
    "captions, the teacher's images": {"strategy": "captions"},
    "captions, the student's images": {"strategy": "generative"},
    "LwF": {"strategy": "lwf"},
    "EWC, weight 1e4": {"strategy": "ewc", "ewc_weight": 1e4},
    "EWC, weight 1e6": {"strategy": "ewc", "ewc_weight": 1e6},
}
GRIDS = {
    "replay": (*BASELINES, *REPLAY),
    "strategies": tuple(STRATEGIES),
    "losses": tuple(LOSSES),
    "inheritance": tuple(STARTS),
}


@dataclass(frozen=True)
class Size:
    """How large every cell is; the report says so."""

    steps: int = 150  # of a task
    batch_size: int = 16
    samples: int = 1200  # images of a task
    images: int = 48  # of a task, in each evaluation
    eval_steps: int = EVALUATION.steps  # of the sampler, for these images
    seeds: int = 3


@dataclass(frozen=True)
class Cell:
    grid: str
    condition: str
    seed: int

    @property
    def name(self) -> str:
        plain = self.condition.replace("%", "percent").replace("+", "and")
        words = plain.replace(",", "").replace("'", "").split()
        return f"{self.grid}-{'-'.join(words)}-s{self.seed}"


def cells(grids: Sequence[str], size: Size, conditions: Sequence[str] = ()) -> list[Cell]:
    """Seed by seed, so that an interrupted grid has whole seeds; raises InputError for what does not exist."""
    for grid in grids:
        if grid not in GRIDS:
            raise unknown_choice("--grid", grid, GRIDS)
    every = [Cell(grid, c, seed) for seed in range(size.seeds) for grid in grids for c in GRIDS[grid]]
    found = [cell for cell in every if cell.seed == 0 or cell.condition not in BASELINES]
    chosen = [cell for cell in found if not conditions or cell.condition in conditions]
    if not chosen:
        raise InputError(f"--condition {', '.join(conditions)} is in none of these grids")
    return chosen


def make_trainer(cell: Cell, out: Path, size: Size) -> Trainer:
    """The trainer of a cell, behind the first task where other cells of the seed have the same one."""
    config = TrainConfig(
        teacher=GARDEN_TEACHER, student="garden-student", tasks=TASKS, steps=size.steps, batch_size=size.batch_size,
        samples=size.samples, eval_images=size.images, eval_steps=size.eval_steps, seed=cell.seed, save_every=50,
        keep=1, log_with="none", cache=out / "cache", replay=0, baselines=False, mixed_precision="no",
        cuda_graphs=torch.cuda.is_available() and cell.condition not in (*BASELINES, "LwF"),
    )  # fmt: skip
    if cell.condition in BASELINES:
        return _open(cell, out, config)
    make = {"replay": _replay, "strategies": _strategies, "losses": _losses, "inheritance": _inheritance}[cell.grid]
    return make(cell, out, config)


def run_cell(cell: Cell, out: Path, size: Size) -> dict[str, object]:
    """A cell's result: every value of every task at the end, R where there is one, and the seconds it took."""
    path = out / "cells" / cell.name / "result.json"
    if path.is_file():
        return read_json(path, InputError)
    started = time.perf_counter()
    trainer = make_trainer(cell, out, size)
    if cell.condition in BASELINES:
        scores = trainer.evaluate(teacher=cell.condition == "teacher").values()
        trainer.position.values.append([score.values for score in scores])
    else:
        for _ in trainer.run():
            pass
    final = trainer.position.values[-1]
    if len(trainer.config.tasks) == 1 and trainer.config.tasks[0] == ALL:
        final = [score.values for score in trainer.evaluate(TASKS).values()]  # trained as one task, asked as three
    result: dict[str, object] = {
        "grid": cell.grid, "condition": cell.condition, "seed": cell.seed,
        "final": {task.name: values for task, values in zip(_asked(cell), final, strict=True)},
        "matrix": trainer.position.matrix, "seconds": round(time.perf_counter() - started, 1),
        "remembered_bytes": remembered_bytes(trainer), "training_seconds": round(training_seconds(trainer), 1),
    }  # fmt: skip
    write_atomic(path, json.dumps(result, indent=2))
    for folder in ("state", "checkpoint"):  # megabytes a cell that nothing needs any more
        shutil.rmtree(path.parent / folder, ignore_errors=True)
    return result


def _asked(cell: Cell) -> tuple[Task, ...]:
    return TASKS if cell.grid in ("replay", "strategies") else TASKS[:1]


def _replay(cell: Cell, out: Path, config: TrainConfig) -> Trainer:
    """Three tasks; the buffer holds a share of the images of the whole sequence."""
    share = REPLAY[cell.condition]
    if share is None:
        return _jointly(cell, out, config)
    return _branch(cell, out, replace(config, replay=_kept(share, config)))


def _strategies(cell: Cell, out: Path, config: TrainConfig) -> Trainer:
    """Three tasks, a strategy against forgetting with the same budget of samples."""
    config = replace(config, **{"replay": _kept(SHARE, config), **STRATEGIES[cell.condition]})
    return _branch(cell, out, config) if shared_first_task(cell) else _open(cell, out, config)


def shared_first_task(cell: Cell) -> str | None:
    """The name of the first task's run that the cells of a seed have in common; None for those that have their own."""
    name = f"replay-first-task-s{cell.seed}"
    if cell.grid == "replay":
        return None if cell.condition in BASELINES or REPLAY[cell.condition] is None else name
    if cell.grid != "strategies" or STRATEGIES[cell.condition].get("loss") == NO_DISTILLATION:
        return None
    settings = STRATEGIES[cell.condition]
    return f"ewc-first-task-s{cell.seed}" if settings.get("strategy") == "ewc" else name


def _jointly(cell: Cell, out: Path, config: TrainConfig) -> Trainer:
    images = len(TASKS) * (config.samples or 0)
    return _open(cell, out, replace(config, tasks=(ALL,), steps=len(TASKS) * config.steps, samples=images))


def _kept(share: float, config: TrainConfig) -> int:
    """Samples in the buffer: a share of the images of the whole sequence."""
    return round(share * len(TASKS) * (config.samples or 0))


def _branch(cell: Cell, out: Path, config: TrainConfig) -> Trainer:
    """A run that goes on from the first task, which all branches of a seed have in common."""
    home, shared = out / "cells" / cell.name, out / "cells" / str(shared_first_task(cell))
    if (home / "config.json").is_file():
        return Trainer(config, home, resume=True)
    shutil.rmtree(home, ignore_errors=True)  # left by a kill while it was branched
    first = Trainer(first_task_config(config), shared, resume=(shared / "config.json").is_file())
    if first.position.task == 0:
        for _ in first.run():
            if first.position.task == 1:
                break
    branch_run(shared, home, config)
    return Trainer(config, home, resume=True)


def first_task_config(config: TrainConfig) -> TrainConfig:
    """The configuration of the first task's run: the same for all cells of a seed that go on from it."""
    most = max(share for share in REPLAY.values() if share is not None)
    return replace(
        config,
        strategy="ewc" if config.strategy == "ewc" else "replay",
        ewc_weight=TrainConfig.ewc_weight,  # a first task has no penalty
        replay=_kept(most, config),
        cuda_graphs=torch.cuda.is_available(),
    )


def remembered_bytes(trainer: Trainer) -> int:
    """What is kept of earlier tasks at the end: all of their latents and captions where all are trained on jointly."""
    if trainer.config.tasks != (ALL,):
        return trainer.strategy.size_bytes
    latents = trainer.teacher.latents(ALL)
    held = sum(2 * (mean.numel() + std.numel()) for mean, std in latents.shards)
    captions = sum(len(caption.encode()) for caption in latents.captions)
    return round((held + captions) * (len(TASKS) - 1) / len(TASKS))


def training_seconds(trainer: Trainer) -> float:
    """Of all steps, those of a shared first task too, and of the strategy's own work; not of the evaluations.

    A step takes its task's median: a step during which the machine did something else does not count.
    """
    log = trainer.run_folder / "metrics.jsonl"
    by_task: dict[str, list[float]] = {}
    for line in log.read_text("utf-8").splitlines() if log.is_file() else []:
        step = json.loads(line)
        by_task.setdefault(step["task"], []).append(trainer.config.batch_size / step["samples_per_sec"])
    steps = sum(len(times) * median(times) for times in by_task.values())
    return steps + trainer.watch.seconds.get("strategy", 0.0)


def _losses(cell: Cell, out: Path, config: TrainConfig) -> Trainer:
    """One task, equal steps, parts of the loss."""
    return _open(cell, out, replace(config, tasks=TASKS[:1], loss=LOSSES[cell.condition]))


def _inheritance(cell: Cell, out: Path, config: TrainConfig) -> Trainer:
    """One task, twice the steps: a random start needs them most."""
    return _open(cell, out, replace(config, tasks=TASKS[:1], steps=2 * config.steps, inherit=STARTS[cell.condition]))


def _open(cell: Cell, out: Path, config: TrainConfig) -> Trainer:
    home = out / "cells" / cell.name
    return Trainer(config, home, resume=(home / "config.json").is_file())


def run(
    out: Path, size: Size, chosen: Sequence[Cell], say: Callable[[str], None], *, minutes: float | None = None,
    jobs: int = 1,
) -> list[dict[str, object]]:  # fmt: skip
    """The results of the cells, `jobs` of them at once; starts no more once `minutes` are over."""
    check_size(out, size)
    started, results = time.perf_counter(), []
    for cell, result in _finished(chosen, out, size, jobs):
        results.append(result)
        say(f"{len(results)}/{len(chosen)} {cell.name}: {result['seconds']} s")
        if minutes is not None and time.perf_counter() - started > 60 * minutes and len(results) < len(chosen):
            say(f"{minutes:g} minutes are over; run it again to go on")
            break
    return results


def _finished(chosen: Sequence[Cell], out: Path, size: Size, jobs: int) -> Iterator[tuple[Cell, dict[str, object]]]:
    """Each cell with its result, in order, or as they end where several processes share the cores."""
    if jobs == 1:
        for cell in chosen:
            yield cell, run_cell(cell, out, size)
        return
    firsts = {name: cell for cell in chosen if (name := shared_first_task(cell)) is not None}
    context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        list(pool.map(_prepare, firsts.values(), repeat(out), repeat(size)))
        futures = {pool.submit(run_cell, cell, out, size): cell for cell in chosen}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare(cell: Cell, out: Path, size: Size) -> None:
    """Train the first task that the cell goes on from, unless that was done before."""
    if not (out / "cells" / cell.name / "result.json").is_file():
        make_trainer(cell, out, size)


def check_size(out: Path, size: Size) -> None:
    """Cells of one folder are of one size: refuse to mix; more seeds may be added."""
    path = out / "size.json"
    now = {name: value for name, value in asdict(size).items() if name != "seeds"}
    if path.is_file() and {"eval_steps": EVALUATION.steps} | read_json(path, InputError) != now:  # not always written
        raise InputError(f"{out} holds cells of another size, {path.read_text()}: choose another folder")
    write_atomic(path, json.dumps(now))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Experiments on the garden; resumable, cell by cell.")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the cells")
    parser.add_argument("--docs", type=Path, help="write experiments.md and its plots here as well")
    parser.add_argument("--grid", nargs="+", default=list(GRIDS), help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--condition", nargs="+", default=[], help="only these, e.g. 'no replay'")
    parser.add_argument("--seeds", type=int, default=Size.seeds)
    parser.add_argument("--steps", type=int, default=Size.steps, help="of a task")
    parser.add_argument("--batch-size", type=int, default=Size.batch_size)
    parser.add_argument("--samples", type=int, default=Size.samples, help="images of a task")
    parser.add_argument("--images", type=int, default=Size.images, help="of a task, in each evaluation")
    parser.add_argument("--eval-steps", type=int, default=Size.eval_steps, help="of the sampler, for these images")
    parser.add_argument("--minutes", type=float, help="start no cell after so many")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, a process each")
    args = parser.parse_args(arguments)
    size = Size(args.steps, args.batch_size, args.samples, args.images, args.eval_steps, args.seeds)
    run(
        args.out,
        size,
        cells(args.grid, size, args.condition),
        lambda text: print(text, flush=True),
        minutes=args.minutes,
        jobs=args.jobs,
    )
    done = [read_json(path, InputError) for path in sorted((args.out / "cells").glob("*/result.json"))]
    for folder in (args.out, args.docs):
        if folder is not None:
            write_report(folder, done, GRIDS, read_json(args.out / "size.json", InputError))
    print(args.out / "experiments.md")


if __name__ == "__main__":
    main()

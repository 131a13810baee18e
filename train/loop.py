"""The training loop, as a generator: task after task, a student learns from its teacher without forgetting.

    trainer = Trainer(config, Path("runs/a"))
    for event in trainer.run():              # StepDone after each step, TaskDone after each task
        ...                                  # draw, log, stop; trainer.save() may be called at any event

All randomness comes from one generator whose state is saved, so that a resumed run ends with the weights of the
uninterrupted one, to the last bit on the CPU. Every process of a distributed run draws the same global batch and
computes its own share of it.
"""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from kdc_edge.diffusers_folder import check_weights, read_model
from kdc_edge.errors import CheckpointError, InputError, KdcError
from kdc_edge.files import read_json, refuse_foreign_folder, write_atomic
from kdc_edge.manifest import Model
from kdc_edge.presets import find_preset
from kdc_edge.train.checkpoint import write_checkpoint
from kdc_edge.train.config import TrainConfig, check_same, learning_rate
from kdc_edge.train.data.batch import Batch, draw_batch
from kdc_edge.train.data.cache import Say, check_cache
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.data.transfer import Ahead
from kdc_edge.train.distributed import any_process, make_accelerator, on_main_process, under
from kdc_edge.train.networks import image_size, origin_of, prepare_learning, untrained_student, view_run
from kdc_edge.train.objective import Stopwatch
from kdc_edge.train.objectives import find_objective
from kdc_edge.train.quality import evaluation_set
from kdc_edge.train.quality.evaluate import Score
from kdc_edge.train.quality.held_out import Evaluator, check_quality, lacking
from kdc_edge.train.quality.matrix import choose_metric, quality_matrix, signed
from kdc_edge.train.quality.metrics import ImageMetrics
from kdc_edge.train.quality.report import STEP_0, TEACHER, make_results, model_card, so_far
from kdc_edge.train.quality.sheet import write_sample_sheet
from kdc_edge.train.runs.states import (
    CHECKPOINTS,
    MODEL_FILE,
    BeforeTaskEnd,
    Position,
    claim_run,
    cut_metrics,
    list_states,
    load_state,
    save_state,
)
from kdc_edge.train.runs.tracking import Tracker
from kdc_edge.train.stepping import MicroBatch, StepDone, Stepper
from kdc_edge.train.strategies.buffer import ReplayBuffer
from kdc_edge.train.strategies.registry import STRATEGIES
from kdc_edge.train.teachers import check_teacher

PROMPTS_A_TASK = 64  # captions that are written beside the weights
# first parts of a state's names
STATE_KINDS = ("generator", "before", "student", "ema", "optimizer", "scaler", "objective", "strategy")


@dataclass(frozen=True)
class TaskDone:
    task: str
    scores: dict[str, Score]  # of every task of the run


def check_run(config: TrainConfig, run: Path, *, resume: bool) -> tuple[Accelerator, Model, ImageMetrics]:
    """Refuse at once, with a KdcError, what a run would refuse; nothing is written. What was opened for it."""
    accelerator = make_accelerator(config, run)
    find_preset(config.student, "--student")
    model = read_model(config.teacher)
    image_size(config, model)
    if config.start is not None:
        check_weights(config.start)
    objective = find_objective(config.objective)
    objective.check(config, model)
    if config.cuda_graphs and not objective.same_work:
        raise InputError(f"--objective {config.objective} does not do the same at every step: give --no-cuda-graphs")
    metrics = ImageMetrics(config.metric_weights, accelerator.device)
    if config.quality != "auto":
        check_quality(config.quality, config, metrics)
    if resume and (run / "config.json").is_file():
        saved = read_json(run / "config.json", KdcError)
        check_same(config, saved)
        if str(config.teacher) != saved["teacher"]:  # which has moved, or is another installation's
            check_teacher(run, config.teacher)
    else:
        refuse_foreign_folder(run, None)
    if config.cache is not None:
        check_cache(config.cache)
    return accelerator, model, metrics


class Trainer:
    """One run, from its start or from its newest saved state.

    The public surface: `run`, `save`, `evaluate`, `unet`, `any_process`; `config`, `run_folder`, `position`, `view`.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        *,
        resume: bool = False,
        watch: Stopwatch | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.config, self.run_folder = config, run
        self.accelerator, model, metrics = check_run(config, run, resume=resume)
        self.watch = watch or Stopwatch()
        learning = prepare_learning(config, model, self.accelerator, run, watch=self.watch, say=say)
        claim_run(run, config, self.accelerator, resume=resume)  # after what can be refused
        self.teacher, self.student, self.objective = learning.teacher, learning.student, learning.objective
        self.stepper = Stepper(config, self.accelerator, self.teacher, self.student, self.objective, self.watch)
        self.evaluator = Evaluator(
            self.teacher, metrics, config.eval_images, self.accelerator, run / evaluation_set.FOLDER,
            garden_loss=any(not task.source.startswith("garden:") for task in config.tasks),
        )  # fmt: skip
        self.view = view_run(config, learning, self.accelerator, metrics)
        if self.accelerator.is_main_process:
            write_atomic(run / MODEL_FILE, self.ships.model_dump_json(indent=2))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.ahead = Ahead(self._draw_and_load, self.generator)
        self.strategy = STRATEGIES[config.strategy](config, self.accelerator, learning)
        self.position = Position(origin=origin_of(config))
        self.before: BeforeTaskEnd | None = None
        if resume:
            self._restore()
            if config.quality == "auto" and self.position.metric and self.position.task < len(config.tasks):
                check_quality(self.position.metric.lstrip("-"), config, metrics)
                for line in lacking(self.position.metric.lstrip("-"), config, metrics):
                    (say if self.accelerator.is_main_process else (lambda _: None))(line)
            for task in config.tasks[: self.position.task]:  # refused before training, not after it
                self.evaluator.evaluation_set(task)
        self.tracker = Tracker(self.accelerator, config, run, since=self.position.total)

    @property
    def replay(self) -> ReplayBuffer:
        """The samples of earlier tasks."""
        return self.strategy.buffer

    # --- the run ---

    def run(self) -> Iterator[StepDone | TaskDone]:
        """Train every task that is left, evaluate after each, and write the checkpoint at the end."""
        config, position = self.config, self.position
        for task in config.tasks[position.task :]:  # what cannot be evaluated is refused before training
            self.evaluator.evaluation_set(task)
        if config.baselines:
            self._measure_baselines()
            self._measure_added_tasks()
        while position.task < len(config.tasks):
            task = config.tasks[position.task]
            with self.watch("prepare"):
                latents = self.teacher.latents(task)
            if position.step == 0:
                self.student.begin_task()
                with self.watch("strategy"):
                    self.strategy.begin_task(position.task, self.generator)
            with self.watch("prepare"):
                self.teacher.prepare_text([*latents.captions, *self.replay.captions, ""])
            while position.step < config.steps:
                yield self._step(task, latents)
                if config.sample_every and position.total % config.sample_every == 0:
                    self._draw_samples()
                if position.step % config.save_every == 0 and position.step < config.steps:
                    self.save()
            self.before = BeforeTaskEnd(
                self.generator.get_state(), copy.copy(self.replay), position.drawn, self.strategy.state_dict()
            )
            with self.watch("strategy"):
                self.strategy.remember(task, latents, self.generator)
            scores = self.evaluate()
            position.values.append([s.values for s in scores.values()])
            position.errors.append([s.errors | {"images": s.images} for s in scores.values()])
            position.by_class.append([s.by_class for s in scores.values()])
            position.references = {t.name: self.evaluator.evaluation_set(t).asked.kind for t in config.tasks}
            if config.quality != "auto":
                position.metric = signed(config.quality)
            position.metric = position.metric or choose_metric(position.values[-1])  # one for all of the run
            position.matrix = quality_matrix(position.values, position.metric)
            position.settings[task.name] = {option: value for _, option, value in config.table()}
            position.prompts[task.name] = self._prompts(latents)
            if config.task_checkpoints and position.task + 1 < len(config.tasks):
                self._write_checkpoint(self.run_folder / CHECKPOINTS / task.name)
            position.task, position.step, position.drawn = position.task + 1, 0, 0
            self.save()
            yield TaskDone(task.name, scores)
        self._finish()

    def _measure_baselines(self) -> None:
        """What the teacher, and the student before its first step, are worth on tasks that it is not known of yet."""
        found = self.position.baselines
        for who in (TEACHER, STEP_0):
            unknown = [t for t in self.config.tasks if t.name not in found.get(who, {})]
            scores: dict[str, Score] = {}
            if unknown and (who == TEACHER or self.position.total == 0):
                scores = self.evaluate(unknown, teacher=who == TEACHER)
            elif unknown and (unet := untrained_student(self.config, self.position.origin)) is not None:
                unet = unet.to(self.accelerator.device).eval()
                scores = {t.name: self.evaluator.score(unet, t, network=unet, model=self.ships) for t in unknown}
            if scores:
                found[who] = found.get(who, {}) | {name: score.values for name, score in scores.items()}

    def _measure_added_tasks(self) -> None:
        """Complete R's last row where tasks were added since: their quality before any of their training."""
        position = self.position
        added = self.config.tasks[len(position.values[-1]) :] if position.values and position.step == 0 else ()
        for score in self.evaluate(added).values() if added else ():
            position.values[-1].append(score.values)
            position.errors[-1].append(score.errors | {"images": score.images})
            for row in position.by_class[-1:]:  # an older version's states have none
                row.append(score.by_class)
        if added:
            position.matrix = quality_matrix(position.values, position.metric)

    def _step(self, task: Task, latents: Latents) -> StepDone:
        started = time.perf_counter()
        rate = learning_rate(self.config, self.position.step)
        with self.watch("data"):
            batch, loaded = self.ahead.take(latents, self.position.drawn)
        drawn = self.position.drawn + self.strategy.new_samples(batch)
        more = self.position.step + 1 < self.config.steps
        name = f"step {self.position.step + 1} of {task.name}"
        losses, by_timestep = self.stepper(
            loaded, rate=rate, name=name, add_penalty=self.strategy.add_penalty,
            meanwhile=partial(self.ahead.prepare, latents, drawn) if more else lambda: None,
        )  # fmt: skip
        self.position.step += 1
        self.position.total += 1
        self.position.drawn = drawn
        event = StepDone(
            task.name, self.position.step, self.config.steps, self.position.total, losses, by_timestep, rate,
            self.config.batch_size / (time.perf_counter() - started), batch.replayed.float().mean().item(),
            self.strategy.size_bytes / 1e6,
        )  # fmt: skip
        if self.accelerator.is_main_process:
            with (self.run_folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(asdict(event)) + "\n")
        self.tracker.log(event.losses, event.by_timestep, rate, event.total)
        return event

    def _draw_and_load(self, latents: Latents, drawn: int) -> tuple[Batch, list[MicroBatch]]:
        batch = self.draw_batch(latents, drawn)
        return batch, self.stepper.load(batch)

    def draw_batch(self, latents: Latents, drawn: int = 0) -> Batch:
        """A global batch behind `drawn` samples of the task; with --own-noise, the noise of this process's share."""
        timesteps = self.objective.draw_timesteps
        batch = draw_batch(
            self.config, latents, self.replay, timesteps=timesteps, generator=self.generator,
            drawn=drawn, own=self.stepper.own_samples(),
        )  # fmt: skip
        return self.strategy.mark_replayed(batch, self.generator)

    def any_process(self, flag: bool) -> bool:
        """Is the flag up in any process? All must ask together."""
        return any_process(self.accelerator, flag)

    # --- quality ---

    def evaluate(self, tasks: Sequence[Task] | None = None, *, teacher: bool = False) -> dict[str, Score]:
        """The quality of the EMA student, or of the teacher, on tasks (the run's own where None). Collective."""
        tasks = self.config.tasks if tasks is None else tasks
        if teacher:
            unet = self.teacher.unet
            return {t.name: self.evaluator.score(unet, t, network=unet) for t in tasks}
        with self.student.averaged() as unet:
            network, model = self.student.prepared, self.ships
            return {t.name: self.evaluator.score(unet, t, network=network, model=model) for t in tasks}

    @property
    def ships(self) -> Model:
        """The model that the checkpoint is: its scheduler, and how it is sampled."""
        return self.objective.ships(self.teacher.model)

    def unet(self) -> UNet2DConditionModel:
        """A copy of the EMA student, which the checkpoint holds. Collective."""
        with self.student.averaged():
            return self.student.copy(self.student.full_weights())

    def _draw_samples(self) -> None:
        total = self.position.total
        prompts = [self.evaluator.evaluation_set(task).asked.prompts for task in self.config.tasks]
        with self.student.averaged() as unet:
            generator = self.teacher.generator(unet, self.ships)
            path = write_sample_sheet(self.run_folder, generator, prompts, total)
        self.tracker.log_image(path, total)

    # --- saving ---

    def save(self) -> None:
        """Save everything that a resumed run needs. Collective."""
        tensors = {"generator": self.generator.get_state(), **self.student.state_dict()}
        tensors |= {f"objective/{n}": t for n, t in self.objective.state_dict().items()}
        tensors |= {f"strategy/{n}": t for n, t in self.strategy.state_dict().items()}
        keep, before = self.config.keep, self.before if self.position.step == 0 else None
        write = partial(save_state, self.run_folder, self.position, tensors, self.replay, keep=keep, before=before)
        on_main_process(self.accelerator, write)

    def _restore(self) -> None:
        """Take up the newest state; a run that was killed before its first one starts from the beginning."""
        if list_states(self.run_folder):
            self.position, tensors, saved = load_state(self.run_folder)
            unknown = {n.partition("/")[0] for n in tensors} - set(STATE_KINDS)
            if unknown:
                raise CheckpointError(
                    f"the saved state of {self.run_folder} holds {', '.join(sorted(unknown))}, which this version"
                    " does not know: resume with the version that started the run"
                )
            self.generator.set_state(tensors["generator"])
            self.student.load_state_dict(tensors, steps=self.position.total)
            self.objective.load_state_dict(under("objective/", tensors))
            self.strategy.load_state_dict(under("strategy/", tensors), saved, tasks=self.position.task)
        if self.accelerator.is_main_process:
            cut_metrics(self.run_folder, self.position.total)

    def _prompts(self, latents: Latents) -> list[str]:
        """Some captions of a task, for an export to calibrate itself on."""
        captions = sorted(set(latents.captions))
        return random.Random(self.config.seed).sample(captions, min(PROMPTS_A_TASK, len(captions)))

    def _write_checkpoint(self, out: Path) -> dict[str, Any]:
        """The EMA student as a diffusers folder, with what was learnt and measured so far; the results. Collective."""
        config, position = so_far(self.config, self.position)
        prompts = [p for t in config.tasks for p in position.prompts.get(t.name, [])]
        results = make_results(config, position, self.ships)
        card = model_card(config, self.ships, results, position.settings)
        with self.student.averaged():
            weights = self.student.full_weights()

            def write() -> None:
                unet = self.student.copy(weights)
                write_checkpoint(out, unet, parts_from=config.teacher, model=self.ships, card=card, prompts=prompts)

            on_main_process(self.accelerator, write)
        return results

    def _finish(self) -> None:
        results = self._write_checkpoint(self.run_folder / "checkpoint")
        path = self.run_folder / "results.json"
        on_main_process(self.accelerator, lambda: write_atomic(path, json.dumps(results, indent=2) + "\n"))
        self.tracker.finish()

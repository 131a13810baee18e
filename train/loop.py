"""The training loop, as a generator: task after task, a student learns from its teacher without forgetting.

    trainer = Trainer(config, Path("runs/a"))
    for event in trainer.run():              # StepDone after each step, TaskDone after each task
        ...                                  # draw, log, stop; trainer.save() may be called at any event

All randomness comes from one generator whose state is saved, so that a resumed run ends with the weights of the
uninterrupted one, to the last bit on the CPU. Every process of a distributed run draws the same global batch and
computes its own part of it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from kdc_edge.diffusers_folder import hash_checkpoint, read_model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.files import read_json, refuse_foreign_folder, write_atomic
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.presets import find_preset
from kdc_edge.runtimes.torch import load_network
from kdc_edge.train.checkpoint import write_checkpoint
from kdc_edge.train.config import TrainConfig, check_same, learning_rate
from kdc_edge.train.data.cache import Latents, TextEmbedder, cache_latents
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.distributed import make_accelerator, make_optimizer, shard_again, whole_weights
from kdc_edge.train.objective import QUARTERS, Batch, Distillation, Stopwatch
from kdc_edge.train.quality.evaluate import Generator, Score
from kdc_edge.train.quality.held_out import score
from kdc_edge.train.quality.metrics import ImageMetrics
from kdc_edge.train.quality.report import model_card, write_results
from kdc_edge.train.quality.sheet import write_sample_sheet
from kdc_edge.train.replay import ReplayBuffer
from kdc_edge.train.runs import Position, list_states, load_state, save_state
from kdc_edge.train.state import pack, unpack
from kdc_edge.train.student import make_student
from kdc_edge.train.tracking import Tracker

PROMPTS_A_TASK = 64  # captions that are written beside the weights


@dataclass(frozen=True)
class StepDone:
    task: str
    step: int  # 1-based, of the task
    steps: int
    total: int  # steps of all tasks so far
    losses: dict[str, float]  # every term unweighted, and their weighted total
    quarters: list[float | None]  # the task term by timestep quarter, the clearest first; None where none was drawn
    learning_rate: float
    samples_per_sec: float


@dataclass(frozen=True)
class TaskDone:
    task: str
    scores: dict[str, Score]  # of every task of the run


class Trainer:
    """One run: teacher, student, replay buffer, and where it stands."""

    def __init__(
        self, config: TrainConfig, run: Path, *, resume: bool = False, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.config, self.run_folder, self.say = config, run, say
        self.accelerator = make_accelerator(config, run)
        self.device: torch.device = self.accelerator.device
        preset = find_preset(config.student)
        self.model = read_model(config.teacher)
        self.size = self._image_size()
        self._claim_folder(resume)  # after what can be refused at once
        teacher = load_network(config.teacher, "unet")
        self.student, self.inherited = make_student(preset, teacher, seed=config.seed, inherit_weights=config.inherit)
        self.teacher = self.frozen(teacher)
        self.vae = load_network(config.teacher, "vae_decoder").to(self.device)
        cache = config.cache or run / "cache"
        text_encoder = load_network(config.teacher, "text_encoder").to(self.device)
        self.embed = TextEmbedder.of_teacher(config.teacher, text_encoder, cache)
        self.vae_sha256 = hash_checkpoint(config.teacher / "vae")
        self.schedule = NoiseSchedule.from_config(self.model.scheduler)
        self.objective = Distillation(self.teacher, self.student, self.schedule, config.loss, self.device)
        self.watch = Stopwatch(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.metrics = ImageMetrics(config.metric_weights, self.device)
        self._prepare()
        budget = None if config.replay_mb is None else int(config.replay_mb * 1e6)
        capacity = config.replay if budget is None else None
        self.replay = ReplayBuffer(capacity, capacity_bytes=budget, policy=config.replay_policy)
        self.position = Position()
        self._latents: dict[str, Latents] = {}
        if resume:
            self._restore()
        self.tracker = Tracker(self.accelerator, config, run, since=self.position.total)

    def _claim_folder(self, resume: bool) -> None:
        """Refuse a folder that is not this run's; a run that was killed before its first state starts again."""
        path, main = self.run_folder / "config.json", self.accelerator.is_main_process
        if resume and main:  # what a kill in the middle of a write left
            for half in self.run_folder.glob(".*.part-*"):
                shutil.rmtree(half)
            for half in self.run_folder.glob(".config.json.*"):
                half.unlink()
        if resume and path.is_file():
            check_same(self.config, read_json(path, KdcError))
            return
        if main:
            refuse_foreign_folder(self.run_folder, None)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_atomic(path, json.dumps(self.config.as_json(), indent=2))

    def _image_size(self) -> int:
        size = self.config.resolution or self.model.latent_size * self.model.vae_scale
        unit = self.model.vae_scale * self.model.latent_unit
        if size % unit or size < unit:
            raise InputError(f"--resolution {size} does not fit this teacher: use a multiple of {unit}")
        return size

    def frozen(self, network: UNet2DConditionModel) -> UNet2DConditionModel:
        """On the device, in the precision it is computed in: what never learns needs no 32-bit weights."""
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        memory_format = torch.channels_last if self.config.channels_last else torch.preserve_format
        moved: UNet2DConditionModel = network.to(self.device, precision, memory_format=memory_format)
        return moved.eval().requires_grad_(False)

    def _prepare(self) -> None:
        """The student on its device, as this launch wants it; its optimizer; its moving average."""
        config, student = self.config, self.student
        if config.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        if config.channels_last:
            student.to(memory_format=torch.channels_last)
        if config.compile:
            for network in (student, self.teacher):
                for block in (*network.down_blocks, *network.up_blocks):
                    block.compile(dynamic=False)  # a shape each: inductor fails on the sizes it would leave free
        student.to(self.device).train()
        self.net, self.optimizer = self.accelerator.prepare(student, make_optimizer(config, student))
        self.ema = self.new_average()

    def twin(self, weights: dict[str, Tensor]) -> UNet2DConditionModel:
        """Another network of the student's shape with these weights, free of what the launch did to the student."""
        network = UNet2DConditionModel(**self.student.config)
        network.load_state_dict(weights)
        return network

    def new_average(self) -> EMAModel:
        """A moving average that starts at the student's weights."""
        return EMAModel(self.student.parameters(), decay=self.config.ema_decay, use_ema_warmup=True, power=0.75)

    # --- the run ---

    def run(self) -> Iterator[StepDone | TaskDone]:
        """Train every task that is left, evaluate after each, and write the checkpoint at the end."""
        config, position = self.config, self.position
        while position.task < len(config.tasks):
            task = config.tasks[position.task]
            latents = self.latents(task)
            self.embed.prepare([*latents.captions, *self.replay.captions, ""], writes=self.accelerator.is_main_process)
            if position.step == 0:
                self.optimizer.state.clear()
                self._remember_student()
            while position.step < config.steps:
                yield self._step(task, latents)
                if config.sample_every and position.total % config.sample_every == 0:
                    self._draw_samples()
                if position.step % config.save_every == 0 and position.step < config.steps:
                    self.save()
            self.replay.add(latents.captions, self._take_sides(latents), task=task.name, generator=self.generator)
            scores = self.evaluate()
            position.metric = scores[task.name].metric
            position.matrix.append([s.quality for s in scores.values()])
            position.values.append([s.values for s in scores.values()])
            position.task, position.step = position.task + 1, 0
            self.save()
            yield TaskDone(task.name, scores)
        self._finish()

    def _step(self, task: Task, latents: Latents) -> StepDone:
        started = time.perf_counter()
        rate = learning_rate(self.config, self.position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.watch("data"):
            batch = self._draw(latents)
        losses, quarters = self._descend(batch, task)
        self.position.step += 1
        self.position.total += 1
        event = StepDone(
            task.name, self.position.step, self.config.steps, self.position.total, losses, quarters, rate,
            self.config.batch_size / (time.perf_counter() - started),
        )  # fmt: skip
        if self.accelerator.is_main_process:
            with (self.run_folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(asdict(event)) + "\n")
        self.tracker.log(event.losses, event.quarters, rate, event.total)
        return event

    def _descend(self, batch: Batch, task: Task) -> tuple[dict[str, float], list[float | None]]:
        """One step down the gradient of the whole batch, of which this process computes its part, bit by bit."""
        accelerator, config = self.accelerator, self.config
        parts = accelerator.num_processes * config.accumulate
        sums: dict[str, Tensor] = {}
        by_quarter = torch.zeros(2, QUARTERS, device=self.device)  # summed task loss, and count
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(config.accumulate):
            with self.watch("data"):
                mine = batch.part(accelerator.process_index * config.accumulate + i, parts).to(self.device)
                hidden = self.embed(mine.captions)
            last = i == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.net):
                terms = self.objective(self.net, mine, hidden, watch=self.watch, autocast=accelerator.autocast())
                with self.watch("student"):
                    weight = torch.where(mine.replayed, config.replay_weight, 1.0)
                    accelerator.backward((terms["total"] * weight).mean() / config.accumulate)
            terms = {n: t.detach() for n, t in terms.items()}
            sums = {n: sums.get(n, 0) + t.mean() / config.accumulate for n, t in terms.items()}
            quarter = mine.timestep * QUARTERS // self.schedule.num_train_timesteps
            by_quarter[0].index_add_(0, quarter, terms["task"])
            by_quarter[1].index_add_(0, quarter, torch.ones_like(terms["task"]))
        with self.watch("optimizer"):
            names, seen = list(sums), torch.stack(list(sums.values()))
            losses = dict(zip(names, accelerator.reduce(seen, "mean").tolist(), strict=True))
            if losses["total"] - losses["total"] != 0:
                raise KdcError(
                    f"the loss is no number at step {self.position.step + 1} of {task.name}: lower --learning-rate,"
                    " then --resume from the last saved state"
                )
            accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
            self.optimizer.step()
            self.ema.step(self.student.parameters())
            total, count = accelerator.reduce(by_quarter, "sum").tolist()
        return losses, [t / n if n else None for t, n in zip(total, count, strict=True)]

    def _draw(self, latents: Latents) -> Batch:
        """The whole batch of a step: new samples and, once there are any, replayed ones, with their noise."""
        config, generator = self.config, self.generator
        old = round(config.batch_size * config.replay_ratio) if len(self.replay) else 0
        new = torch.randint(len(latents), (config.batch_size - old,), generator=generator)
        mean, std = self._take_sides(latents)(new)
        captions = [latents.captions[i] for i in new.tolist()]
        if old:
            picked = self.replay.draw(old, generator)
            mean, std = torch.cat([mean, self.replay.mean[picked]]), torch.cat([std, self.replay.std[picked]])
            captions += [self.replay.captions[i] for i in picked.tolist()]
        mean, std = mean.float(), std.float()
        dropped = torch.rand(len(captions), generator=generator) < config.caption_dropout
        return Batch(
            sample=mean + std * torch.randn(mean.shape, generator=generator),
            noise=torch.randn(mean.shape, generator=generator),
            timestep=torch.randint(self.schedule.num_train_timesteps, (len(mean),), generator=generator),
            replayed=torch.arange(config.batch_size) >= config.batch_size - old,
            captions=["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)],
        )

    def _take_sides(self, latents: Latents) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Samples by number, each mirrored or not at random where both were encoded."""

        def take(numbers: Tensor) -> tuple[Tensor, Tensor]:
            if latents.flips == 1:
                return latents.take(numbers)
            return latents.take(numbers, torch.rand(len(numbers), generator=self.generator) < 0.5)

        return take

    def latents(self, task: Task) -> Latents:
        if task.name not in self._latents:
            self._latents[task.name] = cache_latents(
                task, self.vae, self.config.cache or self.run_folder / "cache", vae_sha256=self.vae_sha256,
                size=self.size, samples=self.config.samples, seed=self.config.seed, say=self.say,
                writes=self.accelerator.is_main_process,
            )  # fmt: skip
        return self._latents[task.name]

    def _remember_student(self) -> None:
        """Keep the averaged student of before the task, where replayed samples are distilled from it."""
        if self.config.replay_teacher == "student" and self.position.task > 0:
            with self.averaged():
                weights = whole_weights(self.accelerator, self.net)
                self.objective.replay_from(self.frozen(self.twin(weights)))

    def any_process(self, flag: bool) -> bool:
        """Is the flag up in any process? All must ask together."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.device), "sum").item())

    # --- quality ---

    def evaluate(self) -> dict[str, Score]:
        """Every task's quality with the averaged weights."""
        with self.averaged() as generator:
            return {t.name: self.score(generator, t) for t in self.config.tasks}

    def score(self, generator: Generator, task: Task) -> Score:
        """An image generator's quality on a task."""
        return score(self, generator, task)

    @contextmanager
    def averaged(self) -> Iterator[Generator]:
        """A context in which the student has its moving average's weights: gives an image generator."""
        self.ema.store(self.student.parameters())
        self.ema.copy_to(self.student.parameters())
        self.student.eval()
        try:
            yield self.generator_of(self.student)
        finally:
            shard_again(self.net)
            self.ema.restore(self.student.parameters())
            self.student.train()

    def generator_of(self, unet: UNet2DConditionModel) -> Generator:
        return Generator(unet, self.vae, self.embed, self.schedule, side=self.size // self.model.vae_scale)

    def _draw_samples(self) -> None:
        with self.averaged() as generator:
            path = write_sample_sheet(self.run_folder, generator, self.config.tasks, self.position.total, self.size)
        self.tracker.log_image(path, self.position.total)

    # --- saving ---

    def save(self) -> None:
        """Save everything that a resumed run needs. All processes must call it together."""
        tensors = pack(self)
        if self.accelerator.is_main_process:
            save_state(self.run_folder, self.position, tensors, self.replay, keep=self.config.keep)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Take up the newest state; a run that was killed before its first one starts from the beginning."""
        if list_states(self.run_folder):
            unpack(self, *load_state(self.run_folder))
        if self.accelerator.is_main_process:
            self._cut_metrics()

    def _cut_metrics(self) -> None:
        """Drop what was logged after the state that the run goes on from."""
        path = self.run_folder / "metrics.jsonl"
        if path.is_file():
            write_atomic(path, "".join(path.read_text().splitlines(keepends=True)[: self.position.total]))

    def _prompts(self) -> list[str]:
        """Some captions of every task, what an export can calibrate itself on."""
        found = []
        for task in self.config.tasks:
            captions = sorted(set(self.latents(task).captions))
            found += random.Random(self.config.seed).sample(captions, min(PROMPTS_A_TASK, len(captions)))
        return found

    def _finish(self) -> None:
        with self.averaged():
            weights = whole_weights(self.accelerator, self.net)
            if self.accelerator.is_main_process:
                results = write_results(self.run_folder, self.config, self.position)
                card = model_card(self.config, self.model, results)
                out = self.run_folder / "checkpoint"
                twin = self.twin(weights)
                write_checkpoint(out, twin, parts_from=self.config.teacher, card=card, prompts=self._prompts())
        self.accelerator.wait_for_everyone()
        self.tracker.finish()

"""The training loop, as a generator: task after task, a student learns from its teacher without forgetting.

    trainer = Trainer(config, Path("runs/a"))
    for event in trainer.run():              # StepDone after each step, TaskDone after each task
        ...                                  # draw, log, stop; trainer.save() may be called at any event

All randomness comes from one generator whose state is saved, so that a resumed run ends with the weights of the
uninterrupted one, to the last bit on the CPU.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from kdc_edge.checkpoint import hash_checkpoint, read_model
from kdc_edge.errors import KdcError
from kdc_edge.files import read_json, refuse_foreign_folder, write_atomic
from kdc_edge.presets import find_preset
from kdc_edge.runtimes.torch import load_network
from kdc_edge.schedulers import NoiseSchedule
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.checkpoint import Position, load_state, save_state
from kdc_edge.train.config import TrainConfig, check_same, learning_rate
from kdc_edge.train.data import Latents, Task, TextEmbedder, cache_latents
from kdc_edge.train.evaluate import Generator, Score, average, backward_transfer, evaluate, forgetting
from kdc_edge.train.folders import write_checkpoint
from kdc_edge.train.losses import distillation_loss
from kdc_edge.train.replay import ReplayBuffer
from kdc_edge.train.student import make_student, source_name


@dataclass(frozen=True)
class StepDone:
    task: str
    step: int  # 1-based, of the task
    steps: int
    total: int  # steps of all tasks so far
    losses: dict[str, float]  # every term unweighted, and their weighted total
    learning_rate: float
    samples_per_sec: float


@dataclass(frozen=True)
class TaskDone:
    task: str
    scores: dict[str, Score]  # of every task of the run


class FeatureTap:
    """The outputs of a U-Net's down and up blocks, caught as they are computed; names are the module's own."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.features: dict[str, Tensor] = {}
        for name, module in unet.named_modules():
            if re.fullmatch(r"(down|up)_blocks\.\d+", name):
                module.register_forward_hook(partial(self._catch, name))

    def _catch(self, name: str, _module: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self.features[name] = output[0] if isinstance(output, tuple) else output


class Trainer:
    """One run: teacher, student, replay buffer, and where it stands."""

    def __init__(self, config: TrainConfig, run: Path, *, resume: bool = False) -> None:
        self.config, self.run_folder = config, run
        if resume:
            check_same(config, read_json(run / "config.json", KdcError))
        else:
            refuse_foreign_folder(run, None)
        preset = find_preset(config.student)
        self.model = read_model(config.teacher)
        self.device = torch.device(config.device if config.device != "auto" else _best_device())
        teacher = load_network(config.teacher, "unet")
        self.student, self.inherited = make_student(preset, teacher, seed=config.seed)
        self.student.to(self.device).train()
        self.teacher = teacher.to(self.device)
        text_encoder = load_network(config.teacher, "text_encoder").to(self.device)
        self.embed = TextEmbedder(text_encoder, Tokenizer.from_folder(config.teacher / "tokenizer"))
        self.vae = load_network(config.teacher, "vae_decoder").to(self.device)
        self.teacher_sha256 = hash_checkpoint(config.teacher)
        self.schedule = NoiseSchedule.from_config(self.model.scheduler)
        self.alphas_cumprod = torch.tensor(self.schedule.alphas_cumprod, dtype=torch.float32).to(self.device)
        self.teacher_tap = FeatureTap(self.teacher)
        self.student_tap = FeatureTap(self.student)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.ema = EMAModel(self.student.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
        self.optimizer = self._new_optimizer()
        self.replay = ReplayBuffer(config.replay)
        self.position = Position()
        if resume:
            self._restore()
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / "config.json", json.dumps(config.as_json(), indent=2))

    # --- the run ---

    def run(self) -> Iterator[StepDone | TaskDone]:
        """Train every task that is left, evaluate after each, and write the checkpoint at the end."""
        config, position = self.config, self.position
        while position.task < len(config.tasks):
            task = config.tasks[position.task]
            latents = self.latents(task)
            if position.step == 0:
                self.optimizer = self._new_optimizer()
            while position.step < config.steps:
                yield self._step(task, latents)
                if position.step % config.save_every == 0 and position.step < config.steps:
                    self.save()
            self.replay.add(latents.mean, latents.std, latents.captions, task=task.name, generator=self.generator)
            scores = self.evaluate()
            position.matrix.append([s.accuracy for s in scores.values()])
            position.exact.append([s.exact for s in scores.values()])
            position.task, position.step = position.task + 1, 0
            self.save()
            yield TaskDone(task.name, scores)
        self._finish()

    def _step(self, task: Task, latents: Latents) -> StepDone:
        started = time.perf_counter()
        rate = learning_rate(self.config, self.position.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mean, std, captions = self._draw(latents)
        losses = self._losses(mean, std, captions)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        if not torch.isfinite(losses["total"]):
            raise KdcError(
                f"the loss is no number at step {self.position.step + 1} of {task.name}: lower --learning-rate,"
                " then --resume from the last saved state"
            )
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.student.parameters())
        self.position.step += 1
        self.position.total += 1
        event = StepDone(
            task.name, self.position.step, self.config.steps, self.position.total,
            {n: v.item() for n, v in losses.items()}, rate,
            self.config.batch_size / (time.perf_counter() - started),
        )  # fmt: skip
        with (self.run_folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(asdict(event)) + "\n")
        return event

    def _draw(self, latents: Latents) -> tuple[Tensor, Tensor, list[str]]:
        """A batch of new samples and, once there are any, replayed ones: posterior (B, C, h, w) and captions."""
        old = round(self.config.batch_size * self.config.replay_ratio) if len(self.replay) else 0
        new = torch.randint(len(latents.captions), (self.config.batch_size - old,), generator=self.generator)
        mean, std = latents.mean[new], latents.std[new]
        captions = [latents.captions[i] for i in new.tolist()]
        if old:
            picked = self.replay.draw(old, self.generator)
            mean, std = torch.cat([mean, self.replay.mean[picked]]), torch.cat([std, self.replay.std[picked]])
            captions += [self.replay.captions[i] for i in picked.tolist()]
        return mean.float(), std.float(), captions

    def _losses(self, mean: Tensor, std: Tensor, captions: list[str]) -> dict[str, Tensor]:
        dropped = torch.rand(len(captions), generator=self.generator) < self.config.caption_dropout
        hidden = self.embed(["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)])
        sample = mean + std * torch.randn(mean.shape, generator=self.generator)  # (B, C, h, w)
        noise = torch.randn(mean.shape, generator=self.generator)
        timestep = torch.randint(self.schedule.num_train_timesteps, (len(mean),), generator=self.generator)
        sample, noise, timestep = (x.to(self.device) for x in (sample, noise, timestep))
        a = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noisy = a.sqrt() * sample + (1 - a).sqrt() * noise
        # v-prediction: Salimans and Ho, arXiv 2202.00512, appendix D
        velocity = self.schedule.prediction_type == "v_prediction"
        target = a.sqrt() * noise - (1 - a).sqrt() * sample if velocity else noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            with torch.no_grad():
                taught = self.teacher(noisy, timestep, hidden).sample
            learnt = self.student(noisy, timestep, hidden).sample
        seen = {n: f.float() for n, f in self.student_tap.features.items()}
        shown = {n: self.teacher_tap.features[source_name(n + ".", self.teacher, self.student)[:-1]] for n in seen}
        return distillation_loss(learnt.float(), taught.float(), target, seen, shown, self.config.loss)

    @property
    def _bf16(self) -> bool:
        choice = self.config.mixed_precision
        return choice == "bf16" or (choice == "auto" and self.device.type == "cuda")

    def latents(self, task: Task) -> Latents:
        return cache_latents(
            task, self.vae, samples=self.config.samples, seed=self.config.seed,
            folder=self.run_folder / "cache", teacher_sha256=self.teacher_sha256,
        )  # fmt: skip

    # --- quality ---

    def evaluate(self) -> dict[str, Score]:
        """Every task's quality with the averaged weights."""
        with self.averaged() as generator:
            return {
                t.name: evaluate(generator, t.open(), pictures=self.config.eval_pictures) for t in self.config.tasks
            }

    @contextmanager
    def averaged(self) -> Iterator[Generator]:
        """A context in which the student has its moving average's weights: gives a picture generator."""
        self.ema.store(self.student.parameters())
        self.ema.copy_to(self.student.parameters())
        self.student.eval()
        try:
            yield self.generator_of(self.student)
        finally:
            self.ema.restore(self.student.parameters())
            self.student.train()

    def generator_of(self, unet: UNet2DConditionModel) -> Generator:
        return Generator(unet, self.vae, self.embed, self.schedule)

    # --- saving ---

    def save(self) -> None:
        """Save everything that a resumed run needs."""
        tensors = {"generator": self.generator.get_state()}
        tensors |= {f"student.{n}": p for n, p in self.student.state_dict().items()}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema.shadow_params)}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        save_state(self.run_folder, self.position, tensors, self.replay)

    def _restore(self) -> None:
        self.position, tensors, replay = load_state(self.run_folder)
        if self.config.replay:
            self.replay = replay
            self.replay.capacity = self.config.replay
        self.generator.set_state(tensors["generator"])
        self.student.load_state_dict(
            {n.removeprefix("student."): t for n, t in tensors.items() if n.startswith("student.")}
        )
        self.ema.load_state_dict(
            self.ema.state_dict()
            | {
                "shadow_params": [tensors[f"ema.{i}"].to(self.device) for i in range(len(self.ema.shadow_params))],
                "optimization_step": self.position.total,
            }
        )
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, moment = name.split(".")
                state.setdefault(int(index), {})[moment] = tensor
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self._cut_metrics()

    def _cut_metrics(self) -> None:
        """Drop what was logged after the state that the run goes on from."""
        path = self.run_folder / "metrics.jsonl"
        if path.is_file():
            write_atomic(path, "".join(path.read_text().splitlines(keepends=True)[: self.position.total]))

    def _finish(self) -> None:
        with self.averaged():
            write_checkpoint(self.run_folder / "checkpoint", self.student, parts_from=self.config.teacher)
        p = self.position
        results = {
            "tasks": [t.name for t in self.config.tasks],
            "prompt_accuracy": p.matrix,
            "exact": p.exact,
            "average": average(p.matrix),
            "backward_transfer": backward_transfer(p.matrix),
            "forgetting_max_minus_last": forgetting(p.matrix),
            "conditions": f"{self.config.eval_pictures} pictures a task, DPM-Solver++ 2M 12 steps, guidance 4",
        }
        write_atomic(self.run_folder / "results.json", json.dumps(results, indent=2) + "\n")

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.student.parameters(), lr=self.config.learning_rate, weight_decay=0.01, fused=True)


def branch(source: Path, out: Path, config: TrainConfig) -> Trainer:
    """A second run that goes on from where `source` stands, with another configuration (e.g. without replay)."""
    refuse_foreign_folder(out, None)
    shutil.copytree(source, out)
    write_atomic(out / "config.json", json.dumps(config.as_json(), indent=2))
    return Trainer(config, out, resume=True)


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"

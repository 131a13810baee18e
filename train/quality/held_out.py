"""The quality of a run on its tasks: generated images, and the denoising loss on latents held out of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from kdc_edge.errors import InputError
from kdc_edge.manifest import Model
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch, add_noise
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.distributed import any_process, on_main_process
from kdc_edge.train.losses import mean_squared_error
from kdc_edge.train.networks import Teacher
from kdc_edge.train.quality.evaluate import Asked, Generator, Score, ask, score_images
from kdc_edge.train.quality.evaluation_set import EvaluationSet, kept_images, key_of
from kdc_edge.train.quality.metrics import ImageMetrics
from kdc_edge.train.quality.spread import generate_spread, spread

EVALUATION_NOISE = 7  # the seed of every evaluation's noise
GARDEN_METRICS = frozenset({"prompt_accuracy", "exact", "judge_frechet", "judge_kernel"})
TIMESTEPS = 4  # the middles of as many equal parts, for the held-out loss


def measurable(tasks: Sequence[Task], metrics: ImageMetrics, images: int) -> set[str]:
    """The names of what is measured on any of these tasks, with so many images each."""
    garden = [task.source.startswith("garden:") for task in tasks]
    found = GARDEN_METRICS if any(garden) else frozenset()
    return set(found) if all(garden) else {*found, "loss", *metrics.measurable(images)}


def check_quality(name: str, config: TrainConfig, metrics: ImageMetrics) -> None:
    """Refuse a metric for R, asked for or the run's own, that will not be measured: InputError."""
    known = measurable(config.tasks, metrics, config.eval_images)
    if name not in known:
        lacking = "" if known <= GARDEN_METRICS else f"; {'; '.join(metrics.missing())}"
        raise InputError(f"--quality {name} cannot be measured on these tasks: use {', '.join(sorted(known))}{lacking}")


def lacking(name: str, config: TrainConfig, metrics: ImageMetrics) -> list[str]:
    """A line for the tasks on which R's metric is not measured, which R, average and forgetting leave out."""
    tasks = [t.name for t in config.tasks if name not in measurable([t], metrics, config.eval_images)]
    if not tasks:
        return []
    every = set.intersection(*({*measurable([t], metrics, config.eval_images), "loss"} for t in config.tasks))
    return [f"R is {name}, which is not measured on {', '.join(tasks)}: --quality {min(every)} is on all new rows"]


@dataclass(frozen=True)
class Evaluator:
    """Scores U-Nets on tasks, with the teacher's other networks."""

    teacher: Teacher
    metrics: ImageMetrics
    images: int  # of each task
    accelerator: Accelerator
    folder: Path  # of evaluation sets
    garden_loss: bool = False  # measure the held-out loss of the garden too: what it has in common with other data

    def evaluation_set(self, task: Task) -> EvaluationSet:
        """What the task is evaluated on: kept in the folder, where it is made the first time. Collective."""
        if task.source.startswith("garden:"):
            latents = self.teacher.test_latents(task, self.images) if self.garden_loss else None
            return EvaluationSet(ask(task, self.images, size=self.teacher.size), latents)
        path = self.folder / f"{task.name}.safetensors"
        key = key_of(task, size=self.teacher.size, vae_sha256=self.teacher.vae_sha256)
        kept = kept_images(path, key)
        if any_process(self.accelerator, kept < self.images):
            try:
                asked = ask(task, self.images, size=self.teacher.size)
                made = EvaluationSet(asked, self.teacher.test_latents(task, self.images))
            except InputError as error:
                if not kept:
                    raise
                raise InputError(
                    f"--eval-images {self.images} is more than the {kept} that the run kept of {task.name}, whose data"
                    f" cannot be read ({error}): use {kept}"
                ) from None
            on_main_process(self.accelerator, lambda: made.save(path, key, images=self.images))
        return EvaluationSet.load(path).first(self.images)

    def score(self, unet: UNet2DConditionModel, task: Task, *, network: nn.Module, model: Model | None = None) -> Score:
        """The quality of a U-Net's images on a task.

        Beyond the garden, with LPIPS to the teacher's images and the held-out loss. `network` is the U-Net as the
        launch wraps it, for the loss; `model` says how it is sampled, the teacher's model where None. Collective.
        """
        found = self.evaluation_set(task)
        asked = found.asked
        images = self._images(self.teacher.generator(unet, model), asked)
        if found.latents is None:
            return score_images(images, asked, self.metrics)
        teacher_images = None
        if self.metrics.has_lpips and not asked.scenes:
            teacher_images = self._images(self.teacher.generator(self.teacher.unet), asked)
        losses = self._held_out_losses(network, found.latents)
        return score_images(
            images, asked, self.metrics, paired=teacher_images, losses=losses, loss_captions=found.latents.captions
        )

    def _images(self, generator: Generator, asked: Asked) -> np.ndarray:
        return generate_spread(self.accelerator, generator, asked.prompts, seed=EVALUATION_NOISE)

    @torch.no_grad()
    def _held_out_losses(self, network: nn.Module, latents: Latents) -> list[float]:
        """The denoising loss of each image of a task's test part (or training part), noise fixed."""
        device, schedule = self.teacher.device, self.teacher.schedule
        alphas_cumprod = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32).to(device)
        generator = torch.Generator().manual_seed(EVALUATION_NOISE)
        part = schedule.num_train_timesteps // TIMESTEPS
        timestep = torch.arange(TIMESTEPS) * part + part // 2
        shape = latents.take(torch.tensor([0] * TIMESTEPS))[0].shape
        noises = [torch.randn(shape, generator=generator) for _ in latents.captions]

        def loss(i: int) -> Tensor:
            mean, _ = latents.take(torch.tensor([i] * TIMESTEPS))
            captions = [latents.captions[i]] * TIMESTEPS
            batch = Batch(mean.float(), noises[i], timestep, timestep < 0, captions).to(device)
            text = self.teacher.embed(batch.captions)
            noisy, target = add_noise(batch, alphas_cumprod, prediction_type=schedule.prediction_type)
            with self.accelerator.autocast():
                pred = network(noisy, batch.timestep, text).sample
            return mean_squared_error(pred.float(), target).mean()

        return [found.item() for found in spread(self.accelerator, len(latents), loss)]

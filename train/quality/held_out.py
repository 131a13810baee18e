"""What a run measures of a task: its images, and the denoising loss on latents that are held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kdc_edge.train.data.cache import cache_latents
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.objective import QUARTERS, Batch
from kdc_edge.train.quality.evaluate import Generator, Score, ask, score_images

if TYPE_CHECKING:
    from kdc_edge.train.loop import Trainer

EVALUATION_NOISE = 7  # the seed of every evaluation's noise


def score(trainer: Trainer, generator: Generator, task: Task) -> Score:
    """An image generator's quality on a task; beyond the garden, with LPIPS to the teacher and the held-out loss."""
    asked = ask(task, trainer.config.eval_images, size=trainer.size)
    images = generator(asked.prompts, seed=EVALUATION_NOISE)
    if asked.scenes:
        return score_images(images, asked, trainer.metrics)
    taught = None
    if trainer.metrics.has_lpips:
        taught = trainer.generator_of(trainer.teacher)(asked.prompts, seed=EVALUATION_NOISE)
    return score_images(images, asked, trainer.metrics, paired=taught, loss=held_out_loss(trainer, task))


@torch.no_grad()
def held_out_loss(trainer: Trainer, task: Task) -> float:
    """The denoising loss on the task's test part (or training part, where it has no other), noise fixed."""
    config, accelerator = trainer.config, trainer.accelerator
    latents = cache_latents(
        task, trainer.vae, config.cache or trainer.run_folder / "cache", vae_sha256=trainer.vae_sha256,
        size=trainer.size, samples=config.eval_images, part="test", writes=accelerator.is_main_process,
    )  # fmt: skip
    generator, losses = torch.Generator().manual_seed(EVALUATION_NOISE), []
    spread = trainer.schedule.num_train_timesteps // QUARTERS
    for i, caption in enumerate(latents.captions):
        mean, _ = latents.take(torch.tensor([i] * QUARTERS))
        noise = torch.randn(mean.shape, generator=generator)
        timestep = torch.arange(QUARTERS) * spread + spread // 2
        batch = Batch(mean.float(), noise, timestep, timestep < 0, [caption] * QUARTERS).to(trainer.device)
        hidden = trainer.embed(batch.captions)
        terms = trainer.objective(trainer.net, batch, hidden, watch=trainer.watch, autocast=accelerator.autocast())
        losses.append(terms["task"].mean().item())
    return sum(losses) / len(losses)

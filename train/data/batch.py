"""A step's batch: new samples and replayed ones, with everything random about them.

batch = draw_batch(config, latents, replay, timesteps=objective.draw_timesteps, generator=generator)
noisy, target = add_noise(batch, alphas_cumprod, prediction_type="epsilon")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.transfer import to_device
from kdc_edge.train.strategies.buffer import ReplayBuffer, Take

DrawTimesteps = Callable[[int, torch.Generator], Tensor]  # how many, random state -> (count,)


@dataclass(frozen=True)
class Batch:
    """Samples of a step: latents (B, C, h, w) fp32, the others (B,)."""

    sample: Tensor
    noise: Tensor
    timestep: Tensor
    replayed: Tensor  # bool: from the buffer
    captions: list[str]  # emptied where dropped

    def __len__(self) -> int:
        return len(self.captions)

    def micro_batch(self, number: int, of: int) -> Batch:
        """Every `of`-th sample from `number` on, so that replayed ones are spread evenly."""
        return Batch(**{f.name: getattr(self, f.name)[number::of] for f in fields(self)})

    def to(self, device: torch.device) -> Batch:
        return Batch(
            sample=to_device(self.sample, device),
            noise=to_device(self.noise, device),
            timestep=to_device(self.timestep, device),
            replayed=to_device(self.replayed, device),
            captions=self.captions,
        )


def draw_batch(
    config: TrainConfig, latents: Latents, replay: ReplayBuffer, *, timesteps: DrawTimesteps,
    generator: torch.Generator, drawn: int = 0, own: Sequence[int] | None = None,
) -> Batch:  # fmt: skip
    """The global batch of a step: new samples and, once there are any, a share of replayed ones, with their noise.

    Its samples have one shape; where there are several, a batch may be all new or all replayed. `drawn` counts the
    task's new samples before this step, for epochs. Every process draws the same one; with --own-noise the noise of
    the samples numbered in `own` alone (of all where None). The order of draws is part of exact resume.
    """
    shape, share = _draw_shape(config, latents, replay.latents, generator)
    old = replayed_count(config.batch_size, share, generator)
    new, found, captions = config.batch_size - old, list[tuple[Tensor, Tensor]](), list[str]()
    if new:
        if config.epochs:  # without --buckets: all have this shape
            numbers = epoch_samples(len(latents), drawn, new, seed=config.seed)
        else:
            numbers = latents.draw(new, shape, generator)
        found.append(random_flip(latents, generator)(numbers))
        captions += [latents.captions[i] for i in numbers.tolist()]
    if old:
        numbers = replay.latents.draw(old, shape, generator)
        found.append(replay.latents.take(numbers))
        captions += [replay.captions[i] for i in numbers.tolist()]
    mean, std = (torch.cat(parts).float() for parts in zip(*found, strict=True))  # (B, C, h, w)
    dropped = torch.rand(len(captions), generator=generator) < config.caption_dropout
    if config.own_noise:
        sample, noise = _noise_by_sample(mean.shape, config.noise_offset, generator, own)
    else:
        sample, noise = _draw_noise(mean.shape, config.noise_offset, generator)
    return Batch(
        sample=mean + std * sample,
        noise=noise,
        timestep=timesteps(len(mean), generator),
        replayed=torch.arange(config.batch_size) >= new,
        captions=["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)],
    )


def _draw_noise(shape: torch.Size, offset: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise of the posteriors and of the diffusion, each of this shape (B, C, h, w)."""
    sample, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    if offset:
        noise += offset * torch.randn((*shape[:2], 1, 1), generator=generator)
    return sample, noise


def _noise_by_sample(
    shape: torch.Size, offset: float, generator: torch.Generator, own: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """The same, each sample's from a seed of its own; zeros where a sample is not among the process's `own`."""
    seeds = torch.randint(2**62, (shape[0],), generator=generator).tolist()
    sample, noise = torch.zeros(shape), torch.zeros(shape)
    for i in range(shape[0]) if own is None else own:
        one = torch.Size((1, *shape[1:]))
        sample[i : i + 1], noise[i : i + 1] = _draw_noise(one, offset, torch.Generator().manual_seed(seeds[i]))
    return sample, noise


def _draw_shape(
    config: TrainConfig, latents: Latents, kept: Latents, generator: torch.Generator
) -> tuple[torch.Size, float]:
    """The shape (C, h, w) of a step's samples, and the share of them that is replayed.

    The shape is that of a kept sample with probability r = `replay_ratio`, else that of a new one. If a share k of all
    kept samples has it and a share n of all new ones, r k / (r k + (1 - r) n) of the batch is replayed. The mean share
    is r then, each kept sample is as likely as another, and so is each new one, whatever shapes the two have.
    """
    ratio = config.replay_ratio if len(kept) else 0.0
    shapes = latents.groups.keys() | kept.groups.keys()
    if len(shapes) == 1:  # nothing is drawn
        return shapes.pop(), ratio
    source = kept if ratio and torch.rand((), generator=generator, dtype=torch.float64) < ratio else latents
    shape = source.shape_of(int(torch.randint(len(source), (), generator=generator)))
    old, new = ratio * kept.share(shape), (1 - ratio) * latents.share(shape)
    return shape, old / (old + new)


def epoch_samples(count: int, drawn: int, wanted: int, *, seed: int) -> Tensor:
    """The numbers (wanted,) of the samples after the first `drawn`: each of `count` once an epoch, in a new order."""
    found, at = [], drawn
    while at < drawn + wanted:
        epoch, start = divmod(at, count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed((seed + epoch * 0x9E3779B1) % 2**63))
        found.append(order[start : start + drawn + wanted - at])
        at += len(found[-1])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long)


def replayed_count(batch_size: int, share: float, generator: torch.Generator) -> int:
    """Replayed samples of a step: `batch_size * share`, rounded at random so that the mean is right."""
    mean = round(batch_size * share, 9)  # 100 * 0.07 is a little more than 7
    whole = int(mean)
    if mean == whole:  # nothing is drawn
        return whole
    return whole + int(torch.rand((), generator=generator, dtype=torch.float64) < mean - whole)


def random_flip(latents: Latents, generator: torch.Generator) -> Take:
    """Random horizontal flip: latents by sample number, mirrored with probability 0.5 where both were encoded."""

    def take(numbers: Tensor) -> tuple[Tensor, Tensor]:
        if latents.flips == 1:
            return latents.take(numbers)
        return latents.take(numbers, torch.rand(len(numbers), generator=generator) < 0.5)

    return take


def add_noise(batch: Batch, alphas_cumprod: Tensor, *, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Noisy latents and the prediction's target, both (B, C, h, w), for `alphas_cumprod` (T,).

    The target is the noise; for `v_prediction` the velocity (Salimans and Ho, arXiv 2202.00512, appendix D); for
    `sample` the clean latents.
    """
    a = alphas_cumprod[batch.timestep].view(-1, 1, 1, 1)
    noisy = a.sqrt() * batch.sample + (1 - a).sqrt() * batch.noise
    if prediction_type == "v_prediction":
        return noisy, a.sqrt() * batch.noise - (1 - a).sqrt() * batch.sample
    return noisy, batch.sample if prediction_type == "sample" else batch.noise

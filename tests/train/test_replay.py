"""The latent replay buffer: uniform, bounded, saved whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from kdc_edge.errors import CheckpointError
from kdc_edge.train.config import ReplayPolicy
from kdc_edge.train.data.batch import Batch, draw_batch, epoch_samples
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.stepping import Stepper
from kdc_edge.train.strategies.buffer import ReplayBuffer
from tests.train.test_loop import config

SHAPE = torch.Size((4, 2, 2))


def latents_of(buffer: ReplayBuffer) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of all samples, which have one shape."""
    return buffer.latents.take(torch.arange(len(buffer)))


def offer(buffer: ReplayBuffer, numbers: range, task: str, generator: torch.Generator) -> None:
    """Samples whose latents and captions both say their number."""
    values = torch.tensor([float(n) for n in numbers]).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    buffer.add([str(n) for n in numbers], lambda some: (values[some], values[some] / 2), task=task, generator=generator)


def test_it_holds_what_fits_and_keeps_latents_and_captions_together() -> None:
    buffer, generator = ReplayBuffer(10), torch.Generator().manual_seed(0)
    offer(buffer, range(8), "a", generator)
    assert len(buffer) == 8
    offer(buffer, range(8, 40), "b", generator)
    assert len(buffer) == 10
    means, stds = latents_of(buffer)
    assert means.dtype == torch.float16
    for mean, std, caption, task in zip(means, stds, buffer.captions, buffer.tasks, strict=True):
        assert mean[0, 0, 0] == int(caption)
        assert std[0, 0, 0] == int(caption) / 2
        assert task == ("a" if int(caption) < 8 else "b")


def test_the_reservoir_is_uniform_over_the_stream() -> None:
    """1,200 runs keep 5 of 20, offered in uneven parts: each number is kept 300 times, give or take 5 deviations."""
    counts, generator = torch.zeros(20), torch.Generator().manual_seed(1)
    for _ in range(1200):
        buffer = ReplayBuffer(5)
        for part in (range(3), range(3, 4), range(4, 15), range(15, 20)):
            offer(buffer, part, "a", generator)
        for caption in buffer.captions:
            counts[int(caption)] += 1
    deviation = (1200 * 0.25 * 0.75) ** 0.5
    assert counts.sum() == 1200 * 5
    assert (counts - 300).abs().max() < 5 * deviation


def test_draws_are_seeded_and_reach_everything() -> None:
    buffer = ReplayBuffer(6)
    offer(buffer, range(6), "a", torch.Generator().manual_seed(0))
    draws = [buffer.latents.draw(200, SHAPE, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert set(draws[0].tolist()) == set(range(6))


def test_a_balanced_buffer_holds_as_many_of_each_task_and_the_reservoir_does_not() -> None:
    """A long first task and two short ones, the last of two samples: its free places go to the others."""
    counts = {}
    for policy in get_args(ReplayPolicy):
        buffer, generator = ReplayBuffer(12, policy=policy), torch.Generator().manual_seed(0)
        for task, numbers in (("a", range(400)), ("b", range(400, 420)), ("c", range(420, 422))):
            offer(buffer, numbers, task, generator)
        counts[policy] = Counter(buffer.tasks)
    assert counts["balanced"] == {"a": 5, "b": 5, "c": 2}
    assert counts["reservoir"]["a"] > 9


def test_a_balanced_buffer_is_uniform_within_a_task() -> None:
    """1,500 runs keep 4 of 12 of each of two tasks: 500 times each, give or take 5 deviations."""
    counts, generator = torch.zeros(24), torch.Generator().manual_seed(2)
    for _ in range(1500):
        buffer = ReplayBuffer(8, policy="balanced")
        offer(buffer, range(12), "a", generator)
        offer(buffer, range(12, 24), "b", generator)
        for caption in buffer.captions:
            counts[int(caption)] += 1
    assert (counts - 500).abs().max() < 5 * (1500 / 3 * 2 / 3) ** 0.5


def test_a_budget_in_bytes_is_kept_and_used() -> None:
    buffer, generator = ReplayBuffer(None, capacity_bytes=1000), torch.Generator().manual_seed(0)
    offer(buffer, range(10, 99), "a", generator)  # 64 bytes of latents and 2 of caption each
    assert len(buffer) == 1000 // 66
    assert 1000 - 66 < buffer.size_bytes <= 1000


def test_a_smaller_budget_leaves_what_it_would_have_kept_from_the_start() -> None:
    for policy in get_args(ReplayPolicy):
        large, small = (ReplayBuffer(n, policy=policy) for n in (30, 7))
        for buffer in (large, small):
            generator = torch.Generator().manual_seed(0)
            offer(buffer, range(40), "a", generator)
            offer(buffer, range(40, 50), "b", generator)
        large.limit(7, capacity_bytes=None, policy=policy)
        assert large.captions == small.captions
        assert torch.equal(*(latents_of(buffer)[0] for buffer in (large, small)))
        large.limit(0, capacity_bytes=None, policy=policy)
        assert len(large) == 0


def test_latents_are_asked_for_only_where_they_stay() -> None:
    asked: list[int] = []

    def take(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(len(numbers))
        return torch.zeros(len(numbers), 4, 2, 2), torch.zeros(len(numbers), 4, 2, 2)

    ReplayBuffer(3).add(["x"] * 5000, take, task="a", generator=torch.Generator().manual_seed(0))
    assert asked == [1, 3]


def test_no_capacity_keeps_nothing() -> None:
    buffer = ReplayBuffer(0)
    offer(buffer, range(5), "a", torch.Generator())
    assert len(buffer) == 0
    assert buffer.size_bytes == 0


def test_it_comes_back_as_it_was_saved_and_goes_on_the_same(tmp_path: Path) -> None:
    buffer, generator = ReplayBuffer(6, capacity_bytes=10**6, policy="balanced"), torch.Generator().manual_seed(0)
    offer(buffer, range(9), "ä", generator)
    buffer.save(tmp_path / "replay.safetensors")
    again = ReplayBuffer.load(tmp_path / "replay.safetensors")
    state = generator.get_state()
    offer(buffer, range(9, 20), "b", generator)
    generator.set_state(state)
    offer(again, range(9, 20), "b", generator)
    assert again.captions == buffer.captions
    assert again.tasks == buffer.tasks
    assert torch.equal(*(latents_of(one)[0] for one in (again, buffer)))
    assert torch.equal(again.keys, buffer.keys)
    assert (again.capacity_bytes, again.policy) == (10**6, "balanced")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "replay.safetensors"
    path.write_bytes(b"no buffer")
    with pytest.raises(CheckpointError, match=r"replay\.safetensors is no replay buffer"):
        ReplayBuffer.load(path)


@pytest.mark.parametrize(
    ("batch_size", "ratio"), [(1, 0.5), (1, 0.6), (4, 0.1), (4, 0.9), (3, 0.5), (4, 0.5), (10, 0.3), (4, 0.0)]
)
def test_the_replayed_share_is_right_on_average(batch_size: int, ratio: float) -> None:
    """600 steps; the mean is within 5 standard deviations, and exact where the share is a whole number of samples."""
    buffer, generator = ReplayBuffer(6), torch.Generator().manual_seed(0)
    offer(buffer, range(6), "a", generator)
    latents = Latents([(torch.zeros(5, 1, 4, 2, 2), torch.zeros(5, 1, 4, 2, 2))], ["new"] * 5)
    settings = config(batch_size=batch_size, replay_ratio=ratio)

    def timesteps(count: int, _: torch.Generator) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.long)

    counts = []
    for _ in range(600):
        batch = draw_batch(settings, latents, buffer, timesteps=timesteps, generator=generator)
        assert len(batch) == len(batch.sample) == len(batch.noise) == batch_size
        assert [c != "new" for c in batch.captions] == batch.replayed.tolist()
        counts.append(int(batch.replayed.sum()))
    share, part = batch_size * ratio, batch_size * ratio % 1
    assert max(counts) - min(counts) <= 1
    assert abs(sum(counts) / 600 - share) <= 5 * (part * (1 - part) / 600) ** 0.5 + 1e-9


def test_epochs_draw_every_sample_once_before_any_again() -> None:
    """In uneven steps, over the end of an epoch, in a new order each time."""
    drawn, sizes = 0, (3, 5, 2, 7, 3)
    found: list[int] = []
    for size in sizes:
        found += epoch_samples(10, drawn, size, seed=0).tolist()
        drawn += size
    assert sorted(found[:10]) == sorted(found[10:]) == list(range(10))
    assert found[:10] != found[10:]
    assert epoch_samples(10, 0, 10, seed=1).tolist() != found[:10]


def test_offset_noise_is_one_for_a_channel_and_epochs_take_the_new_samples() -> None:
    values = torch.arange(60.0).view(-1, 1, 1, 1, 1).expand(-1, 1, 4, 16, 16)
    latents = Latents([(values, torch.zeros_like(values))], [str(i) for i in range(60)])
    chosen = config(batch_size=60, epochs=True, noise_offset=0.5)

    def draw(generator: torch.Generator) -> Batch:
        return draw_batch(chosen, latents, ReplayBuffer(0), timesteps=lambda n, _: torch.zeros(n), generator=generator)

    batch = draw(torch.Generator().manual_seed(0))
    assert sorted(map(int, batch.captions)) == list(range(60))
    assert float(batch.noise.mean((2, 3)).std()) == pytest.approx(0.5, abs=0.1)  # without: 1 / 16


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_process_draws_the_noise_of_its_own_samples(accumulate: int) -> None:
    """With --own-noise: the shares of two processes are the batch of one, and all else is drawn alike."""
    latents = Latents([(torch.zeros(9, 1, 4, 2, 2), torch.ones(9, 1, 4, 2, 2))], [str(i) for i in range(9)])
    settings = config(batch_size=8, own_noise=True, noise_offset=0.1, accumulate=accumulate)

    def draw(processes: int, rank: int) -> tuple[Batch, list[int]]:
        accelerator = SimpleNamespace(num_processes=processes, process_index=rank)
        own = Stepper(settings, accelerator, *[None] * 4).own_samples()  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(3)
        return draw_batch(
            settings, latents, ReplayBuffer(0), timesteps=lambda n, g: torch.randint(1000, (n,), generator=g),
            generator=generator, own=own,
        ), own  # fmt: skip

    whole, every = draw(1, 0)
    assert sorted(every) == list(range(8))
    seen = []
    for rank in (0, 1):
        batch, own = draw(2, rank)
        assert len(own) == 4
        seen += own
        others = [i for i in range(8) if i not in own]
        assert torch.equal(batch.sample[own], whole.sample[own])
        assert torch.equal(batch.noise[own], whole.noise[own])
        assert batch.noise[others].abs().max() == 0
        assert torch.equal(batch.timestep, whole.timestep)
        assert batch.captions == whole.captions
    assert sorted(seen) == list(range(8))
    assert whole.noise.flatten(1).std(1).min() > 0.3

"""The latent replay buffer: uniform, bounded, saved whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdc_edge.errors import CheckpointError
from kdc_edge.train.replay import ReplayBuffer


def offer(buffer: ReplayBuffer, numbers: range, task: str, generator: torch.Generator) -> None:
    """Samples whose latents and captions both say their number."""
    values = torch.tensor([float(n) for n in numbers]).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)
    buffer.add(values, values / 2, [str(n) for n in numbers], task=task, generator=generator)


def test_it_holds_what_fits_and_keeps_latents_and_captions_together() -> None:
    buffer, generator = ReplayBuffer(10), torch.Generator().manual_seed(0)
    offer(buffer, range(8), "a", generator)
    assert len(buffer) == 8
    offer(buffer, range(8, 40), "b", generator)
    assert len(buffer) == 10
    assert buffer.mean.dtype == torch.float16
    for mean, std, caption, task in zip(buffer.mean, buffer.std, buffer.captions, buffer.tasks, strict=True):
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
    draws = [buffer.draw(200, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert set(draws[0].tolist()) == set(range(6))


def test_no_capacity_keeps_nothing() -> None:
    buffer = ReplayBuffer(0)
    offer(buffer, range(5), "a", torch.Generator())
    assert len(buffer) == 0
    assert buffer.size_bytes == 0


def test_it_comes_back_as_it_was_saved_and_goes_on_the_same(tmp_path: Path) -> None:
    buffer, generator = ReplayBuffer(6), torch.Generator().manual_seed(0)
    offer(buffer, range(9), "ä", generator)
    buffer.save(tmp_path / "replay.safetensors")
    again = ReplayBuffer.load(tmp_path / "replay.safetensors")
    state = generator.get_state()
    offer(buffer, range(9, 20), "b", generator)
    generator.set_state(state)
    offer(again, range(9, 20), "b", generator)
    assert again.captions == buffer.captions
    assert again.tasks == buffer.tasks
    assert torch.equal(again.mean, buffer.mean)
    assert torch.equal(again.keys, buffer.keys)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "replay.safetensors"
    path.write_bytes(b"no buffer")
    with pytest.raises(CheckpointError, match=r"replay\.safetensors is no replay buffer"):
        ReplayBuffer.load(path)

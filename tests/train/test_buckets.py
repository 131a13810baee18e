"""Images grouped by aspect ratio: shapes, the cache, batches of one shape."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from kdc_edge.errors import InputError
from kdc_edge.train.data.batch import draw_batch
from kdc_edge.train.data.cache import Latents
from kdc_edge.train.data.images import make_buckets, nearest_bucket, read_image
from kdc_edge.train.data.tasks import parse_task
from kdc_edge.train.loop import Trainer
from kdc_edge.train.strategies.buffer import ReplayBuffer
from tests.train.test_loop import config
from tests.train.test_sources import plain, save


def test_an_image_is_cut_to_the_nearest_shape() -> None:
    buckets = make_buckets(64, 16)
    assert buckets == ((80, 48), (64, 64), (48, 80))
    assert all(h * w <= 64 * 64 for h, w in buckets)
    assert nearest_bucket(300, 100, buckets) == (80, 48)
    assert nearest_bucket(90, 100, buckets) == (64, 64)
    wide = plain((200, 20, 20), (200, 100))
    assert read_image(wide, size=64, buckets=buckets).shape == (48, 80, 3)
    assert read_image(wide, size=64).shape == (64, 64, 3)


def test_batches_have_one_shape_and_samples_are_as_likely_as_each_other() -> None:
    shapes = ((4, 10, 6), (4, 8, 8), (4, 6, 10))
    shards = [
        (torch.zeros(n, 1, *shape), torch.zeros(n, 1, *shape)) for n, shape in zip((1, 4, 3), shapes, strict=True)
    ]
    latents = Latents([*shards, shards[0]], [str(i) for i in range(9)])
    generator, counts = torch.Generator().manual_seed(0), Counter[str]()
    settings = config(batch_size=4, replay=0)
    for _ in range(900):
        batch = draw_batch(
            settings, latents, ReplayBuffer(0), timesteps=lambda n, _: torch.zeros(n), generator=generator
        )
        assert len({shapes.index(tuple(batch.sample.shape[1:]))}) == 1
        counts.update(batch.captions)
    assert set(map(int, counts)) == set(range(9))
    assert max(abs(count - 400) for count in counts.values()) < 120  # of 3,600; samples of a shape come together


def test_a_run_trains_on_every_shape(tmp_path: Path) -> None:
    for i, size in enumerate(((96, 64), (64, 96), (70, 64)) * 2):
        save(tmp_path / "photos" / "rose" / f"{i}.jpg", plain((30 * i, 60, 90), size))
    task = parse_task(f"photos=imagefolder:{tmp_path / 'photos'}")
    grouped = config(
        tasks=(task,), buckets=True, replay=0, resolution=96, steps=4, batch_size=2, samples=None, save_every=9,
        eval_steps=1,
    )  # fmt: skip
    with pytest.raises(InputError, match="--buckets has no shape but the square at --resolution 64: use 96 or more"):
        Trainer(replace(grouped, resolution=64), tmp_path / "run")
    trainer = Trainer(grouped, tmp_path / "run")
    latents = trainer.teacher.latents(task)
    assert {tuple(mean.shape[1:]) for mean, _ in latents.shards} == {(2, 4, 16, 32), (2, 4, 24, 24), (2, 4, 32, 16)}
    for _ in trainer.run():
        pass
    (kept,) = (tmp_path / "run" / "cache").glob("photos-train-*/shard-*.safetensors")
    with safe_open(kept, framework="pt") as file:
        assert sorted(file.keys()) == sorted(
            f"{name}-{shape}" for name in ("mean", "std") for shape in ("64x128", "96x96", "128x64")
        )
    again = Trainer(grouped, tmp_path / "run", resume=True).teacher.latents(task)
    assert again.captions == latents.captions
    assert all(torch.equal(a, b) for a, b in zip(again.shards[1], latents.shards[1], strict=True))
    squares = Trainer(replace(grouped, buckets=False), tmp_path / "squares").teacher.latents(task)
    assert np.unique([mean.shape[-2:] for mean, _ in squares.shards]).tolist() == [24]


def test_what_needs_another_order_or_squares_is_refused() -> None:
    with pytest.raises(InputError, match=r"replay on squares: give --replay 0, or another --strategy"):
        config(buckets=True)
    with pytest.raises(InputError, match="--buckets and --epochs exclude each other"):
        config(buckets=True, replay=0, epochs=True)

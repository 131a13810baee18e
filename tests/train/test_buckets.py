"""Images grouped by aspect ratio: shapes, the cache, batches of one shape, replay of several."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kdc_edge.errors import InputError
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.batch import Batch, draw_batch
from kdc_edge.train.data.images import make_buckets, nearest_bucket, read_image
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.tasks import parse_task
from kdc_edge.train.loop import Trainer
from kdc_edge.train.runs.continuing import begin_stage
from kdc_edge.train.runs.states import list_states, load_state
from kdc_edge.train.stepping import StepDone
from kdc_edge.train.strategies.buffer import ReplayBuffer
from tests.train.layouts import plain, save
from tests.train.test_loop import config, logged, weights

TALL, SQUARE, WIDE = SHAPES = ((4, 10, 6), (4, 8, 8), (4, 6, 10))
CUT = 4  # steps after which a copy of the run is taken: in the second task


def numbered(counts: dict[tuple[int, ...], int], start: int = 0) -> Latents:
    """Latents of so many samples of each shape; means and captions say a sample's number, deviations are 0."""
    shards, at = [], start
    for shape, count in counts.items():
        mean = torch.arange(at, at + count, dtype=torch.float16).view(-1, 1, 1, 1, 1).expand(-1, 1, *shape)
        shards.append((mean, torch.zeros_like(mean)))
        at += count
    return Latents(shards, [str(i) for i in range(start, at)])


def offer(buffer: ReplayBuffer, latents: Latents, task: str, generator: torch.Generator) -> None:
    buffer.add(latents.captions, latents.take, task=task, generator=generator, groups=latents.groups.values())


def content(buffer: ReplayBuffer) -> dict[str, tuple[int, ...]]:
    """The shape of each sample by its caption, which its latents must say too."""
    found = {}
    for number, caption in enumerate(buffer.captions):
        (mean,), (std,) = buffer.latents.take(torch.tensor([number]))
        assert mean.dtype == std.dtype == torch.float16
        assert mean.unique().tolist() == [float(caption)]
        assert std.abs().max() == 0
        found[caption] = tuple(mean.shape)
    return found


def draw(settings: TrainConfig, latents: Latents, kept: ReplayBuffer, generator: torch.Generator) -> Batch:
    return draw_batch(settings, latents, kept, timesteps=lambda n, _: torch.zeros(n), generator=generator)


@dataclass(frozen=True)
class Mixed:
    """A finished run of two tasks, a copy of its folder after `CUT` steps, and the batches that it drew."""

    settings: TrainConfig
    run: Path
    trainer: Trainer
    batches: list[Batch]

    @property
    def cut(self) -> Path:
        return self.run.with_name("cut")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Images of three shapes, then of one of these alone."""
    home, tasks = tmp_path_factory.mktemp("mixed"), []
    for name, kind, sizes in (
        ("photos", "rose", ((96, 64), (64, 96), (70, 64)) * 2), ("birds", "tit", ((90, 60),) * 2),
    ):  # fmt: skip
        for i, size in enumerate(sizes):
            save(home / name / kind / f"{i}.jpg", plain((30 * i, 60, 90), size))
        tasks.append(parse_task(f"{name}=imagefolder:{home / name}"))
    settings = config(
        tasks=tuple(tasks), buckets=True, replay=5, resolution=96, steps=3, batch_size=2, samples=None, save_every=1,
        eval_steps=1,
    )  # fmt: skip
    trainer, batches = Trainer(settings, home / "run"), list[Batch]()
    drawn = trainer.draw_batch

    def record(latents: Latents, count: int = 0) -> Batch:
        batches.append(drawn(latents, count))
        return batches[-1]

    trainer.draw_batch = record  # type: ignore[method-assign]
    for event in trainer.run():
        if isinstance(event, StepDone) and event.total == CUT + 1:  # its own state is not written yet
            shutil.copytree(home / "run", home / "cut")
    return Mixed(settings, home / "run", trainer, batches)


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
        batch = draw(settings, latents, ReplayBuffer(0), generator)
        assert len({shapes.index(tuple(batch.sample.shape[1:]))}) == 1
        counts.update(batch.captions)
    assert set(map(int, counts)) == set(range(9))
    assert max(abs(count - 400) for count in counts.values()) < 120  # of 3,600; samples of a shape come together


@pytest.mark.parametrize(
    "new", [{TALL: 5, SQUARE: 2, WIDE: 1}, {SQUARE: 4}, {(4, 4, 4): 2}], ids=["all shapes", "one of them", "another"]
)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_sample_is_as_likely_as_its_like_and_the_replayed_share_is_right(
    new: dict[tuple[int, ...], int], ratio: float
) -> None:
    """Whatever shapes the buffer and the task have. Within 5 standard deviations over 1,500 batches of one shape."""
    latents, buffer = numbered(new, 100), ReplayBuffer(9)
    generator = torch.Generator().manual_seed(0)
    offer(buffer, numbered({TALL: 1, SQUARE: 2, WIDE: 4}), "a", generator)
    settings = config(batch_size=3, replay_ratio=ratio)
    drawn = torch.zeros(1500, 108)
    replayed = torch.zeros(1500)
    for step in range(len(drawn)):
        batch = draw(settings, latents, buffer, generator)
        numbers = torch.tensor([int(caption) for caption in batch.captions])
        assert batch.sample.shape == (3, *batch.sample.shape[1:])
        assert torch.equal(batch.sample.amax((1, 2, 3)), numbers.float())
        assert batch.replayed.tolist() == (numbers < 100).tolist()
        drawn[step].index_add_(0, numbers, torch.ones(3))
        replayed[step] = batch.replayed.float().mean()
    bound = 5 / len(drawn) ** 0.5
    assert abs(replayed.mean() - ratio) < bound * replayed.std()
    for numbers, share in ((range(len(buffer)), ratio), (range(100, 100 + len(latents)), 1 - ratio)):
        counts = drawn[:, list(numbers)]
        assert counts.sum(0).min() > 0
        assert ((counts.mean(0) - 3 * share / len(numbers)).abs() < bound * counts.std(0)).all()


def test_processes_draw_one_batch_of_several_shapes() -> None:
    """With --own-noise: the shares of two processes are the batch of one."""
    latents, generator = numbered({TALL: 2, SQUARE: 2}, 100), torch.Generator().manual_seed(1)
    buffer, settings = ReplayBuffer(9), config(batch_size=4, own_noise=True)
    offer(buffer, numbered({SQUARE: 2, WIDE: 2}), "a", generator)
    state = generator.get_state()
    whole = [draw(settings, latents, buffer, generator) for _ in range(8)]
    for rank in (0, 1):
        generator.set_state(state)
        for expected in whole:
            batch = draw_batch(
                settings, latents, buffer, timesteps=lambda n, _: torch.zeros(n), generator=generator,
                own=range(rank, 4, 2),
            )  # fmt: skip
            assert batch.captions == expected.captions
            part, of_whole = batch.micro_batch(rank, 2), expected.micro_batch(rank, 2)
            assert torch.equal(part.noise, of_whole.noise)
            assert torch.equal(part.replayed, of_whole.replayed)
    assert len({tuple(batch.sample.shape) for batch in whole}) == 3


def test_a_budget_in_bytes_counts_each_sample_as_large_as_it_is() -> None:
    """What fits of the largest keys, in their order, stays, each sample with its own latents."""
    shapes: dict[tuple[int, ...], int] = {(4, 2, 2): 30, (4, 4, 8): 20}  # 64 and 512 bytes, and the caption's 2
    everything, small = ReplayBuffer(None), ReplayBuffer(None, capacity_bytes=5000)
    for buffer in (everything, small):
        generator = torch.Generator().manual_seed(0)
        offer(buffer, numbered(shapes, 10), "a", generator)
        offer(buffer, numbered({(4, 4, 8): 10, (4, 2, 2): 5}, 60), "b", generator)
    shape_of = content(everything)
    assert everything.size_bytes == 35 * 66 + 30 * 514
    assert len(everything.latents.shards) == 2
    room, expected = 5000, []
    for i in everything.keys.argsort(descending=True).tolist():
        room -= 66 if shape_of[everything.captions[i]] == (4, 2, 2) else 514
        if room < 0:
            break
        expected.append(everything.captions[i])
    kept = content(small)
    assert sorted(kept) == sorted(expected)
    assert all(shape_of[caption] == shape for caption, shape in kept.items())
    assert len(set(kept.values())) == 2
    assert 5000 - 514 < small.size_bytes <= 5000
    assert [int(caption) >= 60 for caption in small.captions] == [task == "b" for task in small.tasks]
    everything.limit(None, capacity_bytes=5000, policy="reservoir")
    assert (everything.captions, everything.tasks) == (small.captions, small.tasks)
    assert content(everything) == kept
    everything.limit(None, capacity_bytes=60, policy="reservoir")
    assert (len(everything), everything.size_bytes, everything.latents.groups) == (0, 0, {})


def test_a_buffer_of_several_shapes_comes_back_as_it_was_saved_and_goes_on_the_same(tmp_path: Path) -> None:
    buffer, generator = ReplayBuffer(8, policy="balanced"), torch.Generator().manual_seed(0)
    offer(buffer, numbered({WIDE: 5, SQUARE: 2, TALL: 5}), "a", generator)
    assert len(set(content(buffer).values())) == 3
    buffer.save(tmp_path / "replay.safetensors")
    again, state = ReplayBuffer.load(tmp_path / "replay.safetensors"), generator.get_state()
    for one in (buffer, again):
        generator.set_state(state)
        offer(one, numbered({TALL: 4, WIDE: 4}, 20), "b", generator)
    assert (again.captions, again.tasks, again.policy) == (buffer.captions, buffer.tasks, "balanced")
    assert torch.equal(again.keys, buffer.keys)
    assert content(again) == content(buffer)
    assert Counter(again.tasks) == {"a": 4, "b": 4}


def test_a_file_of_one_shape_is_that_of_earlier_versions(tmp_path: Path) -> None:
    texts = {"capacity": "3", "capacity_bytes": "null", "policy": "reservoir", "captions": '["0", "1"]',
             "tasks": '["a", "a"]'}  # fmt: skip
    mean = torch.arange(2, dtype=torch.float16).view(-1, 1, 1, 1).expand(-1, *SQUARE).contiguous()
    tensors = {"keys": torch.tensor([0.3, 0.1], dtype=torch.float64), "mean": mean, "std": torch.zeros_like(mean)}
    save_file(tensors, tmp_path / "earlier", metadata=texts)
    buffer = ReplayBuffer.load(tmp_path / "earlier")
    assert content(buffer) == {"0": SQUARE, "1": SQUARE}
    buffer.save(tmp_path / "now")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(tmp_path / "now").items())
    with safe_open(tmp_path / "now", framework="pt") as file:
        assert (sorted(file.keys()), file.metadata()) == (sorted(tensors), texts)
    offer(buffer, numbered({WIDE: 1}, 5), "b", torch.Generator())  # and it takes other shapes
    assert content(buffer) == {"0": SQUARE, "1": SQUARE, "5": WIDE}


def test_a_run_trains_on_every_shape(mixed: Mixed, tmp_path: Path) -> None:
    grouped, task = mixed.settings, mixed.settings.tasks[0]
    with pytest.raises(InputError, match="--buckets has no shape but the square at --resolution 64: use 96 or more"):
        Trainer(replace(grouped, resolution=64), tmp_path / "run")
    latents = mixed.trainer.teacher.latents(task)
    assert {tuple(mean.shape[1:]) for mean, _ in latents.shards} == {(2, 4, 16, 32), (2, 4, 24, 24), (2, 4, 32, 16)}
    (kept,) = (mixed.run / "cache").glob("photos-train-*/shard-*.safetensors")
    with safe_open(kept, framework="pt") as file:
        assert sorted(file.keys()) == sorted(
            f"{name}-{shape}" for name in ("mean", "std") for shape in ("64x128", "96x96", "128x64")
        )
    again = Trainer(grouped, mixed.run, resume=True).teacher.latents(task)
    assert again.captions == latents.captions
    assert all(torch.equal(a, b) for a, b in zip(again.shards[1], latents.shards[1], strict=True))
    squares = Trainer(replace(grouped, buckets=False), tmp_path / "squares").teacher.latents(task)
    assert np.unique([mean.shape[-2:] for mean, _ in squares.shards]).tolist() == [24]


def test_a_run_replays_the_shapes_of_the_earlier_task(mixed: Mixed) -> None:
    """The second task has wide images alone; its steps are of every shape that is kept or new."""
    records, steps = logged(mixed.run), mixed.settings.steps
    assert len(mixed.batches) == len(records) == 2 * steps
    assert [r["replayed"] for r in records] == [float(batch.replayed.float().mean()) for batch in mixed.batches]
    assert [r["replayed"] for r in records[:steps]] == [0] * steps
    assert max(r["replayed"] for r in records[steps:]) > 0
    for batch in mixed.batches[steps:]:
        shape = tuple(batch.sample.shape[1:])
        assert ["rose" in caption for caption in batch.captions] == batch.replayed.tolist()
        assert batch.replayed.all() or shape == (4, 16, 32)
    before = ReplayBuffer.load(list_states(mixed.cut)[0] / "replay.safetensors")
    assert set(before.tasks) == {"photos"}
    assert sum(map(len, before.latents.groups.values())) == len(before) == 5
    assert len(before.latents.groups) == 3
    assert records[-1]["replay_mb"] == before.size_bytes / 1e6
    birds, generator = mixed.trainer.teacher.latents(mixed.settings.tasks[1]), torch.Generator().manual_seed(0)
    batches = [draw(mixed.settings, birds, before, generator) for _ in range(40)]
    assert {tuple(batch.sample.shape[1:]) for batch in batches} == set(before.latents.groups)


def test_a_resumed_run_ends_with_the_same_weights_to_the_last_bit(mixed: Mixed, tmp_path: Path) -> None:
    """Stopped in the second task. A stage of few steps begins with the finished run's buffer."""
    cut = Path(shutil.copytree(mixed.cut, tmp_path / "cut"))
    assert load_state(cut)[0].total == CUT
    for _ in Trainer(mixed.settings, cut, resume=True).run():
        pass
    found = weights(cut)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(mixed.run).items())
    assert logged(cut) == logged(mixed.run)
    begin_stage(mixed.run, tmp_path / "stage", replace(mixed.settings, objective="phased"))
    ours, expected = load_state(tmp_path / "stage")[2], mixed.trainer.replay
    assert set(expected.tasks) == {"photos", "birds"}
    assert (ours.captions, ours.tasks) == (expected.captions, expected.tasks)
    for shards in zip(ours.latents.shards, expected.latents.shards, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*shards, strict=True))


def test_images_of_remembered_captions_are_squares_among_the_buckets(mixed: Mixed, tmp_path: Path) -> None:
    """The second task has none; its steps are of both shapes."""
    settings = replace(mixed.settings, strategy="captions", cache=mixed.run / "cache")
    trainer = Trainer(settings, tmp_path / "run")
    photos, birds = (trainer.teacher.latents(task) for task in settings.tasks)
    trainer.strategy.remember(settings.tasks[0], photos, trainer.generator)
    trainer.strategy.begin_task(1, trainer.generator)
    batches = [trainer.draw_batch(birds) for _ in range(20)]
    assert {(tuple(b.sample.shape[1:]), *b.replayed.tolist()) for b in batches} == {
        ((4, 24, 24), True, True), ((4, 16, 32), False, False),
    }  # fmt: skip


def test_epochs_are_refused() -> None:
    with pytest.raises(InputError, match="--buckets and --epochs exclude each other"):
        config(buckets=True, epochs=True)

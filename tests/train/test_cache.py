"""Latents and embeddings are computed once, right, and an interrupted pass goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.runtimes.torch import load_network
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.data import cache, text
from kdc_edge.train.data.cache import cache_latents
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.source import Selection
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.data.text import TextEmbedder
from kdc_edge.train.processes import ALONE, Processes


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return load_network(GARDEN_TEACHER, "vae_decoder")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of noise in a class folder, the fourth of them broken."""
    folder = tmp_path / "photos" / "noise"
    folder.mkdir(parents=True)
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"broken")
    return folder.parent


def encode(task: Task, vae: AutoencoderKL, folder: Path, **options: object) -> Latents:
    return cache_latents(task, vae, folder, Selection(64, **options), vae_sha256="v")  # type: ignore[arg-type]


def test_both_sides_are_the_vaes_own_posterior(vae: AutoencoderKL, photos: Path, tmp_path: Path) -> None:
    latents = encode(Task("t", f"imagefolder:{photos}"), vae, tmp_path / "cache")
    assert len(latents) == 9
    assert latents.flips == 2
    pixels = np.asarray(Image.open(photos / "noise" / "4.png"))  # the fourth that can be read
    for flipped in (False, True):
        side = pixels[:, ::-1] if flipped else pixels
        image = torch.from_numpy(side.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.inference_mode():
            posterior = vae.encode(image).latent_dist
        mean, std = latents.take(torch.tensor([3]), torch.tensor([flipped]))
        assert mean.dtype == torch.float16
        torch.testing.assert_close(mean.float(), posterior.mean * vae.config.scaling_factor, atol=5e-3, rtol=2e-3)
        torch.testing.assert_close(std.float(), posterior.std * vae.config.scaling_factor, atol=5e-3, rtol=2e-3)


def test_an_interrupted_pass_goes_on_behind_its_last_shard(
    vae: AutoencoderKL, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_ENTRIES", 2)
    task, whole = Task("t", f"imagefolder:{photos}"), tmp_path / "whole"
    expected = encode(task, vae, whole)
    calls = 0
    real = cache.encode_images

    def counted(network: AutoencoderKL, images: np.ndarray, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 7:  # of ten: five shards of two sides each
            raise KeyboardInterrupt
        return real(network, images, **options)

    monkeypatch.setattr(cache, "encode_images", counted)
    with pytest.raises(KeyboardInterrupt):
        encode(task, vae, tmp_path / "cut")
    found = encode(task, vae, tmp_path / "cut")
    assert calls == 7 + 4
    assert found.captions == expected.captions
    for ours, theirs in zip(found.shards, expected.shards, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    index = json.loads(next((tmp_path / "cut").glob("t-*/index.json")).read_text("utf-8"))
    assert (index["read"], index["kept"]) == (10, 9)
    assert index["left_out"] == {"cannot be read as an image": 1}
    encode(task, vae, tmp_path / "cut")
    assert calls == 11  # nothing is encoded twice


def test_the_key_changes_with_whatever_changes_the_latents(photos: Path) -> None:
    task = Task("t", f"imagefolder:{photos}")
    usual = Selection(64, 5)
    changes: list[dict[str, Any]] = [{}, {"size": 32}, {"samples": 6}, {"seed": 1}, {"part": "test"}]
    changes += [{"crop": "random"}, {"buckets": ((32, 64),)}]
    keys = {cache.cache_key(task, replace(usual, **change), vae_sha256="a") for change in changes}
    keys |= {cache.cache_key(task, usual, vae_sha256="b"), cache.cache_key(task, usual, vae_sha256="a", bf16=True)}
    (photos / "noise" / "9.png").unlink()
    keys.add(cache.cache_key(task, usual, vae_sha256="a"))
    assert len(keys) == len(changes) + 3


def test_a_long_pass_says_how_far_it_is(vae: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(cache, "TELL_EVERY_SEC", -1.0)
    task = Task("t", "garden:fish")
    cache_latents(task, vae, tmp_path, Selection(64, 3), vae_sha256="v", say=said.append)
    assert said == [f"t: {count} images encoded so far" for count in (0, 1, 2)]


def test_in_bfloat16_they_are_others_nearly_the_same(vae: AutoencoderKL, tmp_path: Path) -> None:
    task = Task("t", "garden:fish")
    exact, rounded = (
        cache_latents(task, vae, tmp_path, Selection(64, 4), vae_sha256="v", bf16=bf16) for bf16 in (False, True)
    )
    (mean, _), (rough, _) = exact.shards[0], rounded.shards[0]
    assert not torch.equal(mean, rough)
    torch.testing.assert_close(mean, rough, atol=5e-2, rtol=2e-2)
    assert len(list(tmp_path.glob("t-train-*"))) == 2


def test_a_stream_that_breaks_off_for_one_process_ends_them_all(vae: AutoencoderKL, tmp_path: Path) -> None:
    class OtherReadTwo(Processes):
        def together(self, work: Callable[[], object]) -> list[object]:  # type: ignore[override]
            return [found := work(), 2 if isinstance(found, int) and not isinstance(found, bool) else found]

    def encode_four(processes: Processes) -> Latents:
        return cache_latents(
            Task("t", "garden:fish"), vae, tmp_path, Selection(64, 4), vae_sha256="v", processes=processes
        )

    with pytest.raises(InputError, match="t: a stream broke off behind 2 samples: start again"):
        encode_four(OtherReadTwo())
    assert len(encode_four(ALONE)) == 4


def test_a_source_without_one_good_image_says_why(vae: AutoencoderKL, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "a" / "x.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"none of 1 images in .* can be used: 1 cannot be read as an image"):
        encode(Task("t", f"imagefolder:{tmp_path / 'photos'}"), vae, tmp_path / "cache")


def test_a_damaged_shard_is_named(vae: AutoencoderKL, tmp_path: Path) -> None:
    task = Task("t", "garden:fish")
    encode(task, vae, tmp_path, samples=2)
    next(tmp_path.glob("t-*/shard-00000.safetensors")).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors is damaged"):
        encode(task, vae, tmp_path, samples=2)


def test_runs_that_share_a_cache_at_once_find_each_others_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "TEXTS_A_SHARD", 2)
    network = load_network(GARDEN_TEACHER, "text_encoder")
    ours, theirs = (TextEmbedder.of_teacher(GARDEN_TEACHER, network, tmp_path) for _ in range(2))
    theirs.prepare(["a", "b", "c", "d"])  # after we looked
    ours.prepare(["e", "f", "c", "d"])
    assert torch.equal(ours(["c", "d"]), theirs(["c", "d"]))


def test_captions_are_encoded_once_and_kept(tmp_path: Path) -> None:
    network = load_network(GARDEN_TEACHER, "text_encoder")
    captions = ["a red fish on a sand background", "a plain blue fish on a dark background", ""]
    first = TextEmbedder.of_teacher(GARDEN_TEACHER, network, tmp_path)
    first.prepare(captions * 3)
    ids = torch.from_numpy(Tokenizer.from_folder(GARDEN_TEACHER / "tokenizer").encode(captions))
    with torch.inference_mode():
        expected = network(ids).last_hidden_state
    torch.testing.assert_close(first(captions), expected, atol=2e-3, rtol=2e-3)

    def fail(*_: object) -> None:
        raise AssertionError("encoded again")

    again = TextEmbedder.of_teacher(GARDEN_TEACHER, network, tmp_path)
    again._encode = fail  # type: ignore[method-assign, assignment]
    again.prepare(captions)
    assert torch.equal(torch.stack([again._known[c].float() for c in captions]), first(captions))


def test_captions_that_an_evaluation_encoded_first_are_kept_too(tmp_path: Path) -> None:
    """In another batch their last bits may differ: a resumed run would not train on the same."""
    network = load_network(GARDEN_TEACHER, "text_encoder")
    first, again = (TextEmbedder.of_teacher(GARDEN_TEACHER, network, tmp_path) for _ in range(2))
    first(["a"])
    first.prepare(["a", "b", "c"])

    def fail(*_: object) -> None:
        raise AssertionError("encoded again")

    again._encode = fail  # type: ignore[method-assign, assignment]
    again.prepare([])  # reads what is there
    assert torch.equal(again(["a", "b", "c"]), first(["a", "b", "c"]))

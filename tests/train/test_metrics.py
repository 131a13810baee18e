"""Distances against torchmetrics' own, and what is said where a weight file is missing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from kdc_edge.errors import InputError
from kdc_edge.quiet import quiet
from kdc_edge.tokenizer import CLIP_FOLDER
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.garden.judge import load_judge
from kdc_edge.train.quality.evaluate import Asked, ask, score_images
from kdc_edge.train.quality.matrix import average, backward_transfer, forgetting
from kdc_edge.train.quality.metrics import (
    ALEXNET,
    CLIP,
    INCEPTION,
    ImageMetrics,
    frechet_distance,
    kernel_distance,
    kernel_distance_error,
)


def features(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 12)) @ rng.normal(size=(12, 12)) + seed).astype(np.float32)


class Flat(torch.nn.Module):
    """A feature network for torchmetrics that hands the features through."""

    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_the_jackknife_of_the_kernel_distance_is_the_spread_over_samples() -> None:
    """Each sample left out by hand, and the spread of many draws."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(7, 4)), generator.normal(size=(9, 4))
    without_a = [kernel_distance(np.delete(a, i, 0), b) for i in range(7)]
    without_b = [kernel_distance(a, np.delete(b, i, 0)) for i in range(9)]
    expected = sum((len(p) - 1) / len(p) * np.sum((np.array(p) - np.mean(p)) ** 2) for p in (without_a, without_b))
    assert kernel_distance_error(a, b) == pytest.approx(np.sqrt(expected))
    draws = [(generator.normal(size=(40, 4)), generator.normal(0.5, size=(40, 4))) for _ in range(60)]
    spread = np.std([kernel_distance(*pair) for pair in draws])
    assert 0.6 * spread < np.mean([kernel_distance_error(*pair) for pair in draws]) < 1.6 * spread


def test_distances_equal_torchmetrics() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import poly_mmd

        a, b = features(0, 90), features(1, 120)
        fid = FrechetInceptionDistance(feature=Flat(), input_img_size=(12,), normalize=True)
        for x, real in ((a, True), (b, False)):
            fid.update(torch.from_numpy(x), real=real)
        assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-3)
        c = b[:90]
        assert kernel_distance(a, c) == pytest.approx(float(poly_mmd(torch.tensor(a), torch.tensor(c))), rel=1e-3)


def test_distances_are_zero_between_like_sets_and_grow() -> None:
    a = features(0, 400)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-2)
    assert abs(kernel_distance(a[:200], a[200:])) < 0.5 * kernel_distance(a, a + 1)
    assert frechet_distance(a, a + 1) == pytest.approx(12, rel=1e-3)


def test_a_missing_weight_file_is_named_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "torch"))
    metrics = ImageMetrics(tmp_path)
    lines = metrics.missing()
    assert [name in line for name, line in zip((INCEPTION, ALEXNET, CLIP), lines, strict=True)] == [True] * 3
    assert all(str(tmp_path) in line for line in lines)
    images = np.zeros((3, 64, 64, 3), np.uint8)
    assert metrics.measure(images, images, ["x"] * 3, images) == {}


def test_pickled_code_among_the_weights_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)  # type: ignore[return-value]

    torch.save({"a": Evil()}, tmp_path / INCEPTION)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(InputError, match="holds no Inception weights"):
        ImageMetrics(tmp_path).measure(images, images, ["x"] * 2)
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights where the real one would lie."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 49408}  # fmt: skip
    with quiet():
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(
            folder / CLIP.split("/")[1]
        )
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        CLIPProcessor(images, CLIPTokenizer.from_pretrained(CLIP_FOLDER)).save_pretrained(folder / CLIP.split("/")[1])
    return folder


def test_the_clip_score_is_a_hundred_times_the_cosine(clip_folder: Path) -> None:
    metrics = ImageMetrics(clip_folder)
    images = np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3), np.uint8)
    prompts = ["a red fish", "a blue flower"]
    folder = clip_folder / CLIP.split("/")[1]
    with quiet(), torch.inference_mode():
        found = metrics.clip_score(images, prompts)
        model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
        inputs = processor(text=prompts, images=[Image.fromarray(p) for p in images], return_tensors="pt", padding=True)
        seen = model(**inputs)
        cosine = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
    assert found == pytest.approx(float(100 * cosine.clamp(min=0).mean()), rel=1e-3, abs=1e-3)


def test_lpips_is_zero_for_the_same_image_and_grows(tmp_path: Path) -> None:
    """AlexNet of random weights where the real one would lie; the linear layers are the published ones."""
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / ALEXNET)
    metrics = ImageMetrics(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
    assert metrics.lpips(images, images) == pytest.approx(0, abs=1e-6)
    assert metrics.lpips(images, 255 - images) > metrics.lpips(images, np.clip(images + 3, 0, 255)) > 0
    pair = torch.rand(2, 3, 64, 64, requires_grad=True)
    metrics.lpips_network(pair[:1], pair[1:]).sum().backward()  # the network that has measured can be trained with
    assert pair.grad is not None
    assert pair.grad.abs().sum() > 0


def test_garden_images_are_scored_however_they_were_made() -> None:
    asked = ask(Task("fish", "garden:fish"), 12, size=64)
    assert asked.references is not None
    perfect = score_images(asked.references, asked, None)
    assert perfect.metric == "prompt_accuracy"
    assert perfect.quality > 0.95
    assert perfect.values["judge_frechet"] == pytest.approx(0, abs=0.05 * _spread(asked))
    wrong = score_images(np.ascontiguousarray(asked.references[::-1]), asked, None)
    assert wrong.quality < perfect.quality
    grey = score_images(np.full_like(asked.references, 128), asked, None)
    assert grey.values["judge_kernel"] > perfect.values["judge_kernel"]


def _spread(asked: Asked) -> float:
    assert asked.references is not None
    return float(np.cov(load_judge().features(asked.references), rowvar=False).trace())


def test_tasks_that_were_not_known_yet_are_left_out_of_the_mean() -> None:
    r = [[0.9, None], [0.6, 0.8]]
    assert average(r) == pytest.approx(0.7)
    assert backward_transfer(r) == pytest.approx(-0.3)
    assert forgetting(r) == pytest.approx(0.3)
    assert forgetting([[0.9], [0.6, 0.8]]) == pytest.approx(0.3)


def test_scores_by_class_are_means_over_the_classes_that_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(_: object, images: np.ndarray, *rest: Any) -> dict[str, float]:
        rest[-1]["clip_score"] = np.arange(len(images), dtype=float)
        return {"clip_score": 1.5}

    monkeypatch.setattr(ImageMetrics, "measure", measure)
    classes = {"a rose": "rose", "the rose": "rose", "a lily": "lily"}
    asked = Asked(("a rose", "a lily", "the rose", "anything"), (), None, "", classes)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    score = score_images(images, asked, ImageMetrics(), losses=[0.5, 0.25], loss_captions=["a lily", "a lily"])
    assert score.by_class == {"rose": {"clip_score": 1.0}, "lily": {"clip_score": 1.0, "loss": 0.375}}

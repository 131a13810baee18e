"""The judge: a small network that reads a garden image's attributes back, so that prompts can be checked.

Its answers give the prompt accuracy of a generator; its features, the place before the answers, give the
Fréchet distance that larger projects take from an Inception network. Its weights are the garden's (assets.py).

    judge = load_judge()
    judge.read(images)          # uint8 (N, 64, 64, 3) -> {"color": ["red", ...], ...}
    judge.features(images)      # float32 (N, 128)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kdc_edge.train.garden.assets import JUDGE, need_garden
from kdc_edge.train.garden.scenes import BACKGROUNDS, COLORS, COUNTS, PATTERNS, SUBJECTS, Scene

LABELS: dict[str, tuple[str, ...]] = {
    "subject": SUBJECTS,
    "color": tuple(COLORS),
    "detail": (*COUNTS, *PATTERNS),
    "accent": ("none", *COLORS),
    "background": tuple(BACKGROUNDS),
}


class Judge(nn.Module):
    """Five questions over one small convolutional trunk: 0.46 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in ((3, 24), (24, 48), (48, 72), (72, 96)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
            layers += [nn.Conv2d(c_out, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 4 * 4, 128), nn.SiLU())
        self.answers = nn.ModuleDict({name: nn.Linear(128, len(labels)) for name, labels in LABELS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images (N, 3, 64, 64) in [-1, 1] -> logits (N, labels) per attribute."""
        features = self.trunk(images)
        return {name: answer(features) for name, answer in self.answers.items()}

    def maps(self, images: Tensor) -> list[Tensor]:
        """The trunk's activations (N, c, h, w) of images (N, 3, H, W) in [-1, 1], one a stage, with a gradient."""
        found = []
        for number, layer in enumerate(self.trunk):
            if isinstance(layer, nn.Flatten):
                break
            images = layer(images)
            if number % 6 == 5:  # a stage is two convolutions with their norms and activations
                found.append(images)
        return found

    @torch.inference_mode()
    def read(self, images: np.ndarray) -> dict[str, list[str]]:
        """The attributes seen in uint8 images (N, 64, 64, 3)."""
        logits = self(to_images(images))
        return {name: [LABELS[name][i] for i in logits[name].argmax(1).tolist()] for name in LABELS}

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of uint8 images: float32 (N, 128)."""
        features: np.ndarray = self.trunk(to_images(images)).numpy()
        return features

    def right(self, images: np.ndarray, scenes: Sequence[Scene]) -> np.ndarray:
        """Which attribute of which image is as asked: bool (attributes in the order of LABELS, N)."""
        seen = self.read(images)
        return np.array([[a == s.attributes[n] for a, s in zip(seen[n], scenes, strict=True)] for n in LABELS])

    def agreement(self, images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
        """The share of images in which each attribute is as asked, and `all` of them at once."""
        return shares(self.right(images, scenes))


def shares(right: np.ndarray) -> dict[str, float]:
    """From bool (attributes, N): the share of images in which each attribute is right, and `all` at once."""
    return {n: float(r.mean()) for n, r in zip(LABELS, right, strict=True)} | {"all": float(right.all(0).mean())}


def to_images(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The label indices (N,) that the judge should answer for the scenes."""
    return {n: torch.tensor([labels.index(s.attributes[n]) for s in scenes]) for n, labels in LABELS.items()}


def load_judge(path: Path = JUDGE) -> Judge:
    """The trained judge, ready to answer. Raises MissingPackageError where the garden's weights are not installed."""
    if path == JUDGE:
        need_garden("the garden's judge")
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return judge.eval().requires_grad_(False)

"""A further network for Apple's Swift package: the safety checker, where the checkpoint has one.

    for name, network in extra_networks(checkpoint, model): ...

It blacks out unsafe images. It is no part of our own pipeline, so it is proved here on one input of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdc_edge.bundle import Check, Model
from kdc_edge.errors import CheckpointError
from kdc_edge.export.coreml.apple_modules import AppleNetwork, floats
from kdc_edge.export.examples import smooth
from kdc_edge.export.parity import compare
from kdc_edge.formats import Format
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program
from kdc_edge.text import one_line

EXTRAS = {"safety_checker": "SafetyChecker"}


class AppleSafetyChecker(nn.Module):
    """CLIP input (1, 3, S, S), images -> images with unsafe ones black, unsafe or not, scores (1, concepts)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.checker = network

    def forward(self, clip_input: Tensor, images: Tensor, adjustment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        checker = self.checker
        embeds = _unit(checker.visual_projection(checker.vision_model(clip_input)[1]))
        special = embeds @ _unit(checker.special_care_embeds).T - checker.special_care_embeds_weights
        stricter = ((special + adjustment).amax(1, keepdim=True) > 0).float() * 0.01
        scores = embeds @ _unit(checker.concept_embeds).T - checker.concept_embeds_weights
        scores = scores + stricter + adjustment
        unsafe = (scores.amax(1) > 0).float()
        return images * (1 - unsafe)[:, None, None, None], unsafe, scores


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / length


def extra_networks(checkpoint: Path, model: Model) -> Iterator[tuple[str, AppleNetwork]]:
    """The folder's name and the network; the next one is loaded when it is asked for."""
    if (checkpoint / "safety_checker").is_dir():
        yield "safety_checker", _safety_checker(checkpoint / "safety_checker", model)


def prove(name: str, network: AppleNetwork, package: Path, row: Format) -> Check:
    """The package's last output against PyTorch's, on one smooth random image."""
    rng = np.random.default_rng(0)
    inputs = {n: smooth(rng, [int(side) for side in t.shape]) for n, t in network.inputs.items()}
    with torch.no_grad():
        found: Any = network.module(*map(torch.from_numpy, inputs.values()))
    output = list(network.outputs)[-1]
    expected = (found[-1] if isinstance(found, tuple) else found).numpy()
    evaluate = Evaluator(read_program(package / PROGRAM))
    return compare(name, [(inputs, expected)], lambda **given: evaluate(**given)[output], row.min_component_psnr_db)


def _safety_checker(folder: Path, model: Model) -> AppleNetwork:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    try:
        network = StableDiffusionSafetyChecker.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # both libraries raise whatever comes
        raise CheckpointError(f"{folder} cannot be read as a safety checker: {one_line(error)}") from None
    side = int(network.config.vision_config.image_size)
    images = [1, model.image_size, model.image_size, 3]
    return AppleNetwork(
        AppleSafetyChecker(network.float().eval()),
        {"clip_input": floats(1, 3, side, side), "images": floats(*images), "adjustment": floats(1)},
        {
            "filtered_images": floats(*images),
            "has_nsfw_concepts": floats(1),
            "concept_scores": floats(1, len(network.concept_embeds)),
        },
        {
            "clip_input": "the image as CLIP sees it, normalized",
            "images": "images to make black where they are unsafe",
            "adjustment": "added to every score: more is stricter",
            "filtered_images": "the images, black where they are unsafe",
            "has_nsfw_concepts": "1 where the image is unsafe",
            "concept_scores": "above 0 where a concept is in the image",
        },
        "says whether an image is safe to show",
    )

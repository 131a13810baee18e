"""Safety checkers in small, and images that they flag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig

from kdc_edge.safety import clip_input

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 224, "patch_size": 56}  # fmt: skip


def make_checker(folder: Path, images: Sequence[np.ndarray] = (), **vision: int) -> Any:
    """A checker with random weights that flags about half of the images, saved in the checkpoint `folder`."""
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION | vision, projection_dim=16)).eval()
    for embeds in (checker.concept_embeds, checker.special_care_embeds):
        torch.nn.init.normal_(embeds)
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        torch.nn.init.constant_(thresholds, 2)  # cosines are below
    if images:
        with torch.no_grad():
            given = torch.from_numpy(np.concatenate([clip_input(image) for image in images]))
            embeds = checker.visual_projection(checker.vision_model(given)[1])
            for concept, thresholds, rank in (
                (checker.concept_embeds, checker.concept_embeds_weights, len(images) // 2),
                (checker.special_care_embeds, checker.special_care_embeds_weights, 1),
            ):
                found = torch.nn.functional.cosine_similarity(embeds, concept[:1]).sort(descending=True).values
                thresholds[0] = (found[rank - 1] + found[rank]) / 2
    checker.save_pretrained(folder / "safety_checker")
    return checker

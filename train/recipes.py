"""Recipes: named sets of training settings, each with its source. Flags given by hand and a settings file win.

    find_recipe("kdc-diff").settings["learning_rate"]         # 5e-5
    kdc-edge train --recipe kdc-diff --teacher DIR --task flowers=oxford-flowers:DIR

What a recipe leaves out is as in every run. docs/reproducing.md puts them into sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdc_edge.errors import unknown_choice


@dataclass(frozen=True)
class Recipe:
    name: str
    source: str  # of the settings
    settings: Mapping[str, Any]  # by the setting's name


# Of the authors' scripts for Stable Diffusion at 512 pixels. Their batches are micro-batch x accumulation.
_SD1: dict[str, Any] = {"schedule": "constant", "warmup": 0, "ema_decay": 0.9999, "save_every": 1000}

RECIPES = (
    Recipe(
        "kdc-diff",
        "KDC-Diff (arXiv 2505.06995) and its authors' code: batch 1 x 4, learning rate 5e-5 constant, seed 1234, T 2,"
        " soft targets summed over the 64 x 64 positions; steps and loss weights are not published",
        {
            **_SD1, "student": "kdc-482m", "steps": 10_000, "batch_size": 4, "accumulate": 4, "learning_rate": 5e-5,
            "seed": 1234, "weight_task": 1.0, "weight_output": 1.0, "weight_soft": 4096.0, "weight_feature": 1.0,
            "temperature": 2.0, "eval_steps": 25, "eval_guidance": 7.5,
        },
    ),
    Recipe(
        "bk-sdm",
        "BK-SDM-Small (arXiv 2305.15798) and its kd_train.sh: batch 64 x 4, learning rate 5e-5 constant, seed 1234, all"
        " weights 1; 50,000 steps in the paper, 400,000 at most in the script",
        {
            **_SD1, "student": "kdc-482m", "steps": 50_000, "batch_size": 256, "accumulate": 4, "learning_rate": 5e-5,
            "seed": 1234, "weight_task": 1.0, "weight_output": 1.0, "weight_soft": 0.0, "weight_feature": 1.0,
            "gradient_checkpointing": True, "eval_steps": 25, "eval_guidance": 7.5,
        },
    ),
    Recipe(
        "sd-finetune",
        "the teacher itself, by the denoising loss alone: diffusers' text-to-image example, batch 1 x 4, learning rate"
        " 1e-5 constant, 15,000 steps",
        {
            **_SD1, "student": "sd1-teacher", "steps": 15_000, "batch_size": 4, "accumulate": 4, "learning_rate": 1e-5,
            "weight_task": 1.0, "weight_output": 0.0, "weight_soft": 0.0, "weight_feature": 0.0,
            "gradient_checkpointing": True, "eval_steps": 25, "eval_guidance": 7.5,
        },
    ),
    Recipe(
        "garden",
        "docs/experiments.md: the settings of the garden's experiments, which are the defaults",
        {"student": "garden-student", "steps": 300, "batch_size": 16, "learning_rate": 1e-3, "ema_decay": 0.995},
    ),
)  # fmt: skip

# Defaults of a student's family where neither a recipe nor a flag says otherwise. sd1: a learning rate as in the
# published recipes, and fewer states, which are of 7.7 GB; the garden's are the defaults of the settings.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "garden": {},
    "sd1": {"steps": 5000, "learning_rate": 5e-5, "ema_decay": 0.999, "save_every": 1000},
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name; raises UsageError, which names the nearest."""
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    raise unknown_choice("--recipe", name, (recipe.name for recipe in RECIPES))

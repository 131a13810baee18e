"""The results of a run: results.json, and the checkpoint's model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from kdc_edge.bundle import Model
from kdc_edge.checkpoints.assemble import read_sources
from kdc_edge.files import write_atomic
from kdc_edge.pipeline import made_for
from kdc_edge.text import markdown_table
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.quality.evaluate import (
    EVALUATION,
    QUALITIES,
    average,
    backward_transfer,
    forgetting,
    quality_matrix,
    signed,
    signed_forgetting,
)
from kdc_edge.train.quality.metrics import NETWORKS
from kdc_edge.train.runs import Position
from kdc_edge.version import __version__

CARD = Template("""\
---
library_name: diffusers
pipeline_tag: text-to-image
base_model: $base_model
tags: ["stable-diffusion", "knowledge-distillation", "continual-learning", "kdc-edge"]
---

# $student, distilled

A `$student` U-Net distilled from `$teacher` by kdc-edge $version
($prediction prediction), task after task, with latent replay.
$sources
## Trained on

$tasks

$settings$earlier
## Measured

R, `$metric` of each task (column) after training each task (row); higher is better.

$matrix
$transfer
After the last task:

$last
Conditions: $conditions.
""")


def write_results(run: Path, config: TrainConfig, position: Position, model: Model) -> dict[str, Any]:
    """R by the name of its metric, what follows from it, R of every other metric, and every value measured."""
    measured = {name for row in position.values for found in row for name in found or {}}
    matrices = {
        signed(name): quality_matrix(position.values, signed(name)) for name, _ in QUALITIES if name in measured
    }
    results: dict[str, Any] = {
        "tasks": [t.name for t in config.tasks],
        "metric": position.metric,
        position.metric: position.matrix,
        "average": average(position.matrix),
        "backward_transfer": backward_transfer(position.matrix),
        "forgetting_max_minus_last": forgetting(position.matrix),
        "forgetting_signed": signed_forgetting(position.matrix),
        "matrices": matrices,
        "networks": {name: network for name, network in NETWORKS.items() if name in measured},
        "values": position.values,
        "conditions": f"{config.eval_images} images a task, {made_for(model, EVALUATION).conditions}, averaged weights",
    }
    write_atomic(run / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def model_card(
    config: TrainConfig, model: Model, results: dict[str, Any], settings: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """README.md of a checkpoint: a YAML header that the hub reads, tasks, settings and results.

    `settings` are the flags of each task, by its name: those of earlier tasks that differ are listed.
    """
    names, matrix = results["tasks"], results[results["metric"]]
    rows = [
        [name, *map(_number, row), *[""] * (len(names) - len(row))] for name, row in zip(names, matrix, strict=True)
    ]
    last = [
        (name, ", ".join(f"{metric} {value:.4g}" for metric, value in (values or {}).items()))
        for name, values in zip(names, results["values"][-1], strict=True)
    ]
    transfer = {
        "average": results["average"],
        "backward transfer": results["backward_transfer"],
        "forgetting (maximum minus last)": results["forgetting_max_minus_last"],
        "signed forgetting (maximum before the last task minus last)": results.get("forgetting_signed"),
    }
    return CARD.substitute(
        base_model=json.dumps(config.teacher.name),
        student=config.student,
        teacher=config.teacher.name,
        sources=_sources(config.teacher),
        version=__version__,
        prediction=model.scheduler.get("prediction_type", "epsilon"),
        tasks="\n".join(f"{i}. {t.name}: `{t.source}`" for i, t in enumerate(config.tasks, 1)),
        settings=markdown_table(("group", "setting", "value"), config.table()),
        earlier=_earlier_settings(config, settings or {}),
        metric=results["metric"],
        matrix=markdown_table(("after", *names), rows),
        transfer="".join(f"- {name}: {_number(value)}\n" for name, value in transfer.items() if value is not None),
        last=markdown_table(("task", "values"), last),
        conditions=results["conditions"],
    )


def _sources(teacher: Path) -> str:
    """The files that a teacher was assembled from, with their hashes; empty where it was not."""
    lines = [
        f"- {source.role} `{source.name}`{'' if source.weight is None else f', weight {source.weight:g}'}:"
        f" SHA-256 `{source.sha256}`\n"
        for source in read_sources(teacher)
    ]
    return "\nThe teacher's files:\n\n" + "".join(lines) if lines else ""


def _earlier_settings(config: TrainConfig, settings: Mapping[str, Mapping[str, str]]) -> str:
    """The settings that tasks were trained with, where they are not the last task's; empty where there are none."""
    now = {option: value for _, option, value in config.table()}
    rows = [
        (task, option, then.get(option, "not set"))
        for task, then in settings.items()
        for option in now | dict(then)
        if then.get(option) != now.get(option)
    ]
    if not rows:
        return ""
    return f"\nEarlier tasks were trained with other settings:\n\n{markdown_table(('task', 'setting', 'value'), rows)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

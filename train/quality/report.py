"""The results of a run: results.json, and the checkpoint's model card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

from kdc_edge.checkpoints.assemble import read_sources
from kdc_edge.hub import hub_id, label
from kdc_edge.manifest import Model
from kdc_edge.request import made_for
from kdc_edge.text import markdown_table
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.quality.evaluate import evaluation_request
from kdc_edge.train.quality.matrix import (
    QUALITIES,
    average,
    backward_transfer,
    forgetting,
    forward_transfer,
    quality_matrix,
    signed,
    signed_forgetting,
)
from kdc_edge.train.quality.metrics import NETWORKS
from kdc_edge.train.recipes import find_recipe
from kdc_edge.train.runs.states import Position
from kdc_edge.version import __version__

TEACHER, STEP_0 = "teacher", "step 0"  # rows beside R: the teacher, the student before training

# How a student was kept from forgetting, by strategy; of those with a buffer where it may hold something.
BUFFERED = {
    "replay": "with latent replay",
    "captions": "with replay of captions, which the teacher makes images of",
    "generative": "with generative replay",
}
OTHERWISE = {"ewc": "with elastic weight consolidation", "lwf": "by learning without forgetting"}

CARD = Template("""\
---
library_name: diffusers
pipeline_tag: text-to-image
base_model: $base_model
tags: ["stable-diffusion", "knowledge-distillation", "continual-learning", "kdc-edge"]
---

# $student, distilled

A `$student` U-Net distilled from `$teacher` by kdc-edge $version
($prediction prediction), task after task, $memory.
$sources
## Trained on

$tasks

$settings$earlier$recipe
## Measured

R, `$metric` of each task (column) after training each task (row), where it was measured also of the teacher and of the
student before training; higher is better.

$matrix
$transfer
After the last task, ± standard errors over images:

$last
Conditions: $conditions.
""")


def so_far(config: TrainConfig, position: Position) -> tuple[TrainConfig, Position]:
    """The configuration and position of a run that ends with the last task that was evaluated."""
    learnt = len(position.values)
    cut = replace(
        position,
        matrix=[row[:learnt] for row in position.matrix],
        values=[row[:learnt] for row in position.values],
        errors=[row[:learnt] for row in position.errors],
        by_class=[row[:learnt] for row in position.by_class],
    )
    return replace(config, tasks=config.tasks[:learnt]), cut


def make_results(config: TrainConfig, position: Position, model: Model) -> dict[str, Any]:
    """results.json: R of the chosen metric, what follows from it, R of the other metrics, and every value measured."""
    measured = {name for row in position.values for found in row for name in found or {}}
    matrices = {
        signed(name): quality_matrix(position.values, signed(name)) for name, _ in QUALITIES if name in measured
    }
    names = [t.name for t in config.tasks]
    conditions = made_for(model, evaluation_request(config)).conditions
    baselines = {
        who: quality_matrix([[found.get(name) for name in names]], position.metric)[0]
        for who, found in position.baselines.items()
    }
    return {
        "tasks": names,
        "metric": position.metric,
        position.metric: position.matrix,
        "average": average(position.matrix),
        "backward_transfer": backward_transfer(position.matrix),
        "forgetting_max_minus_last": forgetting(position.matrix),
        "forgetting_signed": signed_forgetting(position.matrix),
        "forward_transfer": forward_transfer(position.matrix, baselines.get(STEP_0, [])),
        "baselines": baselines,
        "matrices": matrices,
        "networks": {name: network for name, network in NETWORKS.items() if name in measured},
        "values": position.values,
        "standard_errors": position.errors,
        "by_class": position.by_class,
        "baseline_values": position.baselines,
        "references": position.references,
        "conditions": f"{config.eval_images} images a task, {conditions}, averaged weights"
        + _earlier_conditions(config, position, sampled=model.sampling is None),
    }


def _earlier_conditions(config: TrainConfig, position: Position, *, sampled: bool) -> str:
    """How rows of R were measured where it was otherwise than the last; few-step students have steps of their own."""
    flags = ["--eval-images", *(["--eval-steps", "--eval-guidance"] if sampled else [])]
    now, found = {option: value for _, option, value in config.table()}, ""
    for task, then in position.settings.items():
        other = [f"{f} {then[key]}" for f in flags if (key := f"`{f}`") in then and then[key] != now[key]]
        found += f"; the row after {task}: {', '.join(other)}" if other else ""
    return found


def model_card(
    config: TrainConfig, model: Model, results: dict[str, Any], settings: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """README.md of a checkpoint: a YAML header that the hub reads, tasks, settings and results.

    `settings` are the flags of each task, by its name: those of earlier tasks that differ are listed.
    """
    names, matrix = results["tasks"], results[results["metric"]]
    rows = [[who, *map(_number, found)] for who, found in results.get("baselines", {}).items()] + [
        [name, *map(_number, row), *[""] * (len(names) - len(row))] for name, row in zip(names, matrix, strict=True)
    ]
    spread = (results.get("standard_errors") or [[]])[-1]
    last = [
        (name, ", ".join(_with_error(n, value, (errors or {}).get(n)) for n, value in (values or {}).items()))
        for name, values, errors in itertools.zip_longest(names, results["values"][-1], spread)
    ]
    references = dict.fromkeys(results.get("references", {}).values())
    transfer = {
        "average": results["average"],
        "backward transfer": results["backward_transfer"],
        "forgetting (maximum minus last)": results["forgetting_max_minus_last"],
        "forward transfer (before a task's training, over step 0)": results.get("forward_transfer"),
        "signed forgetting (maximum before the last task minus last)": results.get("forgetting_signed"),
    }
    return CARD.substitute(
        base_model=json.dumps(hub_id(label(config.teacher)) or label(config.teacher)),
        student=config.student,
        teacher=label(config.teacher),
        sources=_sources(config.teacher),
        version=__version__,
        memory=_memory(config),
        prediction=model.scheduler.get("prediction_type", "epsilon"),
        tasks="\n".join(f"{i}. {t.name}: `{t.source}`" for i, t in enumerate(config.tasks, 1)),
        settings=markdown_table(("group", "setting", "value"), config.table()),
        earlier=_earlier_settings(config, settings or {}),
        recipe=f"\nRecipe {config.recipe}: {find_recipe(config.recipe).source}.\n" if config.recipe else "",
        metric=results["metric"],
        matrix=markdown_table(("after", *names), rows),
        transfer="".join(f"- {name}: {_number(value)}\n" for name, value in transfer.items() if value is not None),
        last=markdown_table(("task", "values"), last),
        conditions="; ".join([results["conditions"], *(f"compared with {kind}" for kind in references)]),
    )


def _memory(config: TrainConfig) -> str:
    """What was done against forgetting, in words."""
    room = config.replay if config.replay_mb is None else config.replay_mb
    return OTHERWISE.get(config.strategy) or (BUFFERED[config.strategy] if room else "without replay")


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


def _with_error(name: str, value: float, error: float | None) -> str:
    """ "kid 0.0123 ± 0.002": with the standard error where it is known."""
    return f"{name} {value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

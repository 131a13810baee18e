"""The results of a run: results.json, and the checkpoint's model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdc_edge import __version__
from kdc_edge.bundle import Model
from kdc_edge.files import write_atomic
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.quality.evaluate import average, backward_transfer, forgetting
from kdc_edge.train.runs import Position


def write_results(run: Path, config: TrainConfig, position: Position) -> dict[str, Any]:
    """R by the name of its metric, what follows from it, and every value measured after the last task."""
    results: dict[str, Any] = {
        "tasks": [t.name for t in config.tasks],
        "metric": position.metric,
        position.metric: position.matrix,
        "average": average(position.matrix),
        "backward_transfer": backward_transfer(position.matrix),
        "forgetting_max_minus_last": forgetting(position.matrix),
        "values": position.values,
        "conditions": f"{config.eval_images} images a task, DPM-Solver++ 2M 12 steps, guidance 4, averaged weights",
    }
    write_atomic(run / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def model_card(config: TrainConfig, model: Model, results: dict[str, Any]) -> str:
    """README.md of a checkpoint: a YAML header that the hub reads, what it was trained on, its numbers."""
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": str(config.teacher.name),
        "tags": ["stable-diffusion", "knowledge-distillation", "continual-learning", "kdc-edge"],
    }
    yaml = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    tasks = "\n".join(f"{i}. {t.name}: `{t.source}`" for i, t in enumerate(config.tasks, 1))
    names = results["tasks"]
    rows = [
        f"| {name} | "
        + " | ".join("" if v is None else f"{v:.4g}" for v in [*row, *[None] * (len(names) - len(row))])
        + " |"
        for name, row in zip(names, results[results["metric"]], strict=True)
    ]
    last = [
        f"| {task} | " + ", ".join(f"{k} {v:.4g}" for k, v in (values or {}).items()) + " |"
        for task, values in zip(names, results["values"][-1], strict=True)
    ]
    loss = config.loss
    replayed = f"{config.replay} samples" if config.replay_mb is None else f"{config.replay_mb} MB"
    transfer = "".join(
        f"- {label}: {results[key]:.4g}\n"
        for label, key in (
            ("average", "average"),
            ("backward transfer", "backward_transfer"),
            ("forgetting (maximum minus last)", "forgetting_max_minus_last"),
        )
        if results[key] is not None
    )
    return f"""---
{yaml}
---

# {config.student}, distilled

A `{config.student}` U-Net distilled from `{config.teacher.name}` by kdc-edge {__version__}
({model.scheduler.get("prediction_type", "epsilon")} prediction), task after task, with latent replay.

## Trained on

{tasks}

{config.steps} steps of {config.batch_size} samples a task; AdamW, peak learning rate {config.learning_rate:g}, \
{config.schedule}; seed {config.seed}; weights at the start: \
{"the teacher's" if config.inherit else "random"}.
Loss: {loss.task:g} task + {loss.output:g} output + {loss.soft:g} soft targets (T = {loss.temperature:g}) \
+ {loss.feature:g} features. Replay: {replayed}, {config.replay_policy}, {config.replay_ratio:g} of a batch.

## Measured

R, `{results["metric"]}` of each task (column) after training each task (row); higher is better.

| after | {" | ".join(names)} |
|---|{"---|" * len(names)}
{chr(10).join(rows)}

{transfer}
After the last task:

| task | |
|---|---|
{chr(10).join(last)}

Conditions: {results["conditions"]}.
"""

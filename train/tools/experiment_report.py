"""experiments.md and its plots: mean and standard deviation over seeds of every condition."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdc_edge.files import write_atomic
from kdc_edge.report.charts import spread_chart, standalone
from kdc_edge.report.scatter import Axis, Point, scatter_chart
from kdc_edge.train.quality.evaluate import EVALUATION
from kdc_edge.train.quality.matrix import forgetting

Result = Mapping[str, Any]
Numbers = dict[str, list[float]]  # condition -> one value a seed

# conditions of the replay grid that are strategies too, by their names there
SAME = {"all data jointly": "all data jointly", "no replay": "sequential", "replay 5 %": "replay of latents"}
TITLES = {
    "replay": "Three tasks, with and without memory",
    "strategies": "Strategies against forgetting",
    "losses": "Parts of the loss",
    "inheritance": "Inherited and random weights",
}
TEXTS = {
    "replay": (
        "Flowers, then butterflies, then fish, as many steps each. A share is of the images of the whole sequence, and"
        " half of each batch is replayed after the first task. The teacher and the untrained student, which has the"
        " teacher's weights where their shapes agree, are measured once."
        " *All data jointly* trains on all three at once for as many steps as the sequence has. Forgetting is maximum"
        " minus last, over the earlier tasks."
    ),
    "strategies": (
        "The same three tasks. Strategies that keep samples keep 5 % of the images of the whole sequence, or as many"
        " captions; half of a batch is replayed. *Captions* become images at the beginning of a task, as an evaluation"
        " makes them, by the teacher or by the student from the previous task. *LwF* takes the targets of half of a"
        " batch of new samples from that student. *EWC* penalizes changed weights by the Fisher information of 64"
        " samples a task. *Replay without distillation* trains on the denoising loss alone; the others have all terms"
        " of the loss. MB remembered: what is kept of earlier tasks beside the student. Seconds: of all training steps"
        " and of the strategy's own work, without evaluations."
    ),
    "losses": (
        "Flowers alone, equal steps; features are weighted 0.1, the other terms 1. *Summed* is the soft term in the"
        " scale of the authors' code, a sum over positions, 256 times ours here. While the two predictions are close,"
        " the soft term is half of the output term without its mean over the channels."
    ),
    "inheritance": "Flowers alone, twice the steps.",
}


def write_report(folder: Path, results: Sequence[Result], grids: Mapping[str, Sequence[str]], size: Result) -> None:
    """`experiments.md` and `experiments-*.svg` in the folder, of the cells that are done."""
    lines = [
        "# Experiments on the garden",
        "",
        "Written by `python -m kdc_edge.train.tools.experiments`; run it again and cells that are done are kept.",
        "",
        f"Every cell: {size['steps']} steps of {size['batch_size']} samples a task, {size['samples']} images a task,"
        f" student `garden-student` under the garden's teacher, AdamW with a cosine from 1e-3, averaged weights;"
        f" {size['images']} images a task in each evaluation, half of them of combinations held out of training,"
        f" {replace(EVALUATION, steps=size['eval_steps']).conditions}. Prompt accuracy is the share of asked attributes"
        f" that the judge reads. Mean ± standard deviation over seeds, the number of seeds behind it."
        f" {len(results)} cells.",
    ]
    for grid, conditions in grids.items():
        found = [r for r in results if r["grid"] == grid]
        if grid == "strategies" and found:  # some cells of the replay grid are strategies by another name
            known = [r for r in results if r["grid"] == "replay" and r["condition"] in SAME]
            found += [{**r, "condition": SAME[r["condition"]]} for r in known]
            conditions = (*SAME.values(), *conditions)
        if found:
            lines += ["", f"## {TITLES[grid]}", "", TEXTS[grid], "", *_section(folder, grid, conditions, found)]
    write_atomic(folder / "experiments.md", "\n".join(lines) + "\n")


def _section(folder: Path, grid: str, conditions: Sequence[str], found: Sequence[Result]) -> list[str]:
    columns = _columns(grid, conditions, found)
    names = [c for c in conditions if any(c in values for values in columns.values())]
    rows = [
        f"| {name} | "
        + " | ".join(spread(v.get(name, []), 0 if column == "seconds" else 3) for column, v in columns.items())
        + " |"
        for name in names
    ]
    head = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines = [*head, *rows, ""]
    for column, values in columns.items():
        if column in ("average", "forgetting", "prompt accuracy"):
            file = f"experiments-{grid}-{column.replace(' ', '-')}.svg"
            write_atomic(
                folder / file, bars({n: values[n] for n in names if values.get(n)}, f"{TITLES[grid]}: {column}")
            )
            lines.append(f"![{column}]({file})")
    if grid == "strategies":
        lines += _trade_offs(folder, names, columns)
    return [*lines, *(_verdicts(columns) if grid == "replay" else [])]


def _trade_offs(folder: Path, names: Sequence[str], columns: Mapping[str, Numbers]) -> list[str]:
    """Quality against what is remembered, and against time; the lines that show the plots."""
    quality, lines = columns["average"], []
    for column, file in (("MB remembered", "memory"), ("seconds", "time")):
        cost = columns[column]
        points = [Point(n, statistics.mean(cost[n]), statistics.mean(quality[n])) for n in names]
        title = f"Prompt accuracy after three tasks against {column}"
        chart = scatter_chart(points, title=title, x=Axis(column, linear=True), y=Axis("average", linear=True))
        write_atomic(folder / f"experiments-strategies-{file}.svg", standalone(chart, title))
        lines.append(f"![{title}](experiments-strategies-{file}.svg)")
    return lines


def _columns(grid: str, conditions: Sequence[str], found: Sequence[Result]) -> dict[str, Numbers]:
    """Each column's values, by condition."""
    columns: dict[str, Numbers] = {}

    def put(column: str, condition: str, value: float | None) -> None:
        if value is not None:
            columns.setdefault(column, {}).setdefault(condition, []).append(value)

    for condition in conditions:
        for result in (r for r in found if r["condition"] == condition):
            final = result["final"]
            if grid in ("replay", "strategies"):
                for task, values in final.items():
                    put(task, condition, values["prompt_accuracy"])
                put("average", condition, statistics.mean(v["prompt_accuracy"] for v in final.values()))
                if result["matrix"]:
                    put("forgetting", condition, forgetting(result["matrix"]))
                if grid == "strategies":
                    put("MB remembered", condition, result["remembered_bytes"] / 1e6)
                    put("seconds", condition, result["training_seconds"])
            else:
                (values,) = final.values()
                put("prompt accuracy", condition, values["prompt_accuracy"])
                put("every attribute right", condition, values["exact"])
                put("judge's Fréchet distance", condition, values["judge_frechet"])
    return columns


def _verdicts(columns: Mapping[str, Numbers]) -> list[str]:
    """What was expected beforehand, and what was found."""
    lost, kept = columns.get("forgetting", {}), columns["average"]
    lines = []
    if lost.get("no replay") and lost.get("replay 5 %"):
        without, with_ = statistics.mean(lost["no replay"]), statistics.mean(lost["replay 5 %"])
        held = "holds" if with_ <= without / 5 else "does not hold"
        lines.append(
            f"Expected: forgetting with 5 % replay at most a fifth of that without. Found: {with_:.3f} against"
            f" {without:.3f}; it {held}."
        )
    if kept.get("all data jointly") and kept.get("replay 5 %"):
        joint, with_ = statistics.mean(kept["all data jointly"]), statistics.mean(kept["replay 5 %"])
        held = "holds" if with_ >= 0.95 * joint else "does not hold"
        lines.append(
            f"Expected: the final average with 5 % replay within 5 % of joint training. Found: {with_:.3f} against"
            f" {joint:.3f}; it {held}."
        )
    return ["", *lines] if lines else []


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`0.812 ± 0.010 (3)`; no std for a single value, nothing for none."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f} (1)"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def bars(values: Mapping[str, Sequence[float]], title: str) -> str:
    """Means with one standard deviation each way and a dot a seed, as an SVG file."""
    return standalone(spread_chart(values, title=title), title)

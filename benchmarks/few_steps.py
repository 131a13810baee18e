"""Prompt accuracy, every attribute right and Fréchet distance of few-step students, by sampling and by decoder.

    python benchmarks/few_steps.py --decoder runs/decoder "student=runs/base-*@20,dpm++2m,4" "4 phases=runs/phased-*@4"

A row is NAME=RUNS@STEPS[,SCHEDULER[,GUIDANCE]]: a pattern of garden runs that differ by their seeds, and how their
students are sampled; their own way where it is not given. Writes few-steps.json, whose rows are not measured again,
few-steps.md (means and standard deviations over the runs; with --decoder each row with the small decoder too, from the
same noise) and few-steps.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kdc_edge.files import write_atomic
from kdc_edge.report.charts import line_chart, standalone
from kdc_edge.runtimes.torch import TorchComponent
from kdc_edge.runtimes.torch.small_decoder import find_decoder_folder, load_decoder
from kdc_edge.text import markdown_table
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.quality.evaluate import (
    EVALUATION_NOISE_SEED,
    Score,
    ask,
    generate_with_both,
    open_generator,
    score_images,
)

METRICS = {"prompt_accuracy": 3, "exact": 3, "judge_frechet": 0}  # and their digits
HEAD = (
    "model",
    "steps",
    "guidance",
    "scheduler",
    "prompt accuracy",
    "every attribute right",
    "judge's Fréchet distance",
)
FEW = 3  # numbers of steps in the chart: 1, 2 and 4
SMALL = ("small decoder: accuracy", "right", "distance")

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def measure(run: Path, sampling: str, decoder: Path | None, images: int) -> dict[str, Any]:
    """How the run's student was sampled, and means over the tasks with each decoder."""
    steps, scheduler, guidance, *_ = (*sampling.split(","), None, None)
    own = open_generator(
        run / "checkpoint", steps=int(steps or 0), sampler=scheduler, guidance=float(guidance) if guidance else None
    )
    model = own.pipeline.model
    small = TorchComponent("vae_decoder", load_decoder(decoder, model)) if decoder else None
    scores: dict[str, list[Score]] = {"large": [], "small": []}
    for task in TrainConfig.load(run).tasks:
        asked = ask(task, images, size=model.image_size)
        if small:
            by_large, by_small = generate_with_both(own, small, asked.prompts)
            scores["small"].append(score_images(by_small, asked, None))
        else:
            by_large = own(asked.prompts, seed=EVALUATION_NOISE_SEED)
        scores["large"].append(score_images(by_large, asked, None))
    request = own.request
    found: dict[str, Any] = {"run": run.name, "images": images, "steps": request.steps}
    found |= {"guidance": request.guidance, "scheduler": request.sampler}
    for name, each in scores.items():
        if each:
            found[name] = {metric: mean(score.values[metric] for score in each) for metric in METRICS}
    return found


def cells(runs: Sequence[Mapping[str, Any]], decoder: str) -> list[str]:
    """`0.936 ± 0.005` of each metric."""
    texts = []
    for metric, digits in METRICS.items():
        values = [run[decoder][metric] for run in runs if decoder in run]
        around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
        texts.append(f"{mean(values):.{digits}f}{around}" if values else "")
    return texts


def table(found: Rows) -> str:
    """Markdown, a row for each that was measured."""
    small = any("small" in run for runs in found.values() for run in runs)
    rows = [
        (_name(row), runs[0]["steps"], f"{runs[0]['guidance']:g}", runs[0]["scheduler"], *cells(runs, "large"),
         *(cells(runs, "small") if small else ()))
        for row, runs in found.items()
    ]  # fmt: skip
    return markdown_table((*HEAD, *(SMALL if small else ())), rows)


def chart(found: Rows) -> str:
    """Accuracy over steps: a line a model, in its best scheduler; level for what takes more steps than the others."""
    title = "Prompt accuracy over steps"
    few = sorted({runs[0]["steps"] for runs in found.values()})[:FEW]
    lines: dict[str, dict[float, float]] = {}
    for row, runs in found.items():
        steps, accuracy = runs[0]["steps"], mean(run["large"]["prompt_accuracy"] for run in runs)
        name = _name(row) if steps in few else f"{_name(row)}, {steps} steps"
        best = lines.setdefault(name, {})
        for at in [steps] if steps in few else few:
            best[at] = max(accuracy, best.get(at, 0.0))
    drawn = {name: sorted(points.items()) for name, points in lines.items()}
    made = line_chart(drawn, title=title, x_label="steps", y_label="prompt accuracy")
    return standalone(made, title, keys=list(drawn))


def _name(row: str) -> str:
    return row.split("=", 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of few-step students, by sampling and by decoder.")
    parser.add_argument("rows", nargs="*", help="NAME=RUNS@STEPS[,SCHEDULER[,GUIDANCE]]; those measured before if none")
    parser.add_argument("--decoder", help="a folder of a small decoder, or a hub id")
    parser.add_argument("--images", type=int, default=48, help="of each task, half of them held out")
    parser.add_argument("--work", type=Path, default=Path("few-steps"))
    args = parser.parse_args()
    kept = args.work / "few-steps.json"
    found: dict[str, list[dict[str, Any]]] = json.loads(kept.read_text()) if kept.is_file() else {}
    decoder = find_decoder_folder(args.decoder) if args.decoder else None
    for row in args.rows:
        if row in found:
            continue
        name, rest = row.split("=", 1)
        pattern, sampling = rest.rsplit("@", 1)
        folders = sorted(path for path in Path().glob(pattern) if (path / "checkpoint").is_dir())
        found[row] = [measure(folder, sampling, decoder, args.images) for folder in folders]
        print(name, sampling, *cells(found[row], "large"), *cells(found[row], "small"), flush=True)
        args.work.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, json.dumps(found, indent=1) + "\n")
    (args.work / "few-steps.md").write_text(table(found))
    (args.work / "few-steps.svg").write_text(chart(found))


if __name__ == "__main__":
    main()

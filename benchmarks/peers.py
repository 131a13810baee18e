"""kdc-edge beside its peers: the same weights, prompt, size and steps, on this machine, in turns.

    pip install -r benchmarks/requirements.txt
    kdc-edge init --preset kdc-482m --out kdc-482m
    python benchmarks/peers.py kdc-482m --work peers --rounds 2 --threads 2

Every measurement is a process of its own, which makes one image, as a user's command does. Rounds alternate
between the candidates, so that an hour in which the machine is slow is slow for all. Bundles are exported into
the work folder once. The last line on stdout names the JSON file; peers.md beside it is made from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

PROMPT = "a photo of a red flower"
GUIDANCE = 7.5
SIZE = 512

# name -> (kind, bundle or precision, low memory)
CANDIDATES: dict[str, tuple[str, str, bool]] = {
    "diffusers eager, fp32": ("diffusers", "float32", False),
    "diffusers eager, bf16": ("diffusers", "bfloat16", False),
    "openvino_genai, fp16 files": ("genai", "openvino-fp16", False),
    "kdc-edge, OpenVINO fp16": ("kdc-edge", "openvino-fp16", False),
    "kdc-edge, OpenVINO fp16, --low-memory": ("kdc-edge", "openvino-fp16", True),
    "kdc-edge, OpenVINO int8": ("kdc-edge", "openvino-int8", False),
    "kdc-edge, OpenVINO int8, --low-memory": ("kdc-edge", "openvino-int8", True),
    "kdc-edge, ONNX fp16": ("kdc-edge", "onnx-fp16", False),
}

# Yields once loaded, then after each U-Net step (its time, or None for now), and DONE after each image, endlessly.
Steps = Iterator[float | None]
DONE = -1.0


def run_diffusers(checkpoint: Path, dtype: str, steps: int, threads: int) -> Steps:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=getattr(torch, dtype))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    yield None
    while True:
        yield from _as_steps(
            lambda tick: pipeline(
                PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE, height=SIZE, width=SIZE,
                callback_on_step_end=lambda _p, _i, _t, kwargs: tick() or kwargs,
            )
        )  # fmt: skip


def run_genai(folder: Path, steps: int, threads: int) -> Steps:
    import openvino_genai

    pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    yield None
    while True:
        yield from _as_steps(
            lambda tick: pipeline.generate(
                PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE, height=SIZE, width=SIZE,
                callback=lambda _i, _n, _latents: bool(tick()),  # True would stop it
            )
        )  # fmt: skip


def run_ours(folder: Path, steps: int, threads: int, *, low_memory: bool) -> Steps:
    from kdc_edge.pipeline import GuidanceMode, Request
    from kdc_edge.runtimes import open_pipeline

    pipeline = open_pipeline(folder, threads=threads, low_memory=low_memory)
    yield None
    mode: GuidanceMode = "sequential" if low_memory else "batched"
    request = Request(PROMPT, steps=steps, guidance=GUIDANCE, width=SIZE, height=SIZE, guidance_mode=mode)
    while True:
        for progress in pipeline.run(request):
            if progress.stage == "unet":
                yield None
        yield DONE


def _as_steps(call: Callable[[Callable[[], object]], object]) -> Steps:
    """A generator from a function with a callback: the times of its ticks are kept, and given back as they were."""
    ticks: list[float] = []
    call(lambda: ticks.append(time.time()))
    yield from ticks
    yield DONE


def process_age_sec() -> float:
    """Since the kernel made this process (Linux). The epoch of psutil's create_time is a second coarse."""
    start_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")


def work(name: str, checkpoint: Path, bundles: Path, steps: int, threads: int, *, again: bool) -> dict[str, Any]:
    """In a process of its own: one image, and what it took; with `again` a second one, when all is loaded."""
    started = time.time() - process_age_sec()
    kind, what, low_memory = CANDIDATES[name]
    if kind == "diffusers":
        generator = run_diffusers(checkpoint, what, steps, threads)
    elif kind == "genai":
        generator = run_genai(bundles / what, steps, threads)
    else:
        generator = run_ours(bundles / what, steps, threads, low_memory=low_memory)
    next(generator)
    loaded = time.time()
    ends = [tick or time.time() for tick in itertools.takewhile(lambda tick: tick != DONE, generator)]
    done = time.time()
    assert len(ends) == steps, f"{name}: {len(ends)} steps were seen where {steps} were asked for"
    status = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    report = {
        "load_sec": loaded - started,
        "first_step_sec": ends[0] - started,
        "step_sec": [b - a for a, b in itertools.pairwise(ends)],
        "decode_sec": done - ends[-1],
        "total_sec": done - started,
        "peak_rss_bytes": peak_kib * 1024,
    }
    if again:
        begin = time.time()
        assert sum(1 for _ in itertools.takewhile(lambda tick: tick != DONE, generator)) == steps
        report["again_sec"] = time.time() - begin
    return report


def size_bytes(name: str, checkpoint: Path, bundles: Path) -> int:
    kind, what, _ = CANDIDATES[name]
    if kind == "diffusers":
        return sum(p.stat().st_size for p in checkpoint.rglob("*.safetensors"))
    return sum(p.stat().st_size for p in (bundles / what).rglob("*") if p.is_file())


def export(checkpoint: Path, bundles: Path) -> None:
    for bundle in dict.fromkeys(what for kind, what, _ in CANDIDATES.values() if kind != "diffusers"):
        if not (bundles / bundle).exists():
            target, precision = bundle.split("-", 1)
            few = ["--calibration-samples", "4"] if precision == "int8" else []  # random weights: nothing to lose
            command = ["kdc-edge", "export", str(checkpoint), "--target", target, "--precision", precision]
            subprocess.run([*command, *few, "--no-verify", "--out", str(bundles / bundle)], check=True)


def table(report: dict[str, Any]) -> str:
    """The report as markdown: medians over the rounds."""
    lines = [
        "| | a U-Net step | an image, all in all | once loaded | process start to first step | peak RSS | on disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        step = median(s for run in row["runs"] for s in run["step_sec"])
        total, first, peak = (
            median(run[key] for run in row["runs"]) for key in ("total_sec", "first_step_sec", "peak_rss_bytes")
        )
        again = [run["again_sec"] for run in row["runs"] if "again_sec" in run]
        loaded = f"{median(again):.1f} s" if again else ""
        lines.append(
            f"| {name} | {step:.2f} s | {total:.1f} s | {loaded} | {first:.1f} s | {peak / 1e9:.2f} GB"
            f" | {row['size_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="kdc-edge beside its peers.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, default=Path("peers"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="patterns of names to run: '*genai*' '*fp16'")
    parser.add_argument("--again", action="store_true", help="a second image in each process, all being loaded")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    bundles: Path = args.work / "bundles"
    if args.worker:
        print(json.dumps(work(args.worker, args.checkpoint, bundles, args.steps, args.threads, again=args.again)))
        return
    from dataclasses import asdict

    from kdc_edge.bench.record import here

    names = [n for n in CANDIDATES if any(fnmatch(n, pattern) for pattern in args.only or ["*"])]
    export(args.checkpoint, bundles)
    out = args.work / "peers.json"
    report = json.loads(out.read_text()) if out.exists() else {"rows": {}}  # rounds add up over calls
    report["conditions"] = {
        "checkpoint": args.checkpoint.resolve().name, "steps": args.steps, "guidance": GUIDANCE, "size": SIZE,
        "scheduler": "DPM-Solver++ 2M; openvino_genai: the checkpoint's", "threads": args.threads,
        "machine": asdict(here()),
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    for round_ in range(args.rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            command = [sys.executable, __file__, str(args.checkpoint), "--work", str(args.work)]
            command += ["--steps", str(args.steps), "--threads", str(args.threads), "--worker", name]
            command += ["--again"] if args.again else []
            found = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
            run = json.loads(found.stdout.splitlines()[-1])
            row = report["rows"].setdefault(name, {"runs": []})
            row["runs"].append(run)
            row["size_bytes"] = size_bytes(name, args.checkpoint, bundles)
            out.write_text(json.dumps(report, indent=1) + "\n")
            print(
                f"{name}: {run['total_sec']:.1f} s, {run['peak_rss_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True
            )
    out.with_suffix(".md").write_text(table(report))
    print(table(report), file=sys.stderr)
    print(out)


if __name__ == "__main__":
    main()

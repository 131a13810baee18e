"""kdc-edge beside its peers: the same weights, prompt, size and steps, on this machine, in turns.

    pip install -r benchmarks/requirements.txt
    kdc-edge init --preset kdc-482m --out kdc-482m
    python benchmarks/peers.py kdc-482m --work peers --rounds 2 --threads 2

Every measurement is a process of its own, which makes one image, as a user's command does. Rounds alternate
between the candidates, so that an hour in which the machine is slow is slow for all. Bundles are exported into
the work folder once. The last line on stdout names the JSON file; the table beside it is made from it.
With `--instructions AVX2` the engines compute as on a processor that has no more, where they can be told so.
`--suite few-steps` has a student of four phases with the VAE's decoder and with small ones; with `--interop PYTHON`,
of the environment that `make interop` makes, optimum-intel's pipelines too, which need older packages.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

NARROWER = {  # the environment in which oneDNN, in OpenVINO and PyTorch, PyTorch and MKL use no other instructions
    "AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}  # fmt: skip
PROMPT = "a photo of a red flower"
GUIDANCE = 7.5
SIZE = 512


@dataclass(frozen=True)
class Candidate:
    """One way to make the image."""

    kind: str  # "diffusers", "genai", "optimum", "optimum-lcm" or "kdc-edge"
    what: str  # diffusers: a dtype; else a bundle: TARGET-PRECISION, with +DECODER where a small one decodes
    few_steps: int = 0  # of a few-step student, without guidance; 0: the steps that are asked for, guided
    low_memory: bool = False

    def steps(self, asked: int) -> int:
        return self.few_steps or asked

    @property
    def guidance(self) -> float:
        return 1.0 if self.few_steps else GUIDANCE

    @property
    def elsewhere(self) -> bool:
        """Does it need an environment of its own?"""
        return self.kind.startswith("optimum")

    def folder(self, work: Path) -> Path:
        if self.kind == "optimum-lcm":
            return work / "consistency" / self.what
        return work / ("few-steps" if self.few_steps else "bundles") / self.what


GUIDED = {
    "diffusers eager, fp32": Candidate("diffusers", "float32"),
    "diffusers eager, bf16": Candidate("diffusers", "bfloat16"),
    "openvino_genai, fp16 files": Candidate("genai", "openvino-fp16"),
    "kdc-edge, OpenVINO fp16": Candidate("kdc-edge", "openvino-fp16"),
    "kdc-edge, OpenVINO fp16, --low-memory": Candidate("kdc-edge", "openvino-fp16", low_memory=True),
    "kdc-edge, OpenVINO int8": Candidate("kdc-edge", "openvino-int8"),
    "kdc-edge, OpenVINO int8, --low-memory": Candidate("kdc-edge", "openvino-int8", low_memory=True),
    "kdc-edge, ONNX fp16": Candidate("kdc-edge", "onnx-fp16"),
}
DECODERS = {"": "the VAE's decoder", "+taesd": "taesd", "+thin": "thin"}
FEW_STEPS = {
    "diffusers eager, fp32, 20 guided steps": Candidate("diffusers", "float32"),
    "openvino_genai, fp16 files, 4 steps": Candidate("genai", "openvino-fp16", 4),
    "optimum-intel, fp16 files, 4 steps": Candidate("optimum", "openvino-fp16", 4),
    "optimum-intel, LCM pipeline, fp16 files, 4 steps": Candidate("optimum-lcm", "openvino-fp16", 4),
    "optimum-intel, int8 files, 4 steps, thin": Candidate("optimum", "openvino-int8+thin", 4),
    **{
        f"OpenVINO {precision}, {steps} steps, {title}": Candidate("kdc-edge", f"openvino-{precision}{decoder}", steps)
        for precision in ("fp16", "int8")
        for decoder, title in DECODERS.items()
        for steps in (4, 2)
    },
    "OpenVINO int8, 4 steps, thin, --low-memory": Candidate("kdc-edge", "openvino-int8+thin", 4, low_memory=True),
    "ONNX int8, 4 steps, thin": Candidate("kdc-edge", "onnx-int8+thin", 4),
}
SUITES = {"guided": GUIDED, "few-steps": FEW_STEPS}

# Yields once loaded, then after each U-Net step (its time, or None for now), and DONE after each image, endlessly.
Steps = Iterator[float | None]
DONE = -1.0


def run_diffusers(checkpoint: Path, dtype: str, steps: int, threads: int) -> Steps:
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, torch_dtype=getattr(torch, dtype))
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    yield from _run_pipeline(pipeline, steps, GUIDANCE)


def _run_pipeline(pipeline: Any, steps: int, guidance: float) -> Steps:
    """A pipeline of diffusers, or with its arguments."""
    pipeline.set_progress_bar_config(disable=True)
    yield None
    while True:
        yield from _as_steps(
            lambda tick: pipeline(
                PROMPT, num_inference_steps=steps, guidance_scale=guidance, height=SIZE, width=SIZE,
                callback_on_step_end=lambda _p, _i, _t, kwargs: tick() or kwargs,
            )
        )  # fmt: skip


def run_genai(folder: Path, steps: int, guidance: float, threads: int, exact: bool) -> Steps:
    import openvino_genai

    hint = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
    pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads, **hint)
    yield None
    while True:
        yield from _as_steps(
            lambda tick: pipeline.generate(
                PROMPT, num_inference_steps=steps, guidance_scale=guidance, height=SIZE, width=SIZE,
                callback=lambda _i, _n, _latents: bool(tick()),  # True would stop it
            )
        )  # fmt: skip


def run_optimum(folder: Path, kind: str, steps: int, guidance: float, threads: int) -> Steps:
    """The LCM pipeline for fixed shapes, as its documentation advises for speed; the other takes them guided alone."""
    import torch
    from optimum.intel import OVLatentConsistencyModelPipeline, OVStableDiffusionPipeline

    torch.set_num_threads(threads)
    which = OVLatentConsistencyModelPipeline if kind == "optimum-lcm" else OVStableDiffusionPipeline
    options = {"INFERENCE_NUM_THREADS": str(threads)}
    pipeline = which.from_pretrained(folder, export=False, compile=False, safety_checker=None, ov_config=options)
    if kind == "optimum-lcm":
        pipeline.reshape(batch_size=1, height=SIZE, width=SIZE, num_images_per_prompt=1)
    yield from _run_pipeline(pipeline, steps, guidance)


def run_ours(folder: Path, candidate: Candidate, steps: int, threads: int, exact: bool) -> Steps:
    from kdc_edge.hardware import this_processor
    from kdc_edge.request import GuidanceMode, Request, made_for
    from kdc_edge.runtimes import open_pipeline

    if exact:  # as the processor that is asked for would
        narrower = replace(this_processor(), features=("AVX2",))
        mock.patch("kdc_edge.runtimes.openvino.this_processor", return_value=narrower).start()
    pipeline = open_pipeline(folder, threads=threads, low_memory=candidate.low_memory, exact=exact)
    yield None
    mode: GuidanceMode = "sequential" if candidate.low_memory else "batched"
    request = Request(PROMPT, guidance=GUIDANCE, width=SIZE, height=SIZE, guidance_mode=mode)
    request = replace(made_for(pipeline.model, request), steps=steps)
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


def work(
    candidate: Candidate, checkpoint: Path, folder: Path, asked: int, threads: int, *, again: bool
) -> dict[str, Any]:
    """In a process of its own: one image, and what it took; with `again` a second one, when all is loaded."""
    started = time.time() - process_age_sec()
    steps = candidate.steps(asked)
    exact = any(name in os.environ for name in NARROWER["AVX2"])  # OpenVINO would ask the processor for bfloat16
    if candidate.kind == "diffusers":
        generator = run_diffusers(checkpoint, candidate.what, steps, threads)
    elif candidate.kind == "genai":
        generator = run_genai(candidate.folder(folder), steps, candidate.guidance, threads, exact)
    elif candidate.elsewhere:
        generator = run_optimum(candidate.folder(folder), candidate.kind, steps, candidate.guidance, threads)
    else:
        generator = run_ours(candidate.folder(folder), candidate, steps, threads, exact)
    next(generator)
    loaded = time.time()
    ends = [tick or time.time() for tick in itertools.takewhile(lambda tick: tick != DONE, generator)]
    done = time.time()
    assert len(ends) == steps, f"{candidate}: {len(ends)} steps were seen where {steps} were asked for"
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


def size_bytes(candidate: Candidate, checkpoint: Path, work: Path) -> int:
    if candidate.kind == "diffusers":
        return sum(p.stat().st_size for p in checkpoint.rglob("*.safetensors"))
    return sum(p.stat().st_size for p in candidate.folder(work).rglob("*") if p.is_file())


def export(candidate: Candidate, checkpoint: Path, work: Path) -> None:
    """The candidate's bundle, unless it is there."""
    out = candidate.folder(work)
    if candidate.kind == "diffusers" or out.exists():
        return
    source = few_step_checkpoint(checkpoint, work) if candidate.few_steps else checkpoint
    if candidate.kind == "optimum-lcm":
        source = consistency_checkpoint(checkpoint, work)
    bundle, _, decoder = candidate.what.partition("+")
    target, precision = bundle.split("-", 1)
    command = ["kdc-edge", "export", str(source), "--target", target, "--precision", precision]
    if precision == "int8":
        command += ["--calibration-samples", "4"]  # random weights: nothing to lose
    if decoder:
        command += ["--decoder", str(random_decoder(decoder, work))]
    subprocess.run([*command, "--no-verify", "--out", str(out)], check=True)


def few_step_checkpoint(checkpoint: Path, work: Path) -> Path:
    """The same weights with the scheduler and the sampling of a student of four phases."""
    out = work / "few-steps-checkpoint"
    if not out.exists():
        shutil.copytree(checkpoint, out, copy_function=os.link)
        for path, changes in (
            (out / "scheduler" / "scheduler_config.json", {
                "_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "set_alpha_to_one": True,
            }),
            (out / "model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}),
        ):  # fmt: skip
            _change(path, changes)
        (out / "sampling.json").write_text('{"scheduler": "ddim", "steps": 4, "guidance": 1.0}')
    return out


def consistency_checkpoint(checkpoint: Path, work: Path) -> Path:
    """The same network with an input for the guidance scale, which diffusers' LCM pipelines give; its weights are 0."""
    import torch
    from safetensors.torch import load_file, save_file

    out = work / "consistency-checkpoint"
    if not out.exists():
        shutil.copytree(checkpoint, out, copy_function=os.link)
        for path, changes in (
            (out / "unet" / "config.json", {"time_cond_proj_dim": 256}),
            (out / "scheduler" / "scheduler_config.json", {"_class_name": "LCMScheduler"}),
            (out / "model_index.json", {
                "_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"],
            }),
        ):  # fmt: skip
            _change(path, changes)
        weights = out / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(weights)
        width = tensors["conv_in.weight"].shape[0]
        tensors["time_embedding.cond_proj.weight"] = torch.zeros(width, 256, dtype=tensors["conv_in.weight"].dtype)
        weights.unlink()
        save_file(tensors, weights)
    return out


def _change(path: Path, changes: dict[str, Any]) -> None:
    """Set values in a JSON file that is a link to another checkpoint's."""
    content = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(content, indent=2))


def random_decoder(preset: str, work: Path) -> Path:
    from kdc_edge.presets import find_decoder
    from kdc_edge.runtimes.torch.small_decoder import new_decoder

    out = work / "decoders" / preset
    if not out.exists():
        new_decoder(find_decoder(preset, 8), 4).save_pretrained(out)
    return out


def table(report: dict[str, Any]) -> str:
    """The report as markdown: medians over the rounds. The time between steps is empty where runs have one step."""
    lines = [
        "| | a U-Net step | an image, all in all | once loaded | process start to first step | peak RSS | on disk |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in report["rows"].items():
        steps = [sec for run in row["runs"] for sec in run["step_sec"]]
        step = f"{median(steps):.2f} s" if steps else ""
        total, first, peak = (
            median(run[key] for run in row["runs"]) for key in ("total_sec", "first_step_sec", "peak_rss_bytes")
        )
        again = [run["again_sec"] for run in row["runs"] if "again_sec" in run]
        loaded = f"{median(again):.1f} s" if again else ""
        lines.append(
            f"| {name} | {step} | {total:.1f} s | {loaded} | {first:.1f} s | {peak / 1e9:.2f} GB"
            f" | {row['size_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="kdc-edge beside its peers.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, default=Path("peers"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--suite", choices=SUITES, default="guided")
    parser.add_argument("--steps", type=int, default=20, help="of the guided rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="patterns of names to run: '*genai*' '*fp16'")
    parser.add_argument("--again", action="store_true", help="a second image in each process, all being loaded")
    parser.add_argument("--interop", type=Path, help="a Python with optimum-intel, for its rows")
    parser.add_argument("--instructions", choices=NARROWER, help="use no others; ONNX Runtime's rows are left out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    candidates = SUITES[args.suite]
    if args.worker:
        candidate = candidates[args.worker]
        print(json.dumps(work(candidate, args.checkpoint, args.work, args.steps, args.threads, again=args.again)))
        return
    from kdc_edge.bench.record import here

    names = [n for n in candidates if any(fnmatch(n, pattern) for pattern in args.only or ["*"])]
    names = [n for n in names if args.interop or not candidates[n].elsewhere]
    names = [n for n in names if not (args.instructions and candidates[n].what.startswith("onnx"))]
    args.work.mkdir(parents=True, exist_ok=True)
    out = args.work / f"{args.suite}{f'-{args.instructions}' if args.instructions else ''}.json"
    conditions = {
        "checkpoint": args.checkpoint.resolve().name, "steps": args.steps, "guidance": GUIDANCE, "size": SIZE,
        "scheduler": "guided: DPM-Solver++ 2M, openvino_genai the checkpoint's; few steps: DDIM, trailing",
        "threads": args.threads, "instructions": args.instructions or "all of the processor's",
        "machine": asdict(here()),
    }  # fmt: skip
    report = json.loads(out.read_text()) if out.exists() else {"conditions": conditions, "rows": {}}
    if report["conditions"] != json.loads(json.dumps(conditions)):  # rounds add up over calls
        parser.error(f"{out} has rounds under other conditions: move it, or name another --work")
    for name in names:
        export(candidates[name], args.checkpoint, args.work)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), **NARROWER.get(args.instructions, {})}
    for round_ in range(args.rounds):
        for name in names if round_ % 2 == 0 else reversed(names):
            python = args.interop if candidates[name].elsewhere else sys.executable
            command = [str(python), __file__, str(args.checkpoint), "--work", str(args.work)]
            command += ["--suite", args.suite, "--steps", str(args.steps), "--threads", str(args.threads)]
            command += ["--worker", name]
            command += ["--again"] if args.again else []
            found = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
            run = json.loads(found.stdout.splitlines()[-1])
            row = report["rows"].setdefault(name, {"runs": []})
            row["runs"].append(run)
            row["size_bytes"] = size_bytes(candidates[name], args.checkpoint, args.work)
            out.write_text(json.dumps(report, indent=1) + "\n")
            print(
                f"{name}: {run['total_sec']:.1f} s, {run['peak_rss_bytes'] / 1e9:.2f} GB", file=sys.stderr, flush=True
            )
    out.with_suffix(".md").write_text(table(report))
    print(table(report), file=sys.stderr)
    print(out)


if __name__ == "__main__":
    main()

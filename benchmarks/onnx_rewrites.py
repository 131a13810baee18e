"""What each rewrite of the ONNX graph, and each setting of onnxruntime, is worth: one U-Net step, in turns.

    pip install -r benchmarks/requirements.txt
    kdc-edge init --preset kdc-482m --out kdc-482m
    python benchmarks/onnx_rewrites.py kdc-482m --work rewrites --rounds 5 --threads 2

Every measurement is a process that loads the graph and runs two steps (batch of 2, 512 px), the second of which counts;
each round takes every variant in turn, so that an hour in which the machine is slow is slow for all. Writes
rewrites.json and rewrites.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from kdc_edge.bench.record import here
from kdc_edge.bench.sensors import peak_rss_bytes

CALIBRATION_SAMPLES = 4
# name -> (graph, options of the session)
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "torch.onnx as it is": ("plain", {}),
    "onnxslim": ("slim", {}),
    "Attention of the standard (opset 23)": ("opset23", {}),
    "MultiHeadAttention": ("fused", {}),
    "MultiHeadAttention, with memory pattern": ("fused", {"pattern": "1"}),
    "MultiHeadAttention, without NCHWc layout": ("fused", {"level": "ORT_ENABLE_EXTENDED"}),
    "MultiHeadAttention, without arena": ("fused", {"arena": "0"}),
    "MultiHeadAttention, upsampling split (fp32)": ("split", {}),
    "weights stored in half, widened at load (fp16)": ("half", {}),
    "weights stored in half, widened at each step (--low-memory)": (
        "half", {"level": "ORT_ENABLE_EXTENDED", "arena": "0", "fold": "65536"}
    ),
    "8 bits, widened at each step (w8)": ("w8", {}),
    "4 and 8 bits, widened at each step (w4)": ("w4", {}),
    "convolutions alone in int8": ("int8-conv", {}),
    "matrix products alone in int8": ("int8-matmul", {}),
    "both in int8 (int8)": ("int8", {}),
}  # fmt: skip


def make_graphs(checkpoint: Path, work: Path) -> None:
    """Every graph that is not there yet, each in a process of its own: a U-Net at a time in memory."""
    for graph in dict.fromkeys(graph for graph, _ in VARIANTS.values()):
        if not (work / graph / "model.onnx").is_file():
            subprocess.run(
                [sys.executable, __file__, str(checkpoint), "--work", str(work), "--make", graph], check=True
            )


def make_graph(checkpoint: Path, graph: str, folder: Path) -> None:
    import onnx_ir as ir

    from kdc_edge.export.calibration import calibrate
    from kdc_edge.export.components import load_component
    from kdc_edge.export.onnx import export as onnx
    from kdc_edge.export.onnx import int8 as onnx_int8
    from kdc_edge.export.onnx.weights import store_bits, store_half
    from kdc_edge.export.rewrites.attention import fuse_attention
    from kdc_edge.export.rewrites.upsampling import split_upsampling

    folder.mkdir(parents=True, exist_ok=True)
    if graph == "slim":
        import onnx as package
        import onnxslim

        slim = onnxslim.slim(package.load(folder.parent / "plain" / "model.onnx"))
        package.save(slim, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data")
        return
    calls = calibrate(checkpoint, samples=CALIBRATION_SAMPLES).inputs if graph.startswith("int8") else []
    part = load_component(checkpoint, "unet")
    if graph not in ("plain", "opset23"):
        fuse_attention(part.module)
    if graph.startswith(("split", "half", "int8", "w")):
        split_upsampling(part.module)
    if graph == "opset23":
        onnx.OPSET = 23
    model: ir.Model = onnx.trace(part)
    if graph == "half":
        store_half(model)
    elif graph in ("w8", "w4"):
        store_bits(model, 8 if graph == "w8" else 4)
        store_half(model)
    elif graph.startswith("int8"):
        of = {"int8-conv": ("Conv",), "int8-matmul": ("MatMul",)}.get(graph, ("Conv", "MatMul"))
        is_layer = onnx_int8._is_layer
        onnx_int8._is_layer = lambda node: is_layer(node) and node.op_type in of
        ir.save(model, folder / "base.onnx", external_data="base.weights")
        model, _ = onnx_int8.quantize_int8(folder / "base.onnx", calls)
        store_half(model)
    onnx.save_graph(model, folder)


def run(path: Path, settings: dict[str, str], threads: int) -> None:
    """Load, two steps; the figures as JSON on stdout, the answer in a file."""
    import onnxruntime as ort

    level = settings.get("level", "ORT_ENABLE_ALL")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.enable_mem_pattern = settings.get("pattern") == "1"
    options.enable_cpu_mem_arena = settings.get("arena") != "0"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if "fold" in settings:
        entry = "optimization.constant_folding_max_output_size_in_bytes"
        options.add_session_config_entry(entry, settings["fold"])
    begin = time.perf_counter()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    load_sec = time.perf_counter() - begin
    random = np.random.default_rng(0)
    feeds = {
        "sample": random.standard_normal((2, 4, 64, 64), np.float32),
        "timestep": np.array([500]),
        "encoder_hidden_states": random.standard_normal((2, 77, 768), np.float32),
    }
    for _ in range(2):  # the first step allocates
        begin = time.perf_counter()
        (answer,) = session.run(None, feeds)
        step_sec = time.perf_counter() - begin
    np.save(path.parent / "answer.npy", answer)
    print(json.dumps({"load_sec": load_sec, "step_sec": step_sec, "peak_bytes": peak_rss_bytes()}))


def measure(work: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row a variant."""
    rows: dict[str, dict[str, Any]] = {}
    for turn in range(rounds):
        for name, (graph, settings) in VARIANTS.items():
            model = work / graph / "model.onnx"
            command = [sys.executable, __file__, "--run", str(model), "--work", str(work), "--threads", str(threads)]
            said = subprocess.run(
                [*command, "--settings", json.dumps(settings)], check=True, capture_output=True, text=True
            ).stdout
            found = json.loads(said)
            row = rows.setdefault(name, {"name": name, "steps_sec": [], "load_sec": []})
            row["steps_sec"].append(found["step_sec"])
            row["load_sec"].append(found["load_sec"])
            row["peak_bytes"] = found["peak_bytes"]
            row["size_bytes"] = sum(f.stat().st_size for f in model.parent.glob("model.onnx*"))
            answer, reference = (np.load(work / g / "answer.npy") for g in (graph, "plain"))
            error = float(np.mean((answer - reference) ** 2))
            row["psnr_db"] = 10 * math.log10(float(np.abs(reference).max()) ** 2 / error) if error else None
            print(f"{turn + 1}/{rounds} {name}: {found['step_sec']:.2f} s", file=sys.stderr, flush=True)
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| U-Net of the 482M student | step, s | times the first | load, s | peak RSS | on disk | PSNR |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    first = median(rows[0]["steps_sec"])
    for row in rows:
        step = median(row["steps_sec"])
        psnr = "exact" if row["psnr_db"] is None else f"{row['psnr_db']:.0f} dB"
        lines.append(
            f"| {row['name']} | {step:.2f} | {first / step:.2f} | {median(row['load_sec']):.1f} "
            f"| {row['peak_bytes'] / 2**30:.2f} GiB | {row['size_bytes'] / 2**20:,.0f} MiB | {psnr} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What each rewrite of the ONNX graph is worth.")
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.run, json.loads(args.settings), args.threads)
    elif args.make:
        make_graph(args.checkpoint, args.make, args.work / args.make)
    else:
        make_graphs(args.checkpoint, args.work)
        rows = measure(args.work, args.rounds, args.threads)
        document = {"rows": rows, "threads": args.threads, "rounds": args.rounds, "environment": vars(here())}
        (args.work / "rewrites.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
        (args.work / "rewrites.md").write_text(table(rows))
        print(args.work / "rewrites.json")


if __name__ == "__main__":
    main()

"""What each precision does to the images: PSNR to PyTorch from the same noise, and prompt accuracy by the judge.

    python benchmarks/precisions.py runs/latest/checkpoint --formats openvino-fp16 openvino-int8 --work precisions

For a student of the garden. Exports what is not in the work folder yet, makes `--images` images a subject with
each, and writes precisions.json, precisions.md and precisions.png (a row a format, the first one PyTorch's).
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kdc_edge.image import grid
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.train.garden.judge import load_judge
from kdc_edge.train.garden.scenes import Scene, draw_scenes

STEPS, GUIDANCE = 20, 4.0
REFERENCE = "PyTorch fp32"


def generate(folder: Path, scenes: list[Scene]) -> np.ndarray:
    """uint8 (N, H, W, 3), each from its own seed."""
    pipeline = open_pipeline(folder)
    requests = [Request(s.caption, steps=STEPS, guidance=GUIDANCE, seed=i) for i, s in enumerate(scenes)]
    return np.stack([pipeline.generate(request) for request in requests])


def psnr_db(images: np.ndarray, reference: np.ndarray) -> list[float]:
    errors = np.mean((images.astype(float) - reference) ** 2, axis=(1, 2, 3))
    return [10 * math.log10(255**2 / max(e, 1e-6)) for e in errors]


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | on disk | image PSNR, median | worst | prompt accuracy | all attributes right |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        shown = "| | |" if row["psnr_db"] is None else f"| {row['psnr_db']:.1f} dB | {row['worst_psnr_db']:.1f} dB |"
        lines.append(
            f"| {name} | {row['size_bytes'] / 1e6:.1f} MB {shown} {row['accuracy']:.3f} | {row['exact']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What each precision does to the images.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--formats", nargs="+", required=True, help="such as openvino-int8 onnx-fp16")
    parser.add_argument("--work", type=Path, default=Path("precisions"))
    parser.add_argument("--subjects", nargs="+", default=["flower", "butterfly"])
    parser.add_argument("--images", type=int, default=48, help="of each subject, half of them held out")
    args = parser.parse_args()
    half = args.images // 2
    scenes = [
        s for subject in args.subjects for split in ("train", "heldout")
        for s in draw_scenes(subject, half, seed=99, split=split)
    ]  # fmt: skip
    judge = load_judge()
    reference = generate(args.checkpoint, scenes)
    shown = [reference[:: half // 3]]
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, images: np.ndarray, size_bytes: int) -> None:
        found = psnr_db(images, reference) if name != REFERENCE else None
        right = judge.agreement(images, scenes)
        attributes = [v for k, v in right.items() if k != "all"]
        rows[name] = {
            "size_bytes": size_bytes, "psnr_db": found and float(np.median(found)),
            "worst_psnr_db": found and min(found),
            "accuracy": float(np.mean(attributes)), "exact": right["all"],
        }  # fmt: skip
        print(table({name: rows[name]}).splitlines()[-1], flush=True)

    add(REFERENCE, reference, sum(p.stat().st_size for p in args.checkpoint.rglob("*.safetensors")))
    for name in args.formats:
        folder = args.work / "bundles" / name
        if not folder.exists():
            target, precision = name.split("-", 1)
            command = ["kdc-edge", "export", str(args.checkpoint), "--target", target, "--precision", precision]
            subprocess.run([*command, "--out", str(folder)], check=True)
        images = generate(folder, scenes)
        add(name, images, sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()))
        shown.append(images[:: half // 3])
    args.work.mkdir(parents=True, exist_ok=True)
    sheet = grid([p for row in shown for p in row], len(shown[0]))
    Image.fromarray(sheet.repeat(2, 0).repeat(2, 1)).save(args.work / "precisions.png")
    (args.work / "precisions.md").write_text(table(rows))
    (args.work / "precisions.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

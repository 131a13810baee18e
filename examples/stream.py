"""A preview after each step; Ctrl-C cancels before the next one.

python examples/stream.py bundles/onnx-fp16 "a red flower" flower.png
"""

from __future__ import annotations

import sys

from PIL import Image

import kdc_edge


def main(bundle: str, prompt: str, out: str) -> None:
    pipeline = kdc_edge.Pipeline.open(bundle)
    steps = pipeline.stream(prompt, seed=1)
    try:
        for step in steps:
            print(f"step {step.step} of {step.steps}", flush=True)
            if step.image is None:
                Image.fromarray(step.preview).resize((256, 256)).save(out)  # replaced by the image at the end
            else:
                step.image.save(out)
    except KeyboardInterrupt:
        print(f"cancelled: {out} has the last preview")


if __name__ == "__main__":
    main(*sys.argv[1:])

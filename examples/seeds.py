"""A sheet of images of one prompt, one for each seed, made in batches where memory allows.

python examples/seeds.py bundles/onnx-fp16 "a red flower" sheet.png 1 2 3 4
"""

from __future__ import annotations

import sys

from PIL import Image

import kdc_edge

COLUMNS = 4


def main(bundle: str, prompt: str, out: str, *seeds: str) -> None:
    pipeline = kdc_edge.Pipeline.open(bundle)
    made = pipeline(prompt, num_images_per_prompt=len(seeds), seed=[int(seed) for seed in seeds])
    width, height = made.images[0].size
    rows = -(-len(seeds) // COLUMNS)
    sheet = Image.new("RGB", (min(len(seeds), COLUMNS) * width, rows * height))
    for i, image in enumerate(made.images):  # image i is the image of seed i alone, but for rounding
        sheet.paste(image, (i % COLUMNS * width, i // COLUMNS * height))
    sheet.save(out)
    print(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

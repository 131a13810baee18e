"""One image from a prompt.

python examples/generate.py bundles/onnx-fp16 "a red flower" flower.png
"""

from __future__ import annotations

import sys

import kdc_edge


def main(bundle: str, prompt: str, out: str) -> None:
    pipeline = kdc_edge.Pipeline.open(bundle)
    pipeline(prompt, seed=1).images[0].save(out)
    print(out)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except kdc_edge.KdcError as error:  # one line: what, why, and what to do
        sys.exit(str(error))

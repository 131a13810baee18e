"""Where the time from process start to the first U-Net step goes, for one bundle.

    python benchmarks/startup.py peers/bundles/openvino-int8 --threads 2 [--cache DIR] [--low-memory]

Prints one JSON object, in seconds, and the peak of resident memory in bytes.
"""

from __future__ import annotations

import time

IMPORTING = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

from kdc_edge.bench.sensors import peak_rss_bytes  # noqa: E402
from kdc_edge.request import Request  # noqa: E402
from kdc_edge.runtimes import open_pipeline  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="From process start to the first U-Net step.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--low-memory", action="store_true")
    args = parser.parse_args()
    laps = {}
    last = IMPORTING

    def lap(name: str) -> None:
        nonlocal last
        now = time.time()
        laps[name], last = now - last, now

    lap("import kdc_edge")
    pipeline = open_pipeline(args.bundle, threads=args.threads, low_memory=args.low_memory, cache=args.cache)
    lap("open, import engine")
    ids = pipeline.tokenizer.encode(["", "a photo of a red flower"])
    encoder = pipeline.components["text_encoder"]
    lap("read text encoder")
    hidden = encoder(input_ids=ids)
    lap("compile and run text encoder")
    del encoder
    unet = pipeline.components["unet"]
    lap("read U-Net")
    batch = 1 if args.low_memory else 2
    shape = pipeline.latent_shape(Request(""))
    inputs = {"sample": (batch, *shape[1:]), "timestep": (1,), "encoder_hidden_states": (batch, *hidden.shape[1:])}
    if hasattr(unet, "prepare"):
        unet.prepare(inputs)
    lap("compile U-Net")
    total = sum(laps.values())
    print(json.dumps({**laps, "start of the first step": total, "peak_rss_bytes": peak_rss_bytes()}))


if __name__ == "__main__":
    main()

"""What this processor's cores multiply at most, through OpenVINO: fp32, bfloat16 and int8.

    python benchmarks/peak.py --threads 2

One 3x3 convolution of 640 channels on 32x32, a batch of two, as in the 482M student's U-Net; the best of eight calls,
by the engine's own clock. The three in turns, twice. docs/benchmarks/peers.md reads its times by these.
"""

from __future__ import annotations

import argparse

import numpy as np
import openvino as ov
from openvino import opset13 as ops

CHANNELS, SIDE, BATCH, LAYERS = 640, 32, 2, 4


def network(*, quantized: bool) -> ov.Model:
    draw = np.random.default_rng(0)
    shape = (CHANNELS, CHANNELS, 3, 3)
    found = sample = ops.parameter([BATCH, CHANNELS, SIDE, SIDE], np.float32)
    for _ in range(LAYERS):
        if quantized:
            low, high = (ops.constant(np.float32(n)) for n in (-3, 3))
            found = ops.fake_quantize(found, low, high, low, high, 256)
            kept = ops.constant(draw.integers(-127, 128, shape).astype(np.int8))
            weight = ops.multiply(
                ops.convert(kept, np.float32), ops.constant(np.full((CHANNELS, 1, 1, 1), 1e-4, np.float32))
            )
        else:
            weight = ops.constant(0.01 * draw.standard_normal(shape).astype(np.float32))
        found = ops.convolution(found, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    return ov.Model([ops.result(found)], [sample])


def products_per_sec(arithmetic: str, threads: int) -> float:
    hint = "f32" if arithmetic == "fp32" else "bf16"
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    compiled = ov.Core().compile_model(network(quantized=arithmetic == "int8"), "CPU", settings)
    request = compiled.create_infer_request()
    sample = np.random.default_rng(1).standard_normal((BATCH, CHANNELS, SIDE, SIDE)).astype(np.float32)
    best = float("inf")
    for _ in range(8):
        request.infer([sample])
        layers = [info for info in request.get_profiling_info() if info.node_type == "Convolution"]
        assert len(layers) == LAYERS
        best = min(best, sum(info.real_time.total_seconds() for info in layers))
    return LAYERS * BATCH * SIDE**2 * CHANNELS**2 * 9 / best


def main() -> None:
    parser = argparse.ArgumentParser(description="What this processor's cores multiply at most.")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for arithmetic in ("fp32", "bf16", "int8") * 2:
        print(f"{arithmetic}: {products_per_sec(arithmetic, args.threads) / 1e9:.0f} GMAC/s")


if __name__ == "__main__":
    main()

"""Artifact in, arrays out: one file an engine, found through one registry.

from kdc_edge.runtimes import open_pipeline
pixels = open_pipeline("bundles/onnx-fp16").generate(Request("a red flower"))           # uint8 (H, W, 3)
"""

from kdc_edge.runtimes.base import ENGINES, Device, LoadOptions, Runtime, get_runtime
from kdc_edge.runtimes.pipeline import Pipeline, open_for_bench, open_pipeline

__all__ = ["ENGINES", "Device", "LoadOptions", "Pipeline", "Runtime", "get_runtime", "open_for_bench", "open_pipeline"]

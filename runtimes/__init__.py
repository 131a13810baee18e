"""Artifact in, arrays out: one file an engine, found through one registry.

from kdc_edge.runtimes import open_pipeline
image = open_pipeline(Path("bundles/onnx-fp16")).generate(Request("a red flower"))
"""

from kdc_edge.runtimes.base import ENGINES, Device, LoadOptions, Runtime, get_runtime, open_for_bench, open_pipeline

__all__ = ["ENGINES", "Device", "LoadOptions", "Runtime", "get_runtime", "open_for_bench", "open_pipeline"]

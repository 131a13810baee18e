"""Distil a Stable Diffusion student, export it with proof, run it on the device without PyTorch.

    import kdc_edge

    pipeline = kdc_edge.Pipeline.open("bundles/onnx-fp16")
    pipeline("a red flower", seed=1).images[0].save("flower.png")

The names below are the public interface. Each is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdc_edge.bundle import Bundle
    from kdc_edge.errors import KdcError
    from kdc_edge.request import Request
    from kdc_edge.runtimes.pipeline import Pipeline, open_pipeline

from kdc_edge.telemetry import switch_off
from kdc_edge.version import __version__

__all__ = ["Bundle", "KdcError", "Pipeline", "Request", "__version__", "open_pipeline"]

_MODULES = {
    "Bundle": "kdc_edge.bundle",
    "KdcError": "kdc_edge.errors",
    "Pipeline": "kdc_edge.runtimes.pipeline",
    "Request": "kdc_edge.request",
    "open_pipeline": "kdc_edge.runtimes.pipeline",
}


switch_off()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'kdc_edge' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

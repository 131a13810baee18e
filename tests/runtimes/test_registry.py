"""Engines come from outside too: a row of ENGINES and a module with RUNTIME."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kdc_edge.components import Component
from kdc_edge.errors import InputError
from kdc_edge.formats import FORMATS, find_format
from kdc_edge.request import Request
from kdc_edge.runtimes import ENGINES, Device, LoadOptions, get_runtime, open_pipeline
from kdc_edge.runtimes.base import DEFAULTS, Engine


class AbacusRuntime:
    """ONNX Runtime under another name, which remembers what it opened."""

    name = "abacus"
    version = "1"
    opened: list[tuple[str, str | None]]

    def __init__(self) -> None:
        self.opened = []

    def devices(self) -> list[Device]:
        return [Device("WOOD", "beads")]

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        self.opened.append((component, options.device))
        return get_runtime("onnxruntime").load(folder, component)


def test_an_engine_from_outside_opens_a_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("a red flower", steps=1, seed=3)
    with pytest.raises(InputError, match="abacus cannot run onnx-fp16: choose from onnxruntime"):
        open_pipeline(bundle, engine="abacus")

    module = ModuleType("abacus")
    module.RUNTIME = runtime = AbacusRuntime()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "abacus", module)
    monkeypatch.setitem(ENGINES, "abacus", Engine("abacus", "abacus", package="numpy", extra="onnx"))
    row = find_format("onnx", "fp16")
    with_abacus = replace(row, engines=(*row.engines, "abacus"))
    monkeypatch.setattr("kdc_edge.formats.FORMATS", [with_abacus if f is row else f for f in FORMATS])

    image = open_pipeline(bundle, engine="abacus").generate(request)
    assert runtime.opened == [("text_encoder", "WOOD"), ("unet", "WOOD"), ("vae_decoder", "WOOD")]
    np.testing.assert_array_equal(image, open_pipeline(bundle).generate(request))

"""A module of kdc-edge in a process of its own: with graphs that were traced before, and a smaller garden-student.

    command, environment = python_module_with_traces("kdc_edge")

It takes the place of `kdc_edge.processes.python_module` where a test's child exports to ONNX.
"""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

from kdc_edge import presets
from kdc_edge.processes import python_module

SMALL_STAGES = {  # two of garden-student's four
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
FOLDER = "KDC_EDGE_TEST_TRACED"  # the variable that names the folder of the traced graphs


def small_presets() -> tuple[presets.Preset, ...]:
    """The presets, with a garden-student of two stages: that of the `checkpoint` fixture."""
    return tuple(
        replace(p, unet={**p.unet, **SMALL_STAGES}) if p.name == "garden-student" else p for p in presets.PRESETS
    )


def python_module_with_traces(name: str) -> tuple[list[str], dict[str, str]]:
    command, environment = python_module("tests.traced_module")
    return [*command, name], environment


if __name__ == "__main__":
    from kdc_edge.export.onnx import export as onnx
    from tests.conftest import cached_trace

    presets.PRESETS = small_presets()
    onnx.trace = cached_trace(Path(os.environ[FOLDER]))
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)

"""A module of kdc-edge in a process of its own, with the graphs of networks that were traced before.

    command, environment = python_module_with_traces("kdc_edge")

It takes the place of `kdc_edge.processes.python_module` where a test's child exports to ONNX.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from kdc_edge.processes import python_module

FOLDER = "KDC_EDGE_TEST_TRACED"  # the variable that names the folder of the traced graphs


def python_module_with_traces(name: str) -> tuple[list[str], dict[str, str]]:
    command, environment = python_module("tests.traced_module")
    return [*command, name], environment


if __name__ == "__main__":
    from kdc_edge.export.onnx import export as onnx
    from tests.conftest import cached_trace

    onnx.trace = cached_trace(Path(os.environ[FOLDER]))
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)

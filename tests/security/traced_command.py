"""kdc-edge with the graphs of networks that were traced before: the child that fit's exports get from the killer."""

import os
from pathlib import Path

from kdc_edge.cli import main
from kdc_edge.export.onnx import export as onnx
from tests.conftest import cached_trace

onnx.trace = cached_trace(Path(os.environ["KDC_EDGE_TEST_TRACED"]))
main()

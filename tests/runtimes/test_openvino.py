"""OpenVINO's own faults that the runtime keeps away from its users."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from kdc_edge.runtimes import get_runtime, openvino
from kdc_edge.runtimes.base import check_device

CHILDREN = 3  # each ends in the deadlock about every second time where the runtime does nothing against it
THREADS = """
import faulthandler, os, sys
from threading import Barrier, Thread
faulthandler.dump_traceback_later(20, exit=True)
import kdc_edge.runtimes.openvino
from openvino import Type
sys.setswitchinterval(1e-6)
barrier = Barrier(16)
def ask():
    barrier.wait()
    Type.f32.to_dtype()
threads = [Thread(target=ask) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_open_the_first_network_do_not_wait_for_ever() -> None:
    children = [subprocess.Popen([sys.executable, "-c", THREADS], stderr=subprocess.PIPE) for _ in range(CHILDREN)]
    ends = [(child.communicate()[1].decode(), child.returncode) for child in children]
    assert ends == [("", 0)] * CHILDREN


def test_the_processor_is_chosen_without_loading_the_plugins_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = get_runtime("openvino")
    assert check_device(runtime, None) == check_device(runtime, "cpu") == runtime.devices()[0].name == "CPU"

    def load_all() -> None:
        raise AssertionError("every plugin is loaded")

    monkeypatch.setattr(runtime, "devices", load_all)
    assert check_device(runtime, None) == check_device(runtime, "cpu") == "CPU"


def test_a_network_stays_compiled_for_the_last_few_shapes_or_fewer_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a copy of the weights: a server would hold one for every size that it was ever asked for."""
    x = ov.opset13.parameter([-1, 2], np.float32, name="x")
    doubled = ov.opset13.matmul(x, ov.opset13.constant(2 * np.eye(2, dtype=np.float32)), False, False)
    model = ov.Model([doubled], [x])
    model.inputs[0].get_tensor().set_names({"x"})
    ov.save_model(model, tmp_path / "openvino_model.xml")
    network = openvino.OpenVinoComponent(tmp_path / "openvino_model.xml", "CPU", {})
    compiled: list[int] = []
    compile_model = network._compile
    monkeypatch.setattr(network, "_compile", lambda shapes: (compiled.append(shapes["x"][0]), compile_model(shapes))[1])

    def call(*batches: int) -> list[int]:
        compiled.clear()
        for batch in batches:
            ones = np.ones((batch, 2), np.float32)
            np.testing.assert_array_equal(network(x=ones), 2 * ones)
        return list(compiled)

    assert call(1, 2, 3, 4, 1, 5) == [1, 2, 3, 4, 5]
    assert call(1, 3, 4, 5) == []  # what was used longest ago, 2, has gone
    monkeypatch.setattr(openvino, "_demand_memory", lambda _: None)
    monkeypatch.setattr(openvino, "free_memory_bytes", lambda: 0)
    assert call(6, 6, 5) == [6, 5]

"""OpenVINO's own faults that the runtime keeps away from its users."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kdc_edge.runtimes import get_runtime
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

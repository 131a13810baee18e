"""ONNX Runtime: any bundle whose components are .onnx files, on the CPU and on what else this build offers.

    unet = get_runtime("onnxruntime").load(Path("bundles/onnx-fp16"), "unet", device="CPU", threads=2)
    noise_pred = unet(sample=sample, timestep=timestep, encoder_hidden_states=hidden)

Telemetry is switched off, and the engine's own log goes quiet: what it refuses becomes one BundleError.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdc_edge.bundle import Bundle
from kdc_edge.errors import BundleError, require
from kdc_edge.pipeline import Choice, Component
from kdc_edge.runtimes.base import Device, check_device, first_line

_ort: Any = require("onnxruntime", extra="onnx", purpose="running an ONNX bundle")
_ort.disable_telemetry_events()
_ort.set_default_logger_severity(4)  # its errors arrive as exceptions too; once is enough

# (provider, device, description), the default first.
_PROVIDERS = (
    ("CPUExecutionProvider", "CPU", "processor"),
    ("CUDAExecutionProvider", "CUDA", "NVIDIA GPU"),
    ("ROCMExecutionProvider", "ROCM", "AMD GPU"),
    ("MIGraphXExecutionProvider", "MIGRAPHX", "AMD GPU, MIGraphX"),
    ("DmlExecutionProvider", "DML", "DirectML GPU"),
    ("CoreMLExecutionProvider", "COREML", "Apple GPU and Neural Engine"),
    ("OpenVINOExecutionProvider", "OPENVINO", "Intel CPU, GPU and NPU"),
    ("QNNExecutionProvider", "QNN", "Qualcomm NPU"),
    ("XnnpackExecutionProvider", "XNNPACK", "processor, XNNPACK kernels"),
)
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class OnnxComponent:
    """One session; inputs are cast to what the file declares, and the first output comes as float32."""

    def __init__(self, path: Path, session: Any) -> None:
        self._path = path
        self._session = session
        self._dtypes = {i.name: _DTYPES.get(i.type) for i in session.get_inputs()}
        self._output = session.get_outputs()[0].name  # asked for by name, so that nothing else is computed
        odd = [name for name, dtype in self._dtypes.items() if dtype is None]
        if odd:
            raise BundleError(f"{path} wants input {odd[0]!r} in a type that no pipeline gives: export it again")

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """Compute; raises BundleError when the network does not take inputs of these names and shapes."""
        if inputs.keys() != self._dtypes.keys():
            raise BundleError(
                f"{self._path} takes {', '.join(self._dtypes)} where {', '.join(inputs)} are given: export it again"
            )
        feeds = {name: np.asarray(value, self._dtypes[name]) for name, value in inputs.items()}
        try:
            (output,) = self._session.run([self._output], feeds)
        except Exception as error:  # the engine's exceptions share no root of their own
            raise BundleError(f"{self._path} cannot compute this: {first_line(error)}") from None
        return np.asarray(output, np.float32)

    def explain(self) -> Choice:
        """The first provider; which numbers its kernels take, the engine does not tell."""
        return Choice(str(self._session.get_providers()[0]), None)


class OnnxRuntime:
    name = "onnxruntime"
    version: str = _ort.__version__

    def devices(self) -> list[Device]:
        there = set(_ort.get_available_providers())
        return [Device(name, does) for provider, name, does in _PROVIDERS if provider in there]

    def load(
        self,
        folder: Path,
        component: str,
        *,
        device: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        cache: Path | None = None,  # noqa: ARG002
    ) -> Component:
        """Open a component of a bundle. Raises BundleError for a file that the engine refuses."""
        _, path = Bundle.open(folder).component(component)
        chosen = check_device(self, device)
        # What a device cannot compute falls to the processor; the session adds that by itself.
        providers = [provider for provider, name, _ in _PROVIDERS if name == chosen]
        options = _options(threads, chosen, low_memory=low_memory)
        try:
            session = _ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # the engine's exceptions share no root of their own
            raise BundleError(
                f"{path} is refused by onnxruntime {self.version}: {first_line(error)}; copy or export it again"
            ) from None
        return OnnxComponent(path, session)


def _options(threads: int | None, device: str, *, low_memory: bool) -> Any:
    """For one picture's latency: all graph optimizations, operators one by one on all threads.

    The arena keeps what it once had, and a memory pattern takes a second block of the same size at the second call:
    with `low_memory` there is neither, and memory goes back as it comes.
    """
    options = _ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = _ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = _ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0  # 0: one a core
    options.enable_cpu_mem_arena = not low_memory
    options.enable_mem_pattern = not low_memory and device != "DML"  # DirectML works only without
    return options


RUNTIME = OnnxRuntime()

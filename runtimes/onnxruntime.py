"""ONNX Runtime: any bundle whose components are .onnx files, on the CPU and the other devices of its build.

    unet = get_runtime("onnxruntime").load(Path("bundles/onnx-fp16"), "unet", LoadOptions(device="CPU", threads=2))
    noise_pred = unet(sample=sample, timestep=timestep, encoder_hidden_states=hidden)

The engine's own log goes quiet: what it refuses becomes one BundleError.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdc_edge.bundle import Bundle
from kdc_edge.components import Component, Execution
from kdc_edge.errors import BundleError, InputError, KdcError, require
from kdc_edge.files import atomic_folder
from kdc_edge.hardware import this_processor
from kdc_edge.runtimes.base import DEFAULTS, Device, LoadOptions, check_device, open_component
from kdc_edge.text import one_line

_ort: Any = require("onnxruntime", extra="onnx", purpose="running an ONNX bundle")
_ort.set_default_logger_severity(4)  # its errors arrive as exceptions too; once is enough

# A weight that an operation makes, as a cast does of a stored half, is kept up to this size where memory is short.
FOLD_BYTES_LOW_MEMORY = 2**16
WEIGHTS_BESIDE_BYTES = 2**20  # cached graphs keep larger weights in a file of their own, which is mapped


@dataclass(frozen=True)
class _Provider:
    """A row of what onnxruntime may be built with."""

    name: str  # as onnxruntime calls it
    device: str  # as --device takes it
    description: str
    package: str  # that brings it
    options: Mapping[str, str] = field(default_factory=dict)


# The default first.
_PROVIDERS = (
    _Provider("CPUExecutionProvider", "CPU", "processor", "onnxruntime"),
    _Provider("CUDAExecutionProvider", "CUDA", "NVIDIA GPU", "onnxruntime-gpu"),
    _Provider("ROCMExecutionProvider", "ROCM", "AMD GPU", "onnxruntime-rocm"),
    _Provider("MIGraphXExecutionProvider", "MIGRAPHX", "AMD GPU, MIGraphX", "onnxruntime-migraphx"),
    _Provider("DmlExecutionProvider", "DML", "DirectML GPU", "onnxruntime-directml"),
    _Provider("CoreMLExecutionProvider", "COREML", "Apple GPU and Neural Engine", "onnxruntime on macOS",
              {"ModelFormat": "MLProgram"}),
    _Provider("OpenVINOExecutionProvider", "OPENVINO", "Intel CPU, GPU and NPU", "onnxruntime-openvino"),
    _Provider("QNNExecutionProvider", "QNN", "Qualcomm NPU", "onnxruntime-qnn",
              {"backend_path": "QnnHtp.dll" if sys.platform == "win32" else "libQnnHtp.so"}),
    _Provider("XnnpackExecutionProvider", "XNNPACK", "processor, XNNPACK kernels", "an onnxruntime built with XNNPACK"),
)  # fmt: skip
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
        inputs = session.get_inputs()
        self._dtypes = {i.name: _DTYPES.get(i.type) for i in inputs}
        self._batch = inputs[0].shape[0] if inputs[0].shape else None  # a number in a graph of fixed sizes
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
        batch = len(next(iter(feeds.values())))
        if self._batch != 1 or batch == 1:
            return self._run(feeds)
        # One sample at a time; what is the same for all, as the timestep is, goes to each.
        samples = ({n: v if len(v) != batch else v[i : i + 1] for n, v in feeds.items()} for i in range(batch))
        return np.concatenate([self._run(sample) for sample in samples])

    def _run(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            (output,) = self._session.run([self._output], feeds)
        except Exception as error:  # the engine's exceptions share no root of their own
            raise BundleError(f"{self._path} cannot compute this: {one_line(error)}") from None
        return np.asarray(output, np.float32)

    def explain(self) -> Execution:
        """The first provider; the engine does not report the dtype that its kernels compute in."""
        return Execution(str(self._session.get_providers()[0]), None)


def without_overflow(session: Any) -> None:
    """Let a session's options ask for 8-bit products that are right on every processor: slower where it lacks VNNI."""
    if this_processor().lacks_vnni:
        session.add_session_config_entry("session.x64quantprecision", "1")  # in uint8 alone


class OnnxRuntime:
    name = "onnxruntime"
    version: str = _ort.__version__
    elsewhere: Mapping[str, str] = {p.device: p.package for p in _PROVIDERS}

    def devices(self) -> list[Device]:
        there = set(_ort.get_available_providers())
        return [Device(p.device, p.description) for p in _PROVIDERS if p.name in there]

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        """Open a component of a bundle. Raises BundleError for a file that the engine refuses.

        With low memory the weights stay as they are stored, mapped from the file, and are widened at every call.
        With a cache, the graph as this machine wants it is kept there: the next load has less to do.
        """
        bundle, _, path = open_component(folder, component, options)
        chosen = check_device(self, options.device)
        provider = next(p for p in _PROVIDERS if p.device == chosen)
        threads, cache = options.threads, options.cache
        session = _session_options(provider, threads, low_memory=options.low_memory)
        if bundle.manifest.precision == "int8" and component == "unet":
            without_overflow(session)
        if cache is not None and provider.device == "CPU" and not options.low_memory:
            made = _cached(cache, bundle, component)
            if made.is_file():
                session.graph_optimization_level = _ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it has been done
                return OnnxComponent(path, self._open(made, session, provider, threads))
            with atomic_folder(made.parent, marker=made.name) as new:
                session.optimized_model_filepath = str(new / made.name)
                beside = "session.optimized_model_external_initializers"
                session.add_session_config_entry(f"{beside}_file_name", f"{made.name}_data")
                session.add_session_config_entry(f"{beside}_min_size_in_bytes", str(WEIGHTS_BESIDE_BYTES))
                try:
                    self._open(path, session, provider, threads)
                except BundleError:
                    self.load(folder, component, replace(options, cache=None, check=False))  # is it the network?
                    raise KdcError(
                        f"{cache} cannot take what onnxruntime compiled: make room on its disk, or leave the cache out"
                    ) from None
            return self.load(folder, component, replace(options, check=False))
        return OnnxComponent(path, self._open(path, session, provider, threads))

    def _open(self, path: Path, options: Any, provider: _Provider, threads: int | None) -> Any:
        given = dict(provider.options)
        if provider.device == "XNNPACK" and threads:
            given["intra_op_num_threads"] = str(threads)
        try:
            # What a device cannot compute falls to the processor; the session adds that by itself.
            session = _ort.InferenceSession(str(path), options, providers=[(provider.name, given)])
        except Exception as error:  # the engine's exceptions share no root of their own
            said = one_line(error)
            if "pset" in said:
                raise BundleError(
                    f"{path} is too new for onnxruntime {self.version} ({said}): upgrade onnxruntime"
                ) from None
            raise BundleError(
                f"{path} is refused by onnxruntime {self.version}: {said}; copy or export it again"
            ) from None
        if provider.name not in session.get_providers():  # a driver or a library of it is missing: ORT goes on without
            raise InputError(
                f"onnxruntime {self.version} cannot start {provider.device} here, a driver or library of it is missing:"
                " choose the device CPU, or install it"
            )
        return session


def _cached(cache: Path, bundle: Bundle, component: str) -> Path:
    """Where the optimized graph of a component is kept: it holds for these files, this engine and this processor."""
    processor = this_processor()
    key = bundle.fingerprint(component, OnnxRuntime.version, processor.name, *(processor.features or ()))
    return cache / f"onnxruntime-{component}-{key}" / "model.onnx"


def _session_options(provider: _Provider, threads: int | None, *, low_memory: bool) -> Any:
    """For one image's latency: operators one by one on all threads.

    The arena keeps what it once had, and a memory pattern takes a second block of the same size at the second call,
    for no gain that could be measured (docs/benchmarks/onnx.md). Where memory is short there is neither, and the
    convolutions' weights are not copied into the processor's own layout.
    """
    options = _ort.SessionOptions()
    level = _ort.GraphOptimizationLevel
    options.log_severity_level = 4
    options.execution_mode = _ort.ExecutionMode.ORT_SEQUENTIAL
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = 1 if provider.device == "XNNPACK" else threads or 0  # 0: one a core
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = not low_memory
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if low_memory else level.ORT_ENABLE_ALL
    if low_memory:
        entry = "optimization.constant_folding_max_output_size_in_bytes"
        options.add_session_config_entry(entry, str(FOLD_BYTES_LOW_MEMORY))
    return options


RUNTIME = OnnxRuntime()

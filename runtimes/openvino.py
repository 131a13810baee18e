"""OpenVINO: any bundle whose components are OpenVINO IR, on Intel (and other x86 and Arm) CPUs, GPUs and NPUs.

    unet = get_runtime("openvino").load(Path("bundles/openvino-int8"), "unet", LoadOptions(device="CPU", threads=2))
    noise_pred = unet(sample=sample, timestep=timestep, encoder_hidden_states=hidden)

The network is compiled for the exact shapes of its first call (`prepare` does it before), which is faster than
free shapes and the only way on an NPU. Compute dtype: fp32 for fp32 bundles; for all others bfloat16 where the
processor has it, else fp32. The f16 hint is never given to a CPU: it is five times slower.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np

from kdc_edge.components import Component, Execution, Shapes
from kdc_edge.errors import BundleError, InputError, KdcError, require
from kdc_edge.hardware import free_memory_bytes, this_processor
from kdc_edge.runtimes.base import DEFAULTS, Device, LoadOptions, check_device, open_component
from kdc_edge.text import one_line

_ov: Any = require("openvino", extra="openvino", purpose="running an OpenVINO bundle")

COMPILING_TRIM_SEC, CALL_TRIM_SEC = 0.02, 0.05  # between two looks at the mapped weights: 500 MB and 7 MB are read
WORKING_BYTES = 300 * 2**20  # of one component beside its weights, about

MAX_SHAPES = 4  # sets of shapes that a network stays compiled for: each has a copy of the weights

# Layers that multiply matrices, as the plugins name them, and formats.py's names for their dtypes.
PRODUCTS = ("convolution", "fullyconnected", "matmul", "gemm")
COMPUTE_DTYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "u8": "int8", "i8": "int8"}
WHOLE_NUMBERS = ("u8", "i8", "u4", "i4")
NOT_FOLDED = "DisableConstantFolding_0"  # OpenVINO's mark on an operation that it is to leave as it is
DYNAMIC = "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # activations that share a scale, where they are quantized at run time


@dataclass
class _Compiled:
    """A network for one set of shapes."""

    request: Any
    weights: MappedWeights


class OpenVinoComponent:
    """One network, compiled anew for each set of shapes; the first output comes as float32.

    It stays compiled for the last few, or fewer where memory is short.
    Raises BundleError for a file that the engine refuses.
    """

    def __init__(self, path: Path, device: str, settings: Mapping[str, Any], *, low_memory: bool = False) -> None:
        self._path = path
        self._device = device
        self._settings = settings
        self._low_memory = low_memory
        self._model = model = _read(path, device)
        # By place, because a compiled model may call its inputs by more names than these.
        self._inputs = [(port.any_name, port.element_type.to_dtype()) for port in model.inputs]
        self._shapes = {port.any_name: port.get_partial_shape() for port in model.inputs}
        self._compiled: dict[tuple[tuple[str, tuple[int, ...]], ...], _Compiled] = {}
        self._lock = Lock()  # a request computes for one thread at a time

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        """Compute; raises BundleError when the network does not take inputs of these names and shapes."""
        with self._lock:
            compiled = self._compiled_for({name: value.shape for name, value in inputs.items()})
            feeds = {i: np.ascontiguousarray(inputs[name], dtype) for i, (name, dtype) in enumerate(self._inputs)}
            try:
                with compiled.weights.trimmed(CALL_TRIM_SEC) if self._low_memory else nullcontext():
                    found = compiled.request.infer(feeds, share_inputs=True, share_outputs=True)
            except RuntimeError as error:
                raise BundleError(f"{self._path} cannot compute this: {one_line(error)}") from None
            return np.array(found[0], np.float32)  # a copy: the engine writes there again

    def prepare(self, shapes: Shapes) -> None:
        """Compile for these shapes now."""
        with self._lock:
            self._compiled_for(shapes)

    def explain(self) -> Execution:
        """The device, and the dtypes that the compiled graph's matrix products compute in.

        The precision hint alone does not tell: on CPUs with VNNI the plugin quantizes the activations of layers with
        weights of 8 and 4 bits, unless it was told not to.
        """
        quantizes = DYNAMIC not in self._settings and "VNNI" in (this_processor().features or ())
        compiled = next(iter(self._compiled.values())).request.get_compiled_model()
        found: Counter[str] = Counter()
        for layer in compiled.get_runtime_model().get_ops():
            info = layer.get_rt_info()
            kind, numbers, kernel = (info[k].astype(str) for k in ("layerType", "runtimePrecision", "primitiveType"))
            if any(word in kind.lower() for word in PRODUCTS):
                computed = kernel.lower().rpartition("_")[2]  # "brgemm_avx512_f32"; `numbers` may be its weights' only
                if numbers in WHOLE_NUMBERS and quantizes:
                    computed = "i8"
                found[COMPUTE_DTYPES.get(computed) or COMPUTE_DTYPES.get(numbers, numbers)] += 1
        devices = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
        return Execution(devices, ", ".join(name for name, _ in found.most_common()) or None)

    def _compiled_for(self, shapes: Shapes) -> _Compiled:
        names = [name for name, _ in self._inputs]
        if shapes.keys() != set(names):
            raise BundleError(
                f"{self._path} takes {', '.join(names)} where {', '.join(shapes)} are given: export it again"
            )
        shapes = {name: self._fixed(name, shape) for name, shape in shapes.items()}
        key = tuple(sorted(shapes.items()))
        if (found := self._compiled.pop(key, None)) is None:
            need = _need_bytes(self._path.with_suffix(".bin"))
            while self._compiled and (len(self._compiled) >= MAX_SHAPES or need > free_memory_bytes()):
                del self._compiled[next(iter(self._compiled))]
            found = self._compile(shapes)
        self._compiled[key] = found  # what was used last comes last
        return found

    def _fixed(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with the network's own sizes in place of -1."""
        own = self._shapes[name]
        try:
            return tuple(own[i].get_length() if n < 0 else n for i, n in enumerate(shape))
        except RuntimeError:
            raise BundleError(
                f"{self._path} takes {name} of {own}, which leaves open what must be fixed: export it again"
            ) from None

    def _graph(self) -> Any:
        """The network as it was read, to be given shapes.

        The engine makes a graph of its own of it. With low memory this one is not kept beside that (9 MB), and read
        again for other shapes.
        """
        if not self._low_memory:
            return self._model.clone()
        graph, self._model = self._model or _read(self._path, self._device), None
        return graph

    def _compile(self, shapes: Shapes) -> _Compiled:
        model = self._graph()
        try:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        except RuntimeError as error:
            made = ", ".join(f"{name} {shape}" for name, shape in self._shapes.items())
            raise InputError(f"{self._path} was not made for this size ({one_line(error)}): it takes {made}") from None
        weights = self._path.with_suffix(".bin")
        _demand_memory(weights)
        mapped = MappedWeights(model, weights)
        try:
            with mapped.trimmed():
                compiled = _CORE.compile_model(model, self._device, self._settings)
            return _Compiled(compiled.create_infer_request(), mapped)
        except (RuntimeError, MemoryError) as error:
            if "bad_alloc" in str(error) or isinstance(error, MemoryError):
                raise _too_little_memory(weights, None) from None
            raise BundleError(
                f"{self._path} is refused by openvino {OpenVinoRuntime.version} on {self._device}: {one_line(error)}"
            ) from None


class OpenVinoRuntime:
    name = "openvino"
    version: str = _ov.__version__.split("-")[0]
    default_device = "CPU"  # always there: to ask for all devices loads every plugin, 6 MB

    def devices(self) -> list[Device]:
        found = [Device(name, str(_CORE.get_property(name, "FULL_DEVICE_NAME"))) for name in _CORE.available_devices]
        found.sort(key=lambda device: device.name != "CPU")  # the one that is always there comes first
        return [*found, Device("AUTO", "OpenVINO's own choice among these")]

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        """Open a component of a bundle. Raises BundleError for a file that the engine refuses."""
        bundle, info, path = open_component(folder, component, options)
        chosen = check_device(self, options.device)
        if not path.with_suffix(".bin").is_file():
            raise BundleError(
                f"{path.with_suffix('.bin')} is missing: the bundle is incomplete; copy or export it again"
            )
        settings = _settings(
            chosen, options.threads, exact=options.exact or "fp32" in (bundle.manifest.precision, info.precision)
        )
        if options.cache is not None:
            settings |= _cache_settings(options.cache / f"openvino-{component}-{bundle.fingerprint(component)}", path)
        return OpenVinoComponent(path, chosen, settings, low_memory=options.low_memory)


def _read(path: Path, device: str) -> Any:
    try:
        model = _CORE.read_model(path)
    except RuntimeError as error:
        raise BundleError(
            f"{path} is refused by openvino {OpenVinoRuntime.version}: {one_line(error)}; copy or export it again"
        ) from None
    _leave_tables(model)
    if device == "CPU" and this_processor().lacks_vnni:
        _leave_attention(model)
    return model


def _leave_tables(model: Any) -> None:
    """Disable constant folding of embedding tables: a dozen passes would each convert all of it to fp32 in vain.

    For CLIP's vocabulary that is 0.8 s of the 1.1 s that an fp16 text encoder takes to compile.
    """
    for node in model.get_ops():
        if node.get_type_name() == "Gather" and node.input_value(0).get_node().get_type_name() == "Convert":
            node.get_rt_info()[NOT_FOLDED] = True


def _leave_attention(model: Any) -> None:
    """Take queries and keys as they are, not rounded to 8 bits.

    Without 8-bit dot products the engine has no kernel that computes attention of them part by part: it keeps all
    scores, 0.5 GB at 512 pixels, and is no faster (docs/benchmarks/peers.md).
    """
    for node in model.get_ops():
        if node.get_type_name() == "ScaledDotProductAttention":
            for port in node.inputs()[:2]:
                _bypass_rounding(port)


def _bypass_rounding(port: Any) -> None:
    """Connect an input to the values before their rounding."""
    source = port.get_source_output().get_node()
    if source.get_type_name() == "FakeQuantize":
        port.replace_source_output(source.input_value(0))
    elif source.get_type_name() in ("Transpose", "Reshape"):
        _bypass_rounding(source.input(0))


def _cache_settings(folder: Path, path: Path) -> dict[str, Any]:
    """Keep the compiled graph there; its weights stay in the bundle's file, which is mapped again."""
    return {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(path.with_suffix(".bin"))}


def _settings(device: str, threads: int | None, *, exact: bool) -> dict[str, Any]:
    """For one image's latency."""
    found: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if exact:
        found |= {"INFERENCE_PRECISION_HINT": "f32"} | ({DYNAMIC: 0} if device == "CPU" else {})
    elif device == "CPU":
        able = _CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        found["INFERENCE_PRECISION_HINT"] = "bf16" if "BF16" in able else "f32"
    if device == "CPU" and threads is not None:
        found["INFERENCE_NUM_THREADS"] = threads
    return found


def _demand_memory(weights: Path) -> None:
    """Raise KdcError when what is free cannot hold the weights: better a line now than a killed process later."""
    free = free_memory_bytes()
    if _need_bytes(weights) > free:
        raise _too_little_memory(weights, free)


def _need_bytes(weights: Path) -> int:
    return weights.stat().st_size + WORKING_BYTES


def _too_little_memory(weights: Path, free: int | None) -> KdcError:
    need = _need_bytes(weights)
    there = "" if free is None else f", and {free / 2**20:.0f} MiB are free"
    return KdcError(
        f"too little memory for {weights.parent.name}: it needs about {need / 2**20:.0f} MiB{there};"
        " close other programs, use the low-memory mode, or a bundle of a smaller precision"
    )


class MappedWeights:
    """The weights' file as one model has it mapped.

    The engine reads the file through a mapping and keeps its own copy in the layout of its kernels; the pages it
    has read would count twice until the process ends. They are clean: what is read again comes from the file. Every
    call reads scales and biases there: 2 MB of an int8 U-Net, 7 MB with the pages that Linux maps around each.
    """

    def __init__(self, model: Any, path: Path) -> None:
        constants = (node for node in model.get_ops() if node.get_type_name() == "Constant")
        # Held, because the mapping lasts as long as one of its constants: later its addresses may be another's.
        self._constant = max(constants, key=lambda node: node.get_byte_size(), default=None)
        self._span = None if self._constant is None else _mapping(path, self._constant.data.ctypes.data)

    @contextmanager
    def trimmed(self, every_sec: float = COMPILING_TRIM_SEC) -> Iterator[None]:
        """Give the pages back while the engine reads them, and once more when it has."""
        if self._span is None:
            yield
            return
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        done = Event()
        trim = partial(libc.madvise, *self._span, mmap.MADV_DONTNEED)

        def watch() -> None:
            while not done.wait(every_sec):
                trim()

        watcher = Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            trim()


def _mapping(path: Path, address: int) -> tuple[int, int] | None:
    """Begin and length of the read-only mapping of the file around the address; None where Linux does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    name = str(path.resolve())
    for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name and "w" not in fields[1]:
            begin, end = (int(part, 16) for part in fields[0].split("-"))
            if begin <= address < end:
                return begin, end - begin
    return None


# Two threads that both ask for a dtype first wait for each other for ever: OpenVINO makes its table at the first call,
# and lets go of Python's lock meanwhile.
_ov.Type.f32.to_dtype()
_CORE = _ov.Core()
RUNTIME = OpenVinoRuntime()

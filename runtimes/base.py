"""The interface of an engine, and the registry of engines.

A runtime opens one component of a bundle (or, for torch, of a checkpoint) as a `Component`: named numpy inputs, one
numpy output. An engine's package is imported when the engine is asked for, never before.

    runtime = get_runtime("onnxruntime")            # MissingPackageError names the extra to install
    unet = runtime.load(Path("bundles/onnx-fp16"), "unet", LoadOptions(device="CPU", threads=2))
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock, Thread
from typing import Protocol, cast

from kdc_edge.bundle import Bundle
from kdc_edge.components import COMPONENTS, Component, Shapes, SupportsPrepare
from kdc_edge.errors import InputError, UsageError, unknown_choice
from kdc_edge.files import FileState
from kdc_edge.formats import Format
from kdc_edge.hardware import check_threads
from kdc_edge.manifest import ComponentInfo

__all__ = [
    "COMPONENTS",
    "DEFAULTS",
    "ENGINES",
    "Device",
    "Engine",
    "LoadOptions",
    "LoadedComponents",
    "Runtime",
    "check_device",
    "get_runtime",
    "open_component",
    "preferred_engine",
]


@dataclass(frozen=True)
class Device:
    """A processor that an engine can compute on."""

    name: str  # as --device takes it: "CPU", "GPU", ...
    description: str


@dataclass(frozen=True)
class LoadOptions:
    """How a component is opened. Engines ignore options they do not support. InputError for a number of threads."""

    device: str | None = None  # the engine's default when None
    threads: int | None = None
    low_memory: bool = False  # save memory where that costs speed
    cache: Path | None = None  # a folder for compiled networks
    exact: bool = False  # compute in fp32 where the engine would choose fewer bits
    check: bool = True  # compare a bundle's files with the hashes of its manifest first

    def __post_init__(self) -> None:
        check_threads(self.threads)


DEFAULTS = LoadOptions()


class Runtime(Protocol):
    """An engine."""

    name: str
    version: str

    def devices(self) -> list[Device]:
        """The devices of this machine that it can use, the default first."""
        ...

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        """Open a component ("text_encoder", "unet", "vae_decoder", "vae_encoder")."""
        ...


@dataclass(frozen=True)
class Engine:
    """A row of the registry: a runtime's module, and the package and extra that it needs."""

    name: str
    module: str
    package: str
    extra: str
    platform: str | None = None  # sys.platform where it runs; anywhere when None
    reference: bool = False  # proves artifacts; too slow to be chosen or measured where another engine runs
    reduces_precision: bool = False  # computes in fewer than 32 bits, unasked, where the processor has them
    compiles_ahead: bool = False  # compiles on one core, so that another network can compute meanwhile


ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine("onnxruntime", "kdc_edge.runtimes.onnxruntime", "onnxruntime", "onnx"),
        Engine("openvino", "kdc_edge.runtimes.openvino", "openvino", "openvino", reduces_precision=True,
               compiles_ahead=True),
        Engine("coreml", "kdc_edge.runtimes.coreml", "coremltools", "coreml", platform="darwin"),
        Engine("mil", "kdc_edge.runtimes.mil.evaluator", "numpy", "coreml", reference=True),
        Engine("torch", "kdc_edge.runtimes.torch", "torch", "train"),
    )
}  # fmt: skip


def get_runtime(name: str) -> Runtime:
    """The engine of that name; raises UsageError when unknown, MissingPackageError when absent."""
    if name not in ENGINES:
        raise unknown_choice("engine", name, ENGINES)
    if ENGINES[name].platform not in (None, sys.platform):
        raise InputError(f"{name} needs Apple's frameworks, which only macOS has: use the engine mil here")
    return cast(Runtime, importlib.import_module(ENGINES[name].module).RUNTIME)


def preferred_engine(row: Format) -> Engine:
    """The first of the format's engines that this kind of machine has."""
    engines = [ENGINES[name] for name in row.engines]
    return next((e for e in engines if e.platform in (None, sys.platform)), engines[0])


class LoadedComponents(Mapping[str, Component]):
    """The components, each loaded when it is first asked for; safe to use from several threads.

    The decoder is not in memory while the first image's U-Net runs. With `low_memory` one component is held at a
    time: asking for one drops the other, which is loaded again for the next image. With `compile_ahead` one is
    compiled while another computes, unless memory is short. `check` takes the name of a component that was loaded and
    raises where its files are not the exported ones: no component is given before.
    """

    def __init__(
        self,
        load: Callable[[str], Component],
        *,
        low_memory: bool = False,
        compile_ahead: bool = False,
        check: Callable[[str], None] | None = None,
        names: Sequence[str] = COMPONENTS,
    ) -> None:
        self._names = tuple(names)
        self._load = load
        self._check = check
        self._low_memory = low_memory
        self._compile_ahead = compile_ahead and not low_memory
        self._lock = RLock()
        self._loaded: dict[str, Component] = {}
        self._coming: dict[str, Future[Component]] = {}

    def start(self, name: str, shapes: Sequence[Shapes]) -> None:
        """Begin to load and compile a component; its errors are raised when it is asked for."""

        def make() -> Component:
            component = self._load(name)
            if isinstance(component, SupportsPrepare):
                for inputs in shapes:
                    component.prepare(inputs)
            return component

        with self._lock:
            if not self._compile_ahead or name in self._loaded or name in self._coming:
                return
            pool = ThreadPoolExecutor(1)
            self._coming[name] = pool.submit(make)
            pool.shutdown(wait=False)

    def __getitem__(self, name: str) -> Component:
        with self._lock:
            if name in self._coming:
                self._loaded[name] = self._checked(name, self._coming.pop(name).result)
            if self._low_memory and name not in self._loaded:
                self._loaded.clear()
                gc.collect()  # before the next one takes its memory, not after
            if name not in self._loaded:
                self._loaded[name] = self._checked(name, lambda: self._load(name))
            return self._loaded[name]

    def _checked(self, name: str, load: Callable[[], Component]) -> Component:
        """What `load` gives; a damaged file is named by its check, whatever the engine thought of it."""
        try:
            return load()
        finally:
            if self._check:
                self._check(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Without loading it, as Mapping's own would."""
        return name in self._names


class EarlyCheck:
    """The check of a bundle's components, begun before they are loaded, in the time that loading leaves the cores."""

    def __init__(self, bundle: Bundle, names: Sequence[str]) -> None:
        self._bundle = bundle
        self._found: dict[str, Future[dict[str, FileState]]] = {name: Future() for name in names}
        Thread(target=self._check_all, daemon=True).start()  # where a start is refused, nobody waits for the rest

    def _check_all(self) -> None:
        _step_back()
        for name, found in self._found.items():
            try:
                found.set_result(self._bundle.check(name))
            except Exception as error:  # raised where the component is asked for
                found.set_exception(error)

    def __call__(self, name: str) -> None:
        """Wait for the check of a loaded component, whose files are checked again where they have changed since.

        Raises BundleError.
        """
        if self._found[name].result() != self._bundle.states(name):
            self._bundle.check(name)


def _step_back() -> None:
    """Let other threads go first; Linux counts nice by thread, other systems for the whole process."""
    if sys.platform == "linux":
        with suppress(OSError):  # a system may forbid it: the check goes on, and its results are waited for
            os.nice(10)


def open_component(folder: Path, name: str, options: LoadOptions) -> tuple[Bundle, ComponentInfo, Path]:
    """A bundle, a component's description and the file that an engine opens, checked where the options say so."""
    bundle = Bundle.open(folder)
    info, path = bundle.component(name)
    if options.check:
        bundle.check(name)
    return bundle, info, path


def check_device(runtime: Runtime, device: str | None) -> str:
    """The device's name as the engine spells it, its default for None. Raises UsageError naming the devices here."""
    always: str | None = getattr(runtime, "default_device", None)
    if always and (device is None or device.lower() == always.lower()):
        return always
    names = [d.name for d in runtime.devices()]
    if device is None:
        return names[0]
    for name in names:
        if name.lower() == device.lower():
            return name
    elsewhere: Mapping[str, str] = getattr(runtime, "elsewhere", {})  # device -> the package that brings it
    hint = f"; {device} needs {elsewhere[device.upper()]}" if device.upper() in elsewhere else ""
    words = f"{runtime.name} has no device {device!r:.80} here"
    raise UsageError(f"{unknown_choice('device', device, names, words)}{hint}")

"""What every engine offers, and the registry that finds it.

A runtime opens one component of a bundle (or, for torch, of a checkpoint) and gives back a `Component`:
named numpy inputs, one numpy output. Engines are imported when they are asked for, never before.

    runtime = get_runtime("onnxruntime")            # MissingPackageError names the extra to install
    unet = runtime.load(bundle.root, "unet", LoadOptions(device="CPU", threads=2))
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from kdc_edge.bundle import Bundle, ComponentInfo, Model, kind_of
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import InputError
from kdc_edge.formats import Format, find_format
from kdc_edge.pipeline import Compiled, Component, Pipeline, Shapes
from kdc_edge.tokenizer import Tokenizer

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


@dataclass(frozen=True)
class Device:
    """Something that an engine can compute on."""

    name: str  # as --device takes it: "CPU", "GPU", ...
    description: str


@dataclass(frozen=True)
class LoadOptions:
    """How a component is opened. An engine leaves what it can do nothing with."""

    device: str | None = None  # the engine's default when None
    threads: int | None = None
    low_memory: bool = False  # save memory where that costs speed
    cache: Path | None = None  # a folder for what the engine compiles
    exact: bool = False  # 32-bit arithmetic where the engine would take fewer bits of its own choice
    check: bool = True  # compare a bundle's files with the hashes of its manifest first


DEFAULTS = LoadOptions()


class Runtime(Protocol):
    """An engine."""

    name: str
    version: str

    def devices(self) -> list[Device]:
        """What this machine has for it, the default first."""
        ...

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        """Open a component ("text_encoder", "unet", "vae_decoder")."""
        ...


@dataclass(frozen=True)
class Engine:
    """A row of the registry: where a runtime is, and what it needs."""

    name: str
    module: str
    package: str
    extra: str
    platform: str | None = None  # sys.platform where it runs; anywhere when None
    reference: bool = False  # proves artifacts; too slow to be chosen or measured where another engine runs
    narrows: bool = False  # takes fewer than 32 bits of its own choice where the processor has them
    early: bool = False  # compiles one network on one core, and holds no more memory if another computes meanwhile


ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine("onnxruntime", "kdc_edge.runtimes.onnxruntime", "onnxruntime", "onnx"),
        Engine("openvino", "kdc_edge.runtimes.openvino", "openvino", "openvino", narrows=True, early=True),
        Engine("coreml", "kdc_edge.runtimes.coreml", "coremltools", "coreml", platform="darwin"),
        Engine("mil", "kdc_edge.runtimes.mil.evaluator", "numpy", "coreml", reference=True),
        Engine("torch", "kdc_edge.runtimes.torch", "torch", "train"),
    )
}


def get_runtime(name: str) -> Runtime:
    """The engine of that name; raises InputError when unknown, MissingPackageError when absent."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}: choose from {', '.join(ENGINES)}")
    if ENGINES[name].platform not in (None, sys.platform):
        raise InputError(f"{name} needs Apple's frameworks, which only macOS has: use --engine mil here")
    return cast(Runtime, importlib.import_module(ENGINES[name].module).RUNTIME)


def preferred_engine(row: Format) -> Engine:
    """The first of the format's engines that this kind of machine has."""
    engines = [ENGINES[name] for name in row.engines]
    return next((e for e in engines if e.platform in (None, sys.platform)), engines[0])


class LoadedComponents(Mapping[str, Component]):
    """The three components, each loaded when it is first asked for.

    So the decoder is not yet in memory while the first image's U-Net runs. With `low_memory` no two are ever
    there together: asking for one drops the other, which is loaded again for the next image. With `early`, one
    is compiled while another computes, where memory is not short. `check` takes a component's name and raises where
    its files are not the exported ones: it runs while the engine works, and no component is given before it is done.
    """

    def __init__(
        self,
        load: Callable[[str], Component],
        *,
        low_memory: bool = False,
        early: bool = False,
        check: Callable[[str], None] | None = None,
    ) -> None:
        self._load_unchecked = load
        self._check = check
        self._checks: dict[str, Future[None]] = {}
        self._low_memory = low_memory
        self._early = early and not low_memory
        self._loaded: dict[str, Component] = {}
        self._coming: dict[str, Future[Component]] = {}

    def start(self, name: str, shapes: Sequence[Shapes]) -> None:
        """Begin to load and compile a component; what goes wrong is raised where it is asked for."""
        if not self._early or name in self._loaded or name in self._coming:
            return

        def make() -> Component:
            component = self._load(name)
            if isinstance(component, Compiled):
                for inputs in shapes:
                    component.prepare(inputs)
            return component

        pool = ThreadPoolExecutor(1)
        self._coming[name] = pool.submit(make)
        pool.shutdown(wait=False)

    def __getitem__(self, name: str) -> Component:
        if name in self._coming:
            self._loaded[name] = self._checked(name, self._coming.pop(name).result)
        if self._low_memory and name not in self._loaded:
            self._loaded.clear()
            gc.collect()  # before the next one takes its memory, not after
        if name not in self._loaded:
            self._loaded[name] = self._checked(name, lambda: self._load(name))
        return self._loaded[name]

    def _load(self, name: str) -> Component:
        if self._check and not self._checks:
            pool = ThreadPoolExecutor(1)
            self._checks |= {component: pool.submit(self._check, component) for component in self}
            pool.shutdown(wait=False)
        return self._load_unchecked(name)

    def _checked(self, name: str, load: Callable[[], Component]) -> Component:
        """What `load` gives; a damaged file is named by its check, whatever the engine thought of it."""
        try:
            return load()
        finally:
            if name in self._checks:
                self._checks[name].result()

    def __iter__(self) -> Iterator[str]:
        return iter(COMPONENTS)

    def __len__(self) -> int:
        return len(COMPONENTS)


def open_pipeline(
    folder: Path,
    *,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    low_memory: bool = False,
    cache: Path | None = None,
    exact: bool = False,
    check: bool = True,
) -> Pipeline:
    """A pipeline from a bundle, or through torch from a checkpoint folder; components are loaded when needed.

    `device` names one for all ("CPU"), or one a component ("unet=GPU,text_encoder=CPU"). `low_memory` trades
    speed for memory: one component at a time, and the engine's savings. `cache` is a folder for what the
    engine compiles, where it can keep that. `exact` is 32-bit arithmetic where the engine would choose fewer bits.
    `check` compares a bundle's files with the hashes of its manifest, which is done when a component is first used.
    Raises a KdcError for what can be seen before anything is loaded.
    """
    bundle, model, chosen = _choose(folder, engine)
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is too few: use 1 or more")
    if bundle and check:
        bundle.check("tokenizer")
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    runtime = get_runtime(chosen.name)
    named = split_devices(device)
    devices = {c: check_device(runtime, named.get(c, named.get(""))) for c in COMPONENTS}
    options = LoadOptions(None, threads, low_memory, cache, exact, check=False)  # it is checked beside the loading
    load = LoadedComponents(
        lambda c: runtime.load(folder, c, replace(options, device=devices[c])),
        low_memory=low_memory,
        early=chosen.early,
        check=bundle.check if bundle and check else None,
    )
    return Pipeline(model, tokenizer, load)


def split_devices(device: str | None) -> dict[str, str]:
    """'unet=GPU,CPU' -> {"unet": "GPU", "": "CPU"}: the device without a name is for all the others."""
    found: dict[str, str] = {}
    for part in device.split(",") if device else ():
        component, _, name = part.strip().rpartition("=")
        if component not in ("", *COMPONENTS) or not name or component in found:
            raise InputError(
                f"--device {device!r} is not understood: use CPU, or unet=GPU,text_encoder=CPU with components"
                f" {', '.join(COMPONENTS)}"
            )
        found[component] = name
    return found


def open_for_bench(folder: Path, *, engine: str | None = None, **options: Any) -> Pipeline:
    """The same, but for engines that only prove: what they take says nothing about the artifact."""
    *_, chosen = _choose(folder, engine)
    if chosen.reference:
        raise InputError(f"{chosen.name} only proves this bundle: measure it where its engine runs")
    return open_pipeline(folder, engine=engine, **options)


def open_component(folder: Path, name: str, options: LoadOptions) -> tuple[Bundle, ComponentInfo, Path]:
    """A bundle, a component's description and the file that an engine opens, checked where the options say so."""
    bundle = Bundle.open(folder)
    info, path = bundle.component(name)
    if options.check:
        bundle.check(name)
    return bundle, info, path


def _choose(folder: Path, engine: str | None) -> tuple[Bundle | None, Model, Engine]:
    """The bundle, if it is one, what it computes, and the engine asked for or preferred; InputError for a misfit."""
    if kind_of(folder) == "checkpoint":
        if engine not in (None, "torch"):
            raise InputError(f"{folder} is a checkpoint, which only torch runs: export it for {engine} first")
        return None, read_model(folder), ENGINES["torch"]
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    row = find_format(manifest.target, manifest.precision)
    if engine is not None and engine not in row.engines:
        raise InputError(f"{engine} cannot run {manifest.name}: choose from {', '.join(row.engines)}")
    return bundle, manifest.model, preferred_engine(row) if engine is None else ENGINES[engine]


def check_device(runtime: Runtime, device: str | None) -> str:
    """The device's name as the engine has it, its default for None. Raises InputError naming what is."""
    names = [d.name for d in runtime.devices()]
    if device is None:
        return names[0]
    for name in names:
        if name.lower() == device.lower():
            return name
    elsewhere: Mapping[str, str] = getattr(runtime, "elsewhere", {})  # what brings devices that are not here
    hint = f"; {device} needs {elsewhere[device.upper()]}" if device.upper() in elsewhere else ""
    raise InputError(f"{runtime.name} has no device {device!r} here: choose from {', '.join(names)}{hint}")

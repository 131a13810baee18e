"""What every engine offers, and the registry that finds it.

A runtime opens one component of a bundle (or, for torch, of a checkpoint) and gives back a `Component`:
named numpy inputs, one numpy output. Engines are imported when they are asked for, never before.

    runtime = get_runtime("onnxruntime")            # MissingPackageError names the extra to install
    unet = runtime.load(bundle.root, "unet", device="CPU", threads=2)
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from kdc_edge.bundle import Bundle
from kdc_edge.checkpoint import read_model
from kdc_edge.errors import InputError
from kdc_edge.formats import find_format
from kdc_edge.pipeline import Component, Pipeline
from kdc_edge.tokenizer import Tokenizer

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


@dataclass(frozen=True)
class Device:
    """Something that an engine can compute on."""

    name: str  # as --device takes it: "CPU", "GPU", ...
    description: str


class Runtime(Protocol):
    """An engine."""

    name: str
    version: str

    def devices(self) -> list[Device]:
        """What this machine has for it, the default first."""
        ...

    def load(self, folder: Path, component: str, *, device: str | None, threads: int | None) -> Component:
        """Open a component ("text_encoder", "unet", "vae_decoder"); None means the engine's default."""
        ...


@dataclass(frozen=True)
class Engine:
    """A row of the registry: where a runtime is, and what it needs."""

    name: str
    module: str
    package: str
    extra: str


ENGINES: dict[str, Engine] = {
    e.name: e
    for e in (
        Engine("onnxruntime", "kdc_edge.runtimes.onnxruntime", "onnxruntime", "onnx"),
        Engine("torch", "kdc_edge.runtimes.torch", "torch", "train"),
    )
}


def get_runtime(name: str) -> Runtime:
    """The engine of that name; raises InputError when unknown, MissingPackageError when absent."""
    if name not in ENGINES:
        raise InputError(f"unknown engine {name!r}: choose from {', '.join(ENGINES)}")
    return cast(Runtime, importlib.import_module(ENGINES[name].module).RUNTIME)


def open_pipeline(
    folder: Path, *, engine: str | None = None, device: str | None = None, threads: int | None = None
) -> Pipeline:
    """A pipeline from a bundle, or through torch from a checkpoint folder."""
    if (folder / "model_index.json").is_file() and not (folder / "kdc-edge.json").is_file():
        if engine not in (None, "torch"):
            raise InputError(f"{folder} is a checkpoint, which only torch runs: export it for {engine} first")
        model, chosen = read_model(folder), "torch"
    else:
        bundle = Bundle.open(folder)
        model = bundle.manifest.model
        able = find_format(bundle.manifest.target, bundle.manifest.precision).engines
        if engine is not None and engine not in able:
            raise InputError(f"{engine} cannot run {bundle.manifest.name}: choose from {', '.join(able)}")
        chosen = engine or able[0]
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads} is too few: use 1 or more")
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    runtime = get_runtime(chosen)
    components = {c: runtime.load(folder, c, device=device, threads=threads) for c in COMPONENTS}
    return Pipeline(model, tokenizer, components)


def check_device(runtime: Runtime, device: str | None) -> str:
    """The device's name as the engine has it, its default for None. Raises InputError naming what is."""
    names = [d.name for d in runtime.devices()]
    if device is None:
        return names[0]
    for name in names:
        if name.lower() == device.lower():
            return name
    raise InputError(f"{runtime.name} has no device {device!r} here: choose from {', '.join(names)}")


def first_line(error: Exception) -> str:
    """What another library's exception says, short enough to stand inside one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

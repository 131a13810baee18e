"""Core ML on a Mac: Apple's own engine, on the processor, the GPU and the Neural Engine.

    unet = get_runtime("coreml").load(Path("bundles/coreml-palette6"), "unet", LoadOptions(device="CPU_AND_NE"))

A package has to be compiled for the machine before it runs, which takes a while for a large U-Net. The compiled
model is kept beside the bundle (`.NAME.compiled/`, safe to delete) under the hashes of what it was made from and
the system's version. Elsewhere the registry refuses this engine; `mil` computes the same files anywhere.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdc_edge.components import Component
from kdc_edge.errors import BundleError
from kdc_edge.files import atomic_folder, exclusive
from kdc_edge.runtimes.apple_layout import PROGRAM, Predict, Stage, adapt, in_turn, packages_of
from kdc_edge.runtimes.base import DEFAULTS, Device, LoadOptions, check_device, open_component
from kdc_edge.runtimes.coreml_tools import load_coremltools
from kdc_edge.runtimes.mil.program import read_program
from kdc_edge.text import one_line

_ct: Any = load_coremltools("running a Core ML bundle")

_UNITS = (
    ("ALL", "Core ML chooses among processor, GPU and Neural Engine"),
    ("CPU_AND_NE", "processor and Neural Engine"),
    ("CPU_AND_GPU", "processor and GPU"),
    ("CPU_ONLY", "processor"),
)


class CoreMLRuntime:
    name = "coreml"
    version: str = _ct.__version__

    def devices(self) -> list[Device]:
        return [Device(name, description) for name, description in _UNITS]

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        """Open a component of a bundle; Core ML sets the number of its threads itself. Raises BundleError."""
        units = _ct.ComputeUnit[check_device(self, options.device)]
        bundle, info, _ = open_component(folder, component, options)
        root = bundle.root.resolve()
        cache = options.cache or root.parent / f".{root.name}.compiled"
        key = bundle.fingerprint(component, platform.platform())
        stages = [
            _open(package, cache / f"{package.stem}-{key}.mlmodelc", units) for package in packages_of(bundle, info)
        ]
        return adapt(bundle, component, in_turn(stages))


def _open(package: Path, compiled: Path, units: Any) -> Stage:
    """One package, compiled unless that was done before."""
    inputs = read_program(package / PROGRAM).inputs
    try:
        if not compiled.is_dir():
            _compile(package, compiled)
        model = _ct.models.CompiledMLModel(str(compiled), units)
    except Exception as error:  # coremltools and the frameworks under it raise whatever comes
        shutil.rmtree(compiled, ignore_errors=True)  # perhaps it was this that is damaged: the next try makes it anew
        raise BundleError(f"{package} is refused by Core ML: {one_line(error)}; copy or export it again") from None
    return list(inputs), _predict(package, model)


def _compile(package: Path, compiled: Path) -> None:
    """Compile beside its place, so that a compiled model is whole or not there; once, whoever else opens it."""
    with exclusive(compiled.with_suffix(".lock")):
        if compiled.is_dir():
            return
        with atomic_folder(compiled) as part:
            made = Path(_ct.models.utils.compile_model(str(package), str(part / compiled.name)))
            for file in made.iterdir():
                file.replace(part / file.name)
            made.rmdir()


def _predict(package: Path, model: Any) -> Predict:
    def predict(**inputs: np.ndarray) -> Mapping[str, np.ndarray]:
        try:
            found: Mapping[str, np.ndarray] = model.predict(inputs)
        except Exception as error:
            raise BundleError(f"{package} cannot compute this: {one_line(error)}") from None
        return found

    return predict


RUNTIME = CoreMLRuntime()

"""The reference evaluator: Core ML bundles computed in numpy, on any machine, without Core ML.

    unet = get_runtime("mil").load(Path("bundles/coreml-fp16"), "unet")
    program = Evaluator(read_program(path)); program(sample=..., timestep=..., encoder_hidden_states=...)

It exists to prove artifacts, not to be fast: each operation is computed in fp32 and rounded to the type that the
program gives its result, as Core ML rounds where it computes in fp16. Weights stay in the mapped file until they
are used, and a value is dropped after its last use. An operation that it does not know is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdc_edge.components import Component
from kdc_edge.errors import BundleError, KdcError
from kdc_edge.runtimes.apple_layout import PROGRAM, adapt, in_turn, packages_of
from kdc_edge.runtimes.base import DEFAULTS, Device, LoadOptions, check_device, open_component
from kdc_edge.runtimes.mil.ops import KERNELS
from kdc_edge.runtimes.mil.program import NUMPY, Operation, Program, TensorType, Value, read_program
from kdc_edge.runtimes.mil.weights import CONSTEXPR
from kdc_edge.text import one_line
from kdc_edge.version import __version__

ITERABLE = {"values"}  # arguments that are lists even when they hold one value


class Evaluator:
    """An ML Program as a function of named arrays."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._constants: dict[str, Value | Operation] = {}
        self._steps: list[Operation] = []
        for operation in program.operations:
            if operation.type == "const":
                self._constants[next(iter(operation.outputs))] = operation.attributes["val"]
            elif operation.type in CONSTEXPR:
                self._constants[next(iter(operation.outputs))] = operation
            elif operation.type in KERNELS:
                self._steps.append(operation)
            else:
                raise BundleError(
                    f"{program.path} uses the operation {operation.type!r} at {operation.name!r:.200}, which the mil"
                    " engine does not know: run it with the coreml engine on a Mac, or export it again"
                )
        self._dead = _last_uses(self._steps, set(program.outputs))

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Compute. Raises BundleError naming the operation that cannot be computed, and where it is."""
        values: dict[str, np.ndarray] = {}
        for name, kind in self.program.inputs.items():
            if name not in inputs or inputs[name].shape != kind.shape:
                given = inputs[name].shape if name in inputs else "nothing"
                raise BundleError(f"{self.program.path} takes {name} of shape {kind.shape} where {given} is given")
            values[name] = inputs[name].astype(NUMPY[kind.dtype])
        for operation, dead in zip(self._steps, self._dead, strict=True):
            try:
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # fp16 overflows: the proof tells
                    self._step(operation, values)
            except KdcError:
                raise
            except Exception as error:  # numpy raises whatever comes for a damaged program
                raise BundleError(
                    f"{self.program.path}: {operation.type} at {operation.name!r:.200} cannot be computed:"
                    f" {one_line(error)}; export it again"
                ) from None
            for name in dead:
                del values[name]
        if lost := self.program.outputs.keys() - values.keys():
            raise BundleError(f"{self.program.path} does not compute its output {min(lost)!r:.200}; export it again")
        return {name: values[name] for name in self.program.outputs}

    def constants(self) -> Iterator[tuple[str, Value | Operation]]:
        """Every constant of the program by name, compressed weights as the operation that decompresses them."""
        yield from self._constants.items()

    def constant(self, name: str) -> np.ndarray:
        """A constant's array, decompressed."""
        found = self._constants[name]
        if isinstance(found, Value):
            return self.program.read(found)
        given = {key: self.program.read(value) for key, value in found.attributes.items() if key != "name"}
        given |= {key: self._resolve(refs[0], {}) for key, refs in found.inputs.items()}
        return CONSTEXPR[found.type](**given)

    def _step(self, operation: Operation, values: dict[str, np.ndarray]) -> None:
        arguments: dict[str, Any] = {}
        for key, references in operation.inputs.items():
            found = [self._resolve(reference, values) for reference in references]
            arguments[key] = found if key in ITERABLE else _plain(found[0])
        result = KERNELS[operation.type](**arguments)
        results = result if isinstance(result, list) else [result]
        for (name, kind), array in zip(operation.outputs.items(), results, strict=True):
            values[name] = _typed(array, kind)

    def _resolve(self, reference: str | Value, values: Mapping[str, np.ndarray]) -> np.ndarray:
        if isinstance(reference, Value):
            return self.program.read(reference)
        return values[reference] if reference in values else self.constant(reference)


def _plain(value: np.ndarray) -> Any:
    """A string as a str; all else stays an array."""
    return value.item() if value.dtype.kind == "U" and not value.ndim else value


def _typed(array: np.ndarray, kind: TensorType) -> np.ndarray:
    """The result as the program declares it; ValueError for another shape."""
    if len(array.shape) != len(kind.shape) or any(
        want not in (None, have) for want, have in zip(kind.shape, array.shape, strict=True)
    ):
        raise ValueError(f"its result has the shape {array.shape} where the program says {kind.shape}")
    return array.astype(NUMPY[kind.dtype], copy=False)


def _last_uses(steps: list[Operation], kept: set[str]) -> list[list[str]]:
    """For each step the values that nobody needs after it."""
    found: list[list[str]] = []
    seen = set(kept)
    made = {name for step in steps for name in step.outputs}
    for step in reversed(steps):
        used = {r for references in step.inputs.values() for r in references if isinstance(r, str) and r in made}
        dead = (used | step.outputs.keys()) - seen
        seen |= dead
        found.append(sorted(dead))
    return found[::-1]


class MilRuntime:
    name = "mil"
    version: str = __version__

    def devices(self) -> list[Device]:
        return [Device("CPU", "reference evaluator in numpy: exact, and slow")]

    def load(self, folder: Path, component: str, options: LoadOptions = DEFAULTS) -> Component:
        """Open a component of a Core ML bundle. Threads are numpy's own affair (OMP_NUM_THREADS)."""
        check_device(self, options.device)
        bundle, info, _ = open_component(folder, component, options)
        found = [Evaluator(read_program(package / PROGRAM)) for package in packages_of(bundle, info)]
        return adapt(bundle, component, in_turn([(list(e.program.inputs), e) for e in found]))


RUNTIME = MilRuntime()

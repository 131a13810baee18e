"""Reading an .mlpackage without coremltools: the ML Program in model.mlmodel, the weights in weight.bin.

    program = read_program(package / "Data" / "com.apple.CoreML" / "model.mlmodel")
    program.inputs["sample"].shape, len(program.operations)
    program.read(program.operations[0].attributes["val"])       # an array: a view into the mapped file

model.mlmodel is a protobuf message; the schema is Apple's (coremltools, mlmodel/format: Model.proto, MIL.proto).
It is decoded field by field (protobuf.py) because importing coremltools takes seconds and, where PyTorch is installed,
imports PyTorch too. weight.bin is Apple's blob storage, version 2: a header of 64 bytes, then entries of 64 bytes
of metadata and the data behind them. Both files are untrusted: every length is checked before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdc_edge.errors import BundleError
from kdc_edge.files import inside
from kdc_edge.runtimes.mil.protobuf import Buffer, Damaged, collect, entries, floats, integers, one, text

MAX_PROGRAM_BYTES = 256 * 2**20  # the 482M U-Net's is 1.4 MiB: weights lie in their own file
MODEL_PATH = "@model_path/"
SENTINEL = 0xDEADBEEF  # opens a weight's metadata
METADATA_BYTES = 64

# MIL.proto's DataType -> (name, numpy's dtype, bits a value); below a byte, values are packed, lowest bits first.
DTYPES: dict[int, tuple[str, type[np.generic], int]] = {
    1: ("bool", np.bool_, 8),
    10: ("fp16", np.float16, 16),
    11: ("fp32", np.float32, 32),
    21: ("int8", np.int8, 8),
    22: ("int16", np.int16, 16),
    23: ("int32", np.int32, 32),
    25: ("int4", np.int8, 4),
    31: ("uint8", np.uint8, 8),
    32: ("uint16", np.uint16, 16),
    33: ("uint32", np.uint32, 32),
    35: ("uint4", np.uint8, 4),
    36: ("uint2", np.uint8, 2),
    37: ("uint1", np.uint8, 1),
    38: ("uint6", np.uint8, 6),
    39: ("uint3", np.uint8, 3),
}
STRING = 2
NUMPY = {name: dtype for name, dtype, _ in DTYPES.values()} | {"string": np.str_}
BITS = {name: bits for name, _, bits in DTYPES.values()}


@dataclass(frozen=True)
class TensorType:
    """Type and shape of a value."""

    dtype: str  # "fp16", "fp32", "int32", "bool", "string", "uint4", ...
    shape: tuple[int | None, ...]  # None where the size is free

    @property
    def size(self) -> int:
        """The number of values; of a value in a file, where no size is free."""
        found = 1
        for side in self.shape:
            if side is None:
                raise Damaged("a stored value has a free size")
            found *= side
        return found


@dataclass(frozen=True)
class Value:
    """A constant: in the program itself, or at an offset of the weight file."""

    type: TensorType
    immediate: Any = None  # an array, or a str
    file: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Operation:
    """One line of the program. An input is the name of a value, a constant, or a tuple of those."""

    type: str
    inputs: Mapping[str, tuple[str | Value, ...]]
    outputs: Mapping[str, TensorType]
    attributes: Mapping[str, Value]

    @property
    def name(self) -> str:
        given = self.attributes.get("name")
        return str(given.immediate) if given is not None else next(iter(self.outputs), "?")


@dataclass
class Program:
    """The main function of an ML Program, and its weights."""

    path: Path
    specification_version: int
    opset: str
    inputs: dict[str, TensorType]  # as the model describes them to whoever calls it
    outputs: dict[str, TensorType]
    operations: list[Operation]
    metadata: dict[str, str]
    _files: dict[str, Buffer] = field(default_factory=dict)

    def read(self, value: Value) -> np.ndarray:
        """A constant's array. From the weight file it is a view, read when it is used; BundleError if damaged."""
        if not value.file:
            return np.asarray(value.immediate)
        try:
            return self._blob(value)
        except ValueError as error:
            raise BundleError(f"{self.path} refers to a damaged weight file: {error}; export it again") from None

    def _blob(self, value: Value) -> np.ndarray:
        if value.file not in self._files:
            self._files[value.file] = self._map(value.file)
        data = self._files[value.file]
        if value.offset + METADATA_BYTES > len(data):
            raise Damaged(f"it ends before offset {value.offset}")
        sentinel, _, size_bytes, offset = struct.unpack_from("<IIQQ", data, value.offset)
        bits = BITS[value.type.dtype]
        needed = -(-value.type.size * bits // 8)
        if sentinel != SENTINEL or size_bytes < needed or offset + needed > len(data):
            raise Damaged(f"no weight of {needed} bytes at offset {value.offset}")
        return unpack(data[offset : offset + needed], value.type)

    def _map(self, name: str) -> Buffer:
        if not name.startswith(MODEL_PATH):
            raise Damaged(f"weights are expected under {MODEL_PATH}, not at {name!r:.80}")
        path = inside(self.path.parent, name.removeprefix(MODEL_PATH), BundleError)
        try:
            with path.open("rb") as file:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise Damaged(f"{path.name} cannot be read: {error.strerror}") from None


def unpack(data: Buffer | bytes, tensor: TensorType) -> np.ndarray:
    """The array behind raw bytes; values of less than a byte become bytes, in the sign of their type."""
    bits, dtype, shape = BITS[tensor.dtype], NUMPY[tensor.dtype], [side or 0 for side in tensor.shape]
    if bits >= 8:
        return np.frombuffer(data, dtype, tensor.size).reshape(shape)
    found = unpack_bits(np.frombuffer(data, np.uint8), bits, tensor.size)
    if tensor.dtype == "int4":
        return (((found ^ 8).astype(np.int8)) - np.int8(8)).reshape(shape)
    return found.reshape(shape)


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 (count,) from values of `bits` bits, packed without gaps, lowest bits first."""
    if bits == 8:
        return packed[:count]
    if packed.size * 8 < count * bits:
        raise Damaged(f"{packed.size} bytes hold no {count} values of {bits} bits")
    # Eight values fill `bits` bytes exactly: shift whole groups instead of single bits.
    groups = -(-count // 8)
    padded = np.zeros(groups * bits, np.uint8)
    padded[: min(packed.size, padded.size)] = packed[: padded.size]
    words = np.zeros(groups, np.uint64)
    for i, column in enumerate(padded.reshape(groups, bits).T):
        words |= column.astype(np.uint64) << np.uint64(8 * i)
    found = np.empty((groups, 8), np.uint8)
    for i in range(8):
        found[:, i] = (words >> np.uint64(bits * i)) & np.uint64(2**bits - 1)
    return found.reshape(-1)[:count]


def read_program(path: Path) -> Program:
    """Decode model.mlmodel. Raises BundleError for files that are damaged, or no ML Program."""
    try:
        if path.stat().st_size > MAX_PROGRAM_BYTES:
            raise Damaged(f"it is larger than {MAX_PROGRAM_BYTES // 2**20} MiB")
        return _model(path, memoryview(path.read_bytes()))
    except (OSError, ValueError, OverflowError, KeyError, TypeError, struct.error) as error:
        raise BundleError(f"{path} is no ML Program that can be read: {error}; export it again") from None


def _model(path: Path, data: Buffer) -> Program:
    found = collect(data)
    if 502 not in found:
        raise Damaged("it holds no mlProgram")
    description = collect(one(found, 2))
    metadata = collect(one(description, 100)) if 100 in description else {}
    names = {1: "shortDescription", 2: "versionString", 3: "author", 4: "license"}
    words = {names[n]: text(v[-1]) for n, v in metadata.items() if n in names}
    function = collect(entries(collect(one(found, 502)).get(2, []))["main"])
    opset = text(one(function, 2))
    block = collect(entries(function.get(3, []))[opset])
    return Program(
        path=path,
        specification_version=int(one(found, 1)),
        opset=opset,
        inputs=dict(_feature(f) for f in description.get(1, [])),
        outputs=dict(_feature(f) for f in description.get(10, [])),
        operations=[_operation(o) for o in block.get(3, [])],
        metadata=words | {k: text(v) for k, v in entries(metadata.get(100, [])).items()},
    )


def _feature(data: Buffer) -> tuple[str, TensorType]:
    """FeatureDescription: a name and the array that it stands for."""
    found = collect(data)
    kinds = {65568: "fp32", 65552: "fp16", 131104: "int32"}
    array = collect(one(collect(one(found, 3)), 5))
    return text(one(found, 1)), TensorType(kinds[int(one(array, 2))], tuple(integers(array.get(1, []))))


def _operation(data: Buffer) -> Operation:
    found = collect(data)
    if 4 in found:
        raise Damaged("control flow, which no export of ours contains")
    operation = Operation(
        type=text(one(found, 1)),
        inputs={k: tuple(map(_binding, collect(v).get(1, []))) for k, v in entries(found.get(2, [])).items()},
        outputs=dict(_named_type(v) for v in found.get(3, [])),
        attributes={k: _value(v) for k, v in entries(found.get(5, [])).items()},
    )
    if not operation.outputs or (operation.type == "const" and "val" not in operation.attributes):
        raise Damaged("an operation without its result")
    return operation


def _binding(data: Buffer) -> str | Value:
    found = collect(data)
    return text(found[1][-1]) if 1 in found else _value(one(found, 2))


def _named_type(data: Buffer) -> tuple[str, TensorType]:
    found = collect(data)
    return text(one(found, 1)), _type(one(found, 2))


def _type(data: Buffer) -> TensorType:
    """ValueType: only tensors occur in our programs."""
    tensor = collect(one(collect(data), 1))
    kind = int(one(tensor, 1))
    sides: list[int | None] = []
    for dimension in tensor.get(3, []):
        constant = collect(dimension).get(1)
        sides.append(int(collect(constant[-1]).get(1, [0])[-1]) if constant else None)
    return TensorType("string" if kind == STRING else DTYPES[kind][0], tuple(sides))


def _value(data: Buffer) -> Value:
    found = collect(data)
    kind = _type(one(found, 2))
    if 5 in found:
        blob = collect(found[5][-1])
        return Value(kind, file=text(one(blob, 1)), offset=int(blob.get(2, [0])[-1]))
    return Value(kind, _immediate(collect(one(collect(one(found, 3)), 1)), kind))


def _immediate(tensor: dict[int, list[Any]], kind: TensorType) -> Any:
    """TensorValue: a oneof of packed numbers, strings, or raw bytes."""
    if 4 in tensor:
        words = [text(v) for v in collect(tensor[4][-1]).get(1, [])]
        return words[0] if not kind.shape and len(words) == 1 else np.array(words)
    shape = [side or 0 for side in kind.shape]
    readers: dict[int, Callable[[list[Any]], Any]] = {1: floats, 2: integers, 3: integers, 5: integers}
    for number, read in readers.items():
        if number in tensor:
            values = np.array(read(collect(tensor[number][-1]).get(1, [])), NUMPY[kind.dtype])
            return values.reshape(shape)
    if 7 in tensor:
        raw = collect(tensor[7][-1]).get(1, [b""])[-1]
        return unpack(raw, kind)
    if kind.size:
        raise Damaged("a constant without its value")
    return np.zeros(shape, NUMPY[kind.dtype])

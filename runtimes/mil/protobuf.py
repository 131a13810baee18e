"""Protobuf's wire format, as far as an ML Program needs it: each field is a key, (number << 3) | kind, and a payload.

    fields = collect(memoryview(path.read_bytes()))         # number -> payloads, in the file's order
    name = text(one(fields, 1))

The bytes are untrusted: every length is checked before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

Buffer = memoryview


class Damaged(ValueError):
    """The bytes do not follow their format; becomes a BundleError that names the file."""


def collect(data: Buffer) -> dict[int, list[Any]]:
    """A message's fields by number; embedded messages, strings and packed numbers are still bytes."""
    if not isinstance(data, memoryview):
        raise Damaged("a number where a message is expected")
    found: dict[int, list[Any]] = {}
    position, end = 0, len(data)
    while position < end:
        key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, position = _varint(data, position)
            found.setdefault(number, []).append(value)
            continue
        if kind == 2:
            length, position = _varint(data, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise Damaged(f"a field of kind {kind}")
        if position + length > end:
            raise Damaged("it ends in the middle of a field")
        found.setdefault(number, []).append(data[position : position + length])
        position += length
    return found


def _varint(data: Buffer, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise Damaged("it ends in the middle of a number")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def one(found: Mapping[int, list[Any]], number: int) -> Any:
    if number not in found:
        raise Damaged(f"field {number} is missing")
    return found[number][-1]


def entries(fields: list[Any]) -> dict[str, Buffer]:
    """A map: repeated messages of key and value."""
    pairs = (collect(entry) for entry in fields)
    return {text(pair.get(1, [memoryview(b"")])[-1]): pair.get(2, [memoryview(b"")])[-1] for pair in pairs}


def text(data: Buffer) -> str:
    if not isinstance(data, memoryview):
        raise Damaged("a number where a text is expected")
    return bytes(data).decode("utf-8")


def floats(fields: list[Any]) -> list[float]:
    return [v for data in fields for v in struct.unpack(f"<{len(data) // 4}f", data)]


def integers(fields: list[Any]) -> list[int]:
    """Signed 64-bit numbers, packed or not."""
    return [v - 2**64 if v >= 2**63 else v for v in _varints(fields)]


def _varints(fields: list[Any]) -> Iterator[int]:
    for data in fields:
        if isinstance(data, int):
            yield data
            continue
        position = 0
        while position < len(data):
            value, position = _varint(data, position)
            yield value

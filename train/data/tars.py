"""Tar files as rows: `KEY.jpg` (or png, webp, ...) beside `KEY.txt`, `KEY.cls` or `KEY.json`, one key after the other.

for row in TarRows(("part-0.tar",)):            # {"image": bytes, "txt": "a rose"}, or LeftOut

A member that cannot be read costs itself, a tar that breaks off costs what would have followed in it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from kdc_edge.train.data.images import SUFFIXES, LeftOut

MAX_IMAGE_BYTES = 2**28
MAX_TEXT_BYTES = 2**20
IMAGE = "image"  # the column, whatever the suffix


@dataclass(frozen=True)
class TarRows:
    """The rows of several tars, read from their beginnings at each pass."""

    files: tuple[str, ...]
    features: None = None  # as a `datasets` stream says that it does not know its columns

    def __iter__(self) -> Iterator[dict[str, Any] | LeftOut]:
        for file in self.files:
            try:
                yield from _rows(file)
            except Exception as error:  # tarfile's and the decompressors' errors share no root
                yield LeftOut(file, f"the tar breaks off: {type(error).__name__}")


def _rows(file: str) -> Iterator[dict[str, Any]]:
    key, row = "", dict[str, Any]()
    try:
        with tarfile.open(file, "r|*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, kind = path.name.partition(".")
                if not member.isreg() or not stem or not kind:
                    continue
                if row and key != str(path.parent / stem):
                    yield row
                    row = {}
                key = str(path.parent / stem)
                row |= _read(tar, member, kind.lower())
    except GeneratorExit:  # nobody reads on
        row = {}
        raise
    finally:
        if row:  # whole, even where the tar is cut behind it
            yield row


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, kind: str) -> dict[str, Any]:
    """The member's column and value; none where it cannot be used."""
    image = f".{kind}" in SUFFIXES
    if member.size > (MAX_IMAGE_BYTES if image else MAX_TEXT_BYTES) or not (image or kind in ("txt", "cls", "json")):
        return {}
    opened = tar.extractfile(member)
    assert opened is not None  # a regular file
    content = opened.read()
    if image:
        return {IMAGE: content}
    text = content.decode("utf-8", "replace")
    if kind == "txt":
        return {kind: text}
    try:
        value = json.loads(text) if kind == "json" else int(text)
    except (ValueError, RecursionError):
        return {}
    return {kind: value}

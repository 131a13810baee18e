"""What PyTorch computed before, in the user's cache folder: the next precision and target take it from there.

    key = hash_of("reference", checkpoint_sha256, requests=requests)
    reference = kept(Reference, key, lambda: record(checkpoint, requests))

An entry is one npz file, named by a hash of all that decides it. Entries that cannot be read are computed again, and
those used longest ago are removed beyond MAX_BYTES. A folder that cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np

from kdc_edge.files import user_cache, write_atomic
from kdc_edge.hardware import package_versions
from kdc_edge.request import Request

MAX_BYTES = 500_000_000  # of all; at 512 px a reference of four steps has 10 MB, 64 samples of calibration 39 MB
PACKAGES = ("kdc-edge", "torch", "diffusers", "transformers", "numpy")  # whose versions are part of the hash
FOLDER = "references"  # in the cache

Arrays = dict[str, np.ndarray]
Inputs = dict[str, np.ndarray]  # of a component's call, by name


class Keepable(Protocol):
    """What can be written as arrays and read again."""

    def arrays(self) -> Arrays: ...

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Self: ...


T = TypeVar("T", bound=Keepable)


def hash_of(kind: str, *parts: object, requests: Sequence[Request] = ()) -> str:
    """64 hex digits of the kind, its JSON parts, the requests and the versions of the libraries."""
    asked = [vars(request) | {"latents": None, "edit": None} for request in requests]  # an edit is the model's example
    content = json.dumps([kind, parts, asked, package_versions(PACKAGES)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def kept(kind: type[T], key: str, make: Callable[[], T]) -> T:
    """The object that is kept under the key; else the one that `make` gives, kept from now on."""
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, or one that cannot be written
        path = user_cache() / FOLDER / f"{key}.npz"
        if (found := _read(kind, path)) is not None:
            with contextlib.suppress(OSError):  # another user's
                path.touch()
            return found
    made = make()
    with contextlib.suppress(OSError, RuntimeError):
        path = user_cache() / FOLDER / f"{key}.npz"
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **made.arrays())
        if len(content := stream.getvalue()) <= MAX_BYTES:  # else all others would go for its sake
            write_atomic(path, content)
            _remove_oldest(path.parent)
    return made


def pack_inputs(component: str, calls: Sequence[Inputs]) -> Arrays:
    """A component's inputs, call by call, under names of their own."""
    return {f"{component}/{i}/{name}": value for i, inputs in enumerate(calls) for name, value in inputs.items()}


def unpack_inputs(component: str, arrays: Arrays) -> list[Inputs]:
    """What `pack_inputs` was given. Raises KeyError where there is none."""
    found: dict[int, Inputs] = {}
    for path, value in arrays.items():
        owner, *call = path.split("/", 2)
        if owner == component and len(call) == 2:
            number, name = call
            found.setdefault(int(number), {})[name] = value
    if not found:
        raise KeyError(component)
    return [found[number] for number in sorted(found)]


def _read(kind: type[T], path: Path) -> T | None:
    """None where there is none, or one that is not whole."""
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}  # zip compares each with its checksum
        return kind.from_arrays(arrays)
    except Exception:  # numpy and zipfile raise whatever comes
        return None


def _remove_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in entries:
        total += path.stat().st_size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)

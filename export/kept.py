"""References that were computed before, in the user's cache folder: the next precision and target take them from there.

    reference = kept_reference(key_of(manifest.provenance, requests), lambda: record(checkpoint, requests))

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

import numpy as np

from kdc_edge.components import COMPONENTS
from kdc_edge.export.reference import Reference
from kdc_edge.files import user_cache, write_atomic
from kdc_edge.hardware import package_versions
from kdc_edge.manifest import Provenance
from kdc_edge.request import Request

MAX_BYTES = 500_000_000  # of all entries; at 512 px one of four steps has 10 MB
PACKAGES = ("kdc-edge", "torch", "diffusers", "transformers", "numpy")  # whose versions are part of the hash


def key_of(provenance: Provenance, requests: Sequence[Request]) -> str:
    """64 hex digits of the weights, the requests and the versions of the libraries."""
    parts = [
        provenance.checkpoint_sha256,
        provenance.decoder_sha256,
        [vars(request) | {"latents": None, "edit": None} for request in requests],  # an edit is the model's example
        package_versions(PACKAGES),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def kept_reference(key: str, make: Callable[[], Reference]) -> Reference:
    """The reference that is kept under the key; else the one that `make` gives, kept from now on."""
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, or one that cannot be written
        path = user_cache() / "references" / f"{key}.npz"
        if (found := _read(path)) is not None:
            with contextlib.suppress(OSError):  # another user's
                path.touch()
            return found
    made = make()
    with contextlib.suppress(OSError, RuntimeError):
        path = user_cache() / "references" / f"{key}.npz"
        write_atomic(path, _to_bytes(made))
        _remove_oldest(path.parent)
    return made


def _to_bytes(reference: Reference) -> bytes:
    arrays: dict[str, np.ndarray] = {"made_by": np.array(reference.made_by)}
    arrays |= {f"image/{i}": image for i, image in enumerate(reference.images)}
    for component, calls in reference.calls.items():
        for i, (inputs, output) in enumerate(calls):
            arrays[f"{component}/{i}"] = output
            arrays |= {f"{component}/{i}/{name}": value for name, value in inputs.items()}
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _read(path: Path) -> Reference | None:
    """None where there is none, or one that is not whole."""
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}  # zip compares each with its checksum
        images = [arrays[f"image/{i}"] for i in range(sum(name.startswith("image/") for name in arrays))]
        calls = {component: _calls(arrays, component) for component in COMPONENTS}
        return Reference(calls, images, str(arrays["made_by"]))
    except Exception:  # numpy and zipfile raise whatever comes
        return None


def _calls(arrays: dict[str, np.ndarray], component: str) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    found: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
    while (prefix := f"{component}/{len(found)}") in arrays:
        inputs = {n.removeprefix(f"{prefix}/"): a for n, a in arrays.items() if n.startswith(f"{prefix}/")}
        found.append((inputs, arrays[prefix]))
    if not found:
        raise KeyError(component)
    return found


def _remove_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in entries:
        total += path.stat().st_size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)

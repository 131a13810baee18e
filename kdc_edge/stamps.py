"""Hashes of large files, found once: a file that the system says is unchanged since is not read again.

    known_sha256(Path("bundles/onnx-fp16/unet/model.onnx"))     # reads 1 GB the first time, nothing after that

A stamp holds size, times of change, inode and hash; it lies in the user's cache. The time of a change of the inode
(st_ctime) cannot be set by a program, so a file that was written to and given its old time back is read again.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from kdc_edge.errors import KdcError
from kdc_edge.files import read_json, sha256, user_cache, write_atomic

LEAST_BYTES = 2**20  # a smaller file is read as fast as its stamp
SETTLED_NS = 2 * 10**9  # a file may change again within the resolution of its times: none is kept before


def known_sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits: as it was found before, where the file is the same."""
    begin, state = time.time_ns(), _state(path)
    if state["size"] < LEAST_BYTES:
        return sha256(path)
    stamp = _stamp(path)
    if stamp is not None:
        with suppress(KdcError, OSError):
            found = read_json(stamp, KdcError)
            if found.items() >= state.items() and isinstance(known := found.get("sha256"), str):
                return known
    computed = sha256(path)
    settled = begin - max(state["mtime_ns"], state["ctime_ns"]) > SETTLED_NS
    if stamp is not None and settled and _state(path) == state:
        with suppress(OSError):  # a cache that cannot be written to: the file is read again
            write_atomic(stamp, json.dumps({"file": str(path.resolve()), "sha256": computed, **state}))
    return computed


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {
        "size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino,
        "device": found.st_dev,
    }  # fmt: skip


def _stamp(path: Path) -> Path | None:
    """Where the file's stamp lies; None where there is no place for it."""
    try:
        folder = user_cache() / "hashes"
    except RuntimeError:  # no home folder
        return None
    return folder / f"{hashlib.sha256(str(path.resolve()).encode(errors='surrogateescape')).hexdigest()[:32]}.json"

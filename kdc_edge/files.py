"""Files that are whole or not there: atomic writes, hashes, paths that stay in their folder.

with atomic_folder(Path("bundles/onnx-fp16")) as temporary:
    (temporary / "model.onnx").write_bytes(...)     # on an error: the old folder, untouched
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from kdc_edge.errors import InputError, KdcError

MAX_JSON_BYTES = 16 * 2**20
MAX_PATH_CHARS = 1000
MAX_NAME_BYTES = 255


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, flush it to the disk, and rename it in."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(out: Path, *, marker: str | None = None) -> Iterator[Path]:
    """Fill a temporary folder beside `out`; it takes `out`'s place when the block ends without an error.

    A folder that is already there is replaced only when it holds `marker`, the file that says it is ours.
    """
    refuse_foreign_folder(out, marker)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.part-"))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if out.exists():
            old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
            out.replace(old / out.name)
            try:
                temporary.replace(out)
            except BaseException:
                (old / out.name).replace(out)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_foreign_folder(out: Path, marker: str | None) -> None:
    """Stop before the work starts when `out` holds something that is not ours to replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file: choose another place for the folder")
    if any(out.iterdir()) and not (marker and (out / marker).is_file()):
        raise InputError(f"{out} exists and holds other files: choose another place, or empty it first")


def read_json(path: Path, error: type[KdcError]) -> dict[str, object]:
    """A JSON object from an untrusted file; `error` says in one line what is wrong with it."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise error(f"{path} is larger than {MAX_JSON_BYTES // 2**20} MiB: not a configuration file")
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(found, dict):
        raise error(f"{path} should hold a JSON object")
    return found


def inside(root: Path, relative: str, error: type[KdcError]) -> Path:
    """`root / relative`, refused when it leaves `root`: by `..`, as an absolute path, or through a link."""
    parts = PurePosixPath(relative)
    if not relative.isprintable():  # a line break would also break the one line of an error
        raise error(f"{root} names the path {relative!r:.200}, which is no file's name: do not use this folder")
    if parts.is_absolute() or ".." in parts.parts or "\\" in relative or ":" in relative or not parts.parts:
        raise error(f"{root} names the path {relative!r:.200}, which leaves the folder: do not use this folder")
    if len(relative) > MAX_PATH_CHARS or any(len(part.encode()) > MAX_NAME_BYTES for part in parts.parts):
        raise error(f"{root} names the path {relative!r:.80}..., which is too long for a file")
    path = root / parts
    try:
        leaves = not path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as problem:  # a NUL in the name, a circle of links
        raise error(f"{root} names the path {relative!r:.200}, which cannot be a file: {problem}") from None
    if leaves:
        raise error(f"{path} is a link out of its folder: do not use this folder")
    return path


def parse_size(text: str, option: str) -> int:
    """ "300MB" -> 300,000,000 bytes. Raises InputError that names the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", text.strip())
    if not found:
        raise InputError(f"{option} {text!r:.40} is no size: use 300MB or 1.5GB")
    units = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
    return int(float(found[1]) * units[found[2]])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

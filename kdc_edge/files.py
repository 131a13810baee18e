"""Files that are whole or not there: atomic writes, bounded reads, hashes, paths that stay in their folder.

with atomic_folder(Path("bundles/onnx-fp16")) as temporary:
    (temporary / "model.onnx").write_bytes(...)     # on an error: the old folder, untouched

What is being written is hidden and locked: `.NAME.part-new` for a folder, `.NAME.part` for a file. The lock ends with
its process, so a part without one was left by a process that was killed, and the next writer removes it. The same
holds for the system's folder of temporary files and `.kdc-edge-part-…`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from blake3 import blake3

from kdc_edge.errors import InputError, KdcError

if sys.platform != "win32":
    import fcntl

MAX_JSON_BYTES = 16 * 2**20
MAX_PATH_CHARS = 1000
MAX_NAME_BYTES = 255
TEMPORARY = ".kdc-edge-part-"  # how a temporary folder's name begins
FileState = tuple[int, int, int, int, int]  # device, inode, size in bytes, times of change of content and inode in ns
HashName = Literal["sha256", "blake3"]
HASHES: dict[HashName, Callable[[], Any]] = {"sha256": hashlib.sha256, "blake3": blake3}
BLOCK = 2**20  # bytes; read into a processor's second cache and hashed there: faster than more, and than mapping
PART, OLD = ".part-new", ".part-old"  # of a folder: what comes, and what goes where two folders cannot be exchanged


def hash_file(path: Path, *names: HashName) -> dict[HashName, str]:
    """The file's hashes, each as 64 hexadecimal digits; the file is read once."""
    found = {name: HASHES[name]() for name in names}
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            for hasher in found.values():
                hasher.update(block[:size])
    return {name: hasher.hexdigest() for name, hasher in found.items()}


def sha256(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    return hash_file(path, "sha256")["sha256"]


def file_state(path: Path) -> FileState:
    """What tells a file that was written or replaced: no program can set the time of a change of the inode."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def user_cache() -> Path:
    """The folder for what can be computed again: KDC_EDGE_CACHE, else `kdc-edge` in the system's place for caches.

    Raises RuntimeError where there is no home folder.
    """
    if own := os.environ.get("KDC_EDGE_CACHE"):
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kdc-edge"


def write_atomic(path: Path, content: str | bytes, *, new: bool = False) -> None:
    """Write a file beside its place, flush it to the disk, and rename it in.

    With `new`, raises FileExistsError where another process took the name before, and leaves its file.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with os.fdopen(_lock(part, wait=True, flags=os.O_RDWR | os.O_CREAT), "wb") as file:
        try:
            if new and path.exists():  # looked at under the lock, which every writer of this name takes
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            file.truncate()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(out: Path, *, marker: str | None = None) -> Iterator[Path]:
    """Fill a hidden folder beside `out`; it takes `out`'s place when the block ends without an error.

    A folder that is already there is replaced only when it holds `marker`, the file that says it is ours; no moment
    is without the old one or the new. Raises InputError for another folder, and while another process writes this one.
    """
    refuse_foreign_folder(out, marker)
    out = out.resolve()  # a link to a folder stays a link
    out.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(out, PART)
    with ExitStack() as locks:
        try:
            locks.callback(os.close, _new_part(part))
        except BlockingIOError:
            raise being_written(out) from None
        try:
            _clear_left_over(out.parent)
            yield part
            refuse_foreign_folder(out, marker)  # the work took its time
            if out.exists():  # it stands in the part's place until it is removed, and is nobody's to take over
                locks.callback(os.close, _lock(out, wait=True))
            _take_place(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _take_place(part: Path, out: Path) -> None:
    """`part` becomes `out`, and an old `out` goes; in one step where the system can exchange two folders."""
    if not out.exists():
        part.replace(out)
        return
    old = part
    if not _exchange(part, out):
        old = _beside(out, OLD)
        out.replace(old)
        try:
            part.replace(out)
        except BaseException:
            old.replace(out)
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait. `lock` is an empty file, which stays."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _lock(lock, wait=True, flags=os.O_RDWR | os.O_CREAT)
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """The folder is this process's alone until the block ends; raises InputError where it is another's."""
    try:
        lock = _lock(folder.resolve())  # runs/latest is a link
    except BlockingIOError:
        raise being_written(folder) from None
    try:
        yield
    finally:
        os.close(lock)


def being_written(out: Path) -> InputError:
    """The line for a folder that another process has."""
    return InputError(f"{out} is being written by another process: wait for its end, or choose another place")


def check_writable(path: Path) -> None:
    """Raise InputError for a file that could not be written, before the work whose result it is to hold."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        with suppress(FileNotFoundError):
            (nearest / f".{path.name}.part").lstat()  # as `write_atomic` names it: longer than the file's own name
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError) -> InputError:
    """The line for a file that cannot be written."""
    return InputError(f"{path} cannot be written: {error.strerror or error}; choose another place")


def recover_folder(out: Path) -> None:
    """Put back the folder that a process left aside when it was killed in the middle of `_take_place`."""
    if out.exists():  # also "." and "..", which nothing can lie beside by name
        return
    old = _beside(out, OLD)
    if not old.exists():
        return
    with suppress(BlockingIOError):  # its writer lives, and is about to
        lock = _new_part(part := _beside(out, PART))
        try:
            if not out.exists():
                old.replace(out)
        finally:
            part.rmdir()
            os.close(lock)


def _clear_left_over(folder: Path) -> None:
    """Remove or put back what killed processes left in a folder, whatever they were writing."""
    for old in folder.glob(f".*{OLD}"):
        out = old.with_name(old.name.removeprefix(".").removesuffix(OLD))
        recover_folder(out)
        shutil.rmtree(old, ignore_errors=True)
    for part in folder.glob(f".*{PART}"):
        with suppress(OSError):  # locked: it is being written; gone: another process was faster
            lock = _lock(part)
            shutil.rmtree(part, ignore_errors=True)
            os.close(lock)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files, removed when the block ends."""
    # Those of killed processes go first.
    place = Path(tempfile.gettempdir())
    if sys.platform != "win32":  # without locks, whose process lives is not known
        for left in place.glob(f"{TEMPORARY}*"):
            with suppress(OSError):  # in use, another user's, or gone
                lock = _lock(left)
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=place))
        with suppress(FileNotFoundError, BlockingIOError):  # taken for left over between these two lines: once more
            lock = _lock(folder)
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}{suffix}")


def _new_part(part: Path) -> int:
    """An empty folder and its lock's descriptor; BlockingIOError while another process has it."""
    while True:
        try:
            part.mkdir()
        except FileExistsError:
            with suppress(FileNotFoundError):  # another process was faster
                lock = _lock(part)
                shutil.rmtree(part)
                os.close(lock)
        else:
            with suppress(FileNotFoundError):  # taken for left over between these two lines: once more
                return _lock(part)


def _lock(path: Path, *, wait: bool = False, flags: int = os.O_RDONLY) -> int:
    """A locked descriptor of what stands at `path`. Raises BlockingIOError where another has it, and we do not wait."""
    while True:
        if sys.platform == "win32":  # no folder can be opened there, and nothing renamed that is open: no locks
            return os.open(path if flags & os.O_CREAT else os.devnull, flags, 0o666)
        lock = os.open(path, flags | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks
                    raise
            if os.path.samestat(os.fstat(lock), path.stat(follow_symlinks=False)):  # not renamed while we waited
                return lock
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                os.close(lock)
                raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    if sys.platform == "win32":
        return False
    libc, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(a), os.fsencode(b))
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:  # an older C library
        return False
    if failed and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    return not failed


def refuse_foreign_folder(out: Path, marker: str | None) -> None:
    """Stop before the work starts when `out` holds something that is not ours to replace."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file: choose another place for the folder")
    if any(out.iterdir()) and not (marker and (out / marker).is_file()):
        raise InputError(f"{out} exists and holds other files: choose another place, or empty it first")


def read_bounded(path: Path, limit_bytes: int, error: type[KdcError]) -> bytes:
    """The content of an untrusted file. Raises OSError where it cannot be read, and `error` for what is larger, and
    for what is no regular file: a pipe or a device would never end."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe is not waited for

    with open(path, "rb", opener=opener) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise error(f"{path} is a device or a pipe: a regular file is needed")
        found = file.read(limit_bytes + 1)
    if len(found) > limit_bytes:
        raise error(f"{path} is larger than {limit_bytes // 2**20} MiB: that is no file of its kind")
    return found


def read_json(path: Path, error: type[KdcError]) -> dict[str, object]:
    """A JSON object from an untrusted file; `error` says in one line what is wrong with it."""
    try:
        found = json.loads(read_bounded(path, MAX_JSON_BYTES, error).decode())
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(found, dict):
        raise error(f"{path} should hold a JSON object")
    return found


def homes(root: Path) -> list[Path]:
    """Where the files of a folder may lie: in it; the hub's cache keeps a snapshot's files as links to its `blobs`."""
    root = root.resolve()
    return [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]


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
        place = path.resolve()
        leaves = not any(place.is_relative_to(home) for home in homes(root))
    except (OSError, ValueError, RuntimeError) as problem:  # a NUL in the name, a circle of links
        raise error(f"{root} names the path {relative!r:.200}, which cannot be a file: {problem}") from None
    if leaves:
        raise error(f"{path} is a link out of its folder: do not use this folder")
    return path


def parse_size(text: str, option: str) -> int:
    """ "300MB" -> 300,000,000 bytes. Raises InputError that names the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MB|GB|MiB|GiB)", text.strip())
    units = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
    size = float(found[1]) * units[found[2]] if found else 0.0
    if not 1 <= size < math.inf:
        raise InputError(f"{option} {text!r:.40} is no size: use 300MB or 1.5GB")
    return int(size)

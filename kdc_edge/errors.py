"""What can go wrong, as one tree. The command line turns these, and what the system refuses, into one line.

    KdcError
    ├── BundleError         an exported folder is missing, incomplete, changed or unsafe
    ├── CheckpointError     a diffusers folder is missing, incomplete, pickled or of another architecture
    ├── ParityError         an artifact does not compute what PyTorch computes
    ├── InputError          a prompt, size, step count, file or value that cannot be used
    │   └── UsageError      a choice that does not exist; exit code 2
    ├── HubError            a repository of the Hugging Face hub cannot be had, or written to
    └── MissingPackageError an optional package is needed: names the extra to install

A message says what was wrong, why, and what to do, in one line. It names what Python and HTTP ask for too by its word,
"width 65 cannot be made", not by the command line's option. KdcWarning is no error: Python's warning about an image
that is made in another way than was asked.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import shutil
from collections.abc import Iterable
from types import ModuleType

MEMORY = "there is too little memory: close other programs, or use --low-memory, a smaller size or a smaller precision"
PERMISSION = "choose another place, or change its permissions"
ROOM = "make room on the disk, or choose another place"
# What to do about an error of the system's.
REMEDIES = {
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: PERMISSION,
    errno.ENOSPC: ROOM,
    errno.EDQUOT: ROOM,
    errno.EFBIG: ROOM,
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "check the name",
    errno.EISDIR: "name a file",
    errno.ELOOP: "name the place itself, not a circle of links",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.EIO: "check the disk",
}


class KdcError(Exception):
    """The root: everything that kdc-edge raises on purpose."""

    exit_code = 1


class BundleError(KdcError):
    """An exported folder is missing, incomplete, changed or unsafe."""


class CheckpointError(KdcError):
    """A checkpoint folder is missing, incomplete, pickled or of another architecture."""


class ParityError(KdcError):
    """An artifact does not compute what PyTorch computes."""


class InputError(KdcError):
    """A value from the user that cannot be used."""


class UsageError(InputError):
    """A choice that does not exist: wrong usage, like an unknown flag."""

    exit_code = 2


class HubError(KdcError):
    """A repository of the Hugging Face hub cannot be had, or written to."""


class MissingPackageError(KdcError):
    """An optional package is needed."""


class KdcWarning(UserWarning):
    """A request is made in another way than was asked, or a better value is known; the message says which."""


def unknown_choice(option: str, value: object, choices: Iterable[str], words: str | None = None) -> UsageError:
    """The error for a value that is none of the choices, with the nearest of them; `words` instead of "is unknown".

    >>> str(unknown_choice("--schedule", "cosin", ("cosine", "constant")))
    "--schedule 'cosin' is unknown, did you mean cosine? Choose from cosine, constant"
    """
    names = list(choices)
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(str(value).lower()[:80], lower, n=1, cutoff=0.7)
    hint = f", did you mean {lower[near[0]]}? Choose" if near else ": choose"
    return UsageError(f"{words or f'{option} {value!r:.80} is unknown'}{hint} from {', '.join(names)}")


def require(package: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say what needs it and how to get it.

    >>> require("json", extra="onnx", purpose="an example").__name__
    'json'
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise  # the package is there but broken: its own words help more
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed: pip install 'kdc-edge[{extra}]'"
        ) from error


def explain(error: BaseException) -> str:
    """Any exception as what was wrong and what to do. Only what nobody foresaw is called a fault of kdc-edge."""
    words = str(error) or type(error).__name__
    if isinstance(error, KdcError):
        return words
    if isinstance(error, MemoryError) or "out of memory" in words or "bad_alloc" in words:
        return MEMORY
    if "iostream error" in words:  # openvino's word for a file that it cannot write
        return f"a file could not be written: {ROOM}"
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of a folder: source, target, reason
        _, target, reason = error.args[0][0]
        known = next((number for number in REMEDIES if f"[Errno {number}]" in reason), None)
        error = error if known is None else OSError(known, os.strerror(known), target)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0, "the system refuses it; --debug shows where")
        return f"{place}{error.strerror}: {remedy}"
    if isinstance(error, RecursionError):
        return "an input is nested too deeply to be read: --debug shows which"
    if isinstance(error, ImportError):
        return f"a package is damaged ({words}): install it again"
    return f"{type(error).__name__}: {words}: kdc-edge did not expect this; please report it with what --debug shows"

"""The Hugging Face hub: bundles and checkpoints fetched by name, and pushed.

    folder = local("hf:someone/flowers-onnx-int8@v1")     # in the hub's cache; any other path stays as it is
    url = push(Path("bundles/onnx-int8"), "someone/flowers-onnx-int8", card="...")

Only the files that a bundle's manifest lists are fetched, and each has the size and the hash that it lists; of a
checkpoint, configurations and safetensors. Cache, token (HF_TOKEN, `hf auth login`), HF_HUB_OFFLINE and HF_ENDPOINT are
those of huggingface_hub. What lies on the hub is as untrusted as any other folder.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType

from kdc_edge.bundle import MODEL_INDEX, Bundle, kind_of
from kdc_edge.diffusers_folder import PARTS, ROOT_FILES, SUFFIXES, read_model
from kdc_edge.errors import BundleError, CheckpointError, HubError, InputError, require
from kdc_edge.manifest import MANIFEST, read_manifest
from kdc_edge.text import encodable, one_line
from kdc_edge.weight_files import WEIGHTS, weights_of

PREFIX = "hf:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
CARD = "README.md"
CHECKPOINT_FILES = (
    *ROOT_FILES,
    "tokenizer/*",
    "scheduler/*.json",
    *(f"{network}/*" for network in ("text_encoder", "unet", "vae")),
)
CHECKPOINT_LEFT = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.onnx*", "*.non_ema.*")
HALF = "*.fp16.*"  # weights that are fetched where there are no others
PICKLES = (".ckpt", ".pickle", ".pkl", ".pt", ".pth")  # no bundle has these; OpenVINO's .bin is plain weights


def is_hub_id(name: str) -> bool:
    """Is this `owner/name`, and no folder or place for one?"""
    return not Path(name).exists() and HUB_ID.fullmatch(name) is not None and not Path(name).parent.exists()


def is_remote(place: Path | str) -> bool:
    """Does the name begin with `hf:`?"""
    return str(place).startswith(PREFIX)


def local(place: Path | str, files: Sequence[str] | None = None) -> Path:
    """The folder of `hf:OWNER/NAME[@REVISION]` in the hub's cache, fetched where needed; another path as it is.

    `files`, patterns of names, are fetched in place of a bundle or a checkpoint where they are given. Raises InputError
    for a name of another form, and HubError for what cannot be had or is not what it should be.
    """
    if not is_remote(place):
        return Path(place)
    text = place.as_posix() if isinstance(place, Path) else place
    name, at, revision = text.removeprefix(PREFIX).partition("@")
    if not HUB_ID.fullmatch(name) or (at and not revision):
        raise InputError(f"{text!r:.200} names no repository: use hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return fetch(name, revision or None, files)


def find_checkpoint(name: str, files: Sequence[str] | None = None) -> Path:
    """As `local`; `owner/name` without the prefix is a hub id too. Raises CheckpointError where that cannot be had."""
    if not is_hub_id(name):
        return local(name, files)
    try:
        return fetch(name, files=files)
    except HubError as error:
        raise CheckpointError(f"{name} is neither a folder nor can it be had from the hub: {error}") from None


def fetch(name: str, revision: str | None = None, files: Sequence[str] | None = None) -> Path:
    """The bundle or checkpoint of a repository, or the files of these patterns, in the hub's cache. Raises HubError."""
    hub = require("huggingface_hub", extra="hub", purpose="a hub id")
    if files is not None:
        return _download(hub, name, revision, files)
    folder = _download(hub, name, revision, [MANIFEST, MODEL_INDEX])
    commit = folder.name  # of all that follows, whatever is pushed meanwhile
    if kind_of(folder) == "bundle":
        try:
            listed = read_manifest(folder).files
            _refuse_pickles(listed)
            _download(hub, name, commit, [MANIFEST, *(glob.escape(file) for file in listed)])
            Bundle.open(folder).check_hashes()
        except BundleError as error:
            raise HubError(f"{PREFIX}{name} is not as its manifest says: {error}") from None
    elif kind_of(folder) == "checkpoint":
        _download(hub, name, commit, CHECKPOINT_FILES, (*CHECKPOINT_LEFT, HALF))
        if not all(weights_of(folder / part).files for part in WEIGHTS):
            _download(hub, name, commit, CHECKPOINT_FILES, CHECKPOINT_LEFT)
    else:
        raise HubError(
            f"{PREFIX}{name} is neither a bundle nor a checkpoint: it has no {MANIFEST} and no {MODEL_INDEX}"
        )
    return folder


def label(folder: Path) -> str:
    """A folder's name in records: `owner/name@commit` (8 digits) in the hub's cache, else its last part."""
    folder = folder.resolve()
    name = _repository(folder)
    return encodable(folder.name) if name is None else f"{name}@{folder.name[:8]}"


def hub_id(text: str) -> str | None:
    """The `owner/name` of a label or of a hub id; None for other names."""
    name, _, _ = text.partition("@")
    return name if HUB_ID.fullmatch(name) else None


def push(
    folder: Path, name: str, *, card: str, private: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """Push a bundle or a checkpoint in one commit, `card` as its README.md; the commit's address.

    The repository is made where there is none, and `revision`, a branch, too. Files that lie there under other names
    stay. Raises a KdcError; a bundle whose hashes do not hold is not pushed.
    """
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name!r:.200} names no repository: use OWNER/NAME")
    files = files_to_push(folder)
    hub = require("huggingface_hub", extra="hub", purpose="kdc-edge push")
    with _explained(name):
        if hub.get_token() is None:
            raise HubError("there is no token for the hub: log in with hf auth login, or set HF_TOKEN")
        api = hub.HfApi(library_name="kdc-edge")
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise HubError(f"{PREFIX}{name} is there and public: change that on its page, or push to another name")
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        additions = [hub.CommitOperationAdd(file, folder / file) for file in files]
        additions.append(hub.CommitOperationAdd(CARD, card.encode()))
        made = api.create_commit(name, additions, commit_message=message or f"Push {folder.name}", revision=revision)
    return str(made.commit_url)


def files_to_push(folder: Path) -> list[str]:
    """The files of a bundle, whose hashes are checked, or of a checkpoint, that its loading reads."""
    kind = kind_of(folder)
    if kind == "checkpoint":
        read_model(folder)  # refuses pickles, links that lead elsewhere, and what is incomplete
        inside = (path for part in PARTS for path in (folder / part).rglob("*"))
        paths = [*(folder / name for name in ROOT_FILES), *inside]
        kept = [path for path in paths if path.suffix in SUFFIXES and path.is_file()]
        return sorted(path.relative_to(folder).as_posix() for path in kept)
    bundle = Bundle.open(folder)
    bundle.verify()
    _refuse_pickles(bundle.manifest.files)
    return sorted([*bundle.manifest.files, MANIFEST])


def _refuse_pickles(files: Iterable[str]) -> None:
    for file in files:
        if PurePosixPath(file).suffix in PICKLES:
            raise BundleError(f"{file!r:.200} is a pickle, which can run code: do not use this bundle")


def _repository(snapshot: Path) -> str | None:
    """The `owner/name` of a snapshot in the hub's cache."""
    home = snapshot.parent.parent.name.split("--")
    is_snapshot = snapshot.parent.name == "snapshots" and COMMIT.fullmatch(snapshot.name)
    return f"{home[1]}/{'--'.join(home[2:])}" if is_snapshot and home[0] == "models" and len(home) > 2 else None


def _download(
    hub: ModuleType, name: str, revision: str | None, patterns: Sequence[str], ignored: Sequence[str] = ()
) -> Path:
    """The snapshot's folder with the files of these patterns, from the cache where the hub cannot be reached."""
    with _explained(name if revision is None else f"{name}@{revision}"):
        return Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored))
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the library raises, as a HubError with one line; it has a dozen kinds."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        raise HubError(f"{PREFIX}{name}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from huggingface_hub import constants, errors  # the package does not import its parts by itself

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "Error while uploading"
    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"access to it must be granted: ask for it on its page, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision: check what follows the @"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one: check the name, or {login}"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return "it is not in the cache, not all of it, and HF_HUB_OFFLINE is set: fetch it once without"
        return "it is not in the cache and the hub cannot be reached: check the network and HF_ENDPOINT"
    if status in (401, 403):
        return f"the hub refuses this account (status {status}): {login}, with the right to do this"
    if "Connect" in type(error).__name__ or "Timeout" in type(error).__name__:
        return "the hub cannot be reached: check the network and HF_ENDPOINT"
    if status is not None:
        return f"the hub answers with status {status}: {one_line(getattr(error, 'server_message', None) or error, 150)}"
    return f"{one_line(error, 200)}: check the name, the network and the room on the disk"

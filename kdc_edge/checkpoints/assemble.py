"""Any checkpoint as a diffusers folder: as it is, or assembled once in the user's cache folder.

    open_checkpoint("owner/name")                                            # the hub's snapshot
    open_checkpoint("model.safetensors", Additions(vae=Path("vae.safetensors")), say=print)

What can be seen in the headers of the files is refused before a weight is read; the folder appears when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from kdc_edge.bundle import MODEL_INDEX
from kdc_edge.checkpoints.embedding import Embedding
from kdc_edge.checkpoints.lora import Lora, fuse
from kdc_edge.checkpoints.networks import Parts, State, convert, read_vae, read_vae_config, scaling_factor
from kdc_edge.checkpoints.parts import copy_part, read_config, write_small_parts
from kdc_edge.checkpoints.single_file import (
    Original,
    check_parts,
    read_single_file,
)
from kdc_edge.components import CHECKER
from kdc_edge.diffusers_defaults import Settings
from kdc_edge.diffusers_folder import (
    PICKLES,
    SOURCES_FILE,
    check_checker,
    hash_checkpoint,
    optional_components,
    read_model,
)
from kdc_edge.errors import CheckpointError, InputError, require, unknown_choice
from kdc_edge.files import atomic_folder, check_writable, exclusive, read_json, sha256, user_cache, write_atomic
from kdc_edge.hub import find_checkpoint
from kdc_edge.manifest import MANIFEST, Source
from kdc_edge.noise_schedule import PREDICTION_TYPES
from kdc_edge.quiet import quiet
from kdc_edge.text import encodable, megabytes
from kdc_edge.weight_files import WEIGHTS, weights_of

FORMAT = 2  # of assembled folders: raise it where the same files become other weights
CHECKPOINTS = "checkpoints"  # their folder in the user's cache

Say = Callable[[str], None]


@dataclass(frozen=True)
class Additions:
    """What is put to a checkpoint before it is used: in the order of VAE, LoRAs, tokens."""

    vae: Path | None = None
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    prediction_type: str | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise unknown_choice("--prediction-type", self.prediction_type, PREDICTION_TYPES)

    @classmethod
    def parse(
        cls, vae: Path | None, loras: Sequence[str] | None, embeddings: Sequence[str] | None, prediction: str | None
    ) -> Additions:
        """As the command line gives them."""
        return cls(vae, tuple(map(Lora.parse, loras or ())), tuple(map(Embedding.parse, embeddings or ())), prediction)

    def __bool__(self) -> bool:
        return self != Additions()

    def check(self) -> None:
        """Raise CheckpointError for a file of another kind, by its header."""
        for lora in self.loras:
            lora.check()
        for embedding in self.embeddings:
            embedding.check()
        if self.vae is not None:
            read_vae_config(self.vae)

    def sources(self) -> Iterator[Source]:
        if self.vae is not None:
            yield _source("vae", self.vae)
        for lora in self.loras:
            yield _source("lora", lora.path, lora.weight)
        for embedding in self.embeddings:
            yield _source("embedding", embedding.path)


NOTHING = Additions()


def open_checkpoint(
    source: Path | str, additions: Additions = NOTHING, *, say: Say = lambda _: None, as_teacher: bool = False
) -> Path:
    """A diffusers folder of this checkpoint: a folder, a single file, or a hub id. Raises CheckpointError.

    A single file, and whatever has additions, is assembled once in the user's cache folder and found there again.
    `as_teacher` refuses what can be exported but is no teacher: see `read_model`.
    """
    path = Path(source)
    if path.is_file() and path.name in (MANIFEST, MODEL_INDEX):
        raise CheckpointError(f"{path} is one file of a bundle or a checkpoint: name its folder, {path.parent}")
    if is_single_file(path):
        original = read_single_file(path, additions.prediction_type)
        additions.check()
        vae = original.vae if additions.vae is None else read_vae_config(additions.vae)
        check_parts(original, vae, as_teacher=as_teacher)
        for note in original.notes:
            say(note)
        return _assembled(path, original, additions, say)
    path = find_checkpoint(str(source))
    read_model(path, as_teacher=as_teacher)  # refuses what cannot be used, before any work
    for part in WEIGHTS:
        if line := weights_of(path / part).note:
            say(line)
    additions.check()
    return _assembled(path, None, additions, say) if additions else path


def is_single_file(path: Path) -> bool:
    """Is this a file, or the name of one that is missing?"""
    return path.is_file() or (not path.is_dir() and any(path.match(p) for p in ("*.safetensors", *PICKLES)))


def read_sources(checkpoint: Path) -> list[Source]:
    """The files that a checkpoint's weights come from, where it, or its teacher, was assembled."""
    path = checkpoint / SOURCES_FILE
    if not path.is_file():
        return []
    found = read_json(path, CheckpointError).get("sources")
    try:
        return [Source.model_validate(entry) for entry in (found if isinstance(found, list) else ())]
    except ValueError:
        raise CheckpointError(f"{path} is damaged: open the checkpoint's own files again") from None


def _source(role: str, path: Path, weight: float | None = None) -> Source:
    found = sha256(path) if path.is_file() else hash_checkpoint(path)
    return Source(role=role, name=encodable(path.resolve().name), sha256=found, weight=weight)


def _key(path: Path, additions: Additions) -> str:
    """Of the files as the disk lists them, and of all that decides what becomes of them."""
    used = [path, *([additions.vae] if additions.vae else []), *(e.path for e in additions.embeddings)]
    used += [file for lora in additions.loras for file in lora.files]
    files = [f for p in used for f in (sorted(q for q in p.rglob("*") if q.is_file()) if p.is_dir() else [p])]
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((FORMAT, stats, additions)).encode()).hexdigest()[:10]


def _assembled(path: Path, original: Original | None, additions: Additions, say: Say) -> Path:
    """The folder in the cache, made where it is not there yet; other processes wait for it."""
    name = path.resolve()
    home = _cache()
    out = home / f"{name.stem if original else name.name}-{_key(path, additions)}"
    if not (out / SOURCES_FILE).is_file():  # else whole: another user's cache serves too, which cannot be locked
        with _writing(home / f".{out.name}.lock"):
            if not (out / SOURCES_FILE).is_file():
                require("torch", extra="train", purpose="a single file or an addition to a checkpoint")
                with quiet():
                    parts = Parts(path) if original is None else convert(original)
                _assemble(out, path, parts, original, additions, say)
                size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
                say(f"assembled in {out}, {megabytes(size)}")
    read_model(out)
    return out


def _cache() -> Path:
    try:
        return user_cache() / CHECKPOINTS
    except RuntimeError:
        raise InputError("there is no home folder for the cache: let KDC_EDGE_CACHE name a folder") from None


def _writing(lock: Path) -> AbstractContextManager[None]:
    try:
        check_writable(lock)
    except InputError as error:
        raise InputError(f"{error}, by KDC_EDGE_CACHE") from None
    return exclusive(lock)


def _assemble(out: Path, path: Path, parts: Parts, original: Original | None, additions: Additions, say: Say) -> None:
    if additions.vae is not None:
        parts.configs["vae"] = read_vae_config(additions.vae)
        scale = scaling_factor(parts.configs["vae"])
        if original is None and (ours := scaling_factor(read_config(path / "vae"))) != scale:
            raise InputError(
                f"--vae {additions.vae} has scaling_factor {scale:g} and the checkpoint's VAE {ours:g}: its latents"
                " are of another model"
            )
        parts.states["vae"] = read_vae(additions.vae, parts.configs["vae"])
    for lora in additions.loras:
        say(fuse(lora, {part: parts.state(part) for part in ("unet", "text_encoder")}).line(lora))
    with atomic_folder(out, marker=MODEL_INDEX) as folder:
        if original is not None:
            write_small_parts(folder, original.scheduler, pad_token=original.pad_token, pipeline=original.pipeline)
        else:
            _copy(path, folder, [part for part in WEIGHTS if part not in parts.states])
            if additions.prediction_type is not None:
                config = folder / "scheduler" / "scheduler_config.json"
                changed = read_json(config, CheckpointError) | {"prediction_type": additions.prediction_type}
                write_atomic(config, json.dumps(changed, indent=2))
        for embedding in additions.embeddings:
            (folder / "text_encoder" / WEIGHTS["text_encoder"]).unlink(missing_ok=True)
            say(embedding.add(parts.state("text_encoder"), parts.config("text_encoder"), folder / "tokenizer"))
        for part, state in parts.states.items():
            shutil.rmtree(folder / part, ignore_errors=True)
            _save(state, parts.config(part), folder / part)
        earlier = read_sources(path) if original is None else []
        sources = [*earlier, _source("checkpoint", path), *additions.sources()]
        document = {"sources": [source.model_dump() for source in sources]}
        write_atomic(folder / SOURCES_FILE, json.dumps(document, indent=2))


def _copy(path: Path, folder: Path, networks: Sequence[str]) -> None:
    """The parts of a diffusers folder that stay as they are."""
    for part in (*networks, "tokenizer", "scheduler"):
        copy_part(path / part, folder / part, link=True)
    if CHECKER in optional_components(path):
        check_checker(path)
        copy_part(path / CHECKER, folder / CHECKER, link=True)
    for file in path.iterdir():
        if file.suffix in (".json", ".txt") and file.is_file():
            shutil.copy2(file, folder / file.name)


def _save(state: State, config: Settings, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    write_atomic(folder / "config.json", json.dumps(config, indent=2))
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS[folder.name], metadata={"format": "pt"})
    (folder / WEIGHTS[folder.name]).chmod(0o644)  # safetensors writes for its owner alone

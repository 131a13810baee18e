"""Images in folders: class folders or metadata.jsonl, Oxford Flowers-102, the butterflies of 100 species.

Each layout becomes a list of entries (path, caption, part); reading them is the same for all.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdc_edge.errors import InputError, require
from kdc_edge.files import inside
from kdc_edge.train.data.flower_names import FLOWER_NAMES
from kdc_edge.train.data.images import PICKLES, SUFFIXES, LeftOut, read_image
from kdc_edge.train.data.source import Part, Sample, fill

MAX_METADATA_BYTES = 2**30
MAX_LINE_CHARS = 100_000


@dataclass(frozen=True)
class Entry:
    path: Path
    caption: str
    part: Part = "train"


@dataclass(frozen=True)
class FileSource:
    """Image files with their captions; `said` are notes from opening the folder."""

    root: Path
    entries: tuple[Entry, ...]
    said: tuple[str, ...]
    mirrored = True

    @property
    def has_test_part(self) -> bool:
        return any(entry.part == "test" for entry in self.entries)

    def fingerprint(self) -> str:
        """Over names, captions, sizes and times of change; the images are not read."""
        digest = hashlib.sha256()
        for entry in self.entries:
            stat = entry.path.stat() if entry.path.is_file() else None
            facts = (stat.st_size, stat.st_mtime_ns) if stat else ()
            digest.update(f"{entry.path.relative_to(self.root)} {entry.caption!r} {entry.part} {facts}\n".encode())
        return digest.hexdigest()

    def read(
        self, *, size: int, samples: int | None, seed: int, start: int = 0, part: Part = "train"
    ) -> Iterator[Sample | LeftOut]:
        wanted: Part = part if self.has_test_part else "train"
        chosen = [entry for entry in self.entries if entry.part == wanted]
        if samples is not None and samples < len(chosen):
            chosen = random.Random(seed).sample(chosen, samples)
        for entry in chosen[start:]:
            name = str(entry.path.relative_to(self.root))
            try:
                yield Sample(name, read_image(entry.path, size=size, name=name), entry.caption)
            except LeftOut as problem:
                yield problem

    def notes(self) -> list[str]:
        return list(self.said)


def open_imagefolder(what: str, caption: str | None) -> FileSource:
    """`metadata.jsonl` with `file_name` and `text` where it is; else one folder a class, named by it."""
    root = _folder(what)
    if (root / "metadata.jsonl").is_file():
        return _from_metadata(root, caption)
    entries, said = [], _said_of_pickles(root)
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = _images(folder)
        if not found:
            said.append(f"class {folder.name} has no images")
        text = fill(caption, "a photo of a {name}", _readable(folder.name))
        entries += [Entry(path, text) for path in found]
    return _source(root, entries, said, "one folder a class with images in it, or metadata.jsonl")


def _from_metadata(root: Path, caption: str | None) -> FileSource:
    """Lines of {"file_name": ..., "text": ...}; file names stay inside the folder."""
    path = root / "metadata.jsonl"
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise InputError(f"{path} is larger than 1 GiB: split the data into several tasks")
    entries, wrong = [], Counter[str]()
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line) if len(line) <= MAX_LINE_CHARS else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                wrong[f"no JSON object (line {number} is the first)" if not wrong else "no JSON object"] += 1
                continue
            if "file_name" not in row or "text" not in row:
                raise InputError(
                    f"{path}, line {number} has the columns {', '.join(map(str, row))[:200]}:"
                    " file_name and text are needed"
                )
            if not isinstance(row["file_name"], str) or not isinstance(row["text"], str):
                wrong["file_name or text is no text"] += 1
                continue
            entries.append(Entry(inside(root, row["file_name"], InputError), fill(caption, "{name}", row["text"])))
    said = [f"metadata.jsonl: {count} lines left out: {reason}" for reason, count in wrong.items()]
    return _source(root, entries, said, "metadata.jsonl with file_name and text in every line")


def open_oxford_flowers(what: str, caption: str | None) -> FileSource:
    """The official layout of Flowers-102 (Nilsback and Zisserman, 2008): jpg/, imagelabels.mat, setid.mat.

    Training takes the official training and validation parts, 2,040 images; the test part is the official one.
    """
    root = _folder(what)
    labels = _mat(root / "imagelabels.mat", "labels")
    test = set(_mat(root / "setid.mat", "tstid"))
    known = set(_mat(root / "setid.mat", "trnid")) | set(_mat(root / "setid.mat", "valid")) | test
    entries, said = [], _said_of_pickles(root)
    for number, label in enumerate(labels, 1):
        if not 1 <= label <= len(FLOWER_NAMES):
            raise InputError(f"{root / 'imagelabels.mat'} has the label {label}: 1 to {len(FLOWER_NAMES)} are flowers")
        if number in known:
            text = fill(caption, "a photo of a {name}, a type of flower", FLOWER_NAMES[label - 1])
            path = root / "jpg" / f"image_{number:05d}.jpg"
            entries.append(Entry(path, text, "test" if number in test else "train"))
    return _source(root, entries, said, "jpg/, imagelabels.mat and setid.mat")


def open_butterflies(what: str, caption: str | None) -> FileSource:
    """The 100-species layout: train|valid|test/SPECIES/*.jpg, and a CSV whose `labels` win over folder names.

    Training takes train/; the test part is valid/ and test/.
    """
    root = _folder(what)
    labels = _csv_labels(root)
    entries, said = [], _said_of_pickles(root)
    parts: tuple[tuple[str, Part], ...] = (("train", "train"), ("valid", "test"), ("test", "test"))
    for folder_name, part in parts:
        species = sorted(p for p in (root / folder_name).glob("*") if p.is_dir())
        for folder in species:
            found = _images(folder)
            if not found:
                said.append(f"class {folder_name}/{folder.name} has no images")
            for path in found:
                label = labels.get(path.relative_to(root).as_posix(), folder.name)
                text = fill(caption, "a photo of a {name}, a type of butterfly", _readable(label).lower())
                entries.append(Entry(path, text, part))
    return _source(root, entries, said, "train/SPECIES/*.jpg, and valid/ and test/ alike")


def _csv_labels(root: Path) -> dict[str, str]:
    """File -> species from the CSV beside the folders, where there is one with `filepaths` and `labels`."""
    for path in sorted(root.glob("*.csv")):
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.DictReader(file)
            columns = {c.strip().lower(): c for c in rows.fieldnames or () if c}
            if not {"filepaths", "labels"} <= columns.keys():
                continue
            return {str(r[columns["filepaths"]]): str(r[columns["labels"]]) for r in rows if r[columns["labels"]]}
    return {}


def _mat(path: Path, name: str) -> list[int]:
    """A row of whole numbers from a MATLAB file (version 5: plain arrays, no code)."""
    scipy_io = require("scipy.io", extra="train", purpose="oxford-flowers")
    if not path.is_file():
        raise InputError(f"{path} is missing: oxford-flowers needs jpg/, imagelabels.mat and setid.mat")
    try:
        return [int(value) for value in scipy_io.loadmat(path, variable_names=[name])[name].ravel()]
    except Exception as error:  # the reader raises whatever comes
        raise InputError(f"{path} holds no numbers {name!r}: {str(error)[:100]}; fetch it again") from None


def _folder(what: str) -> Path:
    root = Path(what).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is no folder: name the folder that holds the images")
    return root


def _images(folder: Path) -> list[Path]:
    """Image files at any depth; links that leave the folder are not followed."""
    inner = folder.resolve()
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file() and p.resolve().is_relative_to(inner))


def _said_of_pickles(root: Path) -> list[str]:
    count = sum(1 for p in root.rglob("*") if p.suffix.lower() in PICKLES)
    return [f"{count} pickles or arrays were not opened: images alone are read"] if count else []


def _readable(name: str) -> str:
    return name.replace("_", " ").strip()


def _source(root: Path, entries: list[Entry], said: list[str], layout: str) -> FileSource:
    if not any(entry.part == "train" for entry in entries):
        raise InputError(f"{root} holds no images to train on: expected {layout}")
    return FileSource(root, tuple(entries), tuple(said))

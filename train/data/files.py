"""Image files as a source: Oxford Flowers-102, the butterflies of 100 species, and what folders.py finds.

Each layout becomes a list of entries (path, caption, part); reading them is the same for all.
"""

from __future__ import annotations

import csv
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from kdc_edge.errors import InputError, require
from kdc_edge.text import printable
from kdc_edge.train.data.flower_names import FLOWER_NAMES
from kdc_edge.train.data.images import PICKLES, SUFFIXES
from kdc_edge.train.data.source import Part, Pending, Selection, Template, fill, read_sample, set_aside


@dataclass(frozen=True)
class Entry:
    path: Path
    caption: str
    part: Part = "train"
    origin: str = "labels"  # of the caption, in words
    label: str = ""  # name of the class, where the caption is made from it


@dataclass(frozen=True)
class FileSource:
    """Image files with their captions; `said` are notes from opening the folder."""

    root: Path
    found: tuple[Entry, ...]  # in the parts of their layout
    said: tuple[str, ...]
    classes: tuple[str, ...] = ()  # in the order of their numbers
    mirrored = True

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Where the layout gives no test part, some images with all their captions are set aside as one."""
        return tuple(replace(e, part="test") if e.path in self._aside else e for e in self.found)

    @cached_property
    def _aside(self) -> set[Path]:
        """Of a class range, a tenth of its own images."""
        if any(entry.part == "test" for entry in self.found):
            return set()
        paths = self._paths()
        return {paths[i] for i in set_aside(len(paths))}

    def _paths(self) -> list[Path]:
        return sorted({entry.path for entry in self.found})

    @property
    def has_test_part(self) -> bool:
        return any(entry.part == "test" for entry in self.entries)

    def fingerprint(self) -> str:
        """Over names, captions, sizes and times of change; the images are not read."""
        digest = hashlib.sha256()
        for entry in self.entries:
            stat = entry.path.stat() if entry.path.is_file() else None
            facts = (stat.st_size, stat.st_mtime_ns) if stat else ()
            line = f"{entry.path.relative_to(self.root)} {entry.caption!r} {entry.part} {facts}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))  # a name may be no UTF-8
        return digest.hexdigest()

    def pending(self, selection: Selection) -> Iterator[Pending]:
        wanted: Part = selection.part if self.has_test_part else "train"
        chosen = [entry for entry in self.entries if entry.part == wanted]
        if selection.samples is not None and selection.samples < len(chosen):
            chosen = random.Random(selection.seed).sample(chosen, selection.samples)
        for entry in chosen:
            yield partial(read_sample, entry.path, entry.caption, str(entry.path.relative_to(self.root)), selection)

    def caption_classes(self) -> dict[str, str]:
        return {entry.caption: entry.label for entry in self.entries if entry.label}

    def select(self, first: int, last: int) -> FileSource:
        """The images of the classes `first` to `last`, counted from 0; raises InputError where one is missing."""
        if not 0 <= first <= last < len(self.classes):
            has = f"has the classes 0 to {len(self.classes) - 1}" if self.classes else "has no classes"
            raise InputError(f"{self.root} {has}: #{first}-{last} cannot be taken")
        chosen = set(self.classes[first : last + 1])
        entries = [entry for entry in self.found if entry.label in chosen]
        if not any(entry.part == "train" for entry in entries):
            raise InputError(f"{self.root} has no images to train on in the classes {first} to {last}: take others")
        names = ", ".join(printable(name, 40) for name in self.classes[first : last + 1][:3])
        note = f"classes {first} to {last} of {len(self.classes)}: {names}{', ...' if last - first > 2 else ''}"
        return replace(self, found=tuple(entries), said=(*self.said, note), classes=self.classes[first : last + 1])

    def notes(self) -> list[str]:
        count, total = len(self._aside), len(self._paths())
        aside = [f"no test part: {count} of {total} images are set aside, to evaluate on"] if count else []
        return [*self.said, *aside, *self.summary()]

    def summary(self) -> list[str]:
        """How many captions come from where, and three of those that are trained on."""
        origins = Counter(entry.origin for entry in self.entries)
        counts = ", ".join(f"{count} from {origin}" for origin, count in origins.items())
        train = [entry for entry in self.entries if entry.part == "train"]
        shown = {i: train[i] for i in (0, len(train) // 2, len(train) - 1)}
        samples = "; ".join(f"{printable(e.path.name, 60)}: {printable(e.caption, 80)!r}" for e in shown.values())
        return [f"captions: {counts}", f"such as {samples}"]


def open_oxford_flowers(what: str, caption: Template) -> FileSource:
    """The official layout of Flowers-102 (Nilsback and Zisserman, 2008): jpg/, imagelabels.mat, setid.mat.

    Training takes the official training and validation parts, 2,040 images; the test part is the official one.
    """
    root = open_folder(what)
    labels = _mat(root / "imagelabels.mat", "labels")
    test = set(_mat(root / "setid.mat", "tstid"))
    known = set(_mat(root / "setid.mat", "trnid")) | set(_mat(root / "setid.mat", "valid")) | test
    entries = []
    for number, label in enumerate(labels, 1):
        if not 1 <= label <= len(FLOWER_NAMES):
            raise InputError(f"{root / 'imagelabels.mat'} has the label {label}: 1 to {len(FLOWER_NAMES)} are flowers")
        if number in known:
            path = root / "jpg" / f"image_{number:05d}.jpg"
            name = FLOWER_NAMES[label - 1]
            text = fill(caption, "a photo of a {name}, a type of flower", name, key=path.name)
            entries.append(Entry(path, text, "test" if number in test else "train", label=name))
    return source_of(root, entries, [], "jpg/, imagelabels.mat and setid.mat", classes=FLOWER_NAMES)


def open_butterflies(what: str, caption: Template) -> FileSource:
    """The 100-species layout: train|valid|test/SPECIES/*.jpg, and a CSV whose `labels` win over folder names.

    Training takes train/; the test part is valid/ and test/.
    """
    root = open_folder(what)
    labels = _csv_labels(root)
    entries: list[Entry] = []
    said: list[str] = []
    parts: tuple[tuple[str, Part], ...] = (("train", "train"), ("valid", "test"), ("test", "test"))
    for folder_name, part in parts:
        species = sorted(p for p in (root / folder_name).glob("*") if p.is_dir())
        for folder in species:
            found = find_images(folder)
            if not found:
                said.append(f"class {folder_name}/{folder.name} has no images")
            for path in found:
                label = labels.get(path.relative_to(root).as_posix(), folder.name)
                name = readable(label).lower()
                text = fill(caption, "a photo of a {name}, a type of butterfly", name, key=f"{folder.name}/{path.name}")
                entries.append(Entry(path, text, part, label=name))
    return source_of(root, entries, said, "train/SPECIES/*.jpg, and valid/ and test/ alike")


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


def open_folder(what: str) -> Path:
    root = Path(what).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is no folder: name the folder that holds the images")
    return root


def find_images(folder: Path, *, deep: bool = True) -> list[Path]:
    """Image files, at any depth where `deep`; links that leave the folder are not followed."""
    inner = folder.resolve()
    found = (
        p for p in folder.glob("**/*" if deep else "*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )
    return sorted(p for p in found if p.is_file() and p.resolve().is_relative_to(inner))


def _said_of_pickles(root: Path) -> list[str]:
    count = sum(1 for p in root.rglob("*") if p.suffix.lower() in PICKLES)
    return [f"{count} pickles or arrays were not opened: images alone are read"] if count else []


def readable(name: str) -> str:
    return name.replace("_", " ").strip()


def source_of(
    root: Path, entries: list[Entry], said: list[str], layout: str, *, classes: Sequence[str] = ()
) -> FileSource:
    """The entries as a source; classes are numbered as in `classes`, else by their names' order."""
    if not any(entry.part == "train" for entry in entries):
        raise InputError(f"{root} holds no images to train on: expected {layout}")
    names = classes or sorted({entry.label for entry in entries if entry.label})
    return FileSource(root, tuple(entries), (*_said_of_pickles(root), *said), tuple(names))

"""Image folders as people have them: metadata files, text files beside the images, one folder a class.

    source = open_imagefolder("photos", None)     # laid out as for datasets' imagefolder or kohya's scripts, or so
    source.notes()                                # which captions were taken, how many, three of them

Captions come from metadata.jsonl or metadata.csv where there is one, in the folder or in its train/; else from a text
file beside each image (rose.txt for rose.png); else from the name of the image's class folder.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from PIL import Image

from kdc_edge.errors import InputError
from kdc_edge.files import inside
from kdc_edge.text import printable
from kdc_edge.train.data.files import Entry, FileSource, find_images, open_folder, readable, source_of
from kdc_edge.train.data.source import Part, Template, fill

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")
# datasets' names of splits; training takes train/, the test part is what else there is.
SPLITS: dict[str, Part] = {"train": "train", "test": "test", "validation": "test", "valid": "test", "val": "test"}
KOHYA = re.compile(r"\d+_.+")  # folders of kohya's scripts: repeats_name
ANIMATED = frozenset({".gif", ".webp", ".tif", ".tiff"})  # that may hold several images
MAX_METADATA_BYTES = 2**30
MAX_LINE_CHARS = 100_000
MAX_NAME_BYTES = 255


def open_imagefolder(what: str, caption: Template) -> FileSource:
    """The folder with its captions; `caption` is a template with `{name}`. Raises InputError where none is found."""
    root = open_folder(what)
    entries: list[Entry] = []
    said: list[str] = []
    for folder, part in _parts(root):
        label = "" if folder == root else f"{folder.name}/"
        found = [name for name in METADATA if (folder / name).is_file()]
        if found:
            entries += _from_metadata(folder / found[0], label, part, caption, said)
            said += [f"{label}{name} is not read: {label}{found[0]} is" for name in found[1:]]
        else:
            entries += _from_files(folder, label, part, caption, said)
    animated = sum(_is_animated(entry.path) for entry in entries)
    if animated:
        said.append(f"{animated} animated images: the first frame of each is taken")
    layout = "metadata.jsonl or metadata.csv, a text file beside each image, or one folder a class with images in it"
    return source_of(root, entries, said, layout)


def _parts(root: Path) -> list[tuple[Path, Part]]:
    """The folder itself; or, where it holds splits and nothing else, each of them."""
    if any((root / name).is_file() for name in METADATA):
        return [(root, "train")]
    folders = _folders(root)
    names = {folder.name for folder in folders}
    if "train" in names and names <= SPLITS.keys() and not _images_in(root):
        return [(root / name, part) for name, part in SPLITS.items() if name in names]
    if any((root / "train" / name).is_file() for name in METADATA):
        return [(root / "train", "train")]
    return [(root, "train")]


def _from_files(folder: Path, label: str, part: Part, caption: Template, said: list[str]) -> Iterator[Entry]:
    """Images with a text file beside them, and images in class folders."""
    bare = 0
    for path in _images_in(folder):
        text = _beside(path)
        bare += not text
        if text:
            yield Entry(path, fill(caption, "{name}", text, key=path.name), part, "text files")
    classes = _folders(folder)
    repeats = bool(classes) and all(KOHYA.fullmatch(of_class.name) for of_class in classes)
    if repeats:
        said.append(f"{label}folders are named as kohya's scripts want it: their numbers of repeats are not taken")
    for of_class in classes:
        found = find_images(of_class)
        if not found:
            said.append(f"class {label}{of_class.name} has no images")
        name = of_class.name.partition("_")[2] if repeats else of_class.name
        for path in found:
            text = _beside(path)
            default, words = ("{name}", text) if text else ("a photo of a {name}", readable(name))
            origin = "text files" if text else "folder names"
            made = fill(caption, default, words, key=path.name)
            yield Entry(path, made, part, origin, "" if text else readable(name))
    if bare:
        said.append(f"{bare} images in {printable(str(folder))} left out: neither a text file beside them nor a class")


def _from_metadata(path: Path, label: str, part: Part, caption: Template, said: list[str]) -> list[Entry]:
    """Rows of `file_name` and a caption; file names stay inside the folder."""
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise InputError(f"{path} is larger than 1 GiB: split the data into several tasks")
    folder, wrong = path.parent, Counter[str]()
    entries: list[Entry] = []
    first: dict[str, int] = {}
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    for number, row in rows:
        text = _caption_of(row) if row else ""
        if row and not entries and not wrong and not ("file_name" in row and {*CAPTION_COLUMNS} & row.keys()):
            raise InputError(
                f"{path}, line {number} has the columns {printable(', '.join(map(str, row)), 200)}: file_name and text"
                " are needed; caption or prompt will do for text"
            )
        file = _locate(folder, row.get("file_name")) if row else None
        if file and text:
            entries.append(Entry(file, fill(caption, "{name}", text, key=file.name), part, f"{label}{path.name}"))
            continue
        reason = "no JSON object" if not row else "no caption" if file else "file_name is no file's name"
        wrong[reason] += 1
        first.setdefault(reason, number)
    said += [
        f"{label}{path.name}: {count} lines left out: {reason} (line {first[reason]} is the first)"
        for reason, count in wrong.items()
    ]
    named = Counter(entry.path for entry in entries)
    repeated = sum(count > 1 for count in named.values())
    if repeated:
        said.append(f"{repeated} images have several rows in {label}{path.name}: each row is a sample")
    without = sum(image not in named for image in find_images(folder))
    if without:
        said.append(f"{without} images have no row in {label}{path.name}: left out")
    if any(_images_in(of_class) for of_class in _folders(folder)):
        said.append(f"captions are those of {label}{path.name}, not the names of folders")
    return entries


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, object] | None]]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line) if len(line) <= MAX_LINE_CHARS else None
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, object] | None]]:
    """Columns by the first line; the separator is the one that it has most of."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        header = file.readline(MAX_LINE_CHARS)
        separator = max(",;\t", key=header.count)
        reader = csv.reader(itertools.chain([header], file), delimiter=separator)
        columns = [column.strip().lower() for column in next(reader, [])]
        try:
            for row in reader:
                if row:
                    yield reader.line_num, dict(zip(columns, row, strict=False))
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num} cannot be read as CSV: {error}") from None


def _caption_of(row: dict[str, object]) -> str:
    """The caption of a row, the first where it has a list of them; "" where it has none."""
    found = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), "")
    if isinstance(found, list):
        found = next(iter(found), "")
    return found.strip() if isinstance(found, str) else ""


def _locate(folder: Path, name: object) -> Path | None:
    """The file of a row, written with slashes or backslashes; None for what can be no file's name here.

    Raises InputError for a path that leaves the folder.
    """
    if not isinstance(name, str):
        return None
    plain = PurePosixPath(name.replace("\\", "/"))
    if plain.is_absolute() or ".." in plain.parts:
        inside(folder, str(plain), InputError)  # refuses it
    if not plain.parts or any(len(p.encode("utf-8", "replace")) > MAX_NAME_BYTES for p in plain.parts):
        return None
    path = folder / plain
    try:
        leaves = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL in the name, a circle of links
        return None
    if leaves:
        raise InputError(f"{printable(str(path))} is a link out of its folder: do not use this folder")
    return path


def _beside(image: Path) -> str:
    """The caption in the text file that has an image's name, on one line; "" where there is none."""
    for suffix in (".txt", ".caption"):
        path = image.with_suffix(suffix)
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_LINE_CHARS:
            return " ".join(path.read_text("utf-8-sig", errors="replace").split())
    return ""


def _images_in(folder: Path) -> list[Path]:
    """Images that lie in the folder itself."""
    return find_images(folder, deep=False)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_animated(path: Path) -> bool:
    if path.suffix.lower() not in ANIMATED:
        return False
    try:
        with Image.open(path) as image:
            return bool(getattr(image, "is_animated", False))
    except Exception:  # named when it is read
        return False

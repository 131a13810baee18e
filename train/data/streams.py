"""Rows as a stream: `datasets` reads the hub or a folder (`hf:ID[:split]`), tars.py tar files (`webdataset:GLOB`).

Rows are streamed, so the data may be larger than the disk; nothing but its latents is kept. Samples are drawn over the
whole: rows are counted first, in a pass over them where the data set's card has no count.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from kdc_edge.errors import InputError, require
from kdc_edge.files import read_bounded
from kdc_edge.text import one_line
from kdc_edge.train.data.images import LeftOut
from kdc_edge.train.data.source import (
    SET_ASIDE_SEED,
    Part,
    Pending,
    Sample,
    Selection,
    Template,
    fill,
    read_sample,
    set_aside,
)
from kdc_edge.train.data.tars import TarRows

TARS = "webdataset"
FIRST_ROWS = 20  # that tell the columns, where nothing else does
MAX_CARD_BYTES = 2**20
MAX_HEAD_CHARS = 2**17

CAPTION_COLUMNS = ("text", "caption", "txt", "prompt", "description", "label", "labels", "cls", "class", "json")


@dataclass(frozen=True)
class StreamSource:
    """Rows of a data set. `splits` are its training part and, where it has one, its test part."""

    name: str
    facts: str  # what its fingerprint is made of
    loader: tuple[str, ...]  # the name that datasets.load_dataset takes; tar files where the name is TARS
    splits: tuple[str, ...]
    template: Template
    mirrored = True

    @property
    def has_test_part(self) -> bool:
        return len(self.splits) > 1 or bool(set_aside(self._rows("train")))

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.facts} {self.splits} {self.template} {SET_ASIDE_SEED}".encode()).hexdigest()

    def _split(self, part: Part) -> str:
        return self.splits[1 if part == "test" and len(self.splits) > 1 else 0]

    def _rows(self, part: Part) -> int:
        return _count_rows(self.name, self.loader, self._split(part), self.facts)

    def _chosen(self, selection: Selection) -> Sequence[int]:
        """The numbers of the selected rows, rising."""
        numbers: Sequence[int] = range(self._rows(selection.part))
        aside = set_aside(len(numbers)) if len(self.splits) == 1 else frozenset()
        if aside:
            numbers = [n for n in numbers if (n in aside) == (selection.part == "test")]
        if selection.samples is None or selection.samples >= len(numbers):
            return numbers
        return sorted(random.Random(selection.seed).sample(numbers, selection.samples))

    def pending(self, selection: Selection) -> Iterator[Pending]:
        """In the data's own order, rows drawn over the whole; every process streams them all."""
        rows = _load(self.name, self.loader, self._split(selection.part))
        image_column, caption_column = find_columns(self.name, rows)
        names = _class_names(rows, caption_column)

        def read(row: Any, label: str) -> Sample:
            if isinstance(row, LeftOut):
                raise row
            content = _content(row.get(image_column), label)
            caption = fill(self.template, "{name}", _text(row.get(caption_column), names, label), key=label)
            return read_sample(content, caption, label, selection)

        stream, at = iter(_undecoded(rows, image_column)), 0
        for number in self._chosen(selection):
            label = f"{self.name} row {number}"
            try:
                row = next(islice(stream, number - at, None))
                at = number + 1
            except StopIteration:
                return
            except Exception as error:  # a lost connection: what was read so far is kept
                yield partial(read, LeftOut(label, f"the stream breaks off: {one_line(error)}"), label)
                return
            yield partial(read, row, label)

    def caption_classes(self) -> dict[str, str]:
        return {}

    def notes(self) -> list[str]:
        total = self._rows("train")
        aside = len(set_aside(total)) if len(self.splits) == 1 else 0
        return [f"no test part: {aside} of {total} rows are set aside, to evaluate on"] if aside else []


@lru_cache(maxsize=64)
def _count_rows(name: str, loader: tuple[str, ...], split: str, facts: str) -> int:
    """Rows of a split of the data that `facts` tell: by its card, else by a pass, up to where a stream breaks off."""
    del facts  # a changed data set is counted again
    rows = _load(name, loader, split)
    known = getattr(getattr(rows, "info", None), "splits", None) or {}
    if split in known and known[split].num_examples:
        return int(known[split].num_examples)
    total = 0
    try:
        for _ in _undecoded(rows, find_columns(name, rows)[0]):
            total += 1
    except Exception:  # said when it is read
        return total + 1
    return total


def open_hf(what: str, caption: Template) -> StreamSource:
    """`ID[:split]`: a data set of the hub, or a local folder in a layout that `datasets` knows."""
    datasets = require("datasets", extra="train", purpose="a data source hf:")
    name, _, split = what.rpartition(":") if ":" in what else (what, "", "")
    facts = name
    if Path(folder := os.path.expanduser(name)).is_dir():  # noqa: PTH111 - as in `open_webdataset`
        name = folder
        _check_card(Path(name) / "README.md")
        files = sorted(p for p in Path(name).rglob("*") if p.is_file())
        facts = json.dumps([(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files])
    try:
        found = list(datasets.get_dataset_split_names(name))
    except Exception as error:  # no such data set, offline, no loader: the library has a dozen kinds
        raise InputError(f"hf:{name} cannot be opened: {one_line(error)}") from None
    if split and split not in found:
        raise InputError(f"hf:{name} has no split {split!r}: choose from {', '.join(found)}")
    train = split or ("train" if "train" in found else found[0])
    test = next((s for s in ("test", "validation") if s in found and s != train), None)
    source = StreamSource(name, facts, (name,), (train, test) if test else (train,), caption)
    find_columns(name, _load(name, source.loader, train))
    return source


def open_webdataset(what: str, caption: Template) -> StreamSource:
    """Tar files by a glob pattern; in them `KEY.jpg` (or png, webp) beside `KEY.txt`, `KEY.cls` or `KEY.json`."""
    pattern = os.path.expanduser(what)  # noqa: PTH111 - which no shell does behind webdataset:, and Path tidies more
    files = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - the pattern may be absolute
    if not files:
        raise InputError(f"webdataset:{what} matches no file: quote the pattern, and check the folder")
    facts = json.dumps([(f, Path(f).stat().st_size, Path(f).stat().st_mtime_ns) for f in files])
    source = StreamSource(f"webdataset:{what}", facts, (TARS, *files), ("train",), caption)
    find_columns(source.name, TarRows(source.loader[1:]))
    return source


def _check_card(path: Path) -> None:
    """A data card's head is YAML, in which an alias may stand for a billion lines: refuse what no card needs."""
    if not path.exists():
        return
    text = read_bounded(path, MAX_CARD_BYTES, InputError).decode("utf-8", "replace")
    head = text.split("\n---", 1)[0].removeprefix("---") if text.startswith("---") else ""
    yaml = require("yaml", extra="train", purpose="a data source hf:")
    try:
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(head, yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} has a head that is no YAML: {one_line(error)}") from None
    if aliases or len(head) > MAX_HEAD_CHARS:
        raise InputError(f"{path} has a head with aliases, or of more than {MAX_HEAD_CHARS} characters: shorten it")


def _load(name: str, loader: tuple[str, ...], split: str) -> Any:
    if loader[0] == TARS:
        return TarRows(loader[1:])
    datasets = require("datasets", extra="train", purpose="this data source")
    try:
        return datasets.load_dataset(loader[0], split=split, streaming=True)
    except Exception as error:
        raise InputError(f"{name} cannot be opened: {one_line(error)}") from None


def find_columns(name: str, rows: Any) -> tuple[str, str]:
    """The image's and the caption's column. Raises InputError naming the columns that are there."""
    datasets = require("datasets", extra="train", purpose="this data source")
    if rows.features is None:
        try:
            seen = [row for row in islice(rows, FIRST_ROWS) if isinstance(row, dict)]
        except Exception as error:
            raise InputError(f"{name} has no rows that can be read: {one_line(error)}") from None
        if not seen:
            raise InputError(f"{name} has no rows that can be read: are these tar files?")
        first = {column: value for row in reversed(seen) for column, value in row.items()}
        columns = list(first)
        images = [c for c in columns if isinstance(first[c], Image.Image | bytes)]
    else:
        columns = list(rows.features)
        images = [c for c in columns if isinstance(rows.features[c], datasets.Image)]
    captions = [c for c in CAPTION_COLUMNS if c in columns]
    if not images or not captions:
        missing = "an image" if not images else f"a caption ({', '.join(CAPTION_COLUMNS[:5])} or a label)"
        raise InputError(f"{name} has the columns {', '.join(columns)[:200]}: none is {missing}")
    return images[0], captions[0]


def _undecoded(rows: Any, column: str) -> Any:
    """Rows whose images are bytes: they are decoded here, with all the checks."""
    datasets = require("datasets", extra="train", purpose="this data source")
    return rows.cast_column(column, datasets.Image(decode=False)) if rows.features is not None else rows


def _class_names(rows: Any, column: str) -> list[str] | None:
    feature = (rows.features or {}).get(column)
    names = getattr(feature, "names", None)
    return list(names) if names else None


def _content(value: Any, label: str) -> bytes | Image.Image:
    """What a row has for an image: bytes, or a place from which the library fetches them."""
    datasets = require("datasets", extra="train", purpose="this data source")
    if isinstance(value, dict) and value.get("bytes"):
        return bytes(value["bytes"])
    if isinstance(value, bytes | Image.Image):
        return value
    if isinstance(value, dict) and value.get("path"):
        try:
            fetched: Image.Image = datasets.Image().decode_example(value)
            return fetched
        except Exception:
            raise LeftOut(label, "cannot be read as an image") from None
    raise LeftOut(label, "no image in its row")


def _text(value: Any, names: list[str] | None, label: str) -> str:
    if isinstance(value, dict):  # a webdataset's JSON
        value = next((value[c] for c in CAPTION_COLUMNS if isinstance(value.get(c), str)), None)
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = value[0]  # several captions of one image
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        value = names[value].replace("_", " ")
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise LeftOut(label, "no caption in its row")
    return value

"""Data sources: images with captions, one registry. A source is written `KIND:WHAT`, e.g. `imagefolder:photos`.

`KIND:WHAT#FIRST-LAST` takes the classes of these numbers, counted from 0, of a source that has classes.

    source = open_source("oxford-flowers:data/flowers", caption="a photo of a {name}, a type of flower")
    for item in read_samples(source.pending(Selection(size=512))):     # Sample, or LeftOut with a reason

Reading is lazy and repeatable: what an interrupted pass has read already can be passed over, in the same order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from kdc_edge.errors import InputError
from kdc_edge.train.data.files import FileSource, open_butterflies, open_oxford_flowers
from kdc_edge.train.data.folders import open_imagefolder
from kdc_edge.train.data.source import Pending, Sample, Selection, Source, Template
from kdc_edge.train.data.streams import open_hf, open_webdataset
from kdc_edge.train.garden import scenes as garden
from kdc_edge.train.garden.scenes import PLURALS, Scene, Split, draw_scenes

GARDEN_SAMPLES = 2000
CLASS_RANGE = re.compile(r"(?P<what>.+)#(?P<first>\d{1,6})-(?P<last>\d{1,6})")


@dataclass(frozen=True)
class GardenSource:
    """Procedural images of one subject, or of several in turn; held-out combinations are left out."""

    subjects: tuple[str, ...]
    mirrored = False  # drawn in every pose already
    has_test_part = True

    def scenes(self, count: int, *, seed: int, split: Split) -> list[Scene]:
        """`count` seeded scenes, the subjects taking turns."""
        turns = [draw_scenes(s, -(-count // len(self.subjects)), seed=seed, split=split) for s in self.subjects]
        return [scene for turn in zip(*turns, strict=True) for scene in turn][:count]

    def fingerprint(self) -> str:
        return f"garden {' '.join(self.subjects)}"

    def pending(self, selection: Selection) -> Iterator[Pending]:
        """Squares: crop and buckets say nothing here."""
        count = GARDEN_SAMPLES if selection.samples is None else selection.samples
        split: Split = "train" if selection.part == "train" else "all"
        for i, scene in enumerate(self.scenes(count, seed=selection.seed, split=split)):
            yield partial(_render, scene, i, selection)

    def caption_classes(self) -> dict[str, str]:
        return {}

    def notes(self) -> list[str]:
        return []


def _render(scene: Scene, number: int, selection: Selection) -> Sample:
    image = garden.render(scene, np.random.default_rng([selection.seed, number]))
    if selection.size != garden.SIZE:
        image = image.resize((selection.size, selection.size), Image.Resampling.BICUBIC)
    return Sample(f"{scene.subject} {number}", np.array(image), scene.caption)


def _garden(what: str, caption: Template) -> GardenSource:
    if caption:
        raise InputError("the garden's images have captions of their own: leave --caption out")
    names = {plural: subject for subject, plural in PLURALS.items()}
    for plural in what.split("+"):
        if plural not in names:
            raise InputError(f"the garden has no {plural!r}: choose from {', '.join(names)}, or several joined by +")
    return GardenSource(tuple(names[plural] for plural in what.split("+")))


SOURCES: dict[str, Callable[[str, Template], Source]] = {
    "garden": _garden,
    "imagefolder": open_imagefolder,
    "oxford-flowers": open_oxford_flowers,
    "butterflies": open_butterflies,
    "hf": open_hf,
    "webdataset": open_webdataset,
}


def open_source(text: str, *, caption: Template = None) -> Source:
    """`KIND:WHAT` as a source that exists; `caption` is a template with `{name}`, or several. Raises InputError."""
    kind, _, what = text.partition(":")
    if kind not in SOURCES:
        if Path(text).is_dir():
            raise InputError(f"{text} is a folder: write imagefolder:{text} for images with captions in it")
        raise InputError(f"unknown data source {kind!r} in {text!r}: choose from {', '.join(SOURCES)}")
    if not what:
        raise InputError(f"the data source {text!r} names nothing: write for example imagefolder:photos")
    for template in (caption,) if isinstance(caption, str) else caption or ():
        if "{name}" not in template:
            raise InputError(f"--caption {template!r} has no {{name}}: every image would have the same caption")
    ranged = CLASS_RANGE.fullmatch(what)
    if ranged is None or Path(what).exists():
        return SOURCES[kind](what, caption)
    source = SOURCES[kind](ranged["what"], caption)
    if not isinstance(source, FileSource):
        raise InputError(f"{text} names classes, which {kind}: does not have: leave #{ranged['first']}-... out")
    return source.select(int(ranged["first"]), int(ranged["last"]))

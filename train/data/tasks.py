"""Tasks, which a run learns one after the other. A task is written `NAME=SOURCE`, e.g. `flowers=garden:flowers`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdc_edge.errors import InputError

if TYPE_CHECKING:
    from kdc_edge.train.data.source import Source


@dataclass(frozen=True)
class Task:
    """One part of the sequence that a student learns."""

    name: str
    source: str
    caption: str | tuple[str, ...] | None = None  # a template with {name}, or several; the source's own where None

    def __str__(self) -> str:
        templates = self.caption if isinstance(self.caption, str) else ", ".join(self.caption or ())
        return f"{self.name}={self.source}" + (f" ({templates})" if templates else "")

    def open(self) -> Source:
        from kdc_edge.train.data.sources import open_source  # a configuration with its tasks needs no numpy

        return open_source(self.source, caption=self.caption)


def parse_task(text: str) -> Task:
    """`NAME=KIND:WHAT` as a task whose source exists; raises InputError."""
    task = _split(text)
    task.open()
    return task


def parse_tasks(texts: Sequence[str], captions: Sequence[str] = ()) -> tuple[Task, ...]:
    """Tasks with their caption templates, `TASK=TEMPLATE` for one task or a template for all; raises InputError.

    Of several templates of a task, each image has one.
    """
    tasks = [_split(text) for text in texts]
    names = {task.name for task in tasks}
    templates: dict[str, list[str]] = {}
    common: list[str] = []
    for caption in captions:
        name, equals, template = caption.partition("=")
        if equals and name in names:
            templates.setdefault(name, []).append(template)
        else:
            common.append(caption)
    for i, task in enumerate(tasks):
        own = templates.get(task.name, common)
        tasks[i] = replace(task, caption=tuple(own) if len(own) > 1 else next(iter(own), None))
    for task in tasks:
        task.open()
    return tuple(tasks)


def _split(text: str) -> Task:
    name, equals, source = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise InputError(
            f"--task {text!r} is not NAME=SOURCE, the name of 1 to 64 letters, digits, - and _: write for example"
            " flowers=garden:flowers or roses=imagefolder:photos/roses"
        )
    return Task(name, source)

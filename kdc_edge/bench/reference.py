"""Quality beside speed: images against a reference's that were made from the same requests and the same noise.

    rows = compare_images(measured)                       # the PSNR of every row, and which one is the reference

The reference is a checkpoint in the table, else the images of another folder, else the table's most precise bundle
of the same checkpoint. Rows that ask for another image (steps, sampler, guidance, size, prompt, seed) have another
reference. The quality on a file of prompts is measured by a judge: in kdc_edge.train.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from kdc_edge.bench.record import Psnr, Row
from kdc_edge.bench.runner import Measured
from kdc_edge.errors import InputError
from kdc_edge.formats import find_format
from kdc_edge.image import psnr_db


def compare_images(measured: Sequence[Measured], others: Sequence[Measured] = ()) -> list[Row]:
    """The rows with their PSNR; `others` are measured for their images alone and give no rows."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, found in enumerate(measured):
        if found.pixels is not None:
            groups[image_key(found.row)].append(i)
    outside = {image_key(found.row): found for found in others if found.pixels is not None}
    rows = [found.row for found in measured]
    for key, members in groups.items():
        baselines = [i for i in members if measured[i].row.target is None]
        if baselines:
            _compare(measured, rows, members, measured[baselines[0]], f"torch:{rows[baselines[0]].folder}")
        elif key in outside:
            _compare(measured, rows, members, outside[key], outside[key].row.folder)
        else:
            families: dict[str | None, list[int]] = defaultdict(list)
            for i in members:
                families[rows[i].checkpoint_sha256].append(i)
            for family in families.values():
                best = max(family, key=lambda i: _precision(rows[i]))
                if len(family) > 1:
                    _compare(measured, rows, family, measured[best], f"{rows[best].folder}, the most precise here")
    return rows


def image_key(row: Row) -> Hashable:
    """What decides an image; how it is computed (threads, engine, one U-Net call or two) is not part of it."""
    return (
        row.prompt, row.more_prompts, row.negative_prompt, row.steps, row.guidance, row.guidance_interval, row.sampler,
        row.seed, row.width, row.height,
    )  # fmt: skip


def _compare(
    measured: Sequence[Measured], rows: list[Row], members: Sequence[int], reference: Measured, name: str
) -> None:
    assert reference.pixels is not None
    for i in members:
        found = measured[i]
        assert found.pixels is not None
        if found is reference:
            rows[i] = replace(rows[i], reference=True)
            continue
        db = min(psnr_db(*pair) for pair in zip(found.pixels, reference.pixels, strict=False))  # of common prompts
        rows[i] = replace(rows[i], psnr=Psnr(name, None if math.isinf(db) else db))


def _precision(row: Row) -> float:
    """How near to PyTorch the row's format has to be: the precision's rank."""
    try:
        return find_format(row.target or "", row.precision or "").min_component_psnr_db
    except InputError:
        return -math.inf

"""The teacher of a run, found: `garden`, or any checkpoint that kdc_edge.checkpoints opens. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdc_edge.checkpoints.assemble import NOTHING, Additions, open_checkpoint
from kdc_edge.train.garden.assets import GARDEN_TEACHER, need_garden

__all__ = ["GARDEN_TEACHER", "find_teacher"]


def find_teacher(name: str, additions: Additions = NOTHING, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """`garden` ships with kdc-edge; else a diffusers folder, a single file, or a hub id of a text-to-image model.

    Raises CheckpointError.
    """
    if name == "garden":
        need_garden("the garden's teacher")
    folder = GARDEN_TEACHER if name == "garden" else name
    return open_checkpoint(folder, additions, say=say, as_teacher=True)

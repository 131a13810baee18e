"""The teacher of a run, found: `garden`, or any checkpoint that kdc_edge.checkpoints opens. Imports no PyTorch.

RUN/teacher.json      the SHA-256 of each of its weight files, which tells a folder that has moved from another teacher
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kdc_edge.checkpoints.assemble import NOTHING, Additions, open_checkpoint
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import read_json, sha256, write_atomic
from kdc_edge.train.garden.assets import GARDEN_TEACHER, need_garden

__all__ = ["GARDEN_TEACHER", "check_teacher", "find_teacher", "note_teacher"]

TEACHER_FILE = "teacher.json"
NETWORKS = ("unet", "vae", "text_encoder")


def find_teacher(name: str, additions: Additions = NOTHING, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """`garden` ships with kdc-edge; else a diffusers folder, a single file, or a hub id of a text-to-image model.

    Raises CheckpointError.
    """
    if name == "garden":
        need_garden("the garden's teacher")
    folder = GARDEN_TEACHER if name == "garden" else name
    return open_checkpoint(folder, additions, say=say, as_teacher=True)


def note_teacher(run: Path, teacher: Path) -> None:
    """Keep in the run which teacher it has, where that is not known yet: 2 to 3 s for SD 1.5, 4.3 GB."""
    path = run / TEACHER_FILE
    if not path.is_file():
        write_atomic(path, json.dumps(_hash_weights(teacher), indent=2))


def check_teacher(run: Path, teacher: Path) -> None:
    """Refuse another teacher than the run's: InputError. Runs of earlier versions do not know theirs."""
    path = run / TEACHER_FILE
    if not path.is_file():
        return
    ours, theirs = read_json(path, CheckpointError), _hash_weights(teacher)
    other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if other:
        raise InputError(f"{teacher} is not the run's teacher, its {other[0]} differs: give that of the run's start")


def _hash_weights(teacher: Path) -> dict[str, str]:
    files = [path for part in NETWORKS for path in sorted((teacher / part).glob("*.safetensors"))]
    return {path.relative_to(teacher).as_posix(): sha256(path) for path in files}

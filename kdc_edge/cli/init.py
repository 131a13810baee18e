"""kdc-edge init: a checkpoint from a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kdc_edge.cli.project import Config, need_training, say


def _preset_help() -> str:
    from kdc_edge.presets import PRESETS

    return "One of " + ", ".join(p.name for p in PRESETS) + "."


def init(
    preset: Annotated[str, Option(help=_preset_help())],
    out: Annotated[Path, Option(help="Folder of the checkpoint.")],
    teacher: Annotated[
        str | None, Option("--from", help="Teacher to copy weights from: a folder, a hub id, or `garden`.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the random weights.")] = 0,
    config: Config = None,
) -> None:
    """Make a checkpoint from a preset, with random weights or with weights of a teacher."""
    del config
    need_training("kdc-edge init")
    from kdc_edge.presets import find_preset
    from kdc_edge.train.checkpoint import find_teacher, init_checkpoint
    from kdc_edge.train.student import describe_account

    chosen = find_preset(preset)
    account = init_checkpoint(out, chosen, find_teacher(teacher) if teacher else None, seed=seed)
    if teacher:
        for line in describe_account(account):
            say(line)
        say(f"text encoder, tokenizer, VAE and scheduler copied from {teacher}")
    else:
        say(f"{preset}: random weights, seed {seed}; CLIP tokenizer")
    typer.echo(out)

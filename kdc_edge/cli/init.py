"""kdc-edge init: a checkpoint from a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from kdc_edge.cli.options import EmbeddingFiles, LoraFiles, PredictionType, Vae
from kdc_edge.cli.project import Config, need_training, say
from kdc_edge.errors import InputError


def _preset_help() -> str:
    from kdc_edge.presets import PRESETS

    return "One of " + ", ".join(p.name for p in PRESETS) + "."


def init(
    preset: Annotated[str, Option(help=_preset_help())],
    out: Annotated[Path, Option(help="Folder of the checkpoint.")],
    teacher: Annotated[
        str | None,
        Option("--from", help="Teacher to copy weights from: a folder, a .safetensors file, a hub id, or `garden`."),
    ] = None,
    seed: Annotated[int, Option(help="Seed of the random weights.")] = 0,
    vae: Vae = None,
    lora: LoraFiles = None,
    embedding: EmbeddingFiles = None,
    prediction_type: PredictionType = None,
    config: Config = None,
) -> None:
    """Make a checkpoint from a preset, with random weights or with weights of a teacher."""
    del config
    from kdc_edge.checkpoints import Additions
    from kdc_edge.presets import find_preset
    from kdc_edge.train.teachers import find_teacher

    chosen = find_preset(preset)
    additions = Additions.parse(vae, lora, embedding, prediction_type)
    if additions and not teacher:
        raise InputError("--vae, --lora, --embedding and --prediction-type change a teacher: give one with --from")
    folder = find_teacher(teacher, additions, say=say) if teacher else None
    need_training("kdc-edge init")
    from kdc_edge.train.checkpoint import init_checkpoint
    from kdc_edge.train.student import describe_account

    account = init_checkpoint(out, chosen, folder, seed=seed)
    if teacher:
        for line in describe_account(account):
            say(line)
        say(f"text encoder, tokenizer, VAE and scheduler copied from {teacher}")
    else:
        say(f"{preset}: random weights, seed {seed}; CLIP tokenizer")
    typer.echo(out)

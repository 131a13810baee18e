"""The options that commands share, and the request that generate and bench make."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kdc_edge.errors import InputError, unknown_choice

if TYPE_CHECKING:
    from kdc_edge.request import GuidanceMode, Request

Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; 7.5, or a few-step student's own. 1 for none, at half the cost."),
]
GuidanceModeOption = Annotated[
    str | None,
    typer.Option("--guidance-mode", help="batched, or sequential: two U-Net calls of half the activations."),
]
GuidanceInterval = Annotated[
    str, typer.Option(metavar="FROM:TO", help="Fractions of the steps with guidance, such as 0.0:0.7.")
]
_ENGINE = "Engine"  # the panel of how it is computed
Engine = Annotated[
    str | None, typer.Option(help="Engine that computes; see kdc-edge devices.", rich_help_panel=_ENGINE)
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device for all components, or one for each: unet=GPU,text_encoder=CPU. See kdc-edge devices.",
        rich_help_panel=_ENGINE,
    ),
]
_CHECKPOINT = "Checkpoint"  # the panel of what is put to a checkpoint before it is used
Vae = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE|DIR", rich_help_panel=_CHECKPOINT,
        help="VAE instead of the checkpoint's: a .safetensors file, or a diffusers folder.",
    ),
]  # fmt: skip
LoraFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="FILE[:WEIGHT]", rich_help_panel=_CHECKPOINT,
        help="LoRA to fuse, kohya's or PEFT's format; may be repeated.",
    ),
]  # fmt: skip
EmbeddingFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--embedding", metavar="FILE[:TOKEN]", rich_help_panel=_CHECKPOINT,
        help="Textual inversion to add as a token; may be repeated.",
    ),
]  # fmt: skip
PredictionType = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=_CHECKPOINT,
        help="epsilon, v_prediction or sample: what the U-Net predicts, where the checkpoint's files do not say it.",
    ),
]  # fmt: skip
Threads = Annotated[int | None, typer.Option(help="Threads of the engine.", rich_help_panel=_ENGINE)]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        rich_help_panel=_ENGINE,
        help="Compute in 32 bits where the engine would use fewer: slower, closer to PyTorch.",
    ),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check/--no-check",
        rich_help_panel=_ENGINE,
        help="Compare the bundle's files with the hashes of its manifest.",
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        rich_help_panel=_ENGINE,
        help="One network in memory at a time, guidance sequential: slower, smaller.",
    ),
]


def make_request(
    prompt: str, *, guidance_mode: str | None, guidance_interval: str, low_memory: bool, **rest: Any
) -> Request:
    """The request, which the pipeline checks; `low_memory` makes guidance sequential where no mode is given."""
    from kdc_edge.request import Request

    mode: Any = guidance_mode or ("sequential" if low_memory else None)
    return Request(prompt, guidance_mode=mode, guidance_interval=parse_interval(guidance_interval), **rest)


def parse_interval(text: str) -> tuple[float, float]:
    """'0.0:0.7' as two fractions; raises InputError."""
    begin, _, end = text.partition(":")
    with suppress(ValueError):
        found = float(begin), float(end)
        if all(map(math.isfinite, found)):
            return found
    raise InputError(f"--guidance-interval {text!r} is not understood: use 0.0:0.7 or the like")


def listed(text: str, option: str, kind: Callable[[str], Any]) -> list[Any]:
    """'4,20' as numbers; raises InputError."""
    try:
        found = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r} is not understood: use 4 or 4,20 or the like") from None
    if "" in found:
        raise InputError(f"{option} {text!r} has an empty place: separate values by single commas")
    return list(dict.fromkeys(found))


def guidance_modes(text: str) -> list[GuidanceMode]:
    """'batched,sequential' as modes; raises InputError."""
    from kdc_edge.request import GuidanceMode

    found = listed(text, "--guidance-mode", str)
    if unknown := [mode for mode in found if mode not in get_args(GuidanceMode)]:
        raise unknown_choice("--guidance-mode", unknown[0], get_args(GuidanceMode))
    return found

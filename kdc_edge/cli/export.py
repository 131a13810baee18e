"""kdc-edge export: a proved bundle from a checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer
from typer import Argument, Option

from kdc_edge.cli.options import EmbeddingFiles, LoraFiles, PredictionType, Vae
from kdc_edge.cli.project import (
    BUNDLES,
    LATEST,
    Config,
    command_line,
    find_checkpoint,
    latest_checkpoint,
    need_export,
    say,
)
from kdc_edge.components import OPTIONAL
from kdc_edge.errors import InputError
from kdc_edge.export.targets import TARGETS, ExportRequest, Target, check_optional, export_checkpoint
from kdc_edge.formats import DEFAULT_PRECISION, find_format, targets
from kdc_edge.text import megabytes


def with_target_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with its `**options` as one flag for each option of the targets; None where a flag is not given."""
    flags: dict[str, tuple[Any, str | None, list[str]]] = {}  # type, metavar, help texts
    for target in TARGETS.values():
        for field, kind in _fields(target):
            *_, texts = flags.setdefault(field.name, (kind, field.metadata.get("metavar"), []))
            default = f" Default: {field.default}." if field.default else ""
            texts.append(f"{target.title}: {field.metadata['help']}{default}")
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, (kind, metavar, texts) in flags.items():
        names = [f"--{name.replace('_', '-')}"] if kind is bool else []  # no --no-...
        option = Option(*names, metavar=metavar, help=" ".join(texts), rich_help_panel="Options of one target")
        annotation: Any = Annotated[Optional[kind], option]  # noqa: UP045
        own.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in own} | {"return": None}
    return command


def _fields(target: Target) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    kinds = get_type_hints(target.options)
    yield from ((field, kinds[field.name]) for field in dataclasses.fields(target.options))


@with_target_options
def export(
    checkpoint: Annotated[
        Path | None,
        Argument(help="A run, finished or not, a diffusers folder, or a .safetensors file. Default: the latest run."),
    ] = None,
    task: Annotated[str | None, Option(help="Export the run's checkpoint after this task.")] = None,
    target: Annotated[str, Option("--target", "-t", help=f"One of {', '.join(targets())}.")] = "onnx",
    precision: Annotated[
        str | None, Option("--precision", "-p", help=f"See kdc-edge formats. Default: {DEFAULT_PRECISION}.")
    ] = None,
    out: Annotated[
        Path | None, Option("--out", "-o", help="Folder of the bundle. Default: bundles/TARGET-PRECISION.")
    ] = None,
    calibration_prompts: Annotated[
        Path | None,
        Option(metavar="FILE", help="int8, mixed: prompts, one per line. Default: the training captions."),
    ] = None,
    calibration_samples: Annotated[
        int | None,
        Option(help="int8, mixed: U-Net calls to calibrate on. Default: 64, mixed 12; twice that without guidance."),
    ] = None,
    decoder: Annotated[
        str | None,
        Option(metavar="DIR", help="Small decoder instead of the VAE's: a folder of AutoencoderTiny, or a hub id."),
    ] = None,
    extra: Annotated[
        Optional[list[str]],  # noqa: UP045
        Option("--with", metavar="COMPONENT", help=f"Add an optional component: {', '.join(OPTIONAL)}. Repeatable."),
    ] = None,
    verify: Annotated[bool, Option("--verify/--no-verify", help="Compare the result with PyTorch.")] = True,
    vae: Vae = None,
    lora: LoraFiles = None,
    embedding: EmbeddingFiles = None,
    prediction_type: PredictionType = None,
    config: Config = None,
    **options: Any,
) -> None:
    """Export a checkpoint to a bundle for devices, and prove that it computes the same as PyTorch."""
    del config
    from kdc_edge.hub import local

    row = find_format(target, precision or DEFAULT_PRECISION)
    if precision is None:
        say(f"no precision given: {row.precision}, {row.description}")
    given = {name: value for name, value in options.items() if value is not None}
    _refuse_other_targets(target, given)
    chosen = TARGETS[row.target].options(**given)
    check_optional(extra or ())
    if checkpoint or task:
        source = find_checkpoint(local(checkpoint) if checkpoint else LATEST, task)
    else:
        source = latest_checkpoint()
    if checkpoint is None:
        say(f"no checkpoint given: {source.resolve()}")
    from kdc_edge.checkpoints import Additions, open_checkpoint

    source = open_checkpoint(source, Additions.parse(vae, lora, embedding, prediction_type), say=say)
    need_export("kdc-edge export")
    from kdc_edge.cli.progress import Stages
    from kdc_edge.prompts import read_prompts
    from kdc_edge.runtimes.torch.small_decoder import find_decoder_folder

    stages = Stages()
    request = ExportRequest(
        source, out or BUNDLES / row.name, row.target, row.precision, verify=verify, command=command_line(),
        tell=stages.say, stage=stages,
        calibration_prompts=None if calibration_prompts is None else read_prompts(calibration_prompts),
        calibration_samples=calibration_samples,
        decoder=None if decoder is None else find_decoder_folder(decoder), extra=tuple(dict.fromkeys(extra or ())),
    )  # fmt: skip
    bundle = export_checkpoint(request, chosen)
    if bundle.manifest.parity is None:
        say("not proved: --no-verify was given")
    else:
        say(f"compared with {bundle.manifest.parity.reference}")
        for check in bundle.manifest.parity.checks:
            say(f"{check.what}: {check.text} (at least {check.threshold_db:.0f} dB)")
    say(megabytes(bundle.size_bytes))
    typer.echo(request.out)


def _refuse_other_targets(target: str, given: dict[str, Any]) -> None:
    """Raise InputError for an option that the target does not have."""
    for name in given:
        owners = [key for key, row in TARGETS.items() if name in {field.name for field, _ in _fields(row)}]
        if target not in owners:
            raise InputError(f"--{name.replace('_', '-')} is for --target {' or '.join(owners)}: leave it out")

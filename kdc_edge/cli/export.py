"""kdc-edge export: a proved artifact from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from kdc_edge.cli.project import BUNDLES, Config, command_line, latest_checkpoint, need_export, say
from kdc_edge.errors import InputError
from kdc_edge.formats import DEFAULT_PRECISION, Format, find_format, targets
from kdc_edge.text import megabytes

if TYPE_CHECKING:
    from kdc_edge.export.coreml.export import CoreMLOptions


def export(
    checkpoint: Annotated[Path | None, Argument(help="A diffusers folder; the latest run's when not given.")] = None,
    target: Annotated[str, Option(help=f"One of {', '.join(targets())}.")] = "onnx",
    precision: Annotated[str | None, Option(help="See kdc-edge formats.")] = None,
    out: Annotated[Path | None, Option(help="The bundle's folder; bundles/TARGET-PRECISION when not given.")] = None,
    calibration_prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Prompts, one a line, for int8; the training captions by default.")
    ] = None,
    calibration_samples: Annotated[int | None, Option(help="U-Net calls recorded for int8; 64 by default.")] = None,
    decoder: Annotated[
        str | None,
        Option(metavar="DIR", help="A small decoder instead of the VAE's: an AutoencoderTiny's folder, or a hub id."),
    ] = None,
    verify: Annotated[bool, Option("--verify/--no-verify", help="Prove it against PyTorch first.")] = True,
    unet_batch: Annotated[int | None, Option(help="Core ML: samples a U-Net pass, 2 (with guidance) or 1.")] = None,
    deployment_target: Annotated[
        str | None, Option(help="Core ML: iOS17 (macOS 14), the default, or iOS18 (macOS 15).")
    ] = None,
    attention: Annotated[
        str | None,
        Option(
            help="ONNX: fused (onnxruntime's), or original (standard operations). Core ML: original (GPU),"
            " split-einsum (Neural Engine), or sdpa (fused; needs iOS18)."
        ),
    ] = None,
    static: Annotated[
        bool | None, Option("--static", help="ONNX: one sample of the model's own size; some devices need it.")
    ] = None,
    swift: Annotated[
        bool | None, Option("--swift", help="Core ML: lay out Resources/ for Apple's Swift package.")
    ] = None,
    max_size: Annotated[
        str | None, Option(metavar="SIZE", help="Core ML, mixed: of the U-Net's package, such as 300MB.")
    ] = None,
    min_psnr: Annotated[float | None, Option(help="Core ML, mixed: of the U-Net's guided prediction, in dB.")] = None,
    recipe: Annotated[
        Path | None, Option(metavar="FILE", help="Core ML, mixed: a mixed bundle's kdc-edge.json, to apply it again.")
    ] = None,
    config: Config = None,
) -> None:
    """Export a checkpoint to a bundle that a device can run, and prove that it computes the same."""
    del config
    row = find_format(target, precision or DEFAULT_PRECISION)
    if precision is None:
        say(f"no precision given: {row.precision}, {row.does}")
    source = checkpoint or latest_checkpoint()
    if checkpoint is None:
        say(f"no checkpoint given: {source.resolve()}")
    own: dict[str, tuple[Any, tuple[str, ...]]] = {  # with the targets that have the option
        "unet_batch": (unet_batch, ("coreml",)),
        "deployment_target": (deployment_target, ("coreml",)),
        "attention": (attention, ("onnx", "coreml")),
        "static": (static, ("onnx",)),
        "swift": (swift, ("coreml",)),
        "max_size": (max_size, ("coreml",)),
        "min_psnr": (min_psnr, ("coreml",)),
        "recipe": (recipe, ("coreml",)),
    }
    asked = {name: value for name, (value, _) in own.items() if value is not None}
    for name in asked:
        if row.target not in own[name][1]:
            raise InputError(f"--{name.replace('_', '-')} is for --target {' or '.join(own[name][1])}: leave it out")
    need_export("kdc-edge export")
    out = out or BUNDLES / row.name
    common: dict[str, Any] = {"precision": row.precision, "verify": verify, "command": command_line()}
    if decoder is not None:
        from kdc_edge.runtimes.small_decoder import find_decoder_folder

        common["decoder"] = find_decoder_folder(decoder)
    calibration = _calibration(row, calibration_prompts, calibration_samples)
    if target == "openvino":
        from kdc_edge.export.openvino import export_openvino

        bundle = export_openvino(source, out, **common, **calibration)
    elif target == "coreml":
        from kdc_edge.export.coreml.export import export_coreml

        bundle = export_coreml(source, out, **common, **calibration, options=_coreml_options(asked), tell=say)
    else:
        from kdc_edge.export.onnx.export import OnnxOptions, export_onnx

        bundle = export_onnx(source, out, **common, **calibration, options=OnnxOptions(**asked), tell=say)
    if bundle.manifest.parity is None:
        say("not proved: --no-verify was given")
    else:
        for check in bundle.manifest.parity.checks:
            say(f"{check.what}: {check.text} (at least {check.threshold_db:.0f} dB)")
    say(megabytes(bundle.size_bytes))
    typer.echo(out)


def _calibration(row: Format, prompts: Path | None, samples: int | None) -> dict[str, Any]:
    """The calibration's options, refused where nothing is calibrated."""
    if prompts is None and samples is None:
        return {}
    if not row.calibrated:
        raise InputError(f"{row.name} needs no calibration: leave out --calibration-prompts and --calibration-samples")
    from kdc_edge.prompts import read_prompts

    return {"calibration_prompts": prompts and read_prompts(prompts), "calibration_samples": samples}


def _coreml_options(asked: dict[str, Any]) -> CoreMLOptions:
    """The options that only Core ML has, with the budget and the recipe read."""
    from kdc_edge.export.coreml.export import CoreMLOptions
    from kdc_edge.export.coreml.mixed import Budget, read_recipe
    from kdc_edge.files import parse_size

    size, psnr_db, recipe = (asked.pop(name, None) for name in ("max_size", "min_psnr", "recipe"))
    if size is not None or psnr_db is not None:
        asked["budget"] = Budget(size and parse_size(size, "--max-size"), psnr_db)
    if recipe is not None:
        asked["recipe"] = read_recipe(recipe)
    return CoreMLOptions(**asked)

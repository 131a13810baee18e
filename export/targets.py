"""The targets, their options, and the request of an export.

    request = ExportRequest(Path("runs/latest/checkpoint"), Path("bundles/onnx-fp16"), "onnx", "fp16")
    bundle = export_checkpoint(request, OnnxOptions(static=True))

A target is a row of TARGETS, rows in kdc_edge/formats.py, and a module with `export(request, options) -> Bundle`, which
is imported when it is asked for. The fields of its options are flags of `kdc-edge export` and keys of `[export]`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kdc_edge.components import OPTIONAL
from kdc_edge.errors import InputError, unknown_choice
from kdc_edge.files import check_writable, refuse_foreign_folder
from kdc_edge.formats import Format, find_format

if TYPE_CHECKING:
    from kdc_edge.bundle import Bundle


# Told what runs now, it holds as long as that runs, and gives what is told how far it is.
Stage = Callable[[str], AbstractContextManager[Callable[[str], None]]]


def silent(_: str) -> AbstractContextManager[Callable[[str], None]]:
    """A Stage that nobody watches."""
    return nullcontext(lambda _: None)


@dataclass(frozen=True)
class ExportRequest:
    """One export, whatever the target. Raises InputError for a format that does not exist or needs no calibration."""

    checkpoint: Path
    out: Path  # the bundle's folder; as it was where the export fails
    target: str
    precision: str
    verify: bool = True  # compare with PyTorch before the bundle takes its place
    prompts: Sequence[str] | None = None  # for that comparison; None: the training captions
    calibration_prompts: Sequence[str] | None = None  # None: the training captions
    calibration_samples: int | None = None  # U-Net calls; None: the target's default
    decoder: Path | None = None  # folder of a small decoder that replaces the checkpoint's
    extra: Sequence[str] = ()  # optional components
    command: str | None = None  # for the record
    tell: Callable[[str], None] = lambda _: None  # gets decisions, a line each
    stage: Stage = silent

    def __post_init__(self) -> None:
        check_optional(self.extra)
        calibration = (self.calibration_prompts, self.calibration_samples)
        if calibration != (None, None) and not self.format.calibrated:
            raise InputError(
                f"{self.format.name} needs no calibration: leave out --calibration-prompts and --calibration-samples"
            )

    @property
    def format(self) -> Format:
        return find_format(self.target, self.precision)


def flag(text: str, metavar: str | None = None) -> dict[str, str | None]:
    """Metadata of an option's field."""
    return {"help": text, "metavar": metavar}


@dataclass(frozen=True)
class NoOptions:
    """A target without options of its own."""


@dataclass(frozen=True)
class OnnxOptions:
    """Raises InputError naming the option."""

    attention: str = field(
        default="fused",
        metadata=flag("fused (operator of ONNX Runtime) or original (standard ONNX)."),
    )
    static: bool = field(
        default=False,
        metadata=flag("fixed shapes, batch 1, the model's own image size; some devices need it."),
    )

    def __post_init__(self) -> None:
        _check_choice("attention", self.attention, ("fused", "original"))


@dataclass(frozen=True)
class CoreMLOptions:
    """Raises InputError naming the option."""

    attention: str = field(
        default="original",
        metadata=flag("original (for the GPU), split-einsum (for the Neural Engine) or sdpa (fused; needs iOS18)."),
    )
    unet_batch: int | None = field(
        default=None,
        metadata=flag("samples per U-Net call: 2 (both halves of guidance) or 1. Default: 1 without guidance, else 2."),
    )
    deployment_target: str = field(
        default="iOS17",
        metadata=flag("oldest system: iOS17 (macOS 14) or iOS18 (macOS 15)."),
    )
    swift: bool = field(default=False, metadata=flag("add Resources/ for Apple's Swift package."))
    max_size: str | None = field(
        default=None,
        metadata=flag("size limit of the U-Net package for precision mixed, such as 300MB.", "SIZE"),
    )
    min_psnr: float | None = field(
        default=None,
        metadata=flag("PSNR limit of the guided U-Net prediction for precision mixed, in dB."),
    )
    recipe: Path | None = field(
        default=None,
        metadata=flag("kdc-edge.json of a mixed bundle, to apply its bits again.", "FILE"),
    )

    def __post_init__(self) -> None:
        if self.unet_batch not in (None, 1, 2):
            raise InputError(f"--unet-batch {self.unet_batch} is not supported by Apple's package: use 2 or 1")
        _check_choice("deployment-target", self.deployment_target, ("iOS17", "iOS18"))
        _check_choice("attention", self.attention, ("original", "split-einsum", "sdpa"))
        if self.attention == "sdpa" and self.deployment_target == "iOS17":
            raise InputError("--attention sdpa needs iOS 18 or macOS 15: add --deployment-target iOS18")


def check_optional(names: Sequence[str]) -> None:
    """Raise UsageError for the name of an optional component that there is not."""
    for name in names:
        _check_choice("with", name, OPTIONAL)


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise unknown_choice(f"--{option}", value, choices)


@dataclass(frozen=True)
class Target:
    """A row of the registry."""

    title: str  # in help texts
    module: str
    options: type[Any] = NoOptions  # a frozen dataclass: each field has a default, and `flag` as metadata


TARGETS: dict[str, Target] = {
    "onnx": Target("ONNX", "kdc_edge.export.onnx.export", OnnxOptions),
    "coreml": Target("Core ML", "kdc_edge.export.coreml.export", CoreMLOptions),
    "openvino": Target("OpenVINO", "kdc_edge.export.openvino"),
}


def export_checkpoint(request: ExportRequest, options: object = None) -> Bundle:
    """Write a bundle to `request.out`, proved against PyTorch before it takes its place there.

    `options` are of the target's own class; its defaults when None. Raises CheckpointError, ParityError or InputError;
    `request.out` is then as it was.
    """
    from kdc_edge.diffusers_folder import read_model
    from kdc_edge.manifest import MANIFEST
    from kdc_edge.runtimes.torch import load_network

    target = TARGETS[request.format.target]
    model = read_model(request.checkpoint)
    if model.inpainting:  # each image begins with the encoder
        request = replace(request, extra=tuple(dict.fromkeys((*request.extra, "vae_encoder"))))
    # What is refused is refused before calibration and search, which may take hours.
    refuse_foreign_folder(request.out, MANIFEST)
    if not request.out.exists():
        check_writable(request.out)
    for name in request.extra:
        load_network(request.checkpoint, name)
    if request.decoder is not None:
        from kdc_edge.runtimes.torch.small_decoder import load_decoder

        load_decoder(request.decoder, model)
    export = importlib.import_module(target.module).export
    return cast("Bundle", export(request, target.options() if options is None else options))

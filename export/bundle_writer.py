"""The steps that all targets share: configs, tokenizer, manifest, proof, final rename.

    bundle = write_bundle(request, write)

`write(part, folder)` is the target's step: it writes one component's files to `folder` and returns their names, the one
that the engine opens first. `finish(folder)` adds files beside the components, when these are proved. A VAE that fails
the proof, as one does whose activations overflow in half precision, is written again in fp32. The folder appears at
`request.out` only after all steps.
"""

from __future__ import annotations

import datetime
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kdc_edge.bundle import Bundle, unproved
from kdc_edge.checkpoints.assemble import read_sources
from kdc_edge.diffusers_folder import TINY_VAE, hash_checkpoint, read_model, training_note
from kdc_edge.errors import BundleError, CheckpointError, ParityError
from kdc_edge.export.calibration import Calibration
from kdc_edge.export.components import ExportComponent, describe, load_component
from kdc_edge.export.optional import prove_optional
from kdc_edge.export.parity import IN_32_BITS, check_parity, images_of
from kdc_edge.export.targets import ExportRequest
from kdc_edge.files import atomic_folder, read_json
from kdc_edge.formats import Format
from kdc_edge.hardware import package_versions
from kdc_edge.hub import label
from kdc_edge.manifest import (
    MANIFEST,
    Check,
    ComponentInfo,
    ComponentName,
    Manifest,
    Parity,
    Provenance,
    Recipe,
    Tensor,
    list_files,
    write_manifest,
)
from kdc_edge.prompts import own_prompts
from kdc_edge.tokenizer import write_vocabulary

Write = Callable[[ExportComponent, Path], list[str]]
Interface = tuple[dict[str, Tensor], dict[str, Tensor]]  # inputs and outputs by name
Finish = Callable[[Path], Sequence[Check] | None]  # checks of the files that it adds

PACKAGES = (
    "torch", "diffusers", "transformers", "optimum", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf",
    "coremltools", "numpy",
)  # fmt: skip
# A component's folder in the bundle <- its network's folder in the checkpoint.
SOURCES: dict[ComponentName, str] = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}
OPTIONAL_SOURCES: dict[ComponentName, str] = {"vae_encoder": "vae", "safety_checker": "safety_checker"}
VAE: tuple[ComponentName, ...] = ("vae_decoder", "vae_encoder")
CONFIG = "config.json"
NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder")


def optimum_interface(part: ExportComponent) -> Interface:
    """The component's inputs and outputs under optimum's names, free sizes included."""
    return describe(part.config.input_shapes), describe(part.config.output_shapes)


def write_bundle(
    request: ExportRequest,
    write: Write,
    *,
    interface: Callable[[ExportComponent], Interface] = optimum_interface,
    finish: Finish | None = None,
    calibration: Calibration | None = None,
    recipe: Recipe | None = None,
) -> Bundle:
    """Fill a folder beside `request.out`, prove it, rename it in. Raises a KdcError; `out` is then as it was.

    `interface` gives a component's inputs and outputs for a target with names of its own.
    """
    checkpoint, out, row = request.checkpoint, request.out, request.format
    model = read_model(checkpoint)
    sources = SOURCES | {name: OPTIONAL_SOURCES[name] for name in OPTIONAL_SOURCES if name in request.extra}
    with atomic_folder(out, marker=MANIFEST) as folder:
        copy_configs(checkpoint, folder, sources)
        copy_tokenizer(checkpoint / "tokenizer", folder / "tokenizer")
        components: dict[ComponentName, ComponentInfo] = {
            name: _write_component(request, name, folder, write, interface) for name in sources
        }
        manifest = Manifest(
            target=row.target,
            precision=row.precision,
            model=model,
            components=components,
            files=list_files(folder),
            calibration=calibration.info if calibration else None,
            recipe=recipe,
            provenance=Provenance(
                checkpoint=label(checkpoint),
                checkpoint_sha256=hash_checkpoint(checkpoint),
                training=training_note(checkpoint),
                decoder=request.decoder and label(request.decoder),
                decoder_sha256=request.decoder and hash_checkpoint(request.decoder),
                sources=read_sources(checkpoint),
                packages=package_versions(PACKAGES),
                command=request.command,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ),
        )
        parity = None
        if request.verify:
            parity = _prove(request, folder, manifest)
            if failing := _failing_vae(parity, row):
                for name, check in failing.items():
                    request.tell(f"{name} is kept in fp32; in {row.precision} it gives {_result(check)}")
                    components[name] = _write_component(request, name, folder, write, interface, full_precision=True)
                manifest = manifest.model_copy(update={"components": components, "files": list_files(folder)})
                parity = _prove(request, folder, manifest)
        with request.stage("writing the bundle's other files"):
            own_checks = (finish(folder) if finish else None) or ()
            files = list_files(folder, manifest.files)
        if parity is not None:
            parity = parity.model_copy(update={"checks": [*parity.checks, *own_checks]})
            _demand(parity, row)
        manifest = manifest.model_copy(update={"files": files, "parity": parity})
        write_manifest(folder, manifest)  # the last file: what has none is no bundle
    return Bundle.open(out)


def spread(prompts: Sequence[str], count: int) -> list[str]:
    """Up to `count` of the prompts, evenly over the list, so that each task has its part."""
    return [prompts[i * len(prompts) // count] for i in range(min(count, len(prompts)))]


def _prove(request: ExportRequest, folder: Path, manifest: Manifest) -> Parity:
    """The parity of a bundle whose manifest is not written yet."""
    checkpoint, row = request.checkpoint, request.format
    prompts = request.prompts or spread(own_prompts(checkpoint), images_of(manifest.model))
    with unproved(folder, manifest):
        parity = check_parity(checkpoint, folder, row, prompts, request.decoder, request.stage)
        optional = prove_optional(checkpoint, folder, row, request.extra)
    return parity.model_copy(update={"checks": [*parity.checks, *optional]})


def _failing_vae(parity: Parity, row: Format) -> dict[ComponentName, Check]:
    """The halves of the VAE that the format is too small for."""
    if row.precision == "fp32":
        return {}
    failing = {check.what.removesuffix(IN_32_BITS): check for check in parity.checks if not check.passed}
    return {name: failing[name] for name in VAE if name in failing}


def _write_component(
    request: ExportRequest,
    name: ComponentName,
    folder: Path,
    write: Write,
    interface: Callable[[ExportComponent], Interface],
    *,
    full_precision: bool = False,
) -> ComponentInfo:
    """One component from file to file, in place of what was written before.

    Its weights are in memory only while this runs. `full_precision` keeps it in fp32.
    """
    for old in (folder / name).iterdir():
        if old.name != CONFIG:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    with request.stage(f"converting {name}{' in fp32' if full_precision else ''}"):
        part = replace(load_component(request.checkpoint, name, request.decoder), full_precision=full_precision)
        inputs, outputs = interface(part)
        files = [f"{name}/{file}" for file in write(part, folder / name)]
    precision: Literal["fp32"] | None = "fp32" if full_precision else None
    return ComponentInfo(files=files, class_name=part.class_name, precision=precision, inputs=inputs, outputs=outputs)


def copy_configs(checkpoint: Path, folder: Path, sources: Mapping[ComponentName, str] = SOURCES) -> None:
    """model_index.json, the scheduler's and each component's config, as optimum's pipelines read them.

    Every decoder has AutoencoderKL's interface, and openvino_genai wants to read that name; the manifest has the class.
    """
    index = read_json(checkpoint / "model_index.json", CheckpointError) | {"vae": ["diffusers", "AutoencoderKL"]}
    _write_json(folder / "model_index.json", index | {k: [None, None] for k in NOT_EXPORTED if k in index})
    paths = [(f"{source}/{CONFIG}", f"{name}/{CONFIG}") for name, source in sources.items()]
    for source, target in [*paths, ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json")]:
        config = read_json(checkpoint / source, CheckpointError)
        config.pop("_name_or_path", None)  # a path of this machine
        if config.get("_class_name") == TINY_VAE:
            config["_class_name"] = "AutoencoderKL"
        _write_json(folder / target, config)


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's JSON and text files; vocab.json and merges.txt are made where only tokenizer.json is."""
    if not source.is_dir():
        raise CheckpointError(f"{source} is missing: the checkpoint is incomplete")
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.suffix in {".json", ".txt"} and path.is_file():
            shutil.copyfile(path, target / path.name)  # a link stays in the checkpoint: read_model has seen to that
    try:
        write_vocabulary(target)
    except BundleError as error:
        raise CheckpointError(str(error)) from None


def _demand(parity: Parity, row: Format) -> None:
    """Raise ParityError naming each check that fails, with its numbers."""
    failed = [f"{check.what}: {_result(check)}" for check in parity.checks if not check.passed]
    if failed:
        raise ParityError(
            f"{row.name} does not compute the same as PyTorch, nothing was written: {'; '.join(failed)};"
            " try a higher precision, or inspect the bundle with --no-verify"
        )


def _result(check: Check) -> str:
    if check.psnr_db is None or not math.isfinite(check.psnr_db):
        return "values that are no numbers, or a wrong shape"
    return (
        f"{check.psnr_db:.1f} dB where {check.threshold_db:g} dB are needed (largest error {check.max_abs_error:.3g})"
    )


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")

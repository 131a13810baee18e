"""Checkpoint to Core ML: packages with the names and layouts that Apple's Swift package expects.

    bundle = export(ExportRequest(checkpoint, Path("bundles/coreml-fp16"), "coreml", "fp16"), CoreMLOptions())

Each network is traced by torch.jit, converted by coremltools to an ML Program, and compressed: `w8` keeps int8
weights with one scale per channel, `palette8/6/4` one table of 2**n values per weight tensor, found by k-means. All
precisions but fp32 compute in fp16. Any machine can export; where there is no Core ML, runtimes/mil computes the proof.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import hash_checkpoint, optional_components, read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.export.bundle_writer import Interface, write_bundle
from kdc_edge.export.calibration import Calibration, calibrate_for
from kdc_edge.export.components import ExportComponent, load_component
from kdc_edge.export.coreml.apple_modules import AppleNetwork, apple_network
from kdc_edge.export.coreml.mixed import Budget, Search, Tell, apply_recipe, read_recipe
from kdc_edge.export.coreml.palettize import MIN_WEIGHTS, folder_bytes, palettize
from kdc_edge.export.coreml.swift import lay_out_resources
from kdc_edge.export.coreml.swift_tokens import read_swift_vocabulary
from kdc_edge.export.rewrites.attention import set_attention
from kdc_edge.export.targets import CoreMLOptions, ExportRequest
from kdc_edge.files import exclusive, parse_size
from kdc_edge.formats import Format
from kdc_edge.hardware import package_versions
from kdc_edge.manifest import Model, Recipe
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.apple_layout import CHUNKS, PACKAGES, PROGRAM
from kdc_edge.runtimes.coreml_tools import load_coremltools
from kdc_edge.runtimes.torch import load_network
from kdc_edge.text import megabytes, one_line

CHUNK_BYTES = 1_000_000_000  # iPhones do not load more in one piece
PALETTE_BITS = {"palette8": 8, "palette6": 6, "palette4": 4, "mixed": 8}  # mixed: all but the U-Net
SEARCHED_BY = ("kdc-edge", "torch", "diffusers", "coremltools", "numpy")  # whose versions decide what it measures
MIXED_SAMPLES = 12  # U-Net calls, one per prompt; the search repeats them for each layer and bit width


def export(request: ExportRequest, options: CoreMLOptions) -> Bundle:
    """Write and prove a bundle: see `export_checkpoint`. `mixed` first searches its recipe on calibration inputs."""
    if options.swift:  # Apple's package uses what there is
        extra = (*request.extra, *optional_components(request.checkpoint))
        request = replace(request, extra=tuple(dict.fromkeys(extra)))
        model = read_model(request.checkpoint)
        for has, what in ((model.inpainting, "inpainting"), (model.guidance_embedding, "guidance embedding")):
            if has:
                raise InputError(f"--swift is for Apple's Swift package, which has no {what}: leave it out")
        for name in request.extra:
            load_network(request.checkpoint, name)  # refused before the search
        for line in read_swift_vocabulary(request.checkpoint / "tokenizer").notes():
            request.tell(line)
    budget, recipe = _read_budget(request.format, options)
    load_coremltools("exporting to Core ML")
    export = _Export(request, read_model(request.checkpoint), options)
    calibration = None
    if budget is not None:
        own = MIXED_SAMPLES if export.model.guided else 2 * MIXED_SAMPLES
        calibration = calibrate_for(request, own, samples_an_image=1)
        recipe = export.search(budget, calibration)
    return write_bundle(
        request,
        lambda part, folder: export.write(part, folder, recipe),
        interface=export.interface,
        finish=lay_out_resources if options.swift else None,
        calibration=calibration,
        recipe=recipe,
    )


@dataclass(frozen=True)
class _Export:
    """The conversion of each network under one request."""

    request: ExportRequest
    model: Model
    options: CoreMLOptions

    def interface(self, part: ExportComponent) -> Interface:
        network = self._network(part)
        return dict(network.inputs), dict(network.outputs)

    def write(self, part: ExportComponent, folder: Path, recipe: Recipe | None) -> list[str]:
        """One component's packages in `folder`; their files' names, programs first."""
        precision = self._precision(part)
        network, package = self._convert(part)
        if recipe is not None and part.name == "unet":
            package = apply_recipe(package, recipe)
        else:
            package = compress(package, precision)
        return save(package, folder, part.name, network, self.request.tell)

    def search(self, budget: Budget, calibration: Calibration) -> Recipe:
        """The recipe for the budget; measurements are kept beside the bundle, for other budgets too."""
        checkpoint, tell = self.request.checkpoint, self.request.tell
        part: Any = load_component(checkpoint, "unet")
        _, package = self._convert(part)
        options = repr(replace(self.options, max_size=None, min_psnr=None, swift=False))
        made_by = repr(sorted(package_versions(SEARCHED_BY).items()))
        key = "".join([hash_checkpoint(checkpoint), calibration.info.model_dump_json(), options, made_by])
        folder = self.request.out.parent / f".coreml-search-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        tell(f"searching; measurements are kept in {folder}, for other budgets too")
        with exclusive(folder / "lock"):  # a search for another budget at the same time waits, and measures nothing
            return Search(part.module.unet, package, calibration, folder, tell).find(budget)

    def _precision(self, part: ExportComponent) -> str:
        return "fp32" if part.full_precision else self.request.precision

    def _network(self, part: ExportComponent) -> AppleNetwork:
        own = 2 if self.model.guided else 1
        return apple_network(part, self.model, unet_batch=self.options.unet_batch or own)

    def _convert(self, part: ExportComponent) -> tuple[AppleNetwork, Any]:
        target = self.options.deployment_target
        if part.name == "unet":
            # For iOS 17 coremltools takes sdpa apart into the original, and tracing it holds no scores in memory.
            whole = self.options.attention == "original" and target == "iOS17"
            set_attention(part.module.unet, "sdpa" if whole else self.options.attention)
        network = self._network(part)
        return network, convert(network, half=self._precision(part) != "fp32", target=target)


def _read_budget(row: Format, options: CoreMLOptions) -> tuple[Budget | None, Recipe | None]:
    """The budget or the recipe, which precision mixed needs and no other takes."""
    given = [x for x in (options.max_size, options.min_psnr, options.recipe) if x is not None]
    if row.precision == "mixed" and len(given) != 1:
        raise InputError("coreml-mixed needs one of --max-size 300MB, --min-psnr 30 and --recipe FILE")
    if row.precision != "mixed" and given:
        raise InputError(f"{row.name} has no budget: --max-size, --min-psnr and --recipe are for --precision mixed")
    if options.recipe is not None:
        return None, read_recipe(options.recipe)
    if not given:
        return None, None
    size_bytes = None if options.max_size is None else parse_size(options.max_size, "--max-size")
    return Budget(size_bytes, options.min_psnr), None


def convert(network: AppleNetwork, *, half: bool, target: str) -> Any:
    """The network as coremltools' MLModel, in memory. Raises CheckpointError where coremltools refuses it."""
    ct = load_coremltools("exporting to Core ML")
    with quiet():
        with torch.no_grad():
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                network.module, network.samples(), check_trace=False, strict=False
            )
        try:
            return ct.convert(
                traced,
                convert_to="mlprogram",
                inputs=[ct.TensorType(n, tuple(t.shape), np.float32) for n, t in network.inputs.items()],
                outputs=[ct.TensorType(n, dtype=np.float32) for n in network.outputs],
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                skip_model_load=True,
            )
        except Exception as error:  # coremltools raises whatever comes
            raise CheckpointError(f"coremltools {ct.__version__} cannot convert this: {one_line(error)}") from None


def compress(package: Any, precision: str) -> Any:
    """The package with smaller weights, as the precision says; fp32 and fp16 stay as they are."""
    from coremltools.optimize import coreml as cto

    if precision in ("fp32", "fp16"):
        return package
    with quiet():
        if precision == "w8":
            int8 = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=MIN_WEIGHTS)
            return cto.linear_quantize_weights(package, cto.OptimizationConfig(global_config=int8))
        return palettize(package, PALETTE_BITS[precision])


def save(package: Any, folder: Path, name: str, network: AppleNetwork, tell: Tell) -> list[str]:
    """Write the package, in two where one would be too large; the files' names, programs first."""
    ct = load_coremltools("exporting to Core ML")
    folder.mkdir(exist_ok=True)
    with quiet():
        describe(package, network)
        names: Sequence[str] = [PACKAGES[name]]
        package.save(str(folder / f"{names[0]}.mlpackage"))
        if name == "unet" and folder_bytes(folder) > CHUNK_BYTES:
            tell(f"the U-Net package is over {megabytes(CHUNK_BYTES)}, the limit of iPhones: it is split in two")
            _chunk(ct, folder / f"{names[0]}.mlpackage", network)
            names = CHUNKS
    programs = [f"{n}.mlpackage/{PROGRAM}" for n in names]
    rest = sorted(
        path.relative_to(folder).as_posix()
        for n in names
        for path in (folder / f"{n}.mlpackage").rglob("*.*")
        if path.is_file()
    )
    return programs + [path for path in rest if path not in programs]


def describe(package: Any, network: AppleNetwork) -> None:
    """Metadata of the package, which Xcode shows."""
    package.author = "exported by kdc-edge"
    package.short_description = f"Part of a Stable Diffusion student: {network.purpose}."
    spec = package.get_spec().description  # of a chunk, whose inputs may be outputs of the other
    for ends, descriptions, infos in (
        (spec.input, package.input_description, network.inputs),
        (spec.output, package.output_description, network.outputs),
    ):
        for name in {end.name for end in ends} & infos.keys():
            descriptions[name] = f"{network.descriptions[name]}; {' x '.join(map(str, infos[name].shape))}"


def _chunk(ct: Any, whole: Path, network: AppleNetwork) -> None:
    """Put two packages of about the same size in the place of a whole one."""
    ct.models.utils.bisect_model(str(whole), str(whole.parent), check_output_correctness=False)
    shutil.rmtree(whole)
    for i, name in enumerate(CHUNKS, 1):
        made = whole.parent / f"{whole.stem}_chunk{i}.mlpackage"
        part = ct.models.MLModel(str(made), skip_model_load=True)
        describe(part, network)
        part.save(str(whole.parent / f"{name}.mlpackage"))
        shutil.rmtree(made)

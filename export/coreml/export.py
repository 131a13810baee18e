"""Checkpoint to Core ML: packages with the names and layouts that Apple's Swift package reads.

    bundle = export_coreml(Path("runs/latest/checkpoint"), Path("bundles/coreml-fp16"), precision="fp16")

Each network is traced by torch.jit, converted by coremltools to an ML Program, and compressed: `w8` keeps int8
weights with a scale a channel, `palette8/6/4` a table of 2**n values a weight, found by k-means. Everything but
fp32 computes in fp16. It works on any machine; the proof is computed by runtimes/mil where Core ML is not.
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

from kdc_edge.bundle import MANIFEST, Bundle, Check, Model, Recipe
from kdc_edge.diffusers_folder import hash_checkpoint, read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.export.bundle_writer import Interface, write_bundle
from kdc_edge.export.calibration import Calibration, calibrate
from kdc_edge.export.components import ExportComponent, load_component
from kdc_edge.export.coreml.apple_modules import AppleNetwork, apple_network
from kdc_edge.export.coreml.extras import EXTRAS, extra_networks, prove
from kdc_edge.export.coreml.mixed import Budget, Search, Tell, apply_recipe
from kdc_edge.export.coreml.palettize import MIN_WEIGHTS, folder_bytes, palettize, quiet
from kdc_edge.export.coreml.swift import lay_out_resources
from kdc_edge.export.rewrites.attention import ATTENTIONS, set_attention
from kdc_edge.files import refuse_foreign_folder
from kdc_edge.formats import Format, find_format
from kdc_edge.runtimes.apple_layout import CHUNKS, PACKAGES, PROGRAM
from kdc_edge.runtimes.coreml_tools import load_coremltools
from kdc_edge.text import one_line

DEPLOYMENT_TARGETS = ("iOS17", "iOS18")  # macOS 14 and 15
UNET_BATCHES = (1, 2)
CHUNK_BYTES = 1_000_000_000  # iPhones do not load more in one piece
PALETTE_BITS = {"palette8": 8, "palette6": 6, "palette4": 4, "mixed": 8}  # mixed: of all but the U-Net
MIXED_SAMPLES = 12  # U-Net calls, a prompt each: every layer and number of bits costs as many


@dataclass(frozen=True)
class CoreMLOptions:
    """What only Core ML asks. Raises InputError naming the option."""

    unet_batch: int = 2  # 2 computes both halves of guidance at once; 1 takes less memory
    deployment_target: str = "iOS17"  # iOS 17 and macOS 14; iOS18 (macOS 15) has fused attention
    attention: str = "original"  # export/attention.py
    swift: bool = False  # lay out Resources/ for Apple's Swift package
    budget: Budget | None = None  # of mixed
    recipe: Recipe | None = None  # of mixed, found before: instead of a budget

    def __post_init__(self) -> None:
        if self.unet_batch not in UNET_BATCHES:
            raise InputError(f"--unet-batch {self.unet_batch} is not what Apple's package reads: use 2 or 1")
        if self.deployment_target not in DEPLOYMENT_TARGETS:
            raise InputError(
                f"--deployment-target {self.deployment_target!r} is unknown:"
                f" choose from {', '.join(DEPLOYMENT_TARGETS)}"
            )
        if self.attention not in ATTENTIONS:
            raise InputError(f"--attention {self.attention!r} is unknown: choose from {', '.join(ATTENTIONS)}")
        if self.attention == "sdpa" and self.deployment_target == "iOS17":
            raise InputError("--attention sdpa is an operation of iOS 18 and macOS 15: add --deployment-target iOS18")


def export_coreml(
    checkpoint: Path,
    out: Path,
    *,
    precision: str,
    options: CoreMLOptions | None = None,
    verify: bool = True,
    prompts: Sequence[str] | None = None,
    calibration_prompts: Sequence[str] | None = None,
    calibration_samples: int | None = None,
    decoder: Path | None = None,
    command: str | None = None,
    tell: Tell | None = None,
) -> Bundle:
    """Write a bundle to `out`, proved against PyTorch on `prompts` before it takes its place there.

    `decoder`, the folder of an AutoencoderTiny, takes the place of the checkpoint's decoder.
    `mixed` searches on calibration inputs from `calibration_prompts`, and `tell` gets a line now and then.
    Raises CheckpointError, ParityError or InputError; `out` is then what it was before.
    """
    row = find_format("coreml", precision)
    chosen = options or CoreMLOptions()
    _check_budget(row, chosen)
    load_coremltools("exporting to Core ML")
    refuse_foreign_folder(out, MANIFEST)  # before the search, which may take hours
    export = _Export(checkpoint, read_model(checkpoint), row, chosen, tell or (lambda _: None))
    recipe, calibration = chosen.recipe, None
    if chosen.budget is not None:
        samples = MIXED_SAMPLES if calibration_samples is None else calibration_samples
        calibration = calibrate(checkpoint, calibration_prompts, samples, samples_an_image=1)
        recipe = export.search(calibration, out.parent)
    return write_bundle(
        checkpoint,
        out,
        row,
        lambda part, folder: export.write(part, folder, recipe),
        interface=export.interface,
        finish=export.finish if chosen.swift else None,
        verify=verify,
        prompts=prompts,
        calibration=calibration.info if calibration else None,
        recipe=recipe,
        decoder=decoder,
        command=command,
    )


@dataclass(frozen=True)
class _Export:
    """What stays the same for every network of one export."""

    checkpoint: Path
    model: Model
    row: Format
    options: CoreMLOptions
    tell: Tell

    def interface(self, part: ExportComponent) -> Interface:
        network = apple_network(part, self.model, unet_batch=self.options.unet_batch)
        return dict(network.inputs), dict(network.outputs)

    def write(self, part: ExportComponent, folder: Path, recipe: Recipe | None) -> list[str]:
        """One component's packages in `folder`; their files' names, programs first."""
        network, package = self._convert(part)
        if recipe is not None and part.name == "unet":
            package = apply_recipe(package, recipe)
        else:
            package = compress(package, self.row.precision)
        return save(package, folder, part.name, network, self.tell)

    def finish(self, folder: Path) -> list[Check]:
        """What Apple's package reads beside the components, proved, and Resources/."""
        checks = []
        for name, network in extra_networks(self.checkpoint, self.model):
            package = convert(network, half=self._half, target=self.options.deployment_target)
            save(compress(package, self.row.precision), folder / name, name, network, self.tell)
            checks.append(prove(name, network, folder / name / f"{EXTRAS[name]}.mlpackage", self.row))
        lay_out_resources(folder)
        return checks

    def search(self, calibration: Calibration, beside: Path) -> Recipe:
        """The recipe for the budget; what is found on the way stays in a folder of its own."""
        assert self.options.budget is not None
        part: Any = load_component(self.checkpoint, "unet")
        _, package = self._convert(part)
        options = repr(replace(self.options, budget=None, swift=False))
        key = "".join([hash_checkpoint(self.checkpoint), calibration.info.model_dump_json(), options])
        folder = beside / f".coreml-search-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        self.tell(f"searching; what is found is kept in {folder}, for other budgets too")
        return Search(part.module.unet, package, calibration, folder, self.tell).find(self.options.budget)

    @property
    def _half(self) -> bool:
        return self.row.precision != "fp32"

    def _convert(self, part: ExportComponent) -> tuple[AppleNetwork, Any]:
        target = self.options.deployment_target
        if part.name == "unet":
            # For iOS 17 coremltools takes sdpa apart into the original, and tracing it holds no scores in memory.
            whole = self.options.attention == "original" and target == "iOS17"
            set_attention(part.module.unet, "sdpa" if whole else self.options.attention)
        network = apple_network(part, self.model, unet_batch=self.options.unet_batch)
        return network, convert(network, half=self._half, target=target)


def _check_budget(row: Format, options: CoreMLOptions) -> None:
    """Mixed needs a budget or a recipe, and nothing else takes one."""
    given = [x for x in (options.budget, options.recipe) if x is not None]
    if row.precision == "mixed" and len(given) != 1:
        raise InputError("coreml-mixed needs --max-size 300MB, --min-psnr 30 or --recipe FILE, and one of them only")
    if row.precision != "mixed" and given:
        raise InputError(f"{row.name} has no budget: --max-size, --min-psnr and --recipe are for --precision mixed")


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
        names: Sequence[str] = [(PACKAGES | EXTRAS)[name]]
        package.save(str(folder / f"{names[0]}.mlpackage"))
        if name == "unet" and folder_bytes(folder) > CHUNK_BYTES:
            tell(f"the U-Net's package is over {CHUNK_BYTES / 1e9:g} GB, more than iPhones load: it lies in two")
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
    """What Xcode shows of the package."""
    package.author = "exported by kdc-edge"
    package.short_description = f"Part of a Stable Diffusion student: {network.does}."
    spec = package.get_spec().description  # of a chunk, whose inputs may be another's outputs
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

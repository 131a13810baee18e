"""Checkpoint to OpenVINO IR: names, folders and tokenizer as optimum-intel and openvino_genai open them.

    bundle = export(ExportRequest(checkpoint, Path("bundles/openvino-fp16"), "openvino", "fp16"), NoOptions())

Weights: `fp16` halves them; `w8` and `w4` keep them as integers that are widened inside the graph (size, hardly
time). `int8` also computes in integers (W8A8): the ranges of the U-Net's activations are recorded while the
student itself generates (calibration.py). Components are converted one after the other, so that the peak of
memory is the largest one's.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kdc_edge.bundle import Bundle
from kdc_edge.errors import require
from kdc_edge.export.bundle_writer import write_bundle
from kdc_edge.export.calibration import Calibration, calibrate_for, one_by_one
from kdc_edge.export.components import ExportComponent
from kdc_edge.export.rewrites.gates import split_gates
from kdc_edge.export.rewrites.upsampling import split_upsampling
from kdc_edge.export.targets import ExportRequest, NoOptions
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.openvino import MappedWeights

_ov: Any = require("openvino", extra="export", purpose="an export to OpenVINO")
_decoder: Any = require("openvino.frontend.pytorch.ts_decoder", extra="export", purpose="an export to OpenVINO")

MODEL = "openvino_model.xml"
W4_GROUP = 64  # weights of a row that share a scale; it divides every width of SD 1.x


def export(request: ExportRequest, _: NoOptions) -> Bundle:
    """Write and prove a bundle: see `export_checkpoint`."""
    precision = request.precision
    calibration = calibrate_for(request) if request.format.calibrated else None

    def write(part: ExportComponent, folder: Path) -> list[str]:
        split_upsampling(part.module)
        split_gates(part.module)
        opened = in_a_file if calibration and part.name == "unet" else converted
        with quiet(progress=True), opened(part, folder) as model:
            kept = "fp32" if part.full_precision else precision
            model = compress(model, part.name, kept, calibration)
            _ov.save_model(model, folder / MODEL, compress_to_fp16=kept != "fp32")
        return [MODEL, "openvino_model.bin"]

    return write_bundle(request, write, finish=write_tokenizer, calibration=calibration)


def convert(part: ExportComponent) -> Any:
    """The component as an OpenVINO model in fp32 with optimum's names; its weights are still the module's."""
    dummies = part.config.generate_dummy_inputs()
    shapes = part.config.input_shapes
    example = tuple(dummies.values())
    # torch would trace a second time to compare; the proof does that better.
    traced = _decoder.TorchScriptPythonDecoder(part.module, example_input=example, trace_kwargs={"check_trace": False})
    model = _ov.convert_model(
        traced,
        input=[_ov.PartialShape([-1 if isinstance(n, str) else n for n in shape]) for shape in shapes.values()],
    )
    for ports, names in ((model.inputs, shapes), (model.outputs, part.config.output_shapes)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    for node, name in zip(model.get_parameters(), shapes, strict=True):
        node.set_friendly_name(name)
    return model


@contextmanager
def converted(part: ExportComponent, _: Path) -> Iterator[Any]:
    """The component's model, on the module's own weights."""
    yield convert(part)


@contextmanager
def in_a_file(part: ExportComponent, folder: Path) -> Iterator[Any]:
    """The model on weights mapped from a file, which is there as long as this lasts; the module loses its own.

    Quantization compiles the network, and the engine has a copy of the weights of its own: the file's pages can be
    given back then, a module's memory cannot.
    """
    with TemporaryDirectory(dir=folder) as spare:
        path = Path(spare) / MODEL
        _ov.save_model(convert(part), path, compress_to_fp16=False)
        part.module.to("meta")
        model = _ov.Core().read_model(path)
        with MappedWeights(model, path.with_suffix(".bin")).trimmed():
            yield model


def compress(model: Any, component: str, precision: str, calibration: Calibration | None) -> Any:
    """The model in the precision; only the U-Net is ever computed in integers, or kept in 4 bits."""
    if precision in ("fp32", "fp16"):
        return model
    nncf = require("nncf", extra="export", purpose=f"an export to OpenVINO {precision}")
    if component != "unet" or precision == "w8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    if precision == "w4":
        # ratio 1: every matrix product in 4 bits; convolutions, which nncf keeps out of 4 bits, in 8.
        mode = nncf.CompressWeightsMode.INT4_SYM
        fallback = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        return nncf.compress_weights(
            model, mode=mode, ratio=1.0, group_size=W4_GROUP, all_layers=True, advanced_parameters=fallback
        )
    assert calibration is not None
    calls = one_by_one(calibration.inputs)  # attention's matrices, the largest tensors of all, are half as large then
    dataset = nncf.Dataset(calls)
    if precision == "int8-hybrid":
        model = nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(types=["Convolution"]))
        ignored = nncf.IgnoredScope(types=["MatMul", "ScaledDotProductAttention"], validate=False)
        smooth = nncf.AdvancedSmoothQuantParameters(matmul=-1)  # off
        return nncf.quantize(
            model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calls),
            ignored_scope=ignored, advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
        )  # fmt: skip
    return nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calls))


def write_tokenizer(bundle: Path) -> None:
    """The tokenizer as OpenVINO models, which openvino_genai needs; our own runtime does not."""
    if importlib.util.find_spec("openvino_tokenizers") is None:
        return
    folder = bundle / "tokenizer"
    from openvino_tokenizers import convert_tokenizer
    from transformers import CLIPTokenizer

    class WithSuffixes(CLIPTokenizer):  # type: ignore[misc]
        """Writes the tokenizer.json that openvino_tokenizers reads with added tokens that end in "</w>".

        Its BPETokenizer puts that end to every word before it looks for added tokens, so that it would find
        "<x>" in "<x></w>" and go on with the letters of "</w>".
        """

        def save_pretrained(self, save_directory: str, **options: Any) -> Any:
            found = super().save_pretrained(save_directory, **options)
            path = Path(save_directory) / "tokenizer.json"
            whole = json.loads(path.read_text("utf-8"))
            for token in whole["added_tokens"]:
                token["content"] += "" if token["special"] else whole["model"]["end_of_word_suffix"]
            path.write_text(json.dumps(whole), "utf-8")
            return found

    with quiet(progress=True):
        found = convert_tokenizer(WithSuffixes.from_pretrained(folder), with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer.xml", "openvino_detokenizer.xml"), found, strict=True):
        _ov.save_model(model, folder / name, compress_to_fp16=False)

"""Checkpoint to ONNX: a graph a component, with free batch, height and width, as optimum names them.

    bundle = export(ExportRequest(checkpoint, Path("bundles/onnx-fp16"), "onnx", "fp16"), OnnxOptions())

`fp16` stores the weights in half precision behind casts: half the bytes on the disk, the arithmetic stays in 32
bits. `w8` and `w4` store them as integers; `int8` also computes the U-Net's convolutions and matrix products in
integers (int8.py). docs/benchmarks/onnx.md has the effect of each rewrite of the graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import read_model
from kdc_edge.export.bundle_writer import Interface, optimum_interface, write_bundle
from kdc_edge.export.calibration import calibrate_for, one_by_one
from kdc_edge.export.components import ExportComponent
from kdc_edge.export.onnx.int8 import quantize_int8
from kdc_edge.export.onnx.weights import store_bits, store_half
from kdc_edge.export.rewrites.attention import fuse_attention
from kdc_edge.export.rewrites.upsampling import split_upsampling
from kdc_edge.export.targets import ExportRequest, OnnxOptions
from kdc_edge.manifest import Model, Tensor
from kdc_edge.quiet import quiet

OPSET = 20  # the first with Gelu, which the U-Net's feed-forward layers use; onnxruntime 1.20 reads it
TRACED = "val_"  # begins the names that the tracer gives
EXTERNAL_DATA_BYTES = 100_000_000  # weights beside the graph are mapped, not copied; protobuf ends at 2 GiB anyway


def export(request: ExportRequest, options: OnnxOptions) -> Bundle:
    """Write and prove a bundle: see `export_checkpoint`."""
    precision = request.precision
    sizes = static_sizes(read_model(request.checkpoint)) if options.static else {}
    calibration = calibrate_for(request) if request.format.calibrated else None

    def write(part: ExportComponent, folder: Path) -> list[str]:
        if options.attention == "fused":
            fuse_attention(part.module)
        split_upsampling(part.module)
        model = trace(part, sizes)
        if part.full_precision:
            return save_graph(model, folder)
        if calibration is not None and part.name == "unet":
            with tempfile.TemporaryDirectory(dir=folder) as work:
                base = Path(work) / "base.onnx"
                ir.save(model, base, external_data="weights")
                del model
                part.module.to("meta")  # the weights are in the file now
                inputs = one_by_one(calibration.inputs) if sizes else calibration.inputs  # a fixed batch is 1
                model, left_out = quantize_int8(base, inputs)
                store_half(model)
                for layer, snr_db in left_out.items():
                    request.tell(f"{layer} stays in float: in int8 its signal-to-noise ratio is {snr_db:.1f} dB")
                return save_graph(model, folder)
        if request.format.bytes_per_weight <= 1:
            store_bits(model, 4 if precision == "w4" and part.name == "unet" else 8)
        if precision != "fp32":
            store_half(model)  # what is left
        return save_graph(model, folder)

    def interface(part: ExportComponent) -> Interface:
        inputs, outputs = optimum_interface(part)
        return _fixed(inputs, sizes), _fixed(outputs, sizes)

    return write_bundle(request, write, interface=interface, calibration=calibration)


def static_sizes(model: Model) -> dict[str, int]:
    """The fixed sizes of --static: one sample of the model's own size."""
    latent, image = model.latent_size, model.image_size
    return {"batch_size": 1, "latent_height": latent, "latent_width": latent, "height": image, "width": image}


def _fixed(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return {n: Tensor(dtype=t.dtype, shape=[sizes.get(str(s), s) for s in t.shape]) for n, t in tensors.items()}


def trace(part: ExportComponent, sizes: Mapping[str, int] | None = None) -> ir.Model:
    """The component as an ONNX graph in fp32; its weights are still the module's. `sizes` fixes free sizes."""
    sizes = sizes or {}
    axes = {str(side) for shape in part.config.input_shapes.values() for side in shape}
    given: dict[str, Any] = {name.removeprefix("latent_"): sizes[name] for name in sizes if name in axes}  # optimum's
    with quiet():
        program = torch.onnx.export(
            part.module,
            tuple(part.config.generate_dummy_inputs(**given).values()),
            dynamo=True,
            dynamic_shapes=None if sizes else _free_shapes(part),
            input_names=list(part.config.input_shapes),
            output_names=list(part.config.output_shapes),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    _clean(program.model, part, sizes)
    return program.model


def _free_shapes(part: ExportComponent) -> tuple[dict[int, object], ...]:
    """torch's description of the sizes that stay free.

    Where sizes come in multiples, saying so keeps `8 * ((h - 1) // 8) + 8` out of every shape. Elsewhere torch finds
    the ranges itself: named dimensions would be refused for the limits that it invents.
    """
    unit = part.config.size_unit
    sides = ("latent_height", "latent_width", "height", "width")
    multiples = {axis: unit * Dim(axis, min=1, max=1024) for axis in sides}
    return tuple(
        {i: multiples[axis] if unit > 1 and axis in multiples else Dim.DYNAMIC for i, axis in axes.items()}
        for axes in part.config.inputs.values()
    )


def save_graph(model: ir.Model, folder: Path) -> list[str]:
    """Write model.onnx to `folder`, with model.onnx_data beside it where it is large; the files' names."""
    _shorten(model)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if size_bytes <= EXTERNAL_DATA_BYTES:
        ir.save(ir.external_data.load_to_model(model), folder / "model.onnx")
        return ["model.onnx"]
    ir.save(model, folder / "model.onnx", external_data="model.onnx_data")
    return ["model.onnx", "model.onnx_data"]


def _shorten(model: ir.Model) -> None:
    """Numbers in place of the tracer's own names (val_810, node_MatMul_781), and no types of weights beside their own.

    They are a twentieth of a small graph. Weights, inputs and outputs keep their names.
    """
    weights = list(model.graph.initializers.values())
    for value in weights:
        value.shape = value.type = None
    for node in model.graph.all_nodes():
        node.name = None
    ends = {*model.graph.inputs, *model.graph.outputs}
    made = [value for node in model.graph.all_nodes() for value in node.outputs if value not in ends]
    traced = [value for value in weights if str(value.name).startswith(TRACED)]
    for number, value in enumerate([*made, *traced]):
        value.name = str(number)


def _clean(model: ir.Model, part: ExportComponent, sizes: Mapping[str, int]) -> None:
    """Name the free axes, and drop the tracer's notes, which hold paths of this machine."""
    for values, shapes in (
        (model.graph.inputs, part.config.input_shapes),
        (model.graph.outputs, part.config.output_shapes),
    ):
        for value in values:
            value.shape = ir.Shape([sizes.get(str(side), side) for side in shapes[str(value.name)]])
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ends = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in ends:
                value.shape = value.type = None  # written in the tracer's own symbols; engines infer them
    for value in ends:
        value.metadata_props.clear()

"""Checkpoint to ONNX: three graphs with free batch, height and width, as optimum names them.

    bundle = export_onnx(Path("runs/latest/checkpoint"), Path("bundles/onnx-fp16"), precision="fp16")

`fp16` stores the weights in half precision and casts them back inside the graph: half the bytes on the disk,
the arithmetic stays in 32 bits. onnxruntime folds the casts when it opens the file.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch.export import Dim

from kdc_edge.bundle import Bundle
from kdc_edge.export.bundle_writer import write_bundle
from kdc_edge.export.components import ExportComponent
from kdc_edge.formats import find_format

OPSET = 20  # the first with Gelu, which the U-Net's feed-forward layers use; onnxruntime 1.20 reads it
EXTERNAL_DATA_BYTES = 1_500_000_000  # protobuf ends at 2 GiB
HALF_MIN_VALUES = 1024  # biases and norms are a thousandth of the weights: nothing to gain, precision to lose


def export_onnx(
    checkpoint: Path,
    out: Path,
    *,
    precision: str,
    verify: bool = True,
    prompts: Sequence[str] | None = None,
    command: str | None = None,
) -> Bundle:
    """Write a bundle to `out`, proved against PyTorch on `prompts` before it takes its place there.

    Raises CheckpointError, ParityError or InputError; `out` is then what it was before.
    """
    row = find_format("onnx", precision)

    def write(part: ExportComponent, folder: Path) -> list[str]:
        return save_graph(trace(part), folder, half=precision == "fp16")

    return write_bundle(checkpoint, out, row, write, verify=verify, prompts=prompts, command=command)


def trace(part: ExportComponent) -> ir.Model:
    """The component as an ONNX graph in fp32; its weights are still the module's."""
    unit = part.config.size_unit
    # Where sizes come in multiples, saying so keeps `8 * ((h - 1) // 8) + 8` out of every shape. Elsewhere
    # torch finds the ranges itself: named dimensions would be refused for the limits that it invents.
    multiples = {axis: unit * Dim(axis, min=1, max=1024) for axis in ("latent_height", "latent_width")}
    shapes = tuple(
        {i: multiples[axis] if unit > 1 and axis in multiples else Dim.DYNAMIC for i, axis in axes.items()}
        for axes in part.config.inputs.values()
    )
    with _quiet():
        program = torch.onnx.export(
            part.module,
            tuple(part.config.generate_dummy_inputs().values()),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=list(part.config.input_shapes),
            output_names=list(part.config.output_shapes),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    _clean(program.model, part)
    return program.model


def save_graph(model: ir.Model, folder: Path, *, half: bool) -> list[str]:
    """Write model.onnx to `folder`, with model.onnx_data beside it where it is large; the files' names."""
    if half:
        store_half(model)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if size_bytes <= EXTERNAL_DATA_BYTES:
        ir.save(model, folder / "model.onnx")
        return ["model.onnx"]
    ir.save(model, folder / "model.onnx", external_data="model.onnx_data")
    return ["model.onnx", "model.onnx_data"]


def store_half(model: ir.Model) -> None:
    """Keep large float weights as float16 behind a Cast to float32; those beyond float16's range stay."""
    graph = model.graph
    casts = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2:
            continue
        weights = tensor.numpy()
        if weights.size < HALF_MIN_VALUES or np.abs(weights).max() > np.finfo(np.float16).max:
            continue
        half = ir.tensor(weights.astype(np.float16), name=f"{name}.fp16")
        stored = ir.val(half.name, const_value=half)
        cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")
        del graph.initializers[name]
        cast.outputs[0].name = name
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.register_initializer(stored)
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)


def _clean(model: ir.Model, part: ExportComponent) -> None:
    """Name the free axes, and drop the tracer's notes, which hold paths of this machine."""
    for values, shapes in (
        (model.graph.inputs, part.config.input_shapes),
        (model.graph.outputs, part.config.output_shapes),
    ):
        for value in values:
            value.shape = ir.Shape(shapes[str(value.name)])
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch and onnxscript say about their own insides while they trace."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Deprecations inside torch's exporter change with every release, and nobody here can act on them.
            warnings.filterwarnings("ignore", module=r"(torch|onnxscript|onnx_ir|copyreg)(\.|$)")
            yield
    finally:
        log.setLevel(level)

"""Weights of an ONNX graph in fewer bits, with the operations that widen them again.

    store_half(model)                # float16 behind casts
    store_bits(model, 4)             # matrices in 4 bits, in blocks; convolutions and the timestep's in 8 bits

The arithmetic stays in 32 bits. (MatMulNBits could round activations to 8 bits on the way, accuracy
level 4: a U-Net step is then a tenth faster, and an image of the garden fell from 39 to 26 dB.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from kdc_edge.errors import require
from kdc_edge.quiet import quiet

HALF_MIN_VALUES = 1024  # biases and norms are a thousandth of the weights: nothing to gain, precision to lose
BLOCK = 32  # weights of a matrix's column that share a scale
FLOAT_PRODUCTS = 1  # MatMulNBits' accuracy_level


def store_half(model: ir.Model) -> None:
    """Keep large float weights as float16 behind a Cast to float32; those beyond float16's range stay.

    Of a table, only the rows that are looked up are cast.
    """
    for value, weights in list(_matrices(model)):
        if weights.size < HALF_MIN_VALUES or np.abs(weights).max() > np.finfo(np.float16).max:
            continue
        stored = add_constant(model, f"{value.name}.fp16", weights.astype(np.float16))
        users = list(value.uses())
        if all(use.node.op_type == "Gather" and use.idx == 0 for use in users):
            for use in users:
                (rows,) = use.node.outputs
                cast = ir.node("Cast", [rows], {"to": int(ir.DataType.FLOAT)}, name=f"{rows.name}.cast")
                ir.convenience.replace_all_uses_with(rows, cast.outputs[0])
                cast.replace_input_with(0, rows)
                use.node.replace_input_with(0, stored)
                model.graph.insert_after(use.node, cast)
            del model.graph.initializers[str(value.name)]
        else:
            _widen(model, value, ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}))


def store_bits(model: ir.Model, bits: Literal[4, 8]) -> None:
    """Matrices in `bits` bits, block by block; convolutions, and matrices of the timestep, in 8, channel by channel."""
    for node in list(model.graph):
        weights = node.inputs[1] if len(node.inputs) > 1 else None
        if weights is None or not weights.is_initializer() or weights.const_value is None:
            continue
        if node.op_type == "MatMul" and len(weights.const_value.shape) == 2:
            _store_blocks(model, node, weights, bits)
        elif node.op_type in ("Conv", "Gemm"):
            transposed = node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
            axis = 1 if transposed else 0
            stored, scale = round_channels(weights.const_value.numpy(), axis)
            inputs = [
                add_constant(model, f"{weights.name}.int8", stored),
                add_constant(model, f"{weights.name}.scale", scale),
            ]
            _widen(model, weights, ir.node("DequantizeLinear", inputs, {"axis": axis}))


def _store_blocks(model: ir.Model, node: ir.Node, weights: ir.Value, bits: Literal[4, 8]) -> None:
    """A product with a matrix (K, N) as onnxruntime's MatMulNBits, quantized by onnxruntime."""
    with quiet():
        module: Any = require(
            "onnxruntime.quantization.matmul_nbits_quantizer", extra="export", purpose=f"weights in {bits} bits"
        )
    config = module.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    assert weights.const_value is not None
    matrix = np.ascontiguousarray(weights.const_value.numpy())
    rows, columns = matrix.shape
    packed, scales, _ = module.DefaultWeightOnlyQuantizer(config).qbits_block_quant(matrix)
    source = node.inputs[0]
    inputs = [
        source,
        add_constant(model, f"{weights.name}.{node.name}.int{bits}", packed),
        add_constant(model, f"{weights.name}.{node.name}.scales", scales.reshape(-1)),
    ]
    attributes = {
        "K": rows, "N": columns, "bits": bits, "block_size": BLOCK, "accuracy_level": FLOAT_PRODUCTS
    }  # fmt: skip
    product = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=node.name)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [product], node.outputs, product.outputs)
    model.opset_imports.setdefault("com.microsoft", 1)
    if not weights.uses():
        del model.graph.initializers[str(weights.name)]


def round_channels(
    weights: np.ndarray, axis: int, min_scale: np.ndarray | float = 1e-12
) -> tuple[np.ndarray, np.ndarray]:
    """int8 weights, and the float32 scale of each index of `axis`: symmetric, so that zero stays zero."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = np.maximum(np.abs(weights).max(axis=others) / 127, min_scale).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weights.ndim)]
    return np.clip(np.rint(weights / scale.reshape(shape)), -127, 127).astype(np.int8), scale


def add_constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def _matrices(model: ir.Model) -> Iterator[tuple[ir.Value, np.ndarray]]:
    """The float32 weights that are no vectors."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) >= 2:
            yield value, tensor.numpy()


def _widen(model: ir.Model, value: ir.Value, node: ir.Node) -> None:
    """Put `node`, which makes it, in the place of an initializer."""
    name = str(value.name)
    del model.graph.initializers[name]
    node.name = f"{name}.{node.op_type}"
    node.outputs[0].name = name
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    model.graph.insert_before(model.graph[0], node)

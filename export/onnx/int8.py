"""int8 for ONNX Runtime: convolutions and matrix products between quantized values, from recorded ranges (QDQ).

    model, left_out = quantize_int8(folder / "base.onnx", calibration.inputs)

Activations are uint8 (one scale a tensor), weights int8 (one scale an output channel), as onnxruntime's kernels for
VNNI, AMX and Arm's dot products want them: QLinearConv, whose output is uint8 as well, and MatMulIntegerToFloat. The
ranges are the smallest and largest values of the student's own generation. Then each layer's quantized twin computes
beside it, from the same float input: where the twin's answer is too far off, the layer stays in float. So do those
that read or write the latents: they cost nothing and every error of theirs is in the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kdc_edge.errors import require
from kdc_edge.export.onnx.weights import add_constant, round_channels

MIN_SNR_DB = 15.0  # of a layer's output beside its float twin's
SENSITIVITY_SAMPLES = 4  # U-Net calls on which the twins are compared
MIN_CHANNELS = 16  # a convolution with fewer reads or writes the latents

Inputs = Sequence[Mapping[str, np.ndarray]]
Ranges = Mapping[str, tuple[float, float]]  # smallest and largest value by tensor


def quantize_int8(base: Path, inputs: Inputs, *, min_snr_db: float = MIN_SNR_DB) -> tuple[ir.Model, dict[str, float]]:
    """The float graph in `base` with quantized layers, and the layers left in float with their signal-to-noise ratios.

    `inputs` are recorded calls of the network. The file, which must not go before the model does, holds the weights;
    graphs that observe the layers are written beside it.
    """
    model = ir.load(base)
    layers = [node for node in model.graph if _is_layer(node)]
    ranges = _observe(base, _ends(layers), inputs)
    chosen = inputs[:: max(1, len(inputs) // SENSITIVITY_SAMPLES)][:SENSITIVITY_SAMPLES]
    snr_db = _sensitivity(base, {str(node.name) for node in layers}, ranges, chosen)
    left_out = {name: db for name, db in snr_db.items() if db < min_snr_db}
    quantizer = _Quantizer(model, ranges)
    for node in layers:
        if node.name not in left_out:
            quantizer.quantize(node)
    return model, left_out


def _is_layer(node: ir.Node) -> bool:
    weights = node.inputs[1] if len(node.inputs) > 1 else None
    if weights is None or not weights.is_initializer() or weights.const_value is None:
        return False
    if node.op_type == "Conv":
        return bool(min(weights.const_value.numpy().shape[:2]) >= MIN_CHANNELS)
    return node.op_type == "MatMul"


def _ends(layers: Sequence[ir.Node]) -> list[str]:
    """The tensors that layers read and write, each once."""
    return list(
        dict.fromkeys(str(value.name) for node in layers for value in (node.inputs[0], node.outputs[0]) if value)
    )


class _Quantizer:
    """Puts QuantizeLinear and DequantizeLinear around layers; a tensor that several read is quantized once."""

    def __init__(self, model: ir.Model, ranges: Ranges) -> None:
        self.model = model
        self.ranges = ranges
        self.rounded: dict[str, tuple[ir.Value, float]] = {}  # by tensor: its quantized value and scale

    def quantize(self, node: ir.Node) -> None:
        source, weights = node.inputs[0], node.inputs[1]
        assert source is not None
        assert weights is not None
        name = str(source.name)
        if name not in self.rounded:
            self.rounded[name] = self._round(source, before=node)
        rounded, input_scale = self.rounded[name]
        node.replace_input_with(0, rounded)
        self._quantize_weights(node, weights, input_scale)
        if node.op_type == "Conv":  # QLinearConv's answer is uint8; a product's is float
            output = node.outputs[0]
            users = list(output.uses())
            back, scale = self._round(output, after=node)
            self.rounded[str(back.name)] = back, scale  # the next layer may read it as it is
            for use in users:
                use.node.replace_input_with(use.idx, back)

    def _round(
        self, value: ir.Value, *, before: ir.Node | None = None, after: ir.Node | None = None
    ) -> tuple[ir.Value, float]:
        low, high = self.ranges[str(value.name)]
        scale, zero = uint8_scale(low, high)
        parameters = [
            add_constant(self.model, f"{value.name}.scale", np.array(scale, np.float32)),
            add_constant(self.model, f"{value.name}.zero", np.array(zero, np.uint8)),
        ]
        quantize = ir.node("QuantizeLinear", [value, *parameters], name=f"{value.name}.quantize")
        widen = ir.node("DequantizeLinear", [quantize.outputs[0], *parameters], name=f"{value.name}.dequantize")
        for node, suffix in ((quantize, "uint8"), (widen, "rounded")):
            node.outputs[0].name = f"{value.name}.{suffix}"
        if before is not None:
            self.model.graph.insert_before(before, (quantize, widen))
        else:
            assert after is not None
            self.model.graph.insert_after(after, (quantize, widen))
        return widen.outputs[0], scale

    def _quantize_weights(self, node: ir.Node, weights: ir.Value, input_scale: float) -> None:
        assert weights.const_value is not None
        array = weights.const_value.numpy()
        axis = 0 if node.op_type == "Conv" else 1  # (out, in, h, w); (in, out)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        floor: np.ndarray | float = 1e-12
        if bias is not None:
            assert bias.const_value is not None
            # int32 in units of both scales: a channel of tiny weights must not push its bias out of range.
            floor = np.maximum(np.abs(bias.const_value.numpy()) / (input_scale * 2.0**30), 1e-12)
        stored, scale = round_channels(array, axis, floor)
        node.replace_input_with(1, self._constant(node, f"{node.name}.weight", stored, scale, axis))
        if bias is not None:
            assert bias.const_value is not None
            units = scale * np.float32(input_scale)
            whole = np.rint(bias.const_value.numpy() / units).astype(np.int32)
            node.replace_input_with(2, self._constant(node, f"{node.name}.bias", whole, units, 0))
        for value in (weights, bias):
            if value is not None and not value.uses():
                self.model.graph.initializers.pop(str(value.name), None)

    def _constant(self, node: ir.Node, name: str, array: np.ndarray, scale: np.ndarray, axis: int) -> ir.Value:
        inputs = [
            add_constant(self.model, f"{name}.{array.dtype}", array),
            add_constant(self.model, f"{name}.scale", scale),
        ]
        widen = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{name}.dequantize")
        widen.outputs[0].name = name
        self.model.graph.insert_before(node, widen)
        return widen.outputs[0]


def uint8_scale(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of a range; zero is always one of the 256 values."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float(np.float32((high - low) / 255))
    if scale < np.finfo(np.float32).tiny:  # nothing, or less than has all its bits
        scale = 1.0
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


def _observe(base: Path, tensors: Sequence[str], inputs: Inputs) -> dict[str, tuple[float, float]]:
    """The range of each tensor over the calls."""
    probe = ir.load(base)
    values = _values(probe)
    ends = []
    for name in tensors:
        for kind in ("ReduceMin", "ReduceMax"):
            node = ir.node(kind, [values[name]], {"keepdims": 0})
            ends.append(_append(probe, node, f"{name}.{kind}"))
    found = np.array([[float(x) for x in answer] for answer in _run(probe, base, ends, inputs)])
    lows, highs = found.min(axis=0)[0::2], found.max(axis=0)[1::2]
    return {name: (float(low), float(high)) for name, low, high in zip(tensors, lows, highs, strict=True)}


def _sensitivity(base: Path, names: set[str], ranges: Ranges, inputs: Inputs) -> dict[str, float]:
    """Each layer's output beside its quantized twin's, computed from the same input: power of signal over error, dB."""
    probe = ir.load(base)
    quantizer = _Quantizer(probe, ranges)
    ends = []
    layers = [node for node in probe.graph if node.name in names]
    for node in layers:
        output = node.outputs[0]
        twin = ir.node(node.op_type, list(node.inputs), node.attributes, name=f"{node.name}.twin")
        twin.outputs[0].name = f"{output.name}.twin"
        probe.graph.insert_after(node, twin)
        answer = ir.node("Sub", [output, twin.outputs[0]], name=f"{node.name}.error")
        probe.graph.insert_after(twin, answer)
        quantizer.ranges = {**quantizer.ranges, f"{output.name}.twin": ranges[str(output.name)]}
        quantizer.quantize(twin)
        for value, suffix in ((output, "signal"), (answer.outputs[0], "noise")):
            ends.append(_append(probe, ir.node("ReduceSumSquare", [value], {"keepdims": 0}), f"{output.name}.{suffix}"))
    found = np.array([[float(x) for x in answer] for answer in _run(probe, base, ends, inputs)]).sum(axis=0)
    return {
        str(node.name): 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))
        for node, signal, noise in zip(layers, found[0::2], found[1::2], strict=True)
    }


def _values(model: ir.Model) -> dict[str, ir.Value]:
    made = (value for node in model.graph for value in node.outputs)
    return {str(value.name): value for value in (*model.graph.inputs, *made)}


def _append(model: ir.Model, node: ir.Node, name: str) -> ir.Value:
    """Insert the node directly after its input, so that the input can be freed, and make its result an output."""
    value = node.outputs[0]
    value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(source, node)
    model.graph.outputs.append(value)
    return value


def _run(probe: ir.Model, base: Path, ends: Sequence[ir.Value], inputs: Inputs) -> Iterator[list[np.ndarray]]:
    """The probe's answers, call by call."""
    ort = require("onnxruntime", extra="export", purpose="an export to int8")
    from kdc_edge.runtimes.onnxruntime import without_overflow

    path = base.with_name("probe.onnx")
    ir.save(probe, path)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    without_overflow(options)
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED  # no second copy of the weights
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED  # by default the observers come last: all is kept
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [str(value.name) for value in ends]
    for call in inputs:
        yield session.run(names, dict(call))

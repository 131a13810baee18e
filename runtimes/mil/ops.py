"""The operations of an ML Program in numpy: one function an operation, named and keyed as MIL names them.

    KERNELS["conv"](x=x, weight=weight, strides=..., pad_type="custom", pad=..., dilations=..., groups=1)

Meaning and argument names are those of coremltools' MIL reference (ops iOS 15 to 18). Arrays come as the program
types them; arithmetic is done in fp32, sums too, and the evaluator rounds each result to the program's type.
Those that only move values are in moves.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from kdc_edge.runtimes.mil.moves import MOVES, Array, Kernel

BLOCK_BYTES = 64 * 2**20  # scratch of a convolution, and of operations computed slice by slice


def wide(x: Array) -> Array:
    """fp16 as fp32 for the computation; other types unchanged."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


# Arithmetic


def linear(*, x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    found = wide(x).reshape(-1, x.shape[-1]) @ wide(weight).T
    if bias is not None:
        found += wide(bias)
    return found.reshape(*x.shape[:-1], weight.shape[0])


def matmul(*, x: Array, y: Array, transpose_x: Array | bool = False, transpose_y: Array | bool = False) -> Array:
    """Batched product; slice by slice, so that only one slice is ever held in fp32."""
    x = x.swapaxes(-1, -2) if transpose_x else x
    y = y.swapaxes(-1, -2) if transpose_y else y
    lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    found = np.empty((*lead, x.shape[-2], y.shape[-1]), x.dtype)
    x, y = np.broadcast_to(x, lead + x.shape[-2:]), np.broadcast_to(y, lead + y.shape[-2:])
    for i in np.ndindex(*lead):
        found[i] = wide(x[i]) @ wide(y[i])
    return found


def scaled_dot_product_attention(*, query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Array:
    """softmax(query keyᵀ / sqrt(D) + mask) value, as iOS 18's fused operation; scores stay in fp32."""
    lead = query.shape[:-2]
    found = np.empty((*lead, query.shape[-2], value.shape[-1]), query.dtype)
    scale = np.float32(1 / math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        attn_mask = np.broadcast_to(attn_mask, (*lead, query.shape[-2], key.shape[-2]))
    for i in np.ndindex(*lead):
        scores = (wide(query[i]) * scale) @ wide(key[i]).T
        if attn_mask is not None:
            mask = attn_mask[i]
            scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + wide(mask)
        found[i] = _softmax(scores, -1) @ wide(value[i])
    return found


def softmax(*, x: Array, axis: Array | int = -1) -> Array:
    """Along one axis; in blocks of the others where it is large."""
    axis = int(axis) % x.ndim
    if axis == 0 or x.size * 4 <= BLOCK_BYTES:
        return _softmax(wide(x), axis)
    found = np.empty(x.shape, x.dtype)
    for i in np.ndindex(*x.shape[: min(axis, 2)]):
        found[i] = _softmax(wide(x[i]), axis - len(i))
    return found


def _softmax(x: Array, axis: int) -> Array:
    found = x - x.max(axis, keepdims=True)
    np.exp(found, out=found)
    found /= found.sum(axis, keepdims=True)
    return found


def conv(
    *,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Sequence[int] = (1, 1),
    pad_type: str = "valid",
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: Array | int = 1,
) -> Array:
    """x (B, C, H, W), weight (O, C / groups, kh, kw) -> (B, O, H', W'), as products of unrolled row blocks."""
    kernel = weight.shape[2:]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pad = _padding(pad_type, pad, x.shape[2:], reach, strides)
    height, width = ((n + pad[2 * i] + pad[2 * i + 1] - reach[i]) // strides[i] + 1 for i, n in enumerate(x.shape[2:]))
    groups = int(groups)
    found = np.empty((x.shape[0], weight.shape[0], height, width), np.float32)
    matrix = wide(weight).reshape(groups, weight.shape[0] // groups, -1)  # (G, O/G, C/G kh kw)
    plain = kernel == (1, 1) and tuple(strides) == (1, 1) and not any(pad)
    rows = max(1, BLOCK_BYTES // (4 * matrix.shape[2] * width))
    for image, out in zip(x, found, strict=True):
        split = np.split(image, groups)
        for g, channels in enumerate(split):
            target = out[g * matrix.shape[1] : (g + 1) * matrix.shape[1]]
            if plain:
                np.matmul(matrix[g], wide(channels).reshape(channels.shape[0], -1), out=target.reshape(len(target), -1))
                continue
            windows = _windows(wide(channels), pad, reach, strides, dilations)  # (C/G, kh, kw, H', W')
            for top in range(0, height, rows):
                block = windows[:, :, :, top : top + rows].reshape(matrix.shape[2], -1)
                target[:, top : top + rows] = (matrix[g] @ block).reshape(len(target), -1, width)
    if bias is not None:
        found += wide(bias)[:, None, None]
    return found


def _padding(
    kind: str, pad: Sequence[int], sides: Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> list[int]:
    """(top, bottom, left, right)."""
    if kind == "custom":
        return [int(p) for p in pad]
    if kind == "valid":
        return [0, 0, 0, 0]
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type {kind!r}")
    found = []
    for side, r, stride in zip(sides, reach, strides, strict=True):
        total = max(0, (-(-side // stride) - 1) * stride + r - side)
        first = total // 2 if kind == "same" else total - total // 2
        found += [int(first), int(total - first)]
    return found


def _windows(
    image: Array, pad: Sequence[int], reach: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Array:
    """A view (C, kh, kw, H', W') of the padded image (C, H, W)."""
    padded = np.pad(image, ((0, 0), (pad[0], pad[1]), (pad[2], pad[3])))
    found = sliding_window_view(padded, tuple(reach), axis=(1, 2))[  # type: ignore[call-overload]
        :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]
    ]
    return found.transpose(0, 3, 4, 1, 2)


def layer_norm(
    *,
    x: Array,
    axes: Sequence[int],
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """Over `axes`, which are the last ones; gamma and beta have their shape."""
    x, axes = wide(x), tuple(int(a) for a in axes)
    found = x - x.mean(axes, keepdims=True)
    found /= np.sqrt(np.square(found).mean(axes, keepdims=True) + np.float32(epsilon))
    if gamma is not None:
        found *= wide(gamma)
    if beta is not None:
        found += wide(beta)
    return found


def batch_norm(
    *,
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Array | float = 1e-5,
) -> Array:
    """x (B, C, ...) with one mean, variance, gamma and beta a channel."""
    scale = 1 / np.sqrt(wide(variance) + np.float32(epsilon))
    if gamma is not None:
        scale = scale * wide(gamma)
    shift = -wide(mean) * scale
    if beta is not None:
        shift = shift + wide(beta)
    sides = (-1, *(1,) * (x.ndim - 2))
    found = wide(x) * scale.reshape(sides)
    found += shift.reshape(sides)
    return found


def _erf(x: Array) -> Array:
    """Abramowitz and Stegun 7.1.26: within 1.5e-7."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    series = np.float32(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(factor)
    return np.copysign(1 - series * t * np.exp(-x * x), x)


def gelu(*, x: Array, mode: str = "EXACT") -> Array:
    x = wide(x)
    if mode == "TANH_APPROXIMATION":
        return (
            np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
        )
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(np.float32(1.702) * x)
    return np.float32(0.5) * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))


def _sigmoid(x: Array) -> Array:
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))  # overflows nowhere


def einsum(*, values: Sequence[Array], equation: str) -> Array:
    """The pairwise products that MIL knows; numpy turns each into a batched matrix product."""
    return np.einsum(str(equation), *map(wide, values), optimize=True)


# Reductions and comparisons


def _reduction(reduce: Callable[..., Array]) -> Kernel:
    def kernel(*, x: Array, axes: Sequence[int] | None = None, keep_dims: Array | bool = False) -> Array:
        over = None if axes is None else tuple(int(a) for a in axes)
        return reduce(wide(x), axis=over, keepdims=bool(keep_dims))

    return kernel


def _sum_square(x: Array, **where: Any) -> Array:
    return np.asarray(np.sum(np.square(x), **where))


def _l2_norm(x: Array, **where: Any) -> Array:
    return np.asarray(np.sqrt(np.sum(np.square(x), **where)))


def reduce_argmax(
    *, x: Array, axis: Array | int = -1, keep_dims: Array | bool = True, output_dtype: str = "int32"
) -> Array:
    return np.argmax(x, int(axis), keepdims=bool(keep_dims)).astype(output_dtype)


def clip(*, x: Array, alpha: Array | float, beta: Array | float) -> Array:
    return np.clip(wide(x), np.float32(alpha), np.float32(beta))


def _binary(operate: Callable[[Array, Array], Array]) -> Kernel:
    return lambda *, x, y: operate(wide(x), wide(y))


def _unary(operate: Callable[[Array], Array]) -> Kernel:
    return lambda *, x: operate(wide(x))


def rsqrt(*, x: Array, epsilon: Array | float = 1e-12) -> Array:
    return 1 / np.sqrt(wide(x) + np.float32(epsilon))


KERNELS: dict[str, Kernel] = MOVES | {
    "add": _binary(np.add),
    "batch_norm": batch_norm,
    "clip": clip,
    "conv": conv,
    "cos": _unary(np.cos),
    "einsum": einsum,
    "equal": _binary(np.equal),
    "exp": _unary(np.exp),
    "gelu": gelu,
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "layer_norm": layer_norm,
    "less": _binary(np.less),
    "linear": linear,
    "matmul": matmul,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.divide),
    "reduce_argmax": reduce_argmax,
    "reduce_l2_norm": _reduction(_l2_norm),
    "reduce_max": _reduction(np.max),
    "reduce_mean": _reduction(np.mean),
    "reduce_sum": _reduction(np.sum),
    "reduce_sum_square": _reduction(_sum_square),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "sigmoid": _unary(_sigmoid),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "sin": _unary(np.sin),
    "softmax": softmax,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
}

"""Compressed weights of an ML Program, decompressed: the `constexpr_*` operations in numpy.

iOS 16's take everything as attributes and stay in opsets up to CoreML7; iOS 18's of the same names take inputs,
indices of less than a byte, and scales and look-up tables for blocks of a weight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kdc_edge.runtimes.mil.program import unpack_bits

Array = np.ndarray


def affine_dequantize(*, quantized_data: Array, zero_point: Array, scale: Array, axis: Array | int) -> Array:
    """scale * (quantized_data - zero_point), one pair for all or one along `axis`; scale's type."""

    def along(values: Array) -> Array:
        sides = [1] * quantized_data.ndim
        sides[int(axis)] = -1
        return values.astype(np.float32).reshape(sides if values.ndim else ())

    return ((quantized_data.astype(np.float32) - along(zero_point)) * along(scale)).astype(scale.dtype)


def lut_to_dense_16(*, indices: Array, lut: Array, shape: Array) -> Array:
    """A table of 2**n values; indices of n bits, packed into bytes without gaps."""
    bits = int(lut.size).bit_length() - 1
    sides = [int(side) for side in shape]
    return lut[unpack_bits(indices, bits, int(np.prod(sides)))].reshape(sides)


def lut_to_dense_18(*, indices: Array, lut: Array, vector_axis: Array | int | None = None) -> Array:
    """lut (*blocks, 2**n, V): each block of the weight has its table; V values an index, along `vector_axis`."""
    *blocks, _, vector = lut.shape
    if vector != 1 and vector_axis is None:
        raise ValueError("a table of vectors without its axis")
    at = tuple(
        _block_index(size, count, i, indices.ndim)
        for i, (size, count) in enumerate(zip(indices.shape, blocks, strict=True))
    )
    found = lut[(*at, indices)]  # (*shape, V)
    if vector == 1:
        return found[..., 0]
    axis = int(vector_axis if vector_axis is not None else 0) % indices.ndim
    sides = [s * vector if i == axis else s for i, s in enumerate(indices.shape)]
    return np.moveaxis(found, -1, axis + 1).reshape(sides)


def _block_index(size: int, blocks: int, axis: int, ndim: int) -> Array:
    """Which block each place along an axis belongs to, shaped to broadcast over the others."""
    sides = [1] * ndim
    sides[axis] = size
    return (np.arange(size) // (size // blocks)).reshape(sides)


def blockwise_shift_scale(*, data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), one pair a block of the weight; scale's type."""
    found = data.astype(np.float32)
    if offset is not None:
        found = found - _spread(offset, data.shape)
    return (found * _spread(scale, data.shape)).astype(scale.dtype)


def _spread(values: Array, shape: tuple[int, ...]) -> Array:
    for axis, (size, blocks) in enumerate(zip(shape, values.shape, strict=True)):
        if blocks not in (1, size):
            values = values.repeat(size // blocks, axis)
    return values.astype(np.float32)


CONSTEXPR: dict[str, Callable[..., Array]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lambda **given: (lut_to_dense_16 if "shape" in given else lut_to_dense_18)(**given),
}

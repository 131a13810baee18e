"""The operations of an ML Program that only move values: they keep the type that they are given.

MOVES["transpose"](x=x, perm=[0, 2, 3, 1])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Kernel = Callable[..., Any]


def cast(*, x: Array, dtype: str) -> Array:
    names = {"fp16": np.float16, "fp32": np.float32}
    with np.errstate(invalid="ignore", over="ignore"):
        return x.astype(names.get(str(dtype), str(dtype)))


def reshape(*, x: Array, shape: Sequence[int]) -> Array:
    """A 0 stands for the size at its place, -1 for the remaining size."""
    return x.reshape([x.shape[i] if side == 0 else int(side) for i, side in enumerate(shape)])


def transpose(*, x: Array, perm: Sequence[int]) -> Array:
    return x.transpose([int(p) for p in perm])


def expand_dims(*, x: Array, axes: Sequence[int]) -> Array:
    return np.expand_dims(x, tuple(int(a) for a in axes))


def squeeze(*, x: Array, axes: Sequence[int] | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(int(a) for a in axes))


def concat(*, values: Sequence[Array], axis: Array | int, interleave: Array | bool = False) -> Array:
    if interleave:
        raise ValueError("interleave")
    return np.concatenate(values, int(axis))


def stack(*, values: Sequence[Array], axis: Array | int) -> Array:
    return np.stack(values, int(axis))


def split(
    *, x: Array, axis: Array | int, num_splits: Array | int | None = None, split_sizes: Sequence[int] | None = None
) -> list[Array]:
    if split_sizes is None:
        assert num_splits is not None
        return np.split(x, int(num_splits), int(axis))
    return np.split(x, np.cumsum(split_sizes)[:-1], int(axis))


def slice_by_index(
    *,
    x: Array,
    begin: Sequence[int],
    end: Sequence[int],
    stride: Sequence[int] | None = None,
    begin_mask: Sequence[bool] | None = None,
    end_mask: Sequence[bool] | None = None,
    squeeze_mask: Sequence[bool] | None = None,
) -> Array:
    """Python's slices, an axis each; a mask's True leaves that end open, or takes one index and drops the axis."""
    parts: list[slice | int] = []
    for i in range(x.ndim):
        if squeeze_mask is not None and squeeze_mask[i]:
            parts.append(int(begin[i]))
            continue
        first = None if begin_mask is not None and begin_mask[i] else int(begin[i])
        last = None if end_mask is not None and end_mask[i] else int(end[i])
        parts.append(slice(first, last, None if stride is None else int(stride[i])))
    return x[tuple(parts)]


def gather(
    *,
    x: Array,
    indices: Array,
    axis: Array | int = 0,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001  # numpy validates always
) -> Array:
    if int(batch_dims):
        raise ValueError(f"batch_dims {int(batch_dims)}")
    return np.take(x, indices.astype(np.int64), int(axis))


def gather_nd(
    *,
    x: Array,
    indices: Array,
    batch_dims: Array | int = 0,
    validate_indices: Array | bool = False,  # noqa: ARG001
) -> Array:
    """indices (..., K) name a place in x's first K axes."""
    if int(batch_dims):
        raise ValueError(f"batch_dims {int(batch_dims)}")
    return np.asarray(x[tuple(np.moveaxis(indices.astype(np.int64), -1, 0))])


def select(*, cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


def upsample_nearest_neighbor(
    *, x: Array, scale_factor_height: Array | float = 1, scale_factor_width: Array | float = 1
) -> Array:
    factors = [float(scale_factor_height), float(scale_factor_width)]
    if any(f != int(f) for f in factors):
        raise ValueError(f"the scale factors {factors}")
    return x.repeat(int(factors[0]), -2).repeat(int(factors[1]), -1)


def pad(*, x: Array, pad: Sequence[int], mode: str = "constant", constant_val: Array | float = 0.0) -> Array:
    """`pad` counts from the last axis backwards in pairs, as many axes as it names."""
    if mode != "constant":
        raise ValueError(f"mode {mode!r}")
    pairs = np.array(pad).reshape(-1, 2).tolist()
    return np.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs, constant_values=np.asarray(constant_val, x.dtype))


MOVES: dict[str, Kernel] = {
    "cast": cast,
    "concat": concat,
    "expand_dims": expand_dims,
    "gather": gather,
    "gather_nd": gather_nd,
    "identity": lambda *, x: x,
    "pad": pad,
    "reshape": reshape,
    "select": select,
    "slice_by_index": slice_by_index,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "transpose": transpose,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}

"""The reference evaluator's operations against PyTorch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_edge.runtimes.mil.moves import MOVES
from kdc_edge.runtimes.mil.ops import KERNELS
from kdc_edge.runtimes.mil.program import TensorType, unpack
from kdc_edge.runtimes.mil.weights import CONSTEXPR

sides = st.integers(1, 9)
seeds = st.integers(0, 99)
fast = settings(max_examples=25, deadline=None)


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def equal(found: Any, expected: torch.Tensor, atol: float = 2e-5) -> None:
    assert tuple(found.shape) == tuple(expected.shape)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected.double().numpy(), rtol=1e-4, atol=atol)


@fast
@given(
    data=st.data(), seed=seeds, batch=st.integers(1, 3), groups=st.integers(1, 3), per_group=st.integers(1, 3),
    out=st.integers(1, 4), height=st.integers(5, 12), width=st.integers(5, 12), bias=st.booleans(),
)  # fmt: skip
def test_conv(
    data: st.DataObject,
    seed: int,
    batch: int,
    groups: int,
    per_group: int,
    out: int,
    height: int,
    width: int,
    bias: bool,
) -> None:
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    strides = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilations = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    pad = data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
    x = floats(seed, batch, groups * per_group, height, width)
    weight = floats(seed + 1, groups * out, per_group, *kernel)
    offset = floats(seed + 2, groups * out) if bias else None
    padded = F.pad(torch.tensor(x), (pad[2], pad[3], pad[0], pad[1]))
    expected = F.conv2d(
        padded, torch.tensor(weight), None if offset is None else torch.tensor(offset),
        stride=strides, dilation=dilations, groups=groups,
    )  # fmt: skip
    found = KERNELS["conv"](
        x=x, weight=weight, bias=offset, strides=strides, dilations=dilations, pad_type="custom", pad=pad, groups=groups
    )
    equal(found, expected)


@pytest.mark.parametrize(("kind", "torch_pad"), [("valid", "valid"), ("same", "same"), ("same_lower", "same")])
def test_conv_with_named_padding(kind: str, torch_pad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdc_edge.runtimes.mil.ops.BLOCK_BYTES", 1)  # row by row
    x, weight = floats(0, 1, 3, 7, 6), floats(1, 2, 3, 3, 3)
    expected = F.conv2d(torch.tensor(x), torch.tensor(weight), padding=torch_pad)
    equal(KERNELS["conv"](x=x, weight=weight, pad_type=kind), expected)


@fast
@given(seed=seeds, lead=st.lists(sides, max_size=2), m=sides, k=sides, n=sides, tx=st.booleans(), ty=st.booleans())
def test_matmul_and_linear(seed: int, lead: list[int], m: int, k: int, n: int, tx: bool, ty: bool) -> None:
    x = floats(seed, *lead, *((k, m) if tx else (m, k)))
    y = floats(seed + 1, *lead, *((n, k) if ty else (k, n)))
    a, b = torch.tensor(x), torch.tensor(y)
    expected = (a.mT if tx else a) @ (b.mT if ty else b)
    equal(KERNELS["matmul"](x=x, y=y, transpose_x=tx, transpose_y=ty), expected)
    rows, weight, bias = floats(seed, *lead, m, k), floats(seed + 2, n, k), floats(seed + 3, n)
    equal(
        KERNELS["linear"](x=rows, weight=weight, bias=bias),
        F.linear(torch.tensor(rows), torch.tensor(weight), torch.tensor(bias)),
    )


@fast
@given(seed=seeds, shape=st.lists(sides, min_size=1, max_size=4), data=st.data())
def test_reductions_and_softmax(seed: int, shape: list[int], data: st.DataObject) -> None:
    x = floats(seed, *shape)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    keep = data.draw(st.booleans())
    t = torch.tensor(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdc_edge.runtimes.mil.ops.BLOCK_BYTES", data.draw(st.sampled_from([1, 2**20])))
        equal(KERNELS["softmax"](x=x * 50, axis=axis), (t * 50).softmax(axis))
    for name, reference in {
        "reduce_mean": t.mean, "reduce_sum": t.sum, "reduce_max": t.amax,
        "reduce_sum_square": t.square().sum, "reduce_l2_norm": lambda a, keepdim: t.norm(dim=a, keepdim=keepdim),
    }.items():  # fmt: skip
        equal(KERNELS[name](x=x, axes=[axis], keep_dims=keep), reference(axis, keepdim=keep))
    equal(KERNELS["reduce_argmax"](x=x, axis=axis, keep_dims=keep), t.argmax(axis, keepdim=keep))


@fast
@given(seed=seeds, shape=st.lists(sides, min_size=2, max_size=4), data=st.data())
def test_norms(seed: int, shape: list[int], data: st.DataObject) -> None:
    x = floats(seed, *shape)
    last = shape[-data.draw(st.integers(1, len(shape) - 1)) :]
    gamma, beta = floats(seed + 1, *last), floats(seed + 2, *last)
    axes = [i - len(last) for i in range(len(last))]
    equal(
        KERNELS["layer_norm"](x=x, axes=axes, gamma=gamma, beta=beta, epsilon=1e-3),
        F.layer_norm(torch.tensor(x), last, torch.tensor(gamma), torch.tensor(beta), 1e-3),
    )
    mean, variance, gain, shift = (floats(seed + i, shape[1]) for i in range(4))
    given = {"mean": mean, "variance": np.abs(variance) + 0.1, "gamma": gain, "beta": shift}
    expected = F.batch_norm(torch.tensor(x), *(torch.tensor(v) for v in given.values()), eps=1e-3)
    equal(KERNELS["batch_norm"](x=x, **given, epsilon=1e-3), expected, atol=1e-4)


UNARY = {
    "cos": torch.cos, "exp": torch.exp, "relu": torch.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "sin": torch.sin,
    "square": torch.square, "tanh": torch.tanh, "gelu": F.gelu,
}  # fmt: skip
BINARY = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.div, "maximum": torch.maximum,
    "minimum": torch.minimum, "greater": torch.gt, "greater_equal": torch.ge, "less": torch.lt, "equal": torch.eq,
}  # fmt: skip


@fast
@given(seed=seeds, shape=st.lists(sides, max_size=3), data=st.data())
def test_elementwise(seed: int, shape: list[int], data: st.DataObject) -> None:
    x = floats(seed, *shape) * 3
    for name, reference in UNARY.items():
        equal(KERNELS[name](x=x), reference(torch.tensor(x)))
    equal(KERNELS["sqrt"](x=np.abs(x)), torch.tensor(x).abs().sqrt())
    equal(KERNELS["rsqrt"](x=np.abs(x) + 1, epsilon=1e-3), (torch.tensor(x).abs() + 1 + 1e-3).rsqrt())
    equal(KERNELS["clip"](x=x, alpha=-1.0, beta=0.5), torch.tensor(x).clip(-1, 0.5))
    equal(KERNELS["gelu"](x=x, mode="TANH_APPROXIMATION"), F.gelu(torch.tensor(x), approximate="tanh"))
    equal(KERNELS["gelu"](x=x, mode="SIGMOID_APPROXIMATION"), torch.tensor(x) * torch.sigmoid(1.702 * torch.tensor(x)))
    y = floats(seed + 1, *[side if data.draw(st.booleans()) else 1 for side in shape])  # broadcasts
    for name, binary in BINARY.items():
        equal(KERNELS[name](x=x, y=y), binary(torch.tensor(x), torch.tensor(y)))
    equal(KERNELS["select"](cond=x > 0, a=x, b=y), torch.where(torch.tensor(x) > 0, torch.tensor(x), torch.tensor(y)))


@fast
@given(seed=seeds, shape=st.lists(st.integers(1, 5), min_size=2, max_size=4), data=st.data())
def test_moves(seed: int, shape: list[int], data: st.DataObject) -> None:
    x = floats(seed, *shape)
    t, n = torch.tensor(x), len(shape)
    perm = data.draw(st.permutations(range(n)))
    equal(KERNELS["transpose"](x=x, perm=perm), t.permute(*perm))
    equal(KERNELS["reshape"](x=x, shape=[0, -1]), t.reshape(shape[0], -1))
    axis = data.draw(st.integers(0, n - 1))
    equal(KERNELS["squeeze"](x=KERNELS["expand_dims"](x=x, axes=[axis]), axes=[axis]), t)
    equal(KERNELS["concat"](values=[x, x], axis=axis), torch.cat([t, t], axis))
    equal(KERNELS["stack"](values=[x, x], axis=axis), torch.stack([t, t], axis))
    first = data.draw(st.integers(0, shape[axis]))
    for found, part in zip(
        KERNELS["split"](x=x, axis=axis, split_sizes=[first, shape[axis] - first]),
        t.split([first, shape[axis] - first], axis),
        strict=True,
    ):
        equal(found, part)
    equal(np.concatenate(KERNELS["split"](x=x, axis=axis, num_splits=shape[axis]), axis), t)
    indices = np.random.default_rng(seed).integers(0, shape[axis], 3)
    equal(KERNELS["gather"](x=x, indices=indices, axis=axis), t.index_select(axis, torch.tensor(indices)))
    places = np.random.default_rng(seed).integers(0, shape[:2], (4, 2))
    equal(KERNELS["gather_nd"](x=x, indices=places), t[tuple(torch.tensor(places.T))])
    equal(KERNELS["pad"](x=x, pad=[1, 2, 0, 1], constant_val=0.5), F.pad(t, (0, 1, 1, 2), value=0.5))


def test_slices_and_upsampling() -> None:
    x = floats(0, 2, 3, 4, 5)
    t = torch.tensor(x)
    cut = KERNELS["slice_by_index"]
    found = cut(x=x, begin=[0, 1, 3, 0], end=[0, 3, 0, 5], stride=[1, 1, 2, 2], begin_mask=[True, False, True, False],
                end_mask=[True, False, True, False], squeeze_mask=[False] * 4)  # fmt: skip
    equal(found, t[:, 1:3, ::2, 0:5:2])
    equal(cut(x=x, begin=[1, 0, 0, 0], end=[2, 3, 4, 5], squeeze_mask=[True, False, False, False]), t[1])
    up = KERNELS["upsample_nearest_neighbor"](x=x, scale_factor_height=2.0, scale_factor_width=3.0)
    equal(up, F.interpolate(t, scale_factor=(2.0, 3.0), mode="nearest"))
    with pytest.raises(ValueError, match="scale factors"):
        KERNELS["upsample_nearest_neighbor"](x=x, scale_factor_height=1.5)


@fast
@given(seed=seeds, heads=st.integers(1, 3), queries=sides, keys=sides, width=sides, mask=st.sampled_from([None, 0, 1]))
def test_fused_attention(seed: int, heads: int, queries: int, keys: int, width: int, mask: int | None) -> None:
    query, key, value = (floats(seed + i, 2, heads, n, width) for i, n in enumerate((queries, keys, keys)))
    given = None if mask is None else floats(seed, queries, keys)
    if mask == 1:
        assert given is not None
        given = given > -1
        given[:, 0] = True
    expected = F.scaled_dot_product_attention(
        *map(torch.tensor, (query, key, value)), attn_mask=None if given is None else torch.tensor(given)
    )
    found = KERNELS["scaled_dot_product_attention"](query=query, key=key, value=value, attn_mask=given)
    equal(found, expected)


def test_einsum() -> None:
    q, k = floats(0, 2, 3, 1, 5), floats(1, 2, 7, 1, 3)
    found = KERNELS["einsum"](values=[q, k], equation="bchq,bkhc->bkhq")
    equal(found, torch.einsum("bchq,bkhc->bkhq", torch.tensor(q), torch.tensor(k)))


@given(seed=seeds, bits=st.sampled_from([1, 2, 3, 4, 6, 8]), rows=sides, columns=sides)
@fast
def test_tables_of_any_width(seed: int, bits: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(seed)
    indices = random.integers(0, 2**bits, (rows, columns), np.uint8)
    lut = floats(seed, 2**bits)
    packed = np.packbits(np.unpackbits(indices.reshape(-1, 1), axis=1, bitorder="little")[:, :bits], bitorder="little")
    dense = CONSTEXPR["constexpr_lut_to_dense"]
    old = dense(indices=packed, lut=lut, shape=np.array([rows, columns], np.uint32))
    np.testing.assert_array_equal(old, lut[indices])
    np.testing.assert_array_equal(dense(indices=indices, lut=lut.reshape(1, 1, -1, 1)), lut[indices])
    stored = unpack(packed.tobytes(), TensorType(f"uint{bits}", (rows, columns)))
    np.testing.assert_array_equal(stored, indices)
    tables = floats(seed, rows, 1, 2**bits, 1)  # a table a row
    np.testing.assert_array_equal(
        dense(indices=indices, lut=tables), np.take_along_axis(tables[:, 0, :, 0], indices.astype(int), 1)
    )


def test_scaled_weights() -> None:
    data = np.random.default_rng(0).integers(-128, 128, (4, 6)).astype(np.int8)
    scale, offset = np.abs(floats(1, 4)), np.array([1, -2, 3, 0], np.int8)
    expected = (data.astype(np.float32) - offset[:, None]) * scale[:, None]
    affine = CONSTEXPR["constexpr_affine_dequantize"]
    np.testing.assert_allclose(affine(quantized_data=data, zero_point=offset, scale=scale, axis=np.int32(0)), expected)
    blockwise = CONSTEXPR["constexpr_blockwise_shift_scale"]
    np.testing.assert_allclose(blockwise(data=data, scale=scale[:, None], offset=offset[:, None]), expected)
    halves = np.abs(floats(2, 4, 2))  # two blocks a row
    np.testing.assert_allclose(blockwise(data=data, scale=halves), data * halves.repeat(3, axis=1), rtol=1e-6)
    assert affine(quantized_data=data, zero_point=offset, scale=scale.astype(np.float16), axis=0).dtype == np.float16


def test_signed_half_bytes() -> None:
    found = unpack(bytes([0x8F, 0x07]), TensorType("int4", (4,)))
    assert found.tolist() == [-1, -8, 7, 0]


def test_every_move_keeps_its_type() -> None:
    x = floats(0, 1, 2, 4, 4).astype(np.float16)
    given = {"reshape": {"shape": [-1]}, "transpose": {"perm": [3, 2, 1, 0]}, "pad": {"pad": [1, 1]}, "identity": {}}
    for name, arguments in given.items():
        assert name in MOVES
        assert KERNELS[name](x=x, **arguments).dtype == np.float16

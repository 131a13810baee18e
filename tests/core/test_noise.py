"""kdc_edge.noise against torch's CPU generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_edge.errors import InputError
from kdc_edge.noise import NormalStream, initial_latents

SEEDS = [0, 1, 42, 1234, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63, 2**64 - 1]


def torch_normals(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def max_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float32
    return float(np.abs(ours - theirs).max(initial=0.0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (2, 4, 16, 16), (3, 5, 7), (1,), (15,), (17,), ()])
def test_initial_latents_equal_torch(shape: tuple[int, ...], seed: int) -> None:
    assert max_difference(initial_latents(shape, seed), torch_normals(shape, seed)) <= 1e-6


@pytest.mark.parametrize("n", range(66))
def test_every_small_size_equals_torch(n: int) -> None:
    assert max_difference(initial_latents((n,), 7), torch_normals((n,), 7)) <= 1e-6


def test_the_far_tail_equals_torch() -> None:
    """Two million values: radii beyond five, where a rounding of the angle weighs most."""
    ours, theirs = initial_latents((2_000_000,), 3), torch_normals((2_000_000,), 3)
    assert np.abs(theirs).max() > 4.8
    assert max_difference(ours, theirs) <= 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 80), min_size=1, max_size=6))
def test_successive_draws_equal_torch(seed: int, sizes: list[int]) -> None:
    """Short draws keep the second normal of a pair for later, long ones pass it by: in every order."""
    stream, generator = NormalStream(seed), torch.Generator("cpu").manual_seed(seed)
    for n in sizes:
        assert max_difference(stream.draw((n,)), torch.randn(n, generator=generator).numpy()) <= 1e-6


def test_only_the_low_32_bits_of_a_seed_count_as_in_torch() -> None:
    assert np.array_equal(initial_latents((32,), 5), initial_latents((32,), 2**32 + 5))
    assert not np.array_equal(initial_latents((32,), 5), initial_latents((32,), 6))


def test_numpy_integers_are_seeds_too() -> None:
    assert np.array_equal(initial_latents((20,), np.uint64(9)), initial_latents((20,), 9))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", None, True])
def test_a_bad_seed_is_refused_in_one_line(seed: object) -> None:
    with pytest.raises(InputError, match="seed is") as caught:
        initial_latents((4,), seed)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)

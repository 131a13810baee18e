"""Seeded normal noise, equal to PyTorch's CPU generator, so that a seed means the same image everywhere.

`initial_latents(shape, seed)` is `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`
without torch, within 1e-6. `NormalStream` is the generator itself: one draw after the other; `NormalStreams` has
one for each image of a batch.

    >>> initial_latents((1, 4, 64, 64), seed=1).shape
    (1, 4, 64, 64)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdc_edge.errors import InputError

BLOCK = 16  # torch's vector path turns 16 uniforms into 16 normals at a time


def initial_latents(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The noise that sampling starts from: float32 of the given shape, from a fresh generator.

    Raises InputError for a seed that is no whole number from 0 to 2**64 - 1.
    """
    return NormalStream(seed).draw(shape)


class NormalStream:
    """A seeded source of normals: each draw equals the next `torch.randn` on the same CPU generator.

    Source: ATen/native/cpu/DistributionTemplates.h (normal_fill, normal_fill_16) and
    ATen/core/DistributionsHelper.h (normal_distribution). The words come from MT19937, which numpy's
    RandomState seeds as torch does, with the low 32 bits of the seed.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
            raise InputError(f"the seed is {seed!r}, not a whole number from 0 to 2**64 - 1: choose one, such as 1")
        self._twister = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._spare: float | None = None
        self.fresh = True  # nothing drawn yet

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next normals of the stream: float32 of the given shape."""
        self.fresh = False
        n = math.prod(shape)
        normals = self._draw_few(n) if n < BLOCK else self._draw_blocks(n)
        return normals.reshape(shape)

    def _words(self, n: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size=n, dtype=np.uint32)

    def _draw_blocks(self, n: int) -> NDArray[np.float32]:
        """n >= 16: uniforms of 24 bits, then Box-Muller block by block.

        A rest that fills no block is covered by drawing the last 16 values anew, as torch does.
        """
        uniforms = _uniform24(self._words(n))  # (n,)
        whole = n - n % BLOCK
        normals = np.empty(n, np.float32)
        normals[:whole] = _box_muller(uniforms[:whole])
        if whole < n:
            normals[-BLOCK:] = _box_muller(_uniform24(self._words(BLOCK)))
        return normals

    def _draw_few(self, n: int) -> NDArray[np.float32]:
        """n < 16: one normal at a time in double precision; the second of a pair waits for the next call."""
        normals = np.empty(n, np.float32)
        for i in range(n):
            if self._spare is not None:
                normals[i], self._spare = self._spare, None
                continue
            angle = 2.0 * math.pi * self._uniform53()
            radius = math.sqrt(-2.0 * math.log1p(-self._uniform53()))
            normals[i], self._spare = radius * math.cos(angle), radius * math.sin(angle)
        return normals

    def _uniform53(self) -> float:
        high, low = (int(word) for word in self._words(2))
        return ((high << 32 | low) & (2**53 - 1)) / 2**53


class NormalStreams:
    """The streams of several seeds side by side, a seed an image: an image's noise is the same in any batch."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [NormalStream(seed) for seed in seeds]

    @property
    def fresh(self) -> bool:
        return any(stream.fresh for stream in self._streams)

    def draw(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The next normals of each stream: float32 of the given shape, whose first side counts the streams."""
        return np.concatenate([stream.draw((1, *shape[1:])) for stream in self._streams])


Noise = NormalStream | NormalStreams


def _uniform24(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The low 24 bits of each word, over 2**24: exact in float32."""
    return (words & np.uint32(0xFFFFFF)).astype(np.float32) / np.float32(2**24)


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals from uniforms in [0, 1), both (16 k,): of each block eight give radii, eight angles.

    Radius and angle are rounded to float32 where torch rounds them. Logarithm, sine and cosine run in double
    precision: numpy's float32 versions differ from machine to machine, and a seed should not.
    """
    radius_half, angle_half = uniforms.reshape(-1, 2, BLOCK // 2).transpose(1, 0, 2)  # (k, 8) each
    radius = np.sqrt(-2.0 * np.log1p(-radius_half.astype(np.float64))).astype(np.float32)
    angle = (np.float32(2 * math.pi) * angle_half).astype(np.float64)
    normals: NDArray[np.float64] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return normals.astype(np.float32).reshape(-1)

"""Tensors to the device while it computes, and batches drawn ahead of their step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; a CUDA device copies it from pinned memory once its earlier work is done."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Ahead(Generic[T]):
    """What `draw` gives, drawn before it is asked for.

    The random generator stays as it was until the draw is taken: a state that is saved meanwhile knows nothing of it.
    """

    def __init__(self, draw: Callable[..., T], generator: torch.Generator) -> None:
        self._draw, self._generator = draw, generator
        self._drawn: tuple[T, Tensor] | None = None  # and the generator's state behind it

    def prepare(self, *arguments: object) -> None:
        """Draw for the next `take`, which will have the same arguments."""
        before = self._generator.get_state()
        self._drawn = self._draw(*arguments), self._generator.get_state()
        self._generator.set_state(before)

    def take(self, *arguments: object) -> T:
        """The prepared draw, or a new one."""
        if self._drawn is None:
            return self._draw(*arguments)
        found, state = self._drawn
        self._drawn = None
        self._generator.set_state(state)
        return found

"""CUDA graphs: forward and backward of a micro-batch recorded once and launched as one.

    compute = Graphs(forward_and_backward, network.parameters())   # a function of tensors that adds to gradients
    terms = compute(sample, noise, timestep)                       # what it gave, valid until the next call

A step of the 482M student launches thousands of kernels, which takes the host longer than they take the device while
the batch is small. What is recorded must do the same work at every step: it waits for nothing, copies nothing from the
host, and branches on no value of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WARMUP = 3  # calls before recording, in which libraries choose their kernels (torch.cuda.graphs' own number)


@dataclass(frozen=True)
class Recorded:
    """A graph, the tensors that it reads and those that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: dict[str, Tensor]


class Graphs:
    """A function of tensors that is recorded for each set of shapes; all recordings share one pool of memory.

    The gradients of `weights` must stay where they are from one call to the next: zero them, do not drop them.
    """

    def __init__(self, compute: Callable[..., dict[str, Tensor]], weights: Iterable[nn.Parameter]) -> None:
        self._compute, self._weights = compute, list(weights)
        self._recorded: dict[tuple[torch.Size, ...], Recorded] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        shapes = tuple(t.shape for t in inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(inputs)
        recorded = self._recorded[shapes]
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        recorded.graph.replay()
        return recorded.outputs

    def _record(self, given: tuple[Tensor, ...]) -> Recorded:
        """The graph for inputs of these shapes; the gradients are zero afterwards."""
        inputs = tuple(t.clone() for t in given)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._compute(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph, pool = torch.cuda.CUDAGraph(), next((r.graph.pool() for r in self._recorded.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            outputs = self._compute(*inputs)
        for gradient in (w.grad for w in self._weights if w.grad is not None):
            gradient.zero_()
        return Recorded(graph, inputs, outputs)

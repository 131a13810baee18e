"""Work in turn over processes: every process has all of it, in order, and all compute as often as each other."""

from __future__ import annotations

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kdc_edge.train.quality.spread import spread


@pytest.mark.parametrize(("count", "processes"), [(5, 1), (5, 2), (4, 2), (1, 3), (7, 4)])
def test_every_process_has_all_pieces_in_order(count: int, processes: int) -> None:
    shares: list[Tensor] = []
    calls: list[int] = []

    def work(number: int) -> Tensor:
        calls.append(number)
        return torch.full((2,), number)

    def seen(rank: int) -> list[Tensor]:
        def gather(mine: Tensor) -> Tensor:
            shares.append(mine)
            return torch.cat(shares[:processes])

        fake = SimpleNamespace(num_processes=processes, process_index=rank, gather=gather, device="cpu")
        return spread(fake, count, work)  # type: ignore[arg-type]

    for rank in range(processes - 1):
        with suppress(IndexError):  # the shares of the others are not there yet
            seen(rank)
    found = seen(processes - 1)
    assert [piece.tolist() for piece in found] == [[i, i] for i in range(count)]
    assert len(calls) == processes * -(-count // processes)

"""The processes of a run, as work that is shared among them sees them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from kdc_edge.hardware import cores

T = TypeVar("T")


def cores_per_process() -> int:
    """Logical processors, divided among a run's processes on this machine; at least 1.

    torchrun and accelerate set LOCAL_WORLD_SIZE, the number of these processes.
    """
    return max(1, (cores() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Processes:
    """This process among those of a run; here, the only one. All processes must call the methods together."""

    index, count = 0, 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each process, in order; where it fails in one, all fail."""
        return [work()]

    def once(self, work: Callable[[], None]) -> None:
        """Run `work` in one process while the others wait; where it fails, all fail."""
        work()


ALONE = Processes()

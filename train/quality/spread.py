"""An evaluation's work shared out over the processes of a run; every process has all of what one would have found.

images = generate_spread(accelerator, generator, prompts, seed=7)        # uint8 (N, H, W, 3)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from kdc_edge.train.quality.evaluate import Generator


def spread(accelerator: Accelerator, count: int, work: Callable[[int], Tensor]) -> list[Tensor]:
    """work(0) to work(count - 1), of one shape, in turn over the processes. Collective.

    Where weights are sharded, all processes must compute as often as each other: some do the last piece once more.
    """
    processes, own = accelerator.num_processes, accelerator.process_index
    if processes == 1:
        return [work(i) for i in range(count)]
    rounds = -(-count // processes)
    mine = [work(min(i * processes + own, count - 1)) for i in range(rounds)]
    found = accelerator.gather(torch.stack(mine).to(accelerator.device)).cpu()  # one process's after the other's
    return [found[i % processes * rounds + i // processes] for i in range(count)]


def generate_spread(accelerator: Accelerator, generator: Generator, prompts: Sequence[str], *, seed: int) -> np.ndarray:
    """The generator's images uint8 (N, H, W, 3), one a prompt, the processes taking turns in batches. Collective."""
    batches = generator.batches(len(prompts))

    def work(number: int) -> Tensor:
        images = generator.make(prompts, batches[number], seed=seed)
        padding = np.zeros((len(batches[0]) - len(images), *images.shape[1:]), np.uint8)  # of the last batch
        return torch.from_numpy(np.concatenate([images, padding]))

    return torch.cat(spread(accelerator, len(batches), work))[: len(prompts)].numpy()

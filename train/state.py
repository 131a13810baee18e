"""A trainer's state as one dict of tensors, and back: weights, average, optimizer, random state, loss scale.

Names are `KIND/WEIGHT[/MOMENT]`, with the network's own names, whole whatever the launch made of the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdc_edge.train.distributed import load_moments, load_weights, whole_average, whole_moments, whole_weights
from kdc_edge.train.replay import ReplayBuffer
from kdc_edge.train.runs import Position

if TYPE_CHECKING:
    from kdc_edge.train.loop import Trainer


def pack(trainer: Trainer) -> dict[str, Tensor]:
    """Everything but position and buffer. All processes must call it together."""
    accelerator, net = trainer.accelerator, trainer.net
    tensors = {"generator": trainer.generator.get_state()}
    tensors |= {f"student/{n}": t for n, t in whole_weights(accelerator, net).items()}
    tensors |= {f"ema/{n}": t for n, t in whole_average(accelerator, net, trainer.ema).items()}
    tensors |= {f"optimizer/{n}": t for n, t in whole_moments(accelerator, net, trainer.optimizer).items()}
    if trainer.objective.earlier is not None:
        tensors |= {f"earlier/{n}": t for n, t in trainer.objective.earlier.state_dict().items()}
    if accelerator.scaler is not None:
        scale = accelerator.scaler.state_dict()
        tensors["scaler"] = torch.tensor([scale["scale"], scale["_growth_tracker"]], dtype=torch.float64)
    return tensors


def unpack(trainer: Trainer, position: Position, tensors: dict[str, Tensor], replay: ReplayBuffer) -> None:
    """Put a trainer where the saved one stood; the buffer's budget is the trainer's own."""
    accelerator, net = trainer.accelerator, trainer.net
    trainer.position = position
    budget = trainer.replay
    replay.limit(budget.capacity, capacity_bytes=budget.capacity_bytes, policy=budget.policy)
    trainer.replay = replay
    trainer.generator.set_state(tensors["generator"])
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts.setdefault(kind, {})[rest] = tensor
    load_weights(accelerator, net, parts["ema"])
    trainer.ema = trainer.new_average()
    trainer.ema.optimization_step = position.total
    load_weights(accelerator, net, parts["student"])
    load_moments(accelerator, net, trainer.optimizer, parts.get("optimizer", {}))
    if "earlier" in parts:
        trainer.objective.replay_from(trainer.frozen(trainer.twin(parts["earlier"])))
    if "scaler" in parts and accelerator.scaler is not None:
        scale, growth = parts["scaler"][""].tolist()
        state = accelerator.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)}
        accelerator.scaler.load_state_dict(state)

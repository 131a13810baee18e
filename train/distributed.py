"""One process or many: what accelerate prepares, and whole tensors out of whatever it made of the networks.

`accelerate launch` decides how many processes there are and whether parameters are sharded (FSDP); a run by hand is
one process. Every process draws the same global batch and computes its own part, so that the curve is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kdc_edge.errors import InputError, require
from kdc_edge.train.config import TrainConfig


def make_accelerator(config: TrainConfig, run: Path) -> Accelerator:
    """The accelerator of a run. Raises InputError for a device that is not there or cannot do the precision."""
    cuda = torch.cuda.is_available() and config.device in ("auto", "cuda")
    precision = config.mixed_precision
    if precision == "auto":
        precision = "bf16" if cuda else "no"
    if precision == "fp16" and not cuda:
        raise InputError("--mixed-precision fp16 needs a CUDA device: use bf16 or no")
    if config.log_with in ("wandb", "trackio"):
        require(config.log_with, extra=config.log_with, purpose=f"--log-with {config.log_with}")
    accelerator = Accelerator(
        cpu=config.device == "cpu" or None, mixed_precision=precision,
        log_with=None if config.log_with == "none" else config.log_with, project_dir=run,
    )  # fmt: skip
    if config.device not in ("auto", accelerator.device.type):
        raise InputError(f"--device {config.device} is not here: this machine has {accelerator.device.type}")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError("FSDP of the first version is not supported: set fsdp_version 2 in accelerate's configuration")
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {accelerator.num_processes} processes"
            f" x --accumulate {config.accumulate}: use a multiple of {parts}"
        )
    return accelerator


def make_optimizer(config: TrainConfig, student: nn.Module) -> torch.optim.Optimizer:
    """AdamW, fused, or its 8-bit form."""
    if config.optimizer == "adamw8bit":
        bitsandbytes = require("bitsandbytes", extra="adam8bit", purpose="--optimizer adamw8bit")
        eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            student.parameters(), lr=config.learning_rate, weight_decay=0.01
        )
        return eight_bit
    return torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True)


def whole_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Every weight in full, by the network's own names; all processes must ask together."""
    found: nn.Module = accelerator.unwrap_model(model)
    return {n: _whole(t) for n, t in found.state_dict().items()}


def whole_average(accelerator: Accelerator, model: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """The moving average in full, by the network's own names; all processes must ask together."""
    names = (n for n, _ in accelerator.unwrap_model(model).named_parameters())
    return {n: _whole(t) for n, t in zip(names, ema.shadow_params, strict=True)}


def load_weights(accelerator: Accelerator, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Whole tensors into a network, each process its part of them."""
    found: nn.Module = accelerator.unwrap_model(model)
    found.load_state_dict({n: _part_like(own, tensors[n]) for n, own in found.state_dict().items()})


def whole_moments(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The optimizer's state in full: `WEIGHT/MOMENT` -> tensor; all processes must ask together."""
    names = {p: n for n, p in accelerator.unwrap_model(model).named_parameters()}
    states = _inner(optimizer).state.items()
    # bitsandbytes counts its steps in an int, torch in a float tensor; its code books are shared by all weights
    return {
        f"{names[p]}/{moment}": value.clone() if moment.startswith("qmap") else _whole(torch.as_tensor(value))
        for p, state in states
        for moment, value in state.items()
    }


def load_moments(accelerator: Accelerator, model: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """What `whole_moments` gave into an optimizer, each process its part of it."""
    weights = list(accelerator.unwrap_model(model).named_parameters())
    numbers = {n: i for i, (n, _) in enumerate(weights)}
    state: dict[int, dict[str, Tensor | int]] = {}
    for name, tensor in tensors.items():
        weight, moment = name.split("/")
        number = numbers[weight]
        count = tensor.ndim == 0 and not tensor.is_floating_point()
        state.setdefault(number, {})[moment] = int(tensor) if count else _part_like(weights[number][1], tensor)
    inner = _inner(optimizer)
    inner.load_state_dict(inner.state_dict() | {"state": state})


def shard_again(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left whole; nothing to do where nothing is sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor; what was shared out is put together in the CPU's memory, because no device may hold it all."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _part_like(own: Tensor, whole: Tensor) -> Tensor:
    """This process's part of a whole tensor that is split as `own` is; a step count is not split."""
    if not isinstance(own, DTensor) or whole.shape != own.shape:
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside accelerate's."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found

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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from kdc_edge.errors import InputError, require
from kdc_edge.train.config import TrainConfig

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=False, flatten_optimizer_state_dict=True)


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
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {accelerator.num_processes} processes"
            f" x --accumulate {config.accumulate}: use a multiple of {parts}"
        )
    return accelerator


def make_optimizer(config: TrainConfig, student: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused, or its 8-bit form."""
    if config.optimizer == "adamw8bit":
        if device.type != "cuda":
            raise InputError("--optimizer adamw8bit needs a CUDA device: use adamw")
        bitsandbytes = require("bitsandbytes", extra="adam8bit", purpose="--optimizer adamw8bit")
        eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(
            student.parameters(), lr=config.learning_rate, weight_decay=0.01
        )
        return eight_bit
    return torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True)


def whole_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Every weight in full, by the network's own names; all processes must ask together."""
    if accelerator.distributed_type == DistributedType.FSDP:
        whole: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
        return whole
    found: nn.Module = accelerator.unwrap_model(model)
    return dict(found.state_dict())


def whole_average(accelerator: Accelerator, model: nn.Module, ema: EMAModel) -> dict[str, Tensor]:
    """The moving average in full, by the network's own names."""
    if accelerator.distributed_type != DistributedType.FSDP:
        names = (n for n, _ in accelerator.unwrap_model(model).named_parameters())
        return dict(zip(names, ema.shadow_params, strict=True))
    parameters = list(model.parameters())
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        return {n: t.clone() for n, t in whole_weights(accelerator, model).items()}
    finally:
        ema.restore(parameters)


def load_weights(accelerator: Accelerator, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        set_model_state_dict(model, dict(tensors), options=_SPREAD)
    else:
        accelerator.unwrap_model(model).load_state_dict(tensors)


def whole_moments(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The optimizer's state in full: `WEIGHT/MOMENT` -> tensor."""
    if accelerator.distributed_type == DistributedType.FSDP:
        flat: dict[str, Any] = get_optimizer_state_dict(model, _inner(optimizer), options=_WHOLE)
        split = (n.removeprefix("state.").rsplit(".", 1) for n in flat if n.startswith("state."))
        return {f"{weight}/{moment}": flat[f"state.{weight}.{moment}"] for weight, moment in split}
    names = {p: n for n, p in accelerator.unwrap_model(model).named_parameters()}
    return {
        f"{names[p]}/{moment}": value for p, state in _inner(optimizer).state.items() for moment, value in state.items()
    }


def load_moments(accelerator: Accelerator, model: nn.Module, optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    inner = _inner(optimizer)
    if accelerator.distributed_type == DistributedType.FSDP:
        flat: dict[str, Any] = get_optimizer_state_dict(model, inner, options=_WHOLE)
        flat |= {f"state.{name.replace('/', '.')}": tensor for name, tensor in tensors.items()}
        set_optimizer_state_dict(model, inner, flat, options=_SPREAD)
        return
    numbers = {n: i for i, (n, _) in enumerate(accelerator.unwrap_model(model).named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        weight, moment = name.split("/")
        state.setdefault(numbers[weight], {})[moment] = tensor
    inner.load_state_dict(inner.state_dict() | {"state": state})


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside accelerate's."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found

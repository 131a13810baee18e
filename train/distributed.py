"""One process or many: the student as accelerate prepares it, full state dicts, work of the main process.

`accelerate launch` decides how many processes there are and whether parameters are sharded (FSDP); a run by hand is
one process. Every process draws the same global batch and computes its own share, so that the curve is the same.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from kdc_edge.errors import InputError, KdcError, require
from kdc_edge.text import one_line
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.processes import Processes

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)  # for a process that encodes its share of a large data set


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
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )  # fmt: skip
    if config.device not in ("auto", accelerator.device.type):
        raise InputError(f"--device {config.device} is not here: this machine has {accelerator.device.type}")
    if config.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.num_processes > 1):
        raise InputError("--cuda-graphs needs a CUDA device and a run of one process: give --no-cuda-graphs here")
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as torch's convolutions have by default
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError("FSDP of the first version is not supported: set fsdp_version 2 in accelerate's configuration")
    micro_batches = accelerator.num_processes * config.accumulate
    if config.batch_size % micro_batches:
        raise InputError(
            f"--batch-size {config.batch_size} does not divide into {accelerator.num_processes} processes"
            f" x --accumulate {config.accumulate}: use a multiple of {micro_batches}"
        )
    return accelerator


def make_optimizer(config: TrainConfig, student: nn.Module) -> torch.optim.Optimizer:
    """AdamW, fused, or its 8-bit form."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay,
    }  # fmt: skip
    if config.optimizer == "adamw8bit":
        bitsandbytes = require("bitsandbytes", extra="adam8bit", purpose="--optimizer adamw8bit")
        eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(student.parameters(), **settings)
        return eight_bit
    return torch.optim.AdamW(student.parameters(), fused=True, **settings)


class Student:
    """The student under training: its network as the launch prepared it, its optimizer, its moving average (EMA).

    Methods that give or take full tensors are collective: all processes must call them together.
    """

    def __init__(self, network: UNet2DConditionModel, config: TrainConfig, accelerator: Accelerator) -> None:
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if config.channels_last:
            network.to(memory_format=torch.channels_last)
        if config.compile:
            compile_blocks(network)
        network.to(accelerator.device).train()
        self.network, self.accelerator, self._ema_decay = network, accelerator, config.ema_decay
        self._keeps_gradients = config.cuda_graphs
        self.prepared, self.optimizer = accelerator.prepare(network, make_optimizer(config, network))
        self.ema = self._new_ema()

    def _new_ema(self) -> EMAModel:
        """A moving average that starts at the network's weights."""
        return EMAModel(
            self.network.parameters(), decay=self._ema_decay, use_ema_warmup=True, power=0.75,
            foreach=self.accelerator.device.type == "cuda",  # a launch for all weights: rounded otherwise than on CPUs
        )  # fmt: skip

    def begin_task(self) -> None:
        """Forget the optimizer's moments of the task before."""
        self.optimizer.state.clear()

    def begin_step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.zero_grad()

    def zero_grad(self) -> None:
        """Drop the gradients; those that CUDA graphs write to stay where they are."""
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)

    def end_step(self) -> None:
        """Clip the gradients, take the optimizer's step, update the moving average."""
        self.accelerator.clip_grad_norm_(self.prepared.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.network.parameters())

    @contextmanager
    def averaged(self) -> Iterator[UNet2DConditionModel]:
        """The network with its EMA weights, in evaluation mode, for as long as the context lasts."""
        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        self.network.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # evaluation's shapes would be compiled one by one
                yield self.network
        finally:
            reshard(self.prepared)
            self.ema.restore(self.network.parameters())
            self.network.train()

    def full_weights(self) -> dict[str, Tensor]:
        """Every weight in full, by the network's own names."""
        return {n: full_tensor(t) for n, t in self._unwrapped().state_dict().items()}

    def copy(self, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
        """A network of the student's shape with these weights, free of the launch's wrappers."""
        return copy_unet(self.network, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Weights, moving average, optimizer and loss scale in full: `KIND/WEIGHT[/MOMENT]`."""
        names = [n for n, _ in self._unwrapped().named_parameters()]
        tensors = {f"student/{n}": t for n, t in self.full_weights().items()}
        tensors |= {f"ema/{n}": full_tensor(t) for n, t in zip(names, self.ema.shadow_params, strict=True)}
        tensors |= {f"optimizer/{n}": t for n, t in self._full_moments().items()}
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.state_dict()
            tensors["scaler"] = torch.tensor([scale["scale"], scale["_growth_tracker"]], dtype=torch.float64)
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor], *, steps: int) -> None:
        """Restore what `state_dict` gave, each process its shard; `steps` is the moving average's count."""
        self._load_weights(under("ema/", tensors))
        self.ema = self._new_ema()
        self.ema.optimization_step = steps
        self._load_weights(under("student/", tensors))
        self._load_moments(under("optimizer/", tensors))
        if "scaler" in tensors and self.accelerator.scaler is not None:
            scale, growth = tensors["scaler"].tolist()
            state = self.accelerator.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(growth)}
            self.accelerator.scaler.load_state_dict(state)

    def _unwrapped(self) -> nn.Module:
        found: nn.Module = self.accelerator.unwrap_model(self.prepared)
        return found

    def _load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        network = self._unwrapped()
        network.load_state_dict({n: shard_like(own, tensors[n]) for n, own in network.state_dict().items()})

    def _full_moments(self) -> dict[str, Tensor]:
        """The optimizer's state in full: `WEIGHT/MOMENT` -> tensor."""
        names: dict[Tensor, str] = {p: n for n, p in self._unwrapped().named_parameters()}
        # bitsandbytes counts its steps in an int, torch in a float tensor; its code books are shared by all weights
        return {
            f"{names[p]}/{moment}": value.clone() if moment.startswith("qmap") else full_tensor(torch.as_tensor(value))
            for p, state in _torch_optimizer(self.optimizer).state.items()
            for moment, value in state.items()
        }

    def _load_moments(self, tensors: Mapping[str, Tensor]) -> None:
        weights = list(self._unwrapped().named_parameters())
        numbers = {n: i for i, (n, _) in enumerate(weights)}
        state: dict[int, dict[str, Tensor | int]] = {}
        for name, tensor in tensors.items():
            weight, moment = name.split("/")
            number = numbers[weight]
            count = tensor.ndim == 0 and not tensor.is_floating_point()
            state.setdefault(number, {})[moment] = int(tensor) if count else shard_like(weights[number][1], tensor)
        optimizer = _torch_optimizer(self.optimizer)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, by the rest of their name."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def compile_blocks(unet: UNet2DConditionModel) -> None:
    """torch.compile for each block, with fixed shapes: inductor fails on the sizes that it would leave free."""
    for block in (*unet.down_blocks, *unet.up_blocks):
        block.compile(dynamic=False)


def copy_unet(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """Another network of the same configuration with these weights."""
    found = UNet2DConditionModel(**unet.config)
    found.load_state_dict(weights)
    return found


def freeze(unet: UNet2DConditionModel, config: TrainConfig, accelerator: Accelerator) -> UNet2DConditionModel:
    """The network on the device without gradients, in the compute dtype: frozen weights need no 32 bits."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    memory_format = torch.channels_last if config.channels_last else torch.preserve_format
    moved: UNet2DConditionModel = unet.to(accelerator.device, dtype, memory_format=memory_format)
    return moved.eval().requires_grad_(False)


class Launched(Processes):
    """The processes that the launch made. A failure is raised as it is where it happened, as a KdcError elsewhere."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.index, self.count = accelerator.process_index, accelerator.num_processes

    def together(self, work: Callable[[], T]) -> list[T]:
        if self.count == 1:
            return [work()]
        failure: Exception | None = None
        found: list[T] = []
        try:
            found = [work()]
        except Exception as error:  # whatever it is, the others must not wait for ever
            failure = error
        every = gather_object([(found, None if failure is None else one_line(failure))])
        if failure is not None:
            raise failure
        for index, (_, words) in enumerate(every):
            if words is not None:
                raise KdcError(f"{f'process {index}' if index else 'the main process'} failed: {words}")
        return [value for values, _ in every for value in values]

    def once(self, work: Callable[[], None]) -> None:
        self.together(work if self.index == 0 else lambda: None)


def on_main_process(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Run `work` on the main process while the others wait; where it fails, all processes fail."""
    Launched(accelerator).once(work)


@contextmanager
def temporary_folder(accelerator: Accelerator) -> Iterator[Path]:
    """A new folder, the same in all processes, which is removed afterwards. Collective."""
    names = [tempfile.mkdtemp(prefix="kdc-edge-") if accelerator.is_main_process else ""]
    if accelerator.num_processes > 1:
        broadcast_object_list(names)
    try:
        yield Path(names[0])
        accelerator.wait_for_everyone()  # after a failure the others may never come
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(names[0], ignore_errors=True)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Is the flag up in any process? Collective."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum").item())


def reshard(model: nn.Module) -> None:
    """Shard again what a forward pass without a backward pass left whole; nothing to do where nothing is sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor; shards are put together in the CPU's memory, because a device may not hold them all."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shard_like(own: Tensor, full: Tensor) -> Tensor:
    """This process's shard of a full tensor that is split as `own` is; a step count is not split."""
    if not isinstance(own, DTensor) or full.shape != own.shape:
        return full
    return distribute_tensor(full.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found

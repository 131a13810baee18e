"""Steps, samples, memory and disk of a run before it starts (`kdc-edge train --dry-run`).

Activations are counted, not guessed: a forward pass on fake tensors, which have shapes and no contents, adds up what
backward would need. (On the meta device attention would keep its whole matrix, which no real device does.) Under mixed
precision that includes what CUDA's autocast keeps: the weights' copies in 16 bits, and normalizations in 32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no public name for it
from torch.multiprocessing.reductions import StorageWeakRef

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError
from kdc_edge.files import read_json
from kdc_edge.presets import find_preset
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.recipes import find_recipe
from kdc_edge.train.student import student_config
from kdc_edge.weight_files import count_parameters

GB = 1e9
MAX_TOKENS = 77


@dataclass(frozen=True)
class Plan:
    """Numbers of a run; memory is of each process, without sharding."""

    steps: int
    samples_seen: int
    student_parameters: int
    teacher_parameters: int
    image_size: int
    weights_bytes: int  # teacher, VAE, text encoder, student, gradients, Adam's moments, moving average
    activation_bytes: int  # of one micro-batch, with the weights' copies in 16 bits
    processes: int
    state_bytes: int  # on the disk, each of `keep`
    keep: int
    checkpoint_bytes: int  # on the disk, of all checkpoints
    latents_bytes_per_sample: int
    text_bytes_per_caption: int
    settings: str  # as flags, those that differ from their defaults
    recipe: str | None  # its name and source

    def lines(self) -> list[str]:
        memory = self.weights_bytes + self.activation_bytes
        return [
            f"steps {self.steps}, samples seen {self.samples_seen}, images of {self.image_size} pixels",
            f"student {self.student_parameters:,} parameters, teacher {self.teacher_parameters:,}",
            f"memory{f' of each of {self.processes} processes' if self.processes > 1 else ''} about"
            f" {memory / GB:.2f} GB: {self.weights_bytes / GB:.2f} weights, gradients, optimizer and"
            f" average, {self.activation_bytes / GB:.2f} activations; workspaces come on top",
            f"disk about {self.keep * self.state_bytes / GB:.2f} GB for {self.keep} saved states,"
            f" {self.checkpoint_bytes / GB:.2f} GB for the tasks' checkpoints,"
            f" {self.latents_bytes_per_sample * 1000 / GB:.3f} GB of latents for every 1,000 images,"
            f" {self.text_bytes_per_caption * 1000 / GB:.3f} GB of text embeddings for every 1,000 captions",
            f"settings that differ from their defaults: {self.settings}",
            *([f"recipe {self.recipe}"] if self.recipe else []),
        ]


def make_plan(config: TrainConfig) -> Plan:
    """The plan of a run; reads configurations and the headers of weight files only."""
    model = read_model(config.teacher)
    size = config.resolution or model.latent_size * model.vae_scale
    side = size // model.vae_scale
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**_plain(config, "unet"))
        student = UNet2DConditionModel(**student_config(find_preset(config.student), teacher))
    low = config.mixed_precision in ("bf16", "fp16") or (config.mixed_precision == "auto" and torch.cuda.is_available())
    ours = sum(p.numel() for p in student.parameters())
    theirs = sum(p.numel() for p in teacher.parameters())
    frozen = sum(count_parameters(config.teacher / part) for part in ("vae", "text_encoder"))
    adam = 2 if config.optimizer == "adamw8bit" else 8
    weights = theirs * (2 if low else 4) + frozen * 4 + ours * (4 + 4 + adam + 4)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as accelerate launch says
    micro_batch = max(1, config.batch_size // (config.accumulate * processes))
    activations = _activations(
        student.config, micro_batch, side, config.gradient_checkpointing, torch.bfloat16 if low else None
    )
    return Plan(
        steps=config.steps * len(config.tasks),
        samples_seen=config.steps * len(config.tasks) * config.batch_size,
        student_parameters=ours,
        teacher_parameters=theirs,
        image_size=size,
        weights_bytes=weights,
        activation_bytes=activations,
        processes=processes,
        state_bytes=ours * (4 + 4 + adam),
        keep=config.keep,
        checkpoint_bytes=4 * (ours + frozen) * (len(config.tasks) if config.task_checkpoints else 1),
        latents_bytes_per_sample=2 * 2 * 2 * model.latent_channels * side * side,
        text_bytes_per_caption=2 * MAX_TOKENS * int(student.config.cross_attention_dim),
        settings=config.as_flags(),
        recipe=f"{config.recipe}: {find_recipe(config.recipe).source}" if config.recipe else None,
    )


def _plain(config: TrainConfig, part: str) -> dict[str, Any]:
    found = read_json(config.teacher / part / "config.json", CheckpointError)
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _activations(
    config: Mapping[str, Any], batch: int, side: int, checkpointing: bool, dtype: torch.dtype | None
) -> int:
    """Bytes that a forward pass keeps for backward, each tensor once; fp32 weights are not among them."""
    kept: dict[StorageWeakRef, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[_identity(tensor)] = tensor.untyped_storage()
        return tensor

    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        _forward(config, batch, side, checkpointing, keep)
    return sum(storage.nbytes() for storage in kept.values())


def _forward(
    config: Mapping[str, Any], batch: int, side: int, checkpointing: bool, keep: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """A training forward pass on fake tensors; `keep` sees what backward will need, but for weights."""
    with FakeTensorMode():
        student = UNet2DConditionModel(**config).train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        norms_in_fp32(student)
        weights = {_identity(p) for p in student.parameters()}

        def keep_activation(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if _identity(tensor) in weights else keep(tensor)

        text = torch.empty(batch, MAX_TOKENS, student.config.cross_attention_dim)
        sample = torch.empty(batch, student.config.in_channels, side, side)
        with torch.autograd.graph.saved_tensors_hooks(keep_activation, lambda tensor: tensor):
            student(sample, torch.zeros(batch, dtype=torch.long), text)


def norms_in_fp32(network: nn.Module) -> None:
    """Normalize in 32 bits, as autocast does on CUDA and not on CPUs."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _identity(tensor: torch.Tensor) -> StorageWeakRef:
    """Equal for tensors of the same storage, which on fake tensors has no address."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

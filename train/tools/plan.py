"""Steps, samples, memory and disk of a run before it starts (`kdc-edge train --dry-run`).

Activations are counted, not guessed: a forward pass on fake tensors, which have shapes and no contents, adds up what
backward would need. (On the meta device attention would keep its whole matrix, which no real device does.) Under mixed
precision that includes what CUDA's autocast keeps: the weights' copies in 16 bits, and normalizations in 32. To these
come block features in the feature loss and, with gradient checkpointing, the largest layer that is computed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # torch has no public name for it
from torch.multiprocessing.reductions import StorageWeakRef

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError
from kdc_edge.files import read_json
from kdc_edge.presets import find_preset
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.objectives.distillation import BLOCK, FeatureTap
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
    weights_bytes: int  # teacher, VAE, text encoder, student, gradients, Adam's moments, moving average, Kept
    activation_bytes: int  # of one micro-batch, with the weights' copies in 16 bits, features and what is recomputed
    peak_bytes: int  # activations go before all gradients are there
    processes: int
    state_bytes: int  # on the disk, each of `keep`
    keep: int
    checkpoint_bytes: int  # on the disk, of all checkpoints
    latents_bytes_per_sample: int
    text_bytes_per_caption: int
    settings: str  # as flags, those that differ from their defaults
    recipe: str | None  # its name and source

    def lines(self) -> list[str]:
        return [
            f"steps {self.steps}, samples seen {self.samples_seen}, images of {self.image_size} pixels",
            f"student {self.student_parameters:,} parameters, teacher {self.teacher_parameters:,}",
            f"memory{f' of each of {self.processes} processes' if self.processes > 1 else ''} about"
            f" {self.peak_bytes / GB:.2f} GB at the peak: {self.weights_bytes / GB:.2f} weights, gradients, optimizer,"
            f" average; {self.activation_bytes / GB:.2f} activations, which go as gradients come; workspaces on top",
            f"disk about {self.keep * self.state_bytes / GB:.2f} GB for {self.keep} saved states,"
            f" {self.checkpoint_bytes / GB:.2f} GB for the tasks' checkpoints,"
            f" {self.latents_bytes_per_sample * 1000 / GB:.3f} GB of latents for every 1,000 images,"
            f" {self.text_bytes_per_caption * 1000 / GB:.3f} GB of text embeddings for every 1,000 captions",
            f"settings that differ from their defaults: {self.settings}",
            *([f"recipe {self.recipe}"] if self.recipe else []),
        ]


def make_plan(config: TrainConfig, *, tasks: int | None = None) -> Plan:
    """The plan of a run, of its last `tasks` where given; reads configurations and the headers of weight files only."""
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
    kept = kept_networks(config, 2 if low else 4)
    weights = theirs * (2 if low else 4) + frozen * 4 + ours * (4 + 4 + adam + 4 + kept.memory)
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as accelerate launch says
    micro_batch = max(1, config.batch_size // (config.accumulate * processes))
    activations = step_bytes(
        student.config, micro_batch, side, config.gradient_checkpointing, torch.bfloat16 if low else None,
        features=config.objective == "distillation" and config.loss.feature > 0,
    )  # fmt: skip
    steps = config.steps * (len(config.tasks) if tasks is None else tasks)
    return Plan(
        steps=steps,
        samples_seen=steps * config.batch_size,
        student_parameters=ours,
        teacher_parameters=theirs,
        image_size=size,
        weights_bytes=weights,
        activation_bytes=activations,
        peak_bytes=peak_bytes(weights, 4 * ours, activations, accumulates=config.accumulate > 1),
        processes=processes,
        state_bytes=ours * (4 + 4 + adam + kept.disk),
        keep=config.keep,
        checkpoint_bytes=4 * (ours + frozen) * (len(config.tasks) if config.task_checkpoints else 1),
        latents_bytes_per_sample=2 * 2 * 2 * model.latent_channels * side * side,
        text_bytes_per_caption=2 * MAX_TOKENS * int(student.config.cross_attention_dim),
        settings=config.as_flags(),
        recipe=f"{config.recipe}: {find_recipe(config.recipe).source}" if config.recipe else None,
    )


@dataclass(frozen=True)
class Kept:
    """Bytes for each of the student's parameters, of what an objective and a strategy keep beside the student."""

    memory: int
    disk: int


def kept_networks(config: TrainConfig, frozen: int) -> Kept:
    """Of a frozen network, `frozen` bytes a parameter; of a score network, also gradients and Adam's moments."""
    previous = config.strategy == "lwf" or config.replay_teacher == "student"
    score = config.objective == "distribution"
    fisher = 8 if config.strategy == "ewc" else 0  # and the weights that it holds on to
    return Kept(previous * frozen + score * 16 + fisher, previous * frozen + score * 12 + fisher)


def _plain(config: TrainConfig, part: str) -> dict[str, Any]:
    found = read_json(config.teacher / part / "config.json", CheckpointError)
    return {name: value for name, value in found.items() if not name.startswith("_")}


def peak_bytes(weights: int, gradients: int, activations: int, *, accumulates: bool) -> int:
    """The most bytes at once: before the backward pass, or in the optimizer's step. `weights` is with gradients."""
    before = weights + activations - (0 if accumulates else gradients)
    difference = gradients if torch.cuda.is_available() else 0  # the moving average's, from all weights at once
    return max(before, weights + difference)


def step_bytes(
    config: Mapping[str, Any], batch: int, side: int, checkpointing: bool, dtype: torch.dtype | None, *, features: bool
) -> int:
    """The most that a step holds beside the weights: activations, and block features or what is computed again."""
    kept = _activations(config, batch, side, checkpointing, dtype)
    count = _count_features(config, batch, side) if features else 0
    theirs = 4 if dtype is None else 2  # bytes of a teacher's feature
    in_loss = kept + count * (theirs + 3 * 4)  # both sides and their difference in 32 bits
    if not checkpointing:
        return in_loss
    return max(in_loss, kept + count * (theirs + 4) + _largest_layer(config, batch, side, dtype))


def _count_features(config: Mapping[str, Any], batch: int, side: int) -> int:
    """Numbers in the block features of a batch."""
    with FakeTensorMode(), torch.no_grad():
        student = UNet2DConditionModel(**config)
        tap = FeatureTap(student, [name for name, _ in student.named_modules() if BLOCK.fullmatch(name)])
        _call(student, batch, side)
        return sum(feature.numel() for feature in tap.features.values())


def _largest_layer(config: Mapping[str, Any], batch: int, side: int, dtype: torch.dtype | None) -> int:
    """Bytes that the largest layer keeps for backward, of the layers that gradient checkpointing computes again."""
    largest, kept = 0, dict[StorageWeakRef, int]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[_identity(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def measure(_module: nn.Module, _inputs: object, _output: object) -> None:
        nonlocal largest
        largest = max(largest, sum(kept.values()))

    def watch(student: UNet2DConditionModel) -> None:
        for layer in student.modules():
            if isinstance(layer, ResnetBlock2D | BasicTransformerBlock):
                layer.register_forward_pre_hook(lambda _module, _inputs: kept.clear())
                layer.register_forward_hook(measure)

    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        _forward(config, batch, side, False, keep, watch)
    return largest


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
    config: Mapping[str, Any], batch: int, side: int, checkpointing: bool,
    keep: Callable[[torch.Tensor], torch.Tensor], prepare: Callable[[UNet2DConditionModel], None] = lambda _: None,
) -> None:  # fmt: skip
    """A training forward pass on fake tensors; `keep` sees what backward will need, but for weights."""
    with FakeTensorMode():
        student = UNet2DConditionModel(**config).train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        norms_in_fp32(student)
        prepare(student)
        weights = {_identity(p) for p in student.parameters()}

        def keep_activation(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if _identity(tensor) in weights else keep(tensor)

        with torch.autograd.graph.saved_tensors_hooks(keep_activation, lambda tensor: tensor):
            _call(student, batch, side)


def _call(student: UNet2DConditionModel, batch: int, side: int) -> None:
    text = torch.empty(batch, MAX_TOKENS, student.config.cross_attention_dim)
    student(torch.empty(batch, student.config.in_channels, side, side), torch.zeros(batch, dtype=torch.long), text)


def norms_in_fp32(network: nn.Module) -> None:
    """Normalize in 32 bits, as autocast does on CUDA and not on CPUs."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _identity(tensor: torch.Tensor) -> StorageWeakRef:
    """Equal for tensors of the same storage, which on fake tensors has no address."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

"""The teacher of a run: frozen networks on the device, and the latents and embeddings computed with them once.

teacher = Teacher(config, model, unet, accelerator, run, say=print)
latents = teacher.latents(task)                  # cached on the disk
images = teacher.generator(unet)(prompts, seed=7)     # any U-Net of its latent space, e.g. the student's
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor

from kdc_edge.diffusers_folder import hash_checkpoint
from kdc_edge.errors import InputError
from kdc_edge.manifest import Model
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.presets import find_preset
from kdc_edge.request import made_for
from kdc_edge.runtimes.torch import load_network
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.cache import CACHE, Say, cache_latents
from kdc_edge.train.data.images import make_buckets
from kdc_edge.train.data.latents import Latents
from kdc_edge.train.data.source import Selection
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.data.text import TextEmbedder
from kdc_edge.train.distributed import Launched, Student, compile_blocks, copy_unet, freeze
from kdc_edge.train.objective import Objective, Setup, Stopwatch
from kdc_edge.train.objectives import find_objective
from kdc_edge.train.quality.evaluate import Generator, evaluation_request, torch_generator
from kdc_edge.train.quality.metrics import ImageMetrics
from kdc_edge.train.student import Account, make_student


def image_size(config: TrainConfig, model: Model) -> int:
    """Pixels a side: the configuration's, or the teacher's own. Raises InputError for a size that does not fit it."""
    size = config.resolution or model.latent_size * model.vae_scale
    unit = size_unit(model)
    if size % unit or size < unit:
        raise InputError(f"--resolution {size} does not fit this teacher: use a multiple of {unit}")
    if config.buckets and len(make_buckets(size, unit)) == 1:
        raise InputError(f"--buckets has no shape but the square at --resolution {size}: use {3 * unit} or more")
    return size


def latent_side(config: TrainConfig, model: Model) -> int:
    """Latents a side of the images that a run is trained on: what its checkpoints have as their own size."""
    return image_size(config, model) // model.vae_scale


def size_unit(model: Model) -> int:
    """Pixels of which an image's sides are multiples."""
    return model.vae_scale * model.latent_unit


class Teacher:
    """Frozen U-Net, VAE and text encoder, in the compute dtype or fp32. `latents` and `embed` fill the cache."""

    def __init__(
        self,
        config: TrainConfig,
        model: Model,
        unet: UNet2DConditionModel,
        accelerator: Accelerator,
        run: Path,
        *,
        say: Say = lambda _: None,
    ) -> None:
        self.model, self.size = model, image_size(config, model)
        self._unit = size_unit(model)
        self.device: torch.device = accelerator.device
        self.unet = freeze(unet, config, accelerator)
        self.vae = load_network(config.teacher, "vae_decoder").to(self.device)
        self.schedule = NoiseSchedule.from_config(model.scheduler)
        self._config, self._accelerator, self._processes, self._say = config, accelerator, Launched(accelerator), say
        self._cache = config.cache or run / CACHE
        text_encoder = load_network(config.teacher, "text_encoder").to(self.device)
        self.embed = TextEmbedder.of_teacher(config.teacher, text_encoder, self._cache)
        self.vae_sha256 = hash_checkpoint(config.teacher / "vae")
        self._latents: dict[str, Latents] = {}

    def latents(self, task: Task) -> Latents:
        """The latents of a task's training part. Collective: every process encodes a share."""
        if task.name not in self._latents:
            config = self._config
            buckets = make_buckets(self.size, self._unit) if config.buckets else ()
            selection = Selection(self.size, config.samples, config.seed, crop=config.crop, buckets=buckets)
            self._latents[task.name] = self._open_latents(task, selection, self._say)
        return self._latents[task.name]

    def test_latents(self, task: Task, samples: int) -> Latents:
        """The latents of `samples` images of a task's test part. Collective."""
        return self._open_latents(task, Selection(self.size, samples, part="test"), lambda _: None)

    def _open_latents(self, task: Task, selection: Selection, say: Say) -> Latents:
        return cache_latents(
            task, self.vae, self._cache, selection, vae_sha256=self.vae_sha256, say=say, processes=self._processes,
            bf16=self._accelerator.mixed_precision == "bf16",
        )  # fmt: skip

    def prepare_text(self, captions: Sequence[str]) -> None:
        """Embed captions ahead of training, every process a share. Collective."""
        self.embed.prepare(captions, self._processes)

    def generator(self, unet: UNet2DConditionModel, model: Model | None = None) -> Generator:
        """An image generator with this U-Net and the teacher's other networks; `model` is the teacher's where None."""
        model = model or self.model
        text_encoder, tokenizer = self.embed.text_encoder, self.embed.tokenizer
        request = made_for(model, replace(evaluation_request(self._config), width=self.size, height=self.size))
        return torch_generator(
            model, tokenizer, text_encoder, unet, self.vae, request, autocast=self._accelerator.autocast
        )


@dataclass(frozen=True)
class Learning:
    """Teacher, student and objective of a run, on the device and ready for a step."""

    teacher: Teacher
    student: Student
    objective: Objective
    inherited: Account


def prepare_learning(
    config: TrainConfig, model: Model, accelerator: Accelerator, run: Path, *,
    watch: Stopwatch, autocast: Callable[[], AbstractContextManager[object]] | None = None, say: Say = lambda _: None,
) -> Learning:  # fmt: skip
    """Load the networks and let the launch prepare them; `autocast` is the accelerator's where None."""
    teacher_unet = load_network(config.teacher, "unet")
    network, inherited = start_student(config, teacher_unet)
    network.register_to_config(sample_size=latent_side(config, model))
    teacher = Teacher(config, model, teacher_unet, accelerator, run, say=say)

    def frozen_student(weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
        return freeze(copy_unet(network, weights), config, accelerator)

    setup = Setup(
        config=config, teacher=teacher.unet, student=network, schedule=teacher.schedule, embed=teacher.embed,
        frozen_student=frozen_student, device=accelerator.device, autocast=autocast or accelerator.autocast,
        watch=watch,
    )  # fmt: skip
    made = find_objective(config.objective)(setup)  # its hooks come first, before the launch's
    if config.compile:
        compile_blocks(teacher.unet)
    return Learning(teacher, Student(network, config, accelerator), made, inherited)


def start_student(config: TrainConfig, teacher_unet: UNet2DConditionModel) -> tuple[UNet2DConditionModel, Account]:
    """The student at step 0, and what each of its weights was copied from."""
    preset = find_preset(config.student, "--student")
    network, inherited = make_student(preset, teacher_unet, seed=config.seed, inherit_weights=config.inherit)
    return network, inherited if config.start is None else start_from(network, config.start)


def origin_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that the student at step 0 follows from, beside teacher and preset."""
    return {
        "seed": config.seed,
        "inherit": config.inherit,
        "start": None if config.start is None else str(config.start),
    }


def untrained_student(config: TrainConfig, origin: dict[str, Any] | None) -> UNet2DConditionModel | None:
    """The student at step 0 made again from its origin; None where that is unknown, or its checkpoint gone."""
    if origin is None or (origin["start"] is not None and not Path(origin["start"]).is_dir()):
        return None
    start = None if origin["start"] is None else Path(origin["start"])
    config = replace(config, seed=origin["seed"], inherit=origin["inherit"], start=start)
    return start_student(config, load_network(config.teacher, "unet"))[0]


def start_from(network: UNet2DConditionModel, checkpoint: Path) -> Account:
    """Give a student the weights of a checkpoint's U-Net of the same shape; raises InputError for another shape."""
    weights = load_network(checkpoint, "unet").state_dict()
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in network.state_dict().items()}:
        raise InputError(f"--start {checkpoint} has a U-Net of another shape than --student: name its own preset")
    network.load_state_dict(weights)
    return {name: name for name in weights}


@dataclass(frozen=True)
class RunView:
    """Facts of a run for whoever reports on it."""

    device: str
    processes: int
    is_main_process: bool
    teacher_parameters: int  # of the U-Nets
    student_parameters: int
    student_tensors: int
    inherited_tensors: int  # copied from the teacher
    not_measured: tuple[str, ...]  # a line for each metric whose weight file is missing


def view_run(config: TrainConfig, learning: Learning, accelerator: Accelerator, metrics: ImageMetrics) -> RunView:
    """The facts of a run that is ready to start."""
    beyond_garden = any(not task.source.startswith("garden:") for task in config.tasks)
    return RunView(
        device=str(accelerator.device),
        processes=accelerator.num_processes,
        is_main_process=accelerator.is_main_process,
        teacher_parameters=sum(p.numel() for p in learning.teacher.unet.parameters()),
        student_parameters=sum(p.numel() for p in learning.student.network.parameters()),
        student_tensors=len(learning.inherited),
        inherited_tensors=sum(source is not None for source in learning.inherited.values()),
        not_measured=tuple(metrics.missing()) if beyond_garden else (),
    )

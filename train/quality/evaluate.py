"""Quality of generated images, task by task.

asked = ask(task, 32, size=64)                       # prompts, and the images to compare with
score = score_images(images, asked, metrics)     # however the images were made
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel

from kdc_edge.bundle import kind_of
from kdc_edge.components import COMPONENTS, Component
from kdc_edge.errors import InputError
from kdc_edge.image import to_pixels
from kdc_edge.manifest import Model
from kdc_edge.noise import initial_latents
from kdc_edge.pipeline import Pipeline
from kdc_edge.request import Request, own_request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.runtimes.torch import TorchComponent, load_network
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.data.source import Sample, Selection, read_samples
from kdc_edge.train.data.sources import GardenSource
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.garden import scenes as garden
from kdc_edge.train.garden.judge import LABELS, load_judge, shares
from kdc_edge.train.garden.scenes import Scene, render_many
from kdc_edge.train.quality.matrix import QUALITIES, signed
from kdc_edge.train.quality.metrics import (
    ImageMetrics,
    frechet_distance,
    kernel_distance,
    kernel_distance_error,
    standard_error,
)

EVALUATION = Request("", steps=12, guidance=4.0, sampler="dpm++2m")  # how images are made, unless somebody asks
EVALUATION_SEED = 2024  # of prompts and references
EVALUATION_NOISE_SEED = 7
DECODER_BATCH = 4  # images


def evaluation_request(config: TrainConfig) -> Request:
    """How the images of a run's evaluations are made."""
    return replace(EVALUATION, steps=config.eval_steps, guidance=config.eval_guidance)


@dataclass(frozen=True)
class Score:
    """What was found on one task."""

    values: dict[str, float]
    by_image: tuple[float, ...] = ()  # the garden's prompt accuracy, image by image
    errors: dict[str, float] = field(default_factory=dict)  # standard errors; none of the Frechet distances
    images: int = 0  # that were scored
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)  # means of what each image has a value of

    @property
    def metric(self) -> str:
        """The name of what `quality` is, e.g. `prompt_accuracy` or `-kid`."""
        return signed(self._chosen[0])

    @property
    def quality(self) -> float:
        """R[i][j]: higher is better."""
        name, sign = self._chosen
        return sign * self.values[name]

    @property
    def _chosen(self) -> tuple[str, int]:
        return next((name, sign) for name, sign in QUALITIES if name in self.values)


@dataclass(frozen=True)
class Asked:
    """What an evaluation asks for: prompts, and what to compare the images with."""

    prompts: tuple[str, ...]
    scenes: tuple[Scene, ...] = ()  # of the garden
    references: np.ndarray | None = None  # uint8 (M, H, W, 3)
    kind: str = "images of the training part"  # what the references are
    classes: Mapping[str, str] = field(default_factory=dict)  # caption -> class, where it is known


def batch_size(side: int) -> int:
    """Images at a time, by the side of their latents: 16 small ones or 4 of 512 pixels."""
    return max(1, min(16, 2**14 // side**2))


def evaluation_noise(count: int, shape: tuple[int, int, int], seed: int, numbers: range | None = None) -> np.ndarray:
    """The unit noise (count, C, h, w) of an evaluation: every batch is drawn anew, from `seed` and its place.

    Of the images of these numbers alone where they are given.
    """
    most, numbers = batch_size(shape[-1]), numbers or range(count)
    starts = range(numbers.start // most * most, numbers.stop, most)
    found = np.concatenate([initial_latents((min(most, count - at), *shape), seed + at) for at in starts])
    return found[numbers.start - starts.start :][: len(numbers)]


@dataclass(frozen=True)
class Generator:
    """A pipeline that makes an evaluation's images: image i depends on its prompt, the seed and i."""

    pipeline: Pipeline
    request: Request = EVALUATION  # steps, guidance, sampler and size
    batch: int | None = None  # images at a time; as many as `batch_size` says where None

    @property
    def conditions(self) -> str:
        """How the images are made, for the record: "12 steps of DPM++ 2M, guidance 4"."""
        return self.request.conditions

    def __call__(self, prompts: Sequence[str], *, seed: int) -> np.ndarray:
        """Images uint8 (N, H, W, 3), one a prompt."""
        return np.concatenate([self.make(prompts, numbers, seed=seed) for numbers in self.batches(len(prompts))])

    def batches(self, count: int) -> list[range]:
        """The numbers of `count` images, batch by batch."""
        most = self.batch or batch_size(self._latent_shape[-1])
        return [range(at, min(at + most, count)) for at in range(0, count, most)]

    def make(self, prompts: Sequence[str], numbers: range, *, seed: int) -> np.ndarray:
        """The images uint8 (B, H, W, 3) of these numbers, a batch, of those that all prompts have."""
        noise = evaluation_noise(len(prompts), self._latent_shape, seed, numbers)
        requests = [replace(self.request, prompt=prompts[n], latents=noise[i : i + 1]) for i, n in enumerate(numbers)]
        return np.stack(list(self.pipeline.generate_batch(requests)))

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.pipeline.latent_shape(self.request)
        return channels, height, width


def torch_generator(
    model: Model,
    tokenizer: Tokenizer,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    request: Request = EVALUATION,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Generator:
    """Networks in PyTorch, where they are and in their dtype, as a generator; the U-Net runs under `autocast`."""

    def encode(**inputs: np.ndarray) -> np.ndarray:
        """Text embeddings rounded to fp16, as training caches them."""
        return embed(**inputs).astype(np.float16).astype(np.float32)

    def denoise(**inputs: np.ndarray) -> np.ndarray:
        with autocast():
            return predict(**inputs)

    embed, predict = TorchComponent("text_encoder", text_encoder), TorchComponent("unet", unet)
    components: dict[str, Component] = {
        "text_encoder": encode,
        "unet": denoise,
        "vae_decoder": TorchComponent("vae_decoder", vae),
    }
    return Generator(Pipeline(model, tokenizer, components, decoder_batch=DECODER_BATCH), request)


def evaluation_scenes(source: GardenSource, count: int) -> list[Scene]:
    """The prompts that every evaluation of a garden task asks: half of them of combinations held out of training."""
    heldout = source.scenes(count // 2, seed=EVALUATION_SEED, split="heldout")
    return source.scenes(count - count // 2, seed=EVALUATION_SEED, split="train") + heldout


@lru_cache(maxsize=8)
def ask(task: Task, count: int, *, size: int) -> Asked:
    """`count` prompts of a task, the same every time, with as many reference images of `size` pixels."""
    source = task.open()
    if isinstance(source, GardenSource):
        chosen = evaluation_scenes(source, count)
        references = render_many(chosen, seed=EVALUATION_SEED)
        return Asked(tuple(s.caption for s in chosen), tuple(chosen), references, "renders of the same prompts")
    found = source.pending(Selection(size, count, EVALUATION_SEED, part="test"))
    samples = [item for item in read_samples(found) if isinstance(item, Sample)]
    images = np.stack([s.image for s in samples]) if samples else None
    kind = f"images of the {'test' if source.has_test_part else 'training'} part"
    return Asked(tuple(s.caption for s in samples), (), images, kind, source.caption_classes())


def ask_prompts(prompts: Sequence[str]) -> Asked:
    """A user's prompts: captions of the garden, which the judge can check, or any other text."""
    known = {scene.caption: scene for subject in garden.SUBJECTS for scene in garden.scenes(subject)}
    scenes = [known[prompt] for prompt in prompts if prompt in known]
    return Asked(tuple(prompts), tuple(scenes) if len(scenes) == len(prompts) else ())


def score_images(
    images: np.ndarray,
    asked: Asked,
    metrics: ImageMetrics | None,
    *,
    paired: np.ndarray | None = None,
    losses: Sequence[float] | None = None,
    loss_captions: Sequence[str] = (),
) -> Score:
    """What images uint8 (N, H, W, 3), one a prompt, are worth.

    Of the garden: prompt_accuracy, the share of asked attributes that are in the image; exact, the share of
    images with all of them; judge_frechet and judge_kernel, distances of the judge's features. Elsewhere, what
    `metrics` has weights for. `paired` are the teacher's images from the same noise, `losses` those of held-out
    latents, which have `loss_captions`.
    """
    each: dict[str, np.ndarray] = {}
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    if losses is not None:
        values["loss"], errors["loss"] = float(np.mean(losses)), standard_error(np.array(losses))
    by_image: tuple[float, ...] = ()
    if asked.scenes:
        judge, images = load_judge(), _to_garden_size(images)
        right = judge.right(images, asked.scenes)
        found, by_image = shares(right), tuple(right.mean(0).tolist())
        values |= {"prompt_accuracy": float(np.mean([found[n] for n in LABELS])), "exact": found["all"]}
        errors |= {"prompt_accuracy": standard_error(right.mean(0)), "exact": standard_error(np.asarray(right.all(0)))}
        if asked.references is not None:
            ours, theirs = judge.features(images), judge.features(asked.references)
            values |= {"judge_frechet": frechet_distance(ours, theirs), "judge_kernel": kernel_distance(ours, theirs)}
            errors["judge_kernel"] = kernel_distance_error(ours, theirs)
    if metrics is not None and not asked.scenes:
        values |= metrics.measure(images, asked.references, asked.prompts, paired, errors, each)
    by_class: dict[str, dict[str, float]] = {}
    for name, of_each in each.items():
        _add_class_means(by_class, name, of_each, asked.prompts, asked.classes)
    if losses is not None:
        _add_class_means(by_class, "loss", np.array(losses), loss_captions, asked.classes)
    return Score(values, by_image, {n: e for n, e in errors.items() if math.isfinite(e)}, len(images), by_class)


def _add_class_means(
    by_class: dict[str, dict[str, float]], name: str, values: np.ndarray, captions: Sequence[str],
    classes: Mapping[str, str],
) -> None:  # fmt: skip
    """Put the mean over each class of a metric's values (N,), one a caption, beside its other metrics."""
    known = [classes.get(caption) for caption in captions]
    for of_class in dict.fromkeys(c for c in known if c is not None):
        mine = [value for value, c in zip(values, known, strict=True) if c == of_class]
        by_class.setdefault(of_class, {})[name] = float(np.mean(mine))


def _to_garden_size(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) -> (N, 64, 64, 3), which is what the judge reads."""
    if images.shape[1:3] == (garden.SIZE, garden.SIZE):
        return images
    size = (garden.SIZE, garden.SIZE)
    return np.stack([np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BOX)) for p in images])


@dataclass(frozen=True)
class Evaluated:
    """A task's score, and the images that it was given for."""

    score: Score
    images: np.ndarray  # uint8 (N, H, W, 3)


def evaluate_tasks(
    generate: Generator,
    tasks: Mapping[str, Asked],
    *,
    metrics: ImageMetrics,
    teacher: Generator | None = None,
    seed: int = EVALUATION_NOISE_SEED,
) -> dict[str, Evaluated]:
    """Score a generator on what is asked of each task; `teacher` makes the images that LPIPS compares with.

    Raises InputError where nothing can be measured.
    """
    found = {}
    for name, asked in tasks.items():
        paired = teacher(asked.prompts, seed=seed) if teacher and not asked.scenes else None
        made = generate(asked.prompts, seed=seed)
        score = score_images(made, asked, metrics, paired=paired)
        if not score.values:
            raise InputError(f"nothing can be measured on {name}: {'; '.join(metrics.missing())}")
        found[name] = Evaluated(score, made)
    return found


def open_generator(
    folder: Path,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    side: int | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Generator:
    """A checkpoint in fp32 on the best device; or a bundle, image by image, on this machine's engine for it.

    What is not given is a few-step student's own, else as in EVALUATION; the images' `side` is the model's own, in
    pixels. `tell` is called with what is to be said of that. Raises CheckpointError or BundleError for a folder that
    cannot be read, InputError for a size that cannot be made.
    """
    pipeline = open_pipeline(folder, safety_checker=False)
    request, note = own_request(
        pipeline.model, replace(EVALUATION, width=side, height=side), steps=steps, guidance=guidance,
        sampler=sampler or (None if pipeline.model.sampling else EVALUATION.sampler),
    )  # fmt: skip
    pipeline.check(request)
    if note:
        tell(note)
    if kind_of(folder) == "bundle":
        return Generator(pipeline, request, batch=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text_encoder, unet, vae = (load_network(folder, name).to(device) for name in COMPONENTS)
    return torch_generator(pipeline.model, pipeline.tokenizer, text_encoder, unet, vae, request)


def generate_with_both(
    generate: Generator, decoder: Component, prompts: Sequence[str], *, seed: int = EVALUATION_NOISE_SEED
) -> tuple[np.ndarray, np.ndarray]:
    """The images of the generator's own decoder and of another one, from the same latents, each uint8 (N, H, W, 3)."""
    pipeline, others = generate.pipeline, []

    def decode(**latents: np.ndarray) -> np.ndarray:
        others.append(to_pixels(decoder(**latents)))
        return pipeline.components["vae_decoder"](**latents)

    components = {**pipeline.components, "vae_decoder": decode}
    both = Pipeline(pipeline.model, pipeline.tokenizer, components, decoder_batch=pipeline.decoder_batch)
    return replace(generate, pipeline=both)(prompts, seed=seed), np.concatenate(others)

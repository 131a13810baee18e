"""From a prompt to an image, as a generator of steps; whoever consumes it draws progress, times or stops.

    pipeline = open_pipeline(Path("bundles/onnx-fp16"))                # kdc_edge.runtimes
    for progress in pipeline.run(Request("a red flower", seed=1)):
        print(progress.stage, progress.step, progress.steps)
    image = progress.pixels                                          # uint8 (H, W, 3)

An engine gives the three components; everything between them is numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np

from kdc_edge.bundle import Model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.image import to_pixels
from kdc_edge.noise import NormalStream
from kdc_edge.samplers import DEFAULT_SAMPLER, SAMPLERS, NoiseSchedule, make_sampler
from kdc_edge.tokenizer import Tokenizer

Stage = Literal["load", "compile", "tokenize", "text_encoder", "unet", "scheduler", "vae_decoder"]
GuidanceMode = Literal["batched", "sequential"]
MAX_SIDE = 4096  # pixels


Shapes = Mapping[str, tuple[int, ...]]  # of a network's inputs, by name


class Component(Protocol):
    """A network with named numpy inputs and one numpy output (DESIGN: contracts)."""

    def __call__(self, **inputs: np.ndarray) -> np.ndarray: ...


@runtime_checkable
class Compiled(Protocol):
    """A component whose engine compiles it anew for each set of input shapes."""

    def prepare(self, shapes: Shapes) -> None:
        """Compile for these shapes now, so that the first call need not; -1 is a size that the network has fixed."""
        ...


@runtime_checkable
class Early(Protocol):
    """Components that can be loaded, and compiled for some shapes, while others compute."""

    def start(self, name: str, shapes: Sequence[Shapes]) -> None: ...


@dataclass(frozen=True)
class Execution:
    """What an engine chose for a component."""

    provider: str  # what computes, in the engine's words: "CPUExecutionProvider", "CPU"
    compute_dtype: str | None  # of the matrix products, the most frequent first: "bf16"; None where it does not tell


@runtime_checkable
class Explained(Protocol):
    """A component that knows what its engine chose; to be asked after its first call."""

    def explain(self) -> Execution: ...


@dataclass(frozen=True)
class Request:
    """One image to make."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance: float = 7.5  # classifier-free guidance scale (Ho and Salimans, arXiv 2207.12598); 1 = none
    # Both halves of the guidance in one U-Net call of batch 2, or in two of batch 1, which hold half the
    # activations. None: batched, but sequential where an interval leaves steps without guidance, so that
    # the U-Net is needed for one batch size only.
    guidance_mode: GuidanceMode | None = None
    # Fractions of the schedule between which there is guidance (Kynkäänniemi et al., arXiv 2404.07724); the
    # other steps cost half.
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    sampler: str = DEFAULT_SAMPLER
    width: int | None = None  # pixels; the model's own size when None
    height: int | None = None
    latents: np.ndarray | None = None  # unit normal (1, C, h, w); drawn from the seed when None

    def guided(self, step: int, steps: int) -> bool:
        """Is this step, counted from 0, one of those with guidance?"""
        begin, end = self.guidance_interval
        return self.guidance > 1 and begin * steps <= step < end * steps

    @property
    def batched(self) -> bool:
        """Are both halves of the guidance computed in one call?"""
        if self.guidance_mode is None:
            return self.guidance_interval == (0.0, 1.0)
        return self.guidance_mode == "batched"


@dataclass(frozen=True)
class Progress:
    """What has just been done."""

    stage: Stage
    step: int  # 1-based within the stage
    steps: int
    timestep: int | None = None  # of a step
    latents: np.ndarray | None = None  # (1, C, h, w) after a step of the scheduler
    pixels: np.ndarray | None = None  # uint8 (H, W, 3), with the last one


class Pipeline:
    """Tokenizer, three components and the loop over the noise schedule."""

    def __init__(self, model: Model, tokenizer: Tokenizer, components: Mapping[str, Component]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.components = components
        self.schedule = NoiseSchedule.from_config(model.scheduler)

    def latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        """(1, C, h, w) for the request; raises InputError for a size that the model cannot make."""
        sides = []
        for name, asked in (("height", request.height), ("width", request.width)):
            pixels = self.model.image_size if asked is None else asked
            unit = self.model.vae_scale * self.model.latent_unit
            if pixels < unit or pixels > MAX_SIDE or pixels % unit:
                raise InputError(f"--{name} {pixels} cannot be made: use a multiple of {unit} up to {MAX_SIDE}")
            sides.append(pixels // self.model.vae_scale)
        return (1, self.model.latent_channels, sides[0], sides[1])

    def check(self, request: Request) -> None:
        """Raise InputError for a request that cannot be made, before any work."""
        self.latent_shape(request)
        make_sampler(request.sampler, self.schedule, request.steps)
        if not 0 <= request.guidance <= 100:  # also refuses nan
            raise InputError(f"--guidance {request.guidance} is out of range: use 1 (none) to 20 or so, at most 100")
        if request.guidance_mode not in (None, *get_args(GuidanceMode)):
            raise InputError(f"--guidance-mode {request.guidance_mode!r} is unknown: use batched or sequential")
        begin, end = request.guidance_interval
        if not 0 <= begin < end <= 1:
            raise InputError(
                f"--guidance-interval {begin:g}:{end:g} is no part of the schedule: use 0.0:0.7 or the like"
            )
        self.tokenizer.encode([request.negative_prompt, request.prompt])

    def prepare(self, request: Request) -> Iterator[Progress]:
        """Load every component and compile it for what the request will ask of it, yielding after each.

        A pipeline that was not prepared does the same while it makes its first image.
        """
        self.check(request)
        wanted = self._shapes(request, self._tokenize(request))
        for i, name in enumerate(("text_encoder", "unet", "vae_decoder"), 1):
            component = self.components[name]
            yield Progress("load", i, 3)
            if not isinstance(component, Compiled):
                continue
            for inputs in wanted[name]:
                component.prepare(inputs)
            yield Progress("compile", i, 3)

    def _shapes(self, request: Request, input_ids: np.ndarray) -> dict[str, list[Shapes]]:
        """What each component will be called with."""
        shape = self.latent_shape(request)
        batches = {2 if request.batched and request.guided(i, request.steps) else 1 for i in range(request.steps)}
        unet: list[Shapes] = [
            {"sample": (b, *shape[1:]), "timestep": (1,), "encoder_hidden_states": (b, input_ids.shape[1], -1)}
            for b in sorted(batches)
        ]
        text, decoder = {"input_ids": input_ids.shape}, {"latent_sample": shape}
        return {"text_encoder": [text], "unet": unet, "vae_decoder": [decoder]}

    def run(self, request: Request) -> Iterator[Progress]:
        """Make the image, yielding after each stage; at each step after the U-Net and after the scheduler."""
        self.check(request)
        stream = NormalStream(request.seed)
        shape = self.latent_shape(request)
        latents = stream.draw(shape)
        if request.latents is not None:
            if request.latents.shape != shape:
                raise InputError(f"latents have the shape {request.latents.shape} where {shape} is needed")
            latents = request.latents.astype(np.float32)
        sampler = make_sampler(request.sampler, self.schedule, request.steps, noise=stream)

        input_ids = self._tokenize(request)  # (1 or 2, 77)
        yield Progress("tokenize", 1, 1)
        if isinstance(self.components, Early):
            self.components.start("unet", self._shapes(request, input_ids)["unet"])
        hidden = self.components["text_encoder"](input_ids=input_ids)  # (1 or 2, 77, D)
        yield Progress("text_encoder", 1, 1)

        latents = latents * np.float32(sampler.init_noise_sigma)
        total = len(sampler.timesteps)
        unet = self.components["unet"]
        for i, timestep in enumerate(sampler.timesteps):
            sample = sampler.scale_model_input(latents, i)  # (1, C, h, w)
            halves = _predict(unet, request, sample, int(timestep), hidden, guided=request.guided(i, total))
            yield Progress("unet", i + 1, total, timestep=int(timestep))
            latents = sampler.step(_mix(halves, request.guidance), i, latents)
            yield Progress("scheduler", i + 1, total, timestep=int(timestep), latents=latents)
        del unet  # a pipeline that is short of memory drops it before it loads the decoder

        image = self.components["vae_decoder"](latent_sample=latents / np.float32(self.model.scaling_factor))
        if not np.isfinite(image).all():
            raise KdcError("the decoder's image holds values that are no numbers: use a bundle with fp32 weights")
        yield Progress("vae_decoder", 1, 1, pixels=to_pixels(image)[0])

    def _tokenize(self, request: Request) -> np.ndarray:
        texts = [request.prompt, request.negative_prompt] if request.guidance > 1 else [request.prompt]
        return self.tokenizer.encode(texts)

    def generate(self, request: Request) -> np.ndarray:
        """The image alone: uint8 (H, W, 3)."""
        *_, last = self.run(request)
        assert last.pixels is not None
        return last.pixels


def _predict(
    unet: Component, request: Request, sample: np.ndarray, timestep: int, hidden: np.ndarray, *, guided: bool
) -> Sequence[np.ndarray]:
    """The noise in `sample` (1, C, h, w) as the U-Net sees it: with the prompt, and without where guided."""
    t = np.array([timestep], dtype=np.int64)
    if not guided:
        return [unet(sample=sample, timestep=t, encoder_hidden_states=hidden[:1])]
    if request.batched:
        both = unet(sample=np.repeat(sample, 2, axis=0), timestep=t, encoder_hidden_states=hidden)  # (2, C, h, w)
        return both[:1], both[1:]
    return [unet(sample=sample, timestep=t, encoder_hidden_states=h) for h in (hidden[:1], hidden[1:])]


def _mix(halves: Sequence[np.ndarray], guidance: float) -> np.ndarray:
    """Classifier-free guidance, where there are two predictions."""
    with_, *rest = halves
    return np.asarray(rest[0] + np.float32(guidance) * (with_ - rest[0])) if rest else with_


def describe(request: Request, pixels: np.ndarray, model_name: str) -> dict[str, object]:
    """The generation parameters that go into the PNG, in the words that common user interfaces read."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "CFG scale": request.guidance,
        "Seed": request.seed,
        "Size": f"{pixels.shape[1]}x{pixels.shape[0]}",
        "Model": model_name,
        "Generator": "kdc-edge",
    }

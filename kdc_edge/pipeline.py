"""From a prompt to a picture, as a generator of steps; whoever consumes it draws progress, times or stops.

    pipeline = open_pipeline(Path("bundles/onnx-fp16"))                # kdc_edge.runtimes
    for progress in pipeline.run(Request("a red flower", seed=1)):
        print(progress.stage, progress.step, progress.steps)
    picture = progress.pixels                                          # uint8 (H, W, 3)

An engine gives the three components; everything between them is numpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdc_edge.bundle import Model
from kdc_edge.errors import InputError, KdcError
from kdc_edge.image import to_pixels
from kdc_edge.noise import NormalStream
from kdc_edge.schedulers import DEFAULT_SAMPLER, SAMPLERS, NoiseSchedule, make_sampler
from kdc_edge.tokenizer import Tokenizer

Stage = Literal["tokenize", "text_encoder", "unet", "vae_decoder"]
MAX_SIDE = 4096  # pixels


class Component(Protocol):
    """A network with named numpy inputs and one numpy output (DESIGN: contracts)."""

    def __call__(self, **inputs: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance: float = 7.5  # classifier-free guidance scale (Ho and Salimans, arXiv 2207.12598); 1 = none
    seed: int = 0
    sampler: str = DEFAULT_SAMPLER
    width: int | None = None  # pixels; the model's own size when None
    height: int | None = None
    latents: np.ndarray | None = None  # unit normal (1, C, h, w); drawn from the seed when None


@dataclass(frozen=True)
class Progress:
    """What has just been done."""

    stage: Stage
    step: int  # 1-based within the stage
    steps: int
    timestep: int | None = None  # of a U-Net step
    latents: np.ndarray | None = None  # (1, C, h, w) after a U-Net step
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
            pixels = self.model.picture_size if asked is None else asked
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
        self.tokenizer.encode([request.negative_prompt, request.prompt])

    def run(self, request: Request) -> Iterator[Progress]:
        """Make the picture, yielding after each stage and each step."""
        self.check(request)
        guided = request.guidance > 1
        stream = NormalStream(request.seed)
        shape = self.latent_shape(request)
        latents = stream.draw(shape)
        if request.latents is not None:
            if request.latents.shape != shape:
                raise InputError(f"latents have the shape {request.latents.shape} where {shape} is needed")
            latents = request.latents.astype(np.float32)
        sampler = make_sampler(request.sampler, self.schedule, request.steps, noise=stream)

        texts = [request.negative_prompt, request.prompt] if guided else [request.prompt]
        input_ids = self.tokenizer.encode(texts)  # (B, 77)
        yield Progress("tokenize", 1, 1)
        hidden = self.components["text_encoder"](input_ids=input_ids)  # (B, 77, D)
        yield Progress("text_encoder", 1, 1)

        latents = latents * np.float32(sampler.init_noise_sigma)
        total = len(sampler.timesteps)
        for i, timestep in enumerate(sampler.timesteps):
            sample = sampler.scale_model_input(latents, i)  # (1, C, h, w)
            noise_pred = self.components["unet"](
                sample=np.repeat(sample, len(texts), axis=0),  # (B, C, h, w)
                timestep=np.array([timestep], dtype=np.int64),
                encoder_hidden_states=hidden,
            )
            if guided:
                without, with_ = noise_pred[:1], noise_pred[1:]
                noise_pred = without + np.float32(request.guidance) * (with_ - without)
            latents = sampler.step(noise_pred, i, latents)
            yield Progress("unet", i + 1, total, timestep=int(timestep), latents=latents)

        image = self.components["vae_decoder"](latent_sample=latents / np.float32(self.model.scaling_factor))
        if not np.isfinite(image).all():
            raise KdcError("the decoder's picture holds values that are no numbers: use a bundle with fp32 weights")
        yield Progress("vae_decoder", 1, 1, pixels=to_pixels(image)[0])

    def generate(self, request: Request) -> np.ndarray:
        """The picture alone: uint8 (H, W, 3)."""
        *_, last = self.run(request)
        assert last.pixels is not None
        return last.pixels


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

"""Text (and image) to image: prompt -> tokens -> text embeddings -> latents -> image, as a generator of steps.

    pipeline = open_pipeline("bundles/onnx-fp16")                    # kdc_edge.runtimes
    for progress in pipeline.run(Request("a red flower", seed=1)):
        print(progress.stage, progress.step, progress.steps)
    image = progress.pixels                                          # uint8 (H, W, 3)

Consumers draw progress, preview, time, or stop. An engine gives the components (components.py); everything
between them is numpy. Several requests at once are a batch: each image equals the one that its request makes alone,
but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import psutil

from kdc_edge.components import (
    CHECKER,
    CLIP_SIDE,
    COMPONENTS,
    OPTIONAL,
    Component,
    Shapes,
    SupportsPrepare,
    SupportsStart,
)
from kdc_edge.editing import ENCODER, Begin, Edit, check_edits, encode_edits, read_edit, require_encoder
from kdc_edge.errors import InputError, KdcError, unknown_choice
from kdc_edge.guidance import guidance_embedding, guided
from kdc_edge.hardware import free_memory_bytes
from kdc_edge.image import to_pixels
from kdc_edge.image_files import ImageLike
from kdc_edge.manifest import Model
from kdc_edge.noise import NormalStreams
from kdc_edge.prompt_weights import MAX_CHUNKS, Tokens, plain, unread, weighted
from kdc_edge.request import GuidanceMode, Request, check_guidance
from kdc_edge.safety import check_image
from kdc_edge.samplers import NoiseSchedule, make_sampler
from kdc_edge.text import megabytes
from kdc_edge.tokenizer import Tokenizer

Stage = Literal[
    "load", "compile", "tokenize", "text_encoder", "vae_encoder", "unet", "scheduler", "vae_decoder", "safety_checker"
]  # fmt: skip
MAX_SIDE = 4096  # pixels
MAX_BATCH = 16  # images
# The least that a decoder holds at the image's own size: the input and the output of a layer of 32 channels, fp32.
LEAST_BYTES_A_PIXEL = 2 * 32 * 4
ATTENTION_HEADS = 8  # at the U-Net's full resolution, where its activations are largest


@dataclass(frozen=True)
class Progress:
    """The stage that has just been done."""

    stage: Stage
    step: int  # 1-based within the stage; of the decoder and the safety checker, the image
    steps: int
    timestep: int | None = None  # of a step
    latents: np.ndarray | None = None  # (B, C, h, w) after a step of the scheduler
    pixels: np.ndarray | None = None  # uint8 (H, W, 3), finished: after the decoder, or the safety checker
    nsfw: bool | None = None  # with the pixels: flagged, and black; None where nothing checks


class Pipeline:
    """Tokenizer, three components and the loop over the noise schedule."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        components: Mapping[str, Component],
        *,
        max_batch: int = MAX_BATCH,  # images that `batches` puts together at most
        decoder_batch: int = 1,  # images in one call of the decoder; an exported one takes 1
        max_chunks: int = MAX_CHUNKS,  # of a prompt; 1 where the U-Net's text length is fixed
        fixed_size: bool = False,  # the networks take images of the model's own size alone
    ) -> None:
        self.max_chunks = max_chunks
        self.fixed_size = fixed_size
        self.model = model
        self.tokenizer = tokenizer
        self.components = components
        self.max_batch = max_batch
        self.decoder_batch = decoder_batch
        self.schedule = NoiseSchedule.from_config(model.scheduler)

    def run(self, *requests: Request) -> Iterator[Progress]:
        """Make the images of one batch, yielding after each stage.

        A step yields twice, after the U-Net and after the scheduler; the decoder yields after each image, then the
        safety checker, if there is one: an image is given when it has been checked. Requests
        of a batch differ in prompt, negative prompt, seed, latents, image and mask only. Raises InputError as `check`
        does.
        """
        self.check(*requests)
        if len(self._lengths(requests)) > 1:
            raise InputError("prompts of one batch need equally many chunks of 75 tokens: make these one by one")
        request, count = requests[0], len(requests)
        noise = NormalStreams([r.seed for r in requests])
        edits = [r.edit for r in requests if r.edit is not None]
        shape = (count, *self.latent_shape(request)[1:])
        needed = edits and not (self.model.inpainting and edits[0].only_noise)
        drawn = noise.draw(shape) if needed else None
        latents = self._initial_latents(requests, noise)  # (B, C, h, w)
        # diffusers encodes the image without its masked part for every model, and drops it for most.
        masked = noise.draw(shape) if edits and edits[0].mask is not None else None
        sampler = make_sampler(request.sampler, self.schedule, request.steps, noise=noise)
        sampler.skip(request.skipped)

        tokens = self._tokenize(requests)  # of B or 2B texts
        yield Progress("tokenize", 1, 1)
        if isinstance(self.components, SupportsStart):
            self.components.start("unet", self._shapes(requests, tokens)["unet"])
        hidden = tokens.join(self.components["text_encoder"](input_ids=tokens.ids))  # (B or 2B, 77, D)
        yield Progress("text_encoder", 1, 1)

        begin: Begin | None = None
        if edits:
            begin = encode_edits(
                self.components[ENCODER], edits, drawn=drawn, noise=latents,
                masked=masked if self.model.inpainting else None, scaling_factor=self.model.scaling_factor,
            )  # fmt: skip
            yield Progress("vae_encoder", 1, 1)
        latents = begin.start(sampler) if begin else latents * np.float32(sampler.init_noise_sigma)
        unet, steps = self.components["unet"], len(sampler.timesteps)
        if (width := self.model.guidance_embedding) is not None:
            embedding = guidance_embedding(float(request.guidance), width)
            unet = partial(unet, timestep_cond=np.tile(embedding, (count, 1)))  # (B, width)
        for i in range(sampler.first, steps):
            timestep = int(sampler.timesteps[i])
            at = partial(Progress, step=i + 1 - sampler.first, steps=steps - sampler.first, timestep=timestep)
            sample = sampler.scale_model_input(latents, i)
            sample = begin.extend(sample) if begin else sample
            if self._classifier_free(request) and request.guided(i, steps):
                cond, uncond = _predict_both(unet, sample, timestep, hidden, batched=request.batched)
                yield at("unet")
                noise_pred = guided(cond, uncond, float(request.guidance))
            else:
                noise_pred = _predict(unet, sample, timestep, hidden[:count])
                yield at("unet")
            latents = sampler.step(noise_pred, i, latents)
            if begin is not None:
                latents = begin.hold(latents, sampler, i)
            yield at("scheduler", latents=latents)
        del unet  # a pipeline that is short of memory drops it before it loads the decoder

        decoder, latents = self.components["vae_decoder"], latents / np.float32(self.model.scaling_factor)
        checked, made = CHECKER in self.components, []
        for start in range(0, count, self.decoder_batch):
            images = decoder(latent_sample=latents[start : start + self.decoder_batch])  # (b, 3, H, W)
            if not np.isfinite(images).all():
                raise KdcError("the decoder's image holds values that are no numbers: use a bundle with fp32 weights")
            for number, pixels in enumerate(to_pixels(images), start + 1):
                if checked:
                    made.append(pixels)
                yield Progress("vae_decoder", number, count, pixels=None if checked else pixels)
        del decoder
        for number, pixels in enumerate(made, 1):
            pixels, nsfw = check_image(self.components[CHECKER], pixels)
            yield Progress("safety_checker", number, count, pixels=pixels, nsfw=nsfw)

    def generate(self, request: Request) -> np.ndarray:
        """The image alone: uint8 (H, W, 3)."""
        (pixels,) = self.generate_batch([request])
        return pixels

    def generate_batch(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """The images of one batch: uint8 (H, W, 3) each."""
        return [done.pixels for done in self.run(*requests) if done.pixels is not None]

    def batches(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """The requests in batches that memory allows, in order.

        All are of one size, because some engines compile the networks, and hold their weights, once a size.
        """
        self.check(*requests)
        _, _, height, width = self.latent_shape(requests[0])
        # An upper bound: attention matrices at full resolution, both halves of the guidance, fp32.
        bytes_an_image = 2 * ATTENTION_HEADS * (height * width) ** 2 * 4
        if len(self._lengths(requests)) > 1:
            return [[request] for request in requests]  # padded to one length, a prompt would make another image
        most = min(self.max_batch, psutil.virtual_memory().available // 2 // bytes_an_image, len(requests))
        size = next((n for n in range(most, 0, -1) if len(requests) % n == 0), 1)
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def prepare(self, request: Request) -> Iterator[Progress]:
        """Load every component and compile it for what the request will ask of it, yielding after each.

        A pipeline that was not prepared does the same while it makes its first image.
        """
        self.check(request)
        wanted = self._shapes([request], self._tokenize([request]))
        names = [name for name in (*COMPONENTS, *OPTIONAL) if name in wanted]
        for i, name in enumerate(names, 1):
            component = self.components[name]
            yield Progress("load", i, len(names))
            if not isinstance(component, SupportsPrepare):
                continue
            for inputs in wanted[name]:
                component.prepare(inputs)
            yield Progress("compile", i, len(names))

    def check(self, *requests: Request) -> None:
        """Raise InputError for what cannot be made, or not in one batch, before any work."""
        if not requests:
            raise InputError("no image is asked for: give at least one prompt")
        request = requests[0]
        shared = {"prompt": "", "negative_prompt": "", "seed": 0, "latents": None, "edit": None}
        if any(replace(r, **shared) != replace(request, **shared) for r in requests):  # type: ignore[arg-type]
            raise InputError("images of one batch share steps, guidance, sampler and size: make these one by one")
        _check_memory(self.latent_shape(request), self.model.vae_scale)
        _, _, *sides = self.latent_shape(request)
        height, width = (side * self.model.vae_scale for side in sides)
        check_edits([r.edit for r in requests], (height, width), request.steps, inpainting=self.model.inpainting)
        if request.edit is not None:
            require_encoder(self.components)
        make_sampler(request.sampler, self.schedule, request.steps)
        check_guidance(request.guidance)
        if request.guidance_mode not in (None, *get_args(GuidanceMode)):
            raise unknown_choice("guidance mode", request.guidance_mode, get_args(GuidanceMode))
        if self.model.guidance_embedding is not None and request.guidance_interval != (0.0, 1.0):
            raise InputError(
                "a guidance interval is for classifier-free guidance; this model reads the guidance scale: leave it out"
            )
        begin, end = request.guidance_interval
        if not 0 <= begin < end <= 1:
            raise InputError(f"guidance interval {begin:g}:{end:g} is no part of the schedule: use 0.0:0.7 or the like")
        NormalStreams([r.seed for r in requests])
        self.tokenizer.encode([text for r in requests for text in (r.negative_prompt, r.prompt)])

    def unread(self, request: Request) -> str:
        """What the model does not read of the request's prompts, as a line; "" where it reads all."""
        texts = {"prompt": request.prompt}
        if self._classifier_free(request):
            texts["negative prompt"] = request.negative_prompt
        chunks = self.max_chunks if request.weighted else None
        return "; ".join(filter(None, (unread(self.tokenizer, texts[name], name, chunks) for name in texts)))

    def read_edit(self, request: Request, image: ImageLike, **options: Any) -> Edit:
        """An image (and a mask) at the request's size: see `editing.read_edit`. Raises InputError."""
        require_encoder(self.components)
        _, _, height, width = self.latent_shape(request)
        return read_edit(image, (width * self.model.vae_scale, height * self.model.vae_scale), **options)

    def latent_shape(self, request: Request) -> tuple[int, int, int, int]:
        """(1, C, h, w) for the request; raises InputError for a size that the model cannot make."""
        sides = []
        for name, asked in (("height", request.height), ("width", request.width)):
            pixels = self.model.image_size if asked is None else asked
            unit = self.model.vae_scale * self.model.latent_unit
            if pixels < unit or pixels > MAX_SIDE or pixels % unit:
                raise InputError(f"{name} {pixels} cannot be made: use a multiple of {unit} up to {MAX_SIDE}")
            if self.fixed_size and pixels != self.model.image_size:
                raise InputError(
                    f"{name} {pixels} cannot be made: this bundle's sizes are fixed, leave width and height out"
                )
            sides.append(int(pixels) // self.model.vae_scale)  # 64.0 is a size too
        return (1, self.model.latent_channels, sides[0], sides[1])

    def _initial_latents(self, requests: Sequence[Request], noise: NormalStreams) -> np.ndarray:
        """Unit noise (B, C, h, w): each request's own latents, or the first draw from its seed."""
        shape = self.latent_shape(requests[0])
        latents = noise.draw((len(requests), *shape[1:]))
        for i, request in enumerate(requests):
            if request.latents is None:
                continue
            if request.latents.shape != shape:
                raise InputError(f"latents have the shape {request.latents.shape} where {shape} is needed")
            latents[i] = request.latents[0]
        return latents

    def _classifier_free(self, request: Request) -> bool:
        """Is there classifier-free guidance? A U-Net that reads the guidance scale has none."""
        return request.guidance > 1 and self.model.guidance_embedding is None

    def _lengths(self, requests: Sequence[Request]) -> set[int]:
        """The numbers of chunks that the requests need, each with its negative prompt."""
        if len(requests) == 1 or not requests[0].weighted:
            return {1}
        return {self._tokenize([request]).chunks for request in requests}

    def _tokenize(self, requests: Sequence[Request]) -> Tokens:
        """The prompts, then the negative prompts where there is guidance."""
        texts = [r.prompt for r in requests]
        if self._classifier_free(requests[0]):
            texts += [r.negative_prompt for r in requests]
        if not requests[0].weighted:
            return plain(self.tokenizer, texts)
        return weighted(self.tokenizer, texts, max_chunks=self.max_chunks)

    def _shapes(self, requests: Sequence[Request], tokens: Tokens) -> dict[str, list[Shapes]]:
        """The inputs that each component will be called with."""
        request, count = requests[0], len(requests)
        _, *latent = self.latent_shape(request)
        taken = range(request.skipped, request.steps)
        batched = request.batched and self._classifier_free(request)
        guided_steps = {batched and request.guided(i, request.steps) for i in taken}
        width = self.model.guidance_embedding
        unet: list[Shapes] = [
            {
                "sample": (b, self.model.unet_channels, *latent[1:]),
                "timestep": (1,),
                "encoder_hidden_states": (b, tokens.length, -1),
                **({} if width is None else {"timestep_cond": (b, width)}),
            }
            for b in sorted(2 * count if both else count for both in guided_steps)
        ]
        decoded = {min(self.decoder_batch, count - start) for start in range(0, count, self.decoder_batch)}
        image = (1, 3, *(side * self.model.vae_scale for side in latent[1:]))
        shapes: dict[str, list[Shapes]] = {
            "text_encoder": [{"input_ids": tokens.ids.shape}],
            "unet": unet,
            "vae_decoder": [{"latent_sample": (n, *latent)} for n in sorted(decoded)],
        }
        if request.edit is not None:
            shapes[ENCODER] = [{"sample": image}]
        if CHECKER in self.components:
            shapes[CHECKER] = [{"clip_input": (1, 3, CLIP_SIDE, CLIP_SIDE)}]
        return shapes


def _check_memory(latents: tuple[int, int, int, int], vae_scale: int) -> None:
    """Raise InputError where not even the decoder's activations fit what is free; no bound of what is needed in all."""
    *_, height, width = (side * vae_scale for side in latents)
    need, free = height * width * LEAST_BYTES_A_PIXEL, free_memory_bytes()
    if need > free:
        raise InputError(
            f"an image of {width}x{height} needs more than {megabytes(need)} for the decoder's activations alone,"
            f" and {megabytes(free)} are free: use a smaller size"
        )


def _predict(unet: Component, sample: np.ndarray, timestep: int, hidden: np.ndarray) -> np.ndarray:
    """The noise in `sample` (B, C, h, w), given the text `hidden` (B, 77, D)."""
    return unet(sample=sample, timestep=np.array([timestep], dtype=np.int64), encoder_hidden_states=hidden)


def _predict_both(
    unet: Component, sample: np.ndarray, timestep: int, hidden: np.ndarray, *, batched: bool
) -> Sequence[np.ndarray]:
    """The noise in `sample` (B, C, h, w) with the prompts and with the negative ones; `hidden` (2B, 77, D) has both."""
    if batched:
        return np.split(_predict(unet, np.concatenate([sample, sample]), timestep, hidden), 2)
    return [_predict(unet, sample, timestep, half) for half in np.split(hidden, 2)]

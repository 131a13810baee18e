"""A bundle as an application uses it: open the folder, call the pipeline, save the image.

    pipeline = kdc_edge.Pipeline.open("bundles/openvino-int8")
    pipeline("a red flower", seed=1).images[0].save("flower.png")
    pipeline("a blue flower", image="flower.png", strength=0.6).images[0].save("blue.png")
    for step in pipeline.stream("a red flower", seed=1):
        show(step.preview)                                              # uint8 (h, w, 3)

Arguments are named as in diffusers where they mean the same. One pipeline may be used from several threads: every
call keeps its state to itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from kdc_edge import pipeline as path
from kdc_edge.bundle import DEMO_BUNDLE, Bundle, kind_of
from kdc_edge.checkpoints.assemble import is_single_file, open_checkpoint
from kdc_edge.components import CHECKER, COMPONENTS, OPTIONAL, Component
from kdc_edge.diffusers_folder import optional_components, read_model
from kdc_edge.editing import Edit
from kdc_edge.errors import InputError, KdcWarning
from kdc_edge.formats import find_format
from kdc_edge.hardware import check_threads
from kdc_edge.hub import local
from kdc_edge.image import preview
from kdc_edge.image_files import ImageLike
from kdc_edge.manifest import Model
from kdc_edge.prompt_weights import MAX_CHUNKS
from kdc_edge.request import Request, own_request
from kdc_edge.runtimes.base import (
    ENGINES,
    EarlyCheck,
    Engine,
    LoadedComponents,
    LoadOptions,
    check_device,
    get_runtime,
    preferred_engine,
)
from kdc_edge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Images:
    """The images of one call, in the order of their prompts."""

    images: list[Image.Image]
    seeds: list[int]  # that made them
    nsfw_content_detected: list[bool] | None = None  # those are black; None where the bundle has no safety checker


@dataclass(frozen=True)
class Step:
    """One step of an image."""

    step: int  # from 1
    steps: int
    latents: np.ndarray  # float32 (1, C, h, w)
    image: Image.Image | None  # with the last step
    vae_scale: int  # pixels a latent, each way
    nsfw_content_detected: bool | None = None  # of the image, which is black then; None where nothing checks

    @property
    def preview(self) -> np.ndarray:
        """The latents as a small image, uint8 (h, w, 3), without the decoder."""
        small: np.ndarray = preview(self.latents, self.vae_scale)[0]
        return small


class Pipeline(path.Pipeline):
    """A pipeline that was opened from a folder, and is called with diffusers' argument names."""

    @classmethod
    def open(
        cls,
        folder: Path | str = DEMO_BUNDLE,
        *,
        engine: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        cache: Path | str | None = None,
        exact: bool = False,
        check: bool = True,
        safety_checker: bool = True,
    ) -> Self:
        """Open a bundle, or through torch a checkpoint (a folder, a single file). Components are loaded when needed.

        `folder` may be `hf:OWNER/NAME[@REVISION]`, which is fetched from the hub.

        `device` names one for all ("CPU"), or one a component ("unet=GPU,text_encoder=CPU"). `low_memory` trades
        speed for memory: one component and one image at a time, and the engine's savings. `cache` is a folder for
        compiled networks. `exact` computes in fp32 where the engine would choose fewer bits. `check` compares a
        bundle's files with the hashes of its manifest while the engine loads them. `safety_checker` uses the one that
        the folder has, if it has one.
        Raises a KdcError for everything that can be seen before a network is loaded.
        """
        folder = local(folder)
        if is_single_file(folder):
            folder = open_checkpoint(folder)
        bundle, model, chosen = _choose(folder, engine)
        check_threads(threads)
        named = split_devices(device)
        kept = None if cache is None else Path(cache)
        there = bundle.manifest.components if bundle else optional_components(folder)
        names = [*COMPONENTS, *(c for c in OPTIONAL if c in there and (safety_checker or c != CHECKER))]
        early = EarlyCheck(bundle, names) if bundle and check else None  # while one core imports the engine
        runtime = get_runtime(chosen.name)
        options = {
            c: LoadOptions(
                check_device(runtime, named.get(c, named.get(""))),
                threads,
                low_memory,
                kept,
                exact or c == CHECKER,  # a threshold decides
                check=False,
            )
            for c in names
        }
        tokenizer = Tokenizer.from_folder(
            folder / "tokenizer", check=partial(bundle.check, "tokenizer") if bundle and check else None
        )

        def load(component: str) -> Component:
            if low_memory:
                tokenizer.release()  # until the next image
            return runtime.load(folder, component, options[component])

        components = LoadedComponents(
            load, low_memory=low_memory, compile_ahead=chosen.compiles_ahead, check=early, names=names
        )
        # A graph of fixed text length reads one chunk of a long prompt; ours for Core ML have one.
        inputs = bundle.component("unet")[0].inputs if bundle else {}
        text = inputs["encoder_hidden_states"].shape[1:2] if "encoder_hidden_states" in inputs else []
        sides = inputs["sample"].shape[2:] if "sample" in inputs else []
        one_chunk = bundle is not None and not any(isinstance(n, str) for n in text)
        return cls(
            model, tokenizer, components, max_batch=1 if low_memory else path.MAX_BATCH,
            max_chunks=1 if one_chunk else MAX_CHUNKS, fixed_size=any(isinstance(n, int) for n in sides),
        )  # fmt: skip

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageLike | None = None,
        strength: float | None = None,
        mask_image: ImageLike | None = None,
        negative_prompt: str | None = Request.negative_prompt,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = Request.seed,
        scheduler: str | None = None,
        width: int | None = None,
        height: int | None = None,
        plain_prompt: bool = False,
    ) -> Images:
        """Make images, in batches where memory allows. Raises InputError for what cannot be made, warns (KdcWarning)
        where something else is taken than was asked.

        Steps, guidance and scheduler are the model's own where None: a few-step student's, or the checkpoint's
        scheduler with 20 steps and guidance 7.5. Image i, counted over all prompts, has the seed `seed` + i; or give a
        list with one seed an image. `image` (a path, a PIL image or a file's bytes) is what all images begin with:
        `strength` times the steps are taken, 0.8 by default, 1 with a `mask_image`, whose white part is repainted.
        Brackets in prompts are weights, (red:1.3) and [faint], unless `plain_prompt` is set.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt is {num_images_per_prompt}: use 1 or more")
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        seeds = spread_seeds(seed, len(prompts))
        request = self._own(
            Request("", negative_prompt or "", width=width, height=height, weighted=not plain_prompt),
            sampler=scheduler, steps=num_inference_steps, guidance=guidance_scale,
        )  # fmt: skip
        request = replace(request, edit=self._edit(request, image, strength, mask_image))
        requests = [replace(request, prompt=p, seed=s) for p, s in zip(prompts, seeds, strict=True)]
        _warn(*(self.unread(request) for request in requests))
        made = [d for batch in self.batches(requests) for d in self.run(*batch) if d.pixels is not None]
        flagged = [done.nsfw for done in made if done.nsfw is not None]
        return Images([Image.fromarray(d.pixels) for d in made if d.pixels is not None], seeds, flagged or None)

    def stream(
        self,
        prompt: str,
        *,
        image: ImageLike | None = None,
        strength: float | None = None,
        mask_image: ImageLike | None = None,
        negative_prompt: str | None = Request.negative_prompt,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = Request.seed,
        scheduler: str | None = None,
        width: int | None = None,
        height: int | None = None,
        plain_prompt: bool = False,
    ) -> Iterator[Step]:
        """Make one image, yielding after each step; the last one has the image. Stop by closing the generator."""
        request = self._own(
            Request(prompt, negative_prompt or "", seed=seed, width=width, height=height, weighted=not plain_prompt),
            sampler=scheduler, steps=num_inference_steps, guidance=guidance_scale,
        )  # fmt: skip
        request = replace(request, edit=self._edit(request, image, strength, mask_image))
        self.check(request)
        _warn(self.unread(request))
        return self._stream(request)

    def _own(self, request: Request, *, sampler: str | None, steps: int | None, guidance: float | None) -> Request:
        """The request with the model's own values where None; what there is to say of them is warned of."""
        request, note = own_request(self.model, request, sampler=sampler, steps=steps, guidance=guidance)
        _warn(note, above=3)
        return request

    def _edit(
        self, request: Request, image: ImageLike | None, strength: float | None, mask: ImageLike | None
    ) -> Edit | None:
        if image is None:
            if mask is not None or strength is not None:
                raise InputError("a mask or a strength is given without an image to change: give one")
            return None
        return self.read_edit(request, image, strength=strength, mask=mask)

    def _stream(self, request: Request) -> Iterator[Step]:
        last: Step | None = None
        for done in self.run(request):
            if done.stage == "scheduler":
                assert done.latents is not None
                last = Step(done.step, done.steps, done.latents, None, self.model.vae_scale)
                if done.step < done.steps:
                    yield last
            elif done.pixels is not None:
                assert last is not None
                yield replace(last, image=Image.fromarray(done.pixels), nsfw_content_detected=done.nsfw)


open_pipeline = Pipeline.open


def _warn(*notes: str, above: int = 2) -> None:
    """Warn of each note once, at the line that called the pipeline, `above` calls from here; "" says nothing."""
    for note in dict.fromkeys(filter(None, notes)):
        warnings.warn(note, KdcWarning, stacklevel=above + 1)


def spread_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of `count` images: counted up from one, or a list's own. Raises InputError."""
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise InputError(f"{len(seed)} seeds are given for {count} images: give one an image, or a single one")
        return list(seed)
    first = int(seed) if isinstance(seed, int | np.integer) else None  # numpy's would overflow
    return [seed] * count if first is None else list(range(first, first + count))  # None: refused later


def split_devices(device: str | None) -> dict[str, str]:
    """'unet=GPU,CPU' -> {"unet": "GPU", "": "CPU"}: the device without a name is for all the others."""
    found: dict[str, str] = {}
    for part in device.split(",") if device else ():
        component, _, name = part.strip().rpartition("=")
        if component not in ("", *COMPONENTS, *OPTIONAL) or not name or component in found:
            raise InputError(
                f"device {device!r} is not understood: use CPU, or unet=GPU,text_encoder=CPU with components"
                f" {', '.join((*COMPONENTS, *OPTIONAL))}"
            )
        found[component] = name
    return found


def open_for_bench(folder: Path, *, engine: str | None = None, **options: Any) -> Pipeline:
    """Open for a measurement, without a safety checker: it would hide images that are compared.

    Raises InputError for reference engines, whose times say nothing about the artifact.
    """
    *_, chosen = _choose(folder, engine)
    if chosen.reference:
        raise InputError(f"{chosen.name} only proves this bundle: measure it where its engine runs")
    return open_pipeline(folder, engine=engine, safety_checker=False, **options)


def _choose(folder: Path, engine: str | None) -> tuple[Bundle | None, Model, Engine]:
    """The bundle, if it is one, its model, and the engine asked for or preferred; InputError where they do not fit."""
    if kind_of(folder) == "checkpoint":
        if engine not in (None, "torch"):
            raise InputError(f"{folder} is a checkpoint, which only torch runs: export it for {engine} first")
        return None, read_model(folder), ENGINES["torch"]
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    row = find_format(manifest.target, manifest.precision)
    if engine is not None and engine not in row.engines:
        raise InputError(f"{engine} cannot run {manifest.name}: choose from {', '.join(row.engines)}")
    return bundle, manifest.model, preferred_engine(row) if engine is None else ENGINES[engine]

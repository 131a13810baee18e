"""The proof's reference: images of diffusers' own pipeline, and what each network computed for them.

    reference = record(checkpoint, [Request("a red flower", steps=4, sampler="ddim")])
    reference.images[0], reference.calls["unet"][0]            # uint8 (H, W, 3); inputs by name, output

Tokenizer, noise schedule, guidance and the VAE's scaling factor are those of diffusers and transformers, so a fault of
kdc-edge's own pipeline shows as a difference. Where diffusers cannot open the checkpoint, kdc-edge's loop over the same
PyTorch networks takes its place, and `made_by` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdc_edge.components import COMPONENTS, Component
from kdc_edge.diffusers_folder import LCM_PIPELINE, read_model
from kdc_edge.editing import ENCODER
from kdc_edge.errors import CheckpointError, KdcError, require
from kdc_edge.export.kept import Arrays, pack_inputs, unpack_inputs
from kdc_edge.export.targets import Stage, silent
from kdc_edge.files import read_json
from kdc_edge.noise import initial_latents
from kdc_edge.pipeline import Pipeline
from kdc_edge.quiet import quiet
from kdc_edge.request import Request
from kdc_edge.runtimes.torch import TorchComponent, load_network
from kdc_edge.runtimes.torch.small_decoder import SmallDecoder, load_decoder
from kdc_edge.samplers import SAMPLERS, sampler_for
from kdc_edge.text import one_line
from kdc_edge.tokenizer import Tokenizer

Call = tuple[dict[str, np.ndarray], np.ndarray]  # a component's inputs by name, and its output


@dataclass
class Recorder:
    """A component that records its inputs and outputs."""

    component: Component
    calls: list[Call] = field(default_factory=list)

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        output = self.component(**inputs)
        self.calls.append(({name: value.copy() for name, value in inputs.items()}, output.copy()))
        return output


@dataclass(frozen=True)
class Reference:
    """PyTorch's results: the calls of each component, and the images."""

    calls: dict[str, list[Call]]
    images: list[np.ndarray]  # uint8 (H, W, 3), one a request
    made_by: str  # the program and its noise schedule, in words

    def arrays(self) -> Arrays:
        """All of it, to be kept."""
        found: Arrays = {"made_by": np.array(self.made_by)}
        found |= {f"image/{i}": image for i, image in enumerate(self.images)}
        for component, calls in self.calls.items():
            found |= {f"{component}/{i}": output for i, (_, output) in enumerate(calls)}
            found |= pack_inputs(component, [inputs for inputs, _ in calls])
        return found

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Reference:
        """What `arrays` gave. Raises KeyError where something is missing."""
        images = [arrays[f"image/{i}"] for i in range(sum(name.startswith("image/") for name in arrays))]
        calls = {
            name: [(inputs, arrays[f"{name}/{i}"]) for i, inputs in enumerate(unpack_inputs(name, arrays))]
            for name in COMPONENTS
        }
        return cls(calls, images, str(arrays["made_by"]))


def record(
    checkpoint: Path,
    requests: Sequence[Request],
    decoder: Path | None = None,
    stage: Stage = silent,
) -> Reference:
    """Generate the images in fp32 on the CPU; the requests share a sampler.

    `decoder` is the folder of the small decoder that takes the place of the checkpoint's; `stage` gets what runs.
    Raises CheckpointError for files that cannot be read, and where the images hold values that are no numbers.
    """
    networks = {name: load_network(checkpoint, name) for name in COMPONENTS}
    decode = networks["vae_decoder"] if decoder is None else load_decoder(decoder, read_model(checkpoint))
    try:
        try:
            return _record_diffusers(open_diffusers(checkpoint, networks, requests[0].sampler), decode, requests, stage)
        except KdcError:
            raise
        except Exception as error:  # diffusers and transformers raise whatever comes
            made_by = f"kdc-edge's own loop, because diffusers cannot open the checkpoint ({one_line(error, 120)})"
            return _record_own(checkpoint, networks | {"vae_decoder": decode}, requests, made_by)
    except KdcError as error:
        raise CheckpointError(f"{checkpoint} makes no image in PyTorch either: {error}") from None


def open_diffusers(checkpoint: Path, networks: dict[str, Any], sampler: str) -> Any:
    """diffusers' pipeline for the model, on the networks: StableDiffusionPipeline, or that of another kind of model.

    Its scheduler is the checkpoint's own, or that of the sampler's class, made from the checkpoint's as users do.
    """
    diffusers = require("diffusers", extra="export", purpose="the proof")
    transformers = require("transformers", extra="export", purpose="the proof")
    config = read_json(checkpoint / "scheduler" / "scheduler_config.json", CheckpointError)
    kind = SAMPLERS[sampler]
    model = read_model(checkpoint)
    kind_of_pipeline = "StableDiffusionInpaintPipeline" if model.inpainting else "StableDiffusionPipeline"
    if model.guidance_embedding is not None and not model.inpainting and sampler == "lcm":
        kind_of_pipeline = LCM_PIPELINE
    with quiet():
        own = getattr(diffusers, str(config.get("_class_name", kind.scheduler))).from_config(config)
        pipeline = getattr(diffusers, kind_of_pipeline)(
            vae=networks["vae_decoder"],
            text_encoder=networks["text_encoder"],
            tokenizer=transformers.CLIPTokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True),
            unet=networks["unet"],
            scheduler=own,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        if sampler_for(config) != (sampler, ""):
            pipeline.scheduler = getattr(diffusers, kind.scheduler).from_config(
                pipeline.scheduler.config, **kind.options
            )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _record_diffusers(pipeline: Any, decoder: Any, requests: Sequence[Request], stage: Stage) -> Reference:
    calls: dict[str, list[Call]] = {name: [] for name in COMPONENTS}
    vae = pipeline.vae
    original = vae.decode

    def text_encoder(_: Any, args: Any, __: Any, output: Any) -> None:
        calls["text_encoder"].append(({"input_ids": _array(args[0])}, _array(output[0])))

    def unet(network: Any, args: Any, kwargs: Any, output: Any) -> None:
        sample, timestep = args
        read = {name: kwargs[name] for name in ("encoder_hidden_states", "timestep_cond") if kwargs[name] is not None}
        if timestep != timestep.long():  # a component's timesteps are whole
            output = network.forward(sample, timestep.long(), **read, return_dict=False)
        inputs = {"sample": sample, "timestep": timestep.long().reshape(1), **read}
        calls["unet"].append(({name: _array(value) for name, value in inputs.items()}, _array(output[0])))

    def vae_decoder(latents: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        if isinstance(decoder, SmallDecoder):  # as with vae=AutoencoderTiny, which divides by its own factor
            image = decoder.decoder(latents * vae.config.scaling_factor / decoder.config.scaling_factor)
        else:
            image = original(latents, return_dict=False)[0]
        calls["vae_decoder"].append(({"latent_sample": _array(latents)}, _array(image)))
        return (image,)

    with ExitStack() as recording:  # the networks are as before for whoever computes where this fails
        for network, hook in ((pipeline.text_encoder, text_encoder), (pipeline.unet, unet)):
            recording.callback(network.register_forward_hook(hook, with_kwargs=True).remove)
        vae.decode = vae_decoder
        recording.callback(delattr, vae, "decode")
        images = []
        for number, request in enumerate(requests, 1):
            with stage(f"proof: diffusers' image {number} of {len(requests)} in PyTorch"):
                images.append(_generate(pipeline, request))
    version = require("diffusers", extra="export", purpose="the proof").__version__
    made_by = f"diffusers {version}, {type(pipeline).__name__} with {type(pipeline.scheduler).__name__}"
    return Reference(calls, images, made_by)


def _generate(pipeline: Any, request: Request) -> np.ndarray:
    """The request's image, uint8 (H, W, 3), from kdc-edge's initial noise."""
    side = pipeline.unet.config.sample_size
    side = side if isinstance(side, int) else side[0]
    scale = pipeline.vae_scale_factor
    width, height = request.width or side * scale, request.height or side * scale
    shape = (1, pipeline.vae.config.latent_channels, height // scale, width // scale)
    latents = torch.from_numpy(initial_latents(shape, request.seed))
    generator = torch.Generator().manual_seed(request.seed)
    torch.randn(shape, generator=generator)  # a sampler's noise is what the seed gives after the initial latents
    given: dict[str, Any] = {}
    if (edit := request.edit) is not None and edit.mask is not None:
        given = {"image": Image.fromarray(edit.image), "mask_image": Image.fromarray(edit.mask), "strength": 1.0}
    with quiet():
        image = pipeline(
            request.prompt, height=height, width=width, num_inference_steps=request.steps,
            guidance_scale=request.guidance, negative_prompt=request.negative_prompt, latents=latents,
            generator=generator, output_type="np", **given,
        ).images[0]  # fmt: skip
    if not np.isfinite(image).all():
        raise KdcError("the image holds values that are no numbers")
    pixels: np.ndarray = (image * 255).round().astype(np.uint8)  # from [0, 1]
    return pixels


def _record_own(checkpoint: Path, networks: dict[str, Any], requests: Sequence[Request], made_by: str) -> Reference:
    recorders = {name: Recorder(TorchComponent(name, network)) for name, network in networks.items()}
    components: dict[str, Component] = {**recorders}
    if requests[0].edit is not None:
        components[ENCODER] = TorchComponent(ENCODER, load_network(checkpoint, ENCODER))
    pipeline = Pipeline(read_model(checkpoint), Tokenizer.from_folder(checkpoint / "tokenizer"), components)
    images = [pipeline.generate(request) for request in requests]
    return Reference({name: recorder.calls for name, recorder in recorders.items()}, images, made_by)


def _array(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.detach().numpy().copy()
    return found

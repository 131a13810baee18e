"""A checkpoint: a diffusers folder with safetensors. Read here as far as that needs no PyTorch.

model = read_model(Path("runs/latest/checkpoint"))     # latent shape, scaling factor, scheduler
check_weights(folder)                                  # refuses pickles, names what is missing
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from kdc_edge.bundle import MODEL_INDEX
from kdc_edge.components import CHECKER, CLIP_SIDE
from kdc_edge.diffusers_defaults import AS_WRITTEN, AUTOENCODER_TINY, TEXT_ENCODER, UNET, VAE, Settings
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import homes, read_json, sha256
from kdc_edge.manifest import MANIFEST, Model
from kdc_edge.noise_schedule import NoiseSchedule
from kdc_edge.presets import recognise
from kdc_edge.samplers import make_sampler
from kdc_edge.text import invalid_field
from kdc_edge.weight_files import WEIGHTS, count_parameters, read_shapes, weights_of

TINY_VAE = "AutoencoderTiny"  # the other class that a `vae` may have
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
SAMPLING_FILE = "sampling.json"  # of a few-step student: kdc_edge.manifest.Sampling
LCM_SAMPLING = {"scheduler": "lcm", "steps": 4, "guidance": 8.5}  # the defaults of diffusers' LCM_PIPELINE
SOURCES_FILE = "sources.json"  # the files that its weights come from: kdc_edge.manifest.Source
RANDOM_WEIGHTS = "_random_weights"  # in model_index.json; diffusers skips names that begin so
TRAINING_FILE = "training.json"  # {"note": TEXT}, of a checkpoint from a run that was not finished
PROMPTS_FILE = "prompts.txt"  # captions that it was trained on, one a line: what to calibrate and prove it with
LCM_PIPELINE = "LatentConsistencyModelPipeline"
PIPELINES = (
    "StableDiffusionPipeline", LCM_PIPELINE, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"
)  # fmt: skip
# Settings of a U-Net that are null in every model that is used here, or in every teacher, and what they make it.
UNSUPPORTED = {
    "class_embed_type": "it needs a class beside the text",
    "num_class_embeds": "it needs a class beside the text",
    "addition_embed_type": "it needs more than the text, as Stable Diffusion XL does",
    "encoder_hid_dim_type": "it needs images or other embeddings beside the text",
}
NO_TEACHER = {"time_cond_proj_dim": "a latent consistency model that reads the guidance scale; take its base model"}
PARTS = (*WEIGHTS, "tokenizer", "scheduler")  # the folders that are read
ROOT_FILES = (MODEL_INDEX, SAMPLING_FILE, SOURCES_FILE, TRAINING_FILE, PROMPTS_FILE)  # the files that are read
SUFFIXES = frozenset({".json", ".safetensors", ".txt"})  # of what is loaded, hashed, and copied to other checkpoints
ADAPTER = "adapter_config.json"  # names the folder or the hub's repository that the libraries would load instead


def check_weights(folder: Path) -> None:
    """Raise CheckpointError unless the folder holds each network as whole safetensors, and nothing leads out of it."""
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}: name a diffusers folder, or run kdc-edge train")
    if (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder} is a bundle: name the checkpoint that it was exported from")
    if not (folder / MODEL_INDEX).is_file():
        _refuse_pickle(folder)
        raise CheckpointError(f"{folder} is no checkpoint: {MODEL_INDEX} is missing")
    parts = [folder / part for part in PARTS]
    inside = [p for part in parts for p in part.rglob("*")]
    refuse_links_out(folder, [*(folder / name for name in ROOT_FILES), *parts, *inside])
    for network, name in WEIGHTS.items():
        files = weights_of(folder / network).files
        if not files:
            _refuse_pickle(folder / network)
            raise CheckpointError(f"{folder / network / name} is missing: the checkpoint is incomplete")
        for path in files:
            read_shapes(path)


def refuse_links_out(folder: Path, paths: Iterable[Path]) -> None:
    """Nothing that is read or copied lies elsewhere."""
    allowed = homes(folder)
    for path in paths:
        if path.name == ADAPTER:
            raise CheckpointError(f"{path} takes weights from elsewhere: merge the adapter and save the network again")
        try:
            place = path.resolve() if path.is_symlink() else None
        except (OSError, RuntimeError):  # a circle
            place = Path()
        if place and (place.is_dir() or not any(place.is_relative_to(home) for home in allowed)):
            raise CheckpointError(f"{path} is a link out of its folder: copy the file itself there")
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is a device or a pipe: a regular file is needed")


def optional_components(folder: Path) -> tuple[str, ...]:
    """The optional components that a checkpoint has; a safety checker in pickles is none."""
    return ("vae_encoder", *((CHECKER,) if weights_of(folder / CHECKER, "text_encoder").files else ()))


def check_checker(folder: Path) -> None:
    """Raise CheckpointError unless the checkpoint has a safety checker in whole safetensors, as `check_weights`."""
    part = folder / CHECKER
    refuse_links_out(folder, [part, *part.rglob("*")])
    files = weights_of(part, "text_encoder").files
    if not files:
        _refuse_pickle(part)
        raise CheckpointError(
            f"{folder} has no {CHECKER}: copy that folder from the teacher, or leave --with {CHECKER} out"
        )
    for path in files:
        read_shapes(path)
    vision = read_json(part / "config.json", CheckpointError).get("vision_config")
    side = vision.get("image_size", CLIP_SIDE) if isinstance(vision, dict) else CLIP_SIDE
    if side != CLIP_SIDE:
        raise CheckpointError(f"{part} reads images of {side!r:.80} pixels where CLIP's have {CLIP_SIDE}")


def _refuse_pickle(folder: Path) -> None:
    for path in (path for pattern in PICKLES for path in folder.glob(pattern)):
        raise CheckpointError(f"{path} is a pickle, which can run code: convert it to safetensors")


def read_model(folder: Path, *, as_teacher: bool = False) -> Model:
    """What a pipeline needs to know of the checkpoint, from its configuration files alone.

    Keys that a file lacks have the defaults of diffusers' class. Raises CheckpointError for a checkpoint that is no
    text-to-image or inpainting model of Stable Diffusion 1.x or 2.x, by the setting that says so; `as_teacher` also for
    one whose U-Net reads more than a teacher's: see `obstacles`.
    """
    index = read_json(folder / MODEL_INDEX, CheckpointError) if (folder / MODEL_INDEX).is_file() else {}
    if index:
        _check_class(folder / MODEL_INDEX, index, PIPELINES)
    check_weights(folder)
    unet = _read_config(folder / "unet" / "config.json", UNet2DConditionModel=UNET)
    vae = _read_config(folder / "vae" / "config.json", AutoencoderKL=VAE, AutoencoderTiny=AUTOENCODER_TINY)
    text = _read_config(folder / "text_encoder" / "config.json", CLIPTextModel=TEXT_ENCODER)
    config = read_json(folder / "scheduler" / "scheduler_config.json", CheckpointError)
    scheduler = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    if index.get("_class_name") == LCM_PIPELINE:
        scheduler[AS_WRITTEN] = True
    for problem in obstacles(unet, vae, text, as_teacher=as_teacher):
        raise CheckpointError(f"{folder} cannot be used: {problem}")
    try:
        NoiseSchedule.from_config(scheduler)
    except InputError as error:
        raise CheckpointError(f"{folder} cannot be used: {error}") from None
    stages = vae.get("decoder_block_out_channels", vae.get("block_out_channels"))  # AutoencoderTiny's, AutoencoderKL's
    unet_stages = unet["block_out_channels"]
    try:
        model = Model.model_validate(
            {
                "preset": recognise(unet),
                "unet_parameters": count_parameters(folder / "unet"),
                "latent_channels": vae["latent_channels"],
                "latent_size": _latent_size(unet),
                "latent_unit": 2 ** (len(unet_stages) - 1) if isinstance(unet_stages, list) else None,
                "vae_scale": 2 ** (len(stages) - 1) if isinstance(stages, list) else None,
                "scaling_factor": vae["scaling_factor"],
                "scheduler": scheduler,
                "inpainting": is_inpainting(unet, vae),
                "guidance_embedding": unet["time_cond_proj_dim"],
                "random_weights": index.get(RANDOM_WEIGHTS) is True,
                "sampling": _sampling(folder / SAMPLING_FILE, unet, scheduler),
            }
        )
    except ValidationError as error:
        raise CheckpointError(f"{folder} cannot be used: {invalid_field(error)}") from None
    if model.sampling is not None:
        try:
            make_sampler(model.sampling.scheduler, NoiseSchedule.from_config(scheduler), model.sampling.steps)
        except InputError as error:
            raise CheckpointError(f"{folder} cannot be sampled as its {SAMPLING_FILE} says: {error}") from None
    return model


def _read_config(path: Path, **classes: Settings) -> Settings:
    """A network's config.json, complete with the defaults of its class; the first one where it names none."""
    found = read_json(path, CheckpointError)
    return {**classes[_check_class(path, found, tuple(classes))], **found}


def _check_class(path: Path, config: Mapping[str, object], known: Sequence[str]) -> str:
    name = config.get("_class_name", known[0])
    if name not in known:
        raise CheckpointError(
            f"{path} is of the class {name!r:.80}, which cannot be used here: take a checkpoint of Stable Diffusion"
            f" 1.x or 2.x, whose class is {known[0]}"
        )
    return str(name)


def is_inpainting(unet: Settings, vae: Settings) -> bool:
    """Does the U-Net read a mask and the masked image's latents beside the noisy latents?"""
    latents = vae["latent_channels"]
    return isinstance(latents, int) and unet["in_channels"] == 2 * latents + 1


def _sampling(path: Path, unet: Settings, scheduler: Settings) -> Settings | None:
    """How a few-step model is sampled: a student of ours by its file, a latent consistency model as in diffusers."""
    if path.is_file():
        return read_json(path, CheckpointError)
    consistency = unet["time_cond_proj_dim"] is not None and scheduler.get("_class_name") == "LCMScheduler"
    return LCM_SAMPLING if consistency else None


def obstacles(unet: Settings, vae: Settings, text: Settings, *, as_teacher: bool) -> Iterator[str]:
    """Settings with which a network needs other inputs than there are.

    These are latents, a timestep and the text's embedding; unless it is a teacher, also a mask and the masked image's
    latents, and the guidance scale's embedding.
    """
    for key, why in (UNSUPPORTED | NO_TEACHER if as_teacher else UNSUPPORTED).items():
        if unet.get(key) is not None:
            yield f"its U-Net has {key} = {unet[key]!r:.80}: {why}"
    channels = vae["latent_channels"]
    if unet["in_channels"] != channels and (as_teacher or not is_inpainting(unet, vae)):
        kinds = {"9": "an inpainting model", "8": "an image-to-image model", "5": "a depth-to-image model"}
        what = kinds.get(str(unet["in_channels"]), "another kind of model")
        yield (
            f"its U-Net has in_channels = {unet['in_channels']!r:.80} where the VAE has {channels!r:.80}: {what}; take"
            " a text-to-image checkpoint"
        )
    if unet["out_channels"] != channels:
        yield f"its U-Net has out_channels = {unet['out_channels']!r:.80} where the VAE has {channels!r:.80}"
    if unet["cross_attention_dim"] != text["hidden_size"]:
        yield (
            f"its U-Net has cross_attention_dim = {unet['cross_attention_dim']!r:.80} and its text encoder hidden_size"
            f" = {text['hidden_size']!r:.80}: these are parts of different models"
        )


def _latent_size(unet: Settings) -> object:
    """As diffusers' pipeline reads sample_size: a side, or both; before version 0.9 the U-Net of Stable Diffusion
    was saved with the class's default of then instead of 64."""
    size = unet["sample_size"]
    if isinstance(size, list):
        if len(size) != 2 or size[0] != size[1]:
            raise CheckpointError(f"the U-Net has sample_size = {size!r:.80}, which is no square: give it one side")
        return size[0]
    version = re.match(r"0\.(\d)\.", str(unet.get("_diffusers_version", "")))
    return 64 if version and isinstance(size, int) and size < 64 else size


def training_note(folder: Path) -> str | None:
    """What a checkpoint of an unfinished run says of itself; None of any other."""
    path = folder / TRAINING_FILE
    return str(read_json(path, CheckpointError).get("note"))[:200] if path.is_file() else None


def hash_checkpoint(folder: Path) -> str:
    """One SHA-256 over the names and contents of a checkpoint's configuration and weight files, or of one network's.

    What else lies in the checkpoint's folder, such as bundles and reports, is left out.
    """
    inside: Iterable[Path] = folder.rglob("*")
    if (folder / MODEL_INDEX).is_file():
        parts = (p for part in (*PARTS, CHECKER) for p in (folder / part).rglob("*"))
        inside = chain((folder / name for name in ROOT_FILES), parts)
    files = sorted(p for p in inside if p.suffix in SUFFIXES and p.is_file())
    lines = [f"{p.relative_to(folder).as_posix()} {sha256(p)}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

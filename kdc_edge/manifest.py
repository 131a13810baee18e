"""The manifest: what `kdc-edge.json` says of a bundle, and of a checkpoint's model.

    manifest = read_manifest(Path("bundles/onnx-fp16"))     # BundleError where it is damaged
    manifest.model.image_size                             # 512
    manifest.files["unet/model.onnx"].sha256

Manifests are untrusted: every record refuses unknown fields and bounds its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdc_edge.errors import BundleError
from kdc_edge.files import HashName, hash_file, read_json, write_atomic
from kdc_edge.text import decibels, invalid_field

MANIFEST = "kdc-edge.json"
FORMAT_VERSION = 1

Text = Annotated[str, Field(max_length=10_000)]
ComponentName = Literal["text_encoder", "unet", "vae_decoder", "vae_encoder", "safety_checker"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # 256 bits


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sampling(_Record):
    """How a few-step model is sampled: the defaults of generate, bench, eval and fit."""

    scheduler: Text  # by the name that --scheduler takes
    steps: int = Field(ge=1, le=1000)
    guidance: float = Field(ge=0, le=100, allow_inf_nan=False)


class Model(_Record):
    """What the artifact computes, in the numbers that a pipeline needs."""

    preset: Text | None = None
    unet_parameters: int = Field(ge=0)
    latent_channels: int = Field(ge=1, le=64)
    latent_size: int = Field(ge=1, le=1024)  # of the images it was trained on
    latent_unit: int = Field(ge=1, le=64)  # its sides are multiples of this: the U-Net halves them on its way down
    vae_scale: int = Field(ge=1, le=64)  # pixels a latent, each way
    scaling_factor: float = Field(gt=0, allow_inf_nan=False)  # of the VAE's latents
    scheduler: dict[str, object]  # diffusers' scheduler_config.json
    sampling: Sampling | None = None  # None: any scheduler, with guidance
    # The U-Net reads the mask and the latents of the image without its masked part beside the noisy latents.
    inpainting: bool = False
    # Width of the guidance scale's embedding that the U-Net reads in place of classifier-free guidance, as a latent
    # consistency model does (diffusers' time_cond_proj_dim); None: it reads none.
    guidance_embedding: int | None = Field(default=None, ge=4, le=8192)
    random_weights: bool = False  # untrained: it measures time, memory and equality; its images are noise

    @property
    def image_size(self) -> int:
        return self.latent_size * self.vae_scale

    @property
    def unet_channels(self) -> int:
        """Of the U-Net's input: the latents', and for inpainting the mask's and the masked image's."""
        return self.latent_channels * 2 + 1 if self.inpainting else self.latent_channels

    @property
    def guided(self) -> bool:
        """Whether a step computes the U-Net for both halves of classifier-free guidance.

        A guidance-free student needs one, and so does a U-Net that reads the guidance scale.
        """
        return self.guidance_embedding is None and (self.sampling is None or self.sampling.guidance > 1)


class Tensor(_Record):
    dtype: Text
    shape: list[int | str]  # a name where the size is free


class ComponentInfo(_Record):
    """One exported network. `files[0]` is the one that the engine opens."""

    files: list[Text] = Field(min_length=1)
    class_name: Text | None = None  # of the network, in diffusers, transformers or here: AutoencoderKL
    precision: Literal["fp32"] | None = None  # where it is not the bundle's
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class FileInfo(_Record):
    size_bytes: int = Field(ge=0)
    sha256: Digest  # the hub's, and what sha256sum prints
    blake3: Digest | None = None  # in a third of the time; bundles of before have none

    @property
    def hashes(self) -> dict[HashName, str]:
        return {"sha256": self.sha256, **self.fastest}

    @property
    def fastest(self) -> dict[HashName, str]:
        """The one hash that takes the least time, by its name."""
        return {"blake3": self.blake3} if self.blake3 else {"sha256": self.sha256}


class Check(_Record):
    """One proof of equality with PyTorch: PSNR of what was compared, beside its threshold."""

    what: Text
    psnr_db: float | None  # None when both were equal to the last bit
    threshold_db: float
    max_abs_error: float

    @property
    def passed(self) -> bool:
        return self.reaches(self.threshold_db)

    def reaches(self, threshold_db: float) -> bool:
        return self.psnr_db is None or self.psnr_db >= threshold_db

    @property
    def text(self) -> str:
        """ "equal", or the PSNR in dB."""
        return decibels(self.psnr_db)


class Parity(_Record):
    reference: Text  # what it was compared with, in words
    conditions: Text
    checks: list[Check]


class CalibrationInfo(_Record):
    """What the ranges of the activations were recorded on."""

    prompts_sha256: Digest  # of the prompts, one a line
    prompts: int = Field(ge=1)
    samples: int = Field(ge=1)  # U-Net calls, each with both halves where there is guidance
    seed: int
    sampler: Text
    steps: int = Field(ge=1)  # of each image, from which samples were taken at random
    guidance: float


class Recipe(_Record):
    """How many bits each layer of the U-Net got, by the name of its weight; `--recipe` applies it again."""

    bits: dict[Text, Literal[1, 2, 4, 6, 8]] = Field(max_length=10_000)
    size_bytes: int = Field(ge=0)  # of the U-Net's package, as it was planned
    psnr_db: float  # of the guided prediction on the calibration inputs, in PyTorch with these weights


class Source(_Record):
    """A file or folder that a checkpoint's weights come from, or those of its teacher."""

    role: Literal["checkpoint", "vae", "lora", "embedding"]
    name: Text
    sha256: Digest
    weight: float | None = Field(default=None, allow_inf_nan=False)  # of a LoRA


class Provenance(_Record):
    checkpoint: Text  # name of the source folder
    checkpoint_sha256: Digest
    training: Text | None = None  # what a checkpoint of an unfinished run says of itself
    decoder: Text | None = None  # name of the small decoder's folder, where one took the place of the checkpoint's
    decoder_sha256: Digest | None = None
    sources: list[Source] = Field(default=[], max_length=100)  # where the checkpoint was assembled from other files
    packages: dict[str, Text]
    command: Text | None = None
    created: Text


class Manifest(_Record):
    format_version: Literal[1] = 1
    target: Text
    precision: Text
    model: Model
    components: dict[ComponentName, ComponentInfo]
    files: dict[Text, FileInfo] = Field(max_length=10_000)
    parity: Parity | None = None
    calibration: CalibrationInfo | None = None
    recipe: Recipe | None = None
    provenance: Provenance
    licence: Text | None = None

    @property
    def name(self) -> str:
        return f"{self.target}-{self.precision}"

    @property
    def image_parity(self) -> Check | None:
        """The worst check of whole images; None where no image was compared."""
        images = [c for c in (self.parity.checks if self.parity else ()) if "image" in c.what]
        return min(images, key=lambda c: math.inf if c.psnr_db is None else c.psnr_db, default=None)


def read_manifest(root: Path) -> Manifest:
    """The manifest of a bundle, whose files may not be there yet. Raises BundleError."""
    raw = read_json(root / MANIFEST, BundleError)
    if raw.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{root} has format version {raw.get('format_version')!r:.80} and this kdc-edge reads"
            f" {FORMAT_VERSION}: export it again, or use the kdc-edge that made it"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise BundleError(f"{root / MANIFEST} is damaged: {invalid_field(error)}; export it again") from None


def list_files(root: Path, known: Mapping[str, FileInfo] = MappingProxyType({})) -> dict[str, FileInfo]:
    """Every file under `root` but the manifest, with size and hashes, in order of name; `known` ones are as before."""
    found = sorted(p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST)
    names = {p.relative_to(root).as_posix(): p for p in found}
    return {name: known[name] if name in known else _describe(p) for name, p in names.items()}


def _describe(path: Path) -> FileInfo:
    return FileInfo(size_bytes=path.stat().st_size, **hash_file(path, "sha256", "blake3"))


def write_manifest(root: Path, manifest: Manifest) -> None:
    write_atomic(root / MANIFEST, manifest.model_dump_json(indent=2) + "\n")

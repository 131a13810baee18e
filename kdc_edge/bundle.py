"""The bundle: a folder that a device can run, and the manifest in it that says what it is.

    bundle = Bundle.open(Path("bundles/onnx-fp16"))     # schema, paths and sizes are checked
    bundle.manifest.model.image_size                  # 512
    bundle.check("unet")                                # a component's hashes, as every loading does
    bundle.verify()                                     # every hash; raises BundleError naming the file

The folder keeps diffusers' and optimum's names (unet/model.onnx, tokenizer/vocab.json, model_index.json), so
other tools open it too. `kdc-edge.json` is the manifest. Bundles are untrusted: nothing in a manifest may
name a path outside its folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdc_edge.errors import BundleError
from kdc_edge.files import FileState, HashName, file_state, hash_file, inside, read_json, recover_folder, write_atomic
from kdc_edge.text import decibels, invalid_field

MANIFEST = "kdc-edge.json"
# The garden's few-step student, which ships; docs/few-steps.md says how it was made.
DEMO_BUNDLE = Path(__file__).parent / "assets" / "demo"
MODEL_INDEX = "model_index.json"  # diffusers' and optimum's; bundles and checkpoints have it
FORMAT_VERSION = 1
OF_THE_HUB = ("README.md", ".gitattributes")  # a model card and git's settings, in every repository
OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")  # file managers leave these in every folder that they show

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


_UNPROVED: dict[Path, Manifest] = {}


@contextmanager
def unproved(root: Path, manifest: Manifest) -> Iterator[None]:
    """Let this process, and no other, open a bundle whose manifest is not written: it is written when all is proved."""
    _UNPROVED[root] = manifest
    try:
        yield
    finally:
        del _UNPROVED[root]


@dataclass(frozen=True)
class Bundle:
    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read a bundle; schema, paths and sizes are checked, hashes are not (see `check` and `verify`)."""
        if root in _UNPROVED:
            return cls(root, _UNPROVED[root])
        recover_folder(root)
        if not root.is_dir():
            raise BundleError(f"no bundle at {root}: make one with kdc-edge export")
        if not (root / MANIFEST).is_file():
            raise BundleError(f"{root} is no bundle: {MANIFEST} is missing; make one with kdc-edge export")
        bundle = cls(root, read_manifest(root))
        bundle._check_files()
        return bundle

    def _check_files(self) -> None:
        for name, info in self.manifest.files.items():
            path = inside(self.root, name, BundleError)
            if not path.is_file():
                raise BundleError(f"{path} is missing: the bundle is incomplete; copy or export it again")
            if path.stat().st_size != info.size_bytes:
                raise BundleError(
                    f"{path} has {path.stat().st_size} bytes where {info.size_bytes} are expected:"
                    " the bundle is damaged; copy or export it again"
                )
        for component in self.manifest.components.values():
            for name in component.files:
                if name not in self.manifest.files:
                    raise BundleError(f"{self.root / MANIFEST} is damaged: {name} is used but not listed")

    def verify(self) -> int:
        """Check every hash of every file, and that nothing was added; the number of files. Raises BundleError."""
        self._check_hashes(self.manifest.files)
        self._refuse_unlisted(self.root)
        return len(self.manifest.files)

    def check_hashes(self) -> None:
        """Check the fastest hash of every file that the manifest lists. Raises BundleError."""
        self._check_hashes(self.manifest.files, fastest=True)

    def check(self, part: str) -> dict[str, FileState]:
        """Check a component, or another folder such as "tokenizer", before anything in it is used.

        Each of its files has the fastest hash that the manifest lists for it, and no other file lies among them: an
        engine opens what a network names. Gives their states from before. Raises BundleError.
        """
        before = self.states(part)
        self._check_hashes(before, fastest=True)
        for folder in {self.root / part, *((self.root / name).parent for name in before)}:
            self._refuse_unlisted(folder)
        return before

    def states(self, part: str) -> dict[str, FileState]:
        """By name, what the system tells of a component's files; it differs for a file that was written or replaced."""
        used = [
            name for component, info in self.manifest.components.items() if component == part for name in info.files
        ]
        names = {*used, *(name for name in self.manifest.files if name.startswith(f"{part}/"))}
        return {name: file_state(self.root / name) for name in names}

    def _check_hashes(self, names: Iterable[str], *, fastest: bool = False) -> None:
        for name in sorted(names):
            path, info = self.root / name, self.manifest.files[name]
            listed = info.fastest if fastest else info.hashes
            if hash_file(path, *listed) != listed:
                raise BundleError(f"{path} has changed since it was exported: copy or export it again")

    def _refuse_unlisted(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            ours = name in (MANIFEST, *OF_THE_HUB) or name in self.manifest.files or path.name in OF_SYSTEMS
            if not ours and (path.is_symlink() or not path.is_dir()):
                raise BundleError(f"{path} is not part of the bundle: remove it, or export the bundle again")

    def component(self, name: str) -> tuple[ComponentInfo, Path]:
        """A component's description and the file that an engine opens."""
        for known, info in self.manifest.components.items():
            if known == name:
                return info, inside(self.root, info.files[0], BundleError)
        raise BundleError(f"{self.root} has no {name}: export it again")

    def fingerprint(self, component: str, *also: str) -> str:
        """16 hex digits of a component's files, and of what else decides what an engine makes of them."""
        info, _ = self.component(component)
        parts = [*(self.manifest.files[name].sha256 for name in info.files), *also]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.manifest.files.values())


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


def kind_of(folder: Path) -> Literal["bundle", "checkpoint"] | None:
    """What a folder holds, by its index files alone; None for neither."""
    if (folder / MANIFEST).is_file() or folder in _UNPROVED:
        return "bundle"
    return "checkpoint" if (folder / MODEL_INDEX).is_file() else None


def find_bundles(folder: Path) -> list[Path]:
    """The bundles that lie in `folder`, in order of name; folders of unfinished exports are hidden and left out."""
    return sorted(p.parent for p in folder.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))


def list_files(root: Path, known: Mapping[str, FileInfo] = MappingProxyType({})) -> dict[str, FileInfo]:
    """Every file under `root` but the manifest, with size and hashes, in order of name; `known` ones are as before."""
    found = sorted(p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST)
    names = {p.relative_to(root).as_posix(): p for p in found}
    return {name: known[name] if name in known else _describe(p) for name, p in names.items()}


def _describe(path: Path) -> FileInfo:
    return FileInfo(size_bytes=path.stat().st_size, **hash_file(path, "sha256", "blake3"))


def write_manifest(root: Path, manifest: Manifest) -> None:
    write_atomic(root / MANIFEST, manifest.model_dump_json(indent=2) + "\n")

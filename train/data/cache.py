"""Latents and text embeddings, computed once: the VAE and the text encoder never learn.

    CACHE/flowers-train-1f2e.../    shard-00000.safetensors ...   posterior mean and std, fp16, of each sample
                                    index.json                    written last: counts, what was left out and why
    CACHE/text-9ab8.../             shard-00000.safetensors ...   embeddings of unique captions, fp16

A shard is written whole; an interrupted pass goes on behind the last one. The key is a hash of source, VAE and
resolution, so a changed image or another teacher makes a new folder. Training reads the shards memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTextModel

from kdc_edge.diffusers_folder import hash_checkpoint
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import write_atomic
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.data.images import Crop, LeftOut, Shape
from kdc_edge.train.data.source import Part, Sample
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.data.transfer import to_device

SHARD_BYTES = 64 * 2**20
SHARD_SAMPLES = 1024  # at most
TEXTS_A_SHARD = 256
NAMES_KEPT = 20  # of the samples left out, in index.json

Say = Callable[[str], None]
Write = Callable[[], None]


def write_here(write: Write) -> None:
    """One process reads what it wrote itself; with several, pass `on_main_process` of their accelerator."""
    write()


@dataclass(frozen=True)
class Latents:
    """Encoded samples: scaled posterior mean and std, (n, F, C, h, w) fp16 a shard; a task's are memory-mapped.

    F is 2 where the mirror image was encoded too, else 1.
    """

    shards: list[tuple[Tensor, Tensor]]  # of one shape each; of several where images are grouped by aspect ratio
    captions: list[str]
    starts: Tensor = field(init=False)  # the first sample's number of each shard, (shards,)

    def __post_init__(self) -> None:
        sizes = torch.tensor([0] + [len(mean) for mean, _ in self.shards])
        object.__setattr__(self, "starts", sizes.cumsum(0)[:-1])

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def flips(self) -> int:
        return int(self.shards[0][0].shape[1])

    @cached_property
    def groups(self) -> dict[torch.Size, Tensor]:
        """The numbers (n,) of the samples of each shape (C, h, w)."""
        numbers: dict[torch.Size, list[Tensor]] = {}
        for start, (mean, _) in zip(self.starts.tolist(), self.shards, strict=True):
            numbers.setdefault(mean.shape[2:], []).append(torch.arange(start, start + len(mean)))
        return {shape: torch.cat(found) for shape, found in numbers.items()}

    def shape_of(self, number: int) -> torch.Size:
        """The shape (C, h, w) of a sample."""
        shard = int(torch.searchsorted(self.starts, number, right=True)) - 1
        return self.shards[shard][0].shape[2:]

    def share(self, shape: torch.Size) -> float:
        """The share of the samples that have this shape."""
        return len(self.groups[shape]) / len(self) if shape in self.groups else 0.0

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """`count` numbers (count,) of samples of this shape, drawn uniformly, with repetition."""
        group = self.groups[shape]
        return group[torch.randint(len(group), (count,), generator=generator)]

    def take(self, numbers: Tensor, flipped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and std (B, C, h, w) fp16 of samples (B,) of one shape, mirrored where `flipped` (B,) says so."""
        shard = torch.searchsorted(self.starts, numbers, right=True) - 1
        row = numbers - self.starts[shard]
        flip = torch.zeros_like(row) if flipped is None else flipped.long()
        picked = [
            (self.shards[s][0][r, f], self.shards[s][1][r, f])
            for s, r, f in zip(shard.tolist(), row.tolist(), flip.tolist(), strict=True)
        ]
        return torch.stack([mean for mean, _ in picked]), torch.stack([std for _, std in picked])


def cache_key(
    task: Task, *, vae_sha256: str, size: int, samples: int | None, seed: int, part: Part, crop: Crop = "center",
    buckets: Sequence[Shape] = (),
) -> str:  # fmt: skip
    """Sixteen digits that change with anything that changes the latents."""
    facts: list[object] = [
        task.open().fingerprint(),
        vae_sha256,
        size,
        samples,
        seed,
        part,
        *([crop] if crop != "center" else []),
    ]
    facts += [buckets] if buckets else []
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@torch.inference_mode()
def encode_images(vae: AutoencoderKL, images: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 (N, H, W, 3) -> posterior mean and std (N, C, h, w) fp16, times the scaling factor."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    found = vae.encode(batch.to(vae.device, vae.dtype) / 127.5 - 1)
    if not hasattr(found, "latent_dist"):
        raise CheckpointError(f"the VAE is an {type(vae).__name__}, and training needs an AutoencoderKL's encoder")
    posterior = found.latent_dist
    scale = vae.config.scaling_factor
    return (posterior.mean * scale).half().cpu(), (posterior.std * scale).half().cpu()


def cache_latents(
    task: Task,
    vae: AutoencoderKL,
    folder: Path,
    *,
    vae_sha256: str,
    size: int,
    samples: int | None = None,
    seed: int = 0,
    part: Part = "train",
    crop: Crop = "center",
    buckets: Sequence[Shape] = (),
    say: Say = lambda _: None,
    write_once: Callable[[Write], None] = write_here,
) -> Latents:
    """The task's latents at `size` pixels, encoded unless `folder` has them. Raises InputError when none is left.

    Of several processes one writes: `write_once` runs the writing there and gives back when all may read.
    """
    key = cache_key(
        task, vae_sha256=vae_sha256, size=size, samples=samples, seed=seed, part=part, crop=crop, buckets=buckets
    )
    home = folder / f"{task.name}-{part}-{key}"

    def write() -> None:
        if not (home / "index.json").is_file():
            _encode(
                task, vae, home, size=size, samples=samples, seed=seed, part=part, crop=crop, buckets=buckets, say=say
            )

    write_once(write)
    shards, captions = [], []
    for path in sorted(home.glob("shard-*.safetensors")):
        with _open(path) as file:
            texts = json.loads(file.metadata()["captions"])
            for shape in _shapes(file):
                shards.append((file.get_tensor(f"mean{shape}"), file.get_tensor(f"std{shape}")))
                captions += texts[shape] if isinstance(texts, dict) else texts
    return Latents(shards, captions)


def _encode(
    task: Task,
    vae: AutoencoderKL,
    home: Path,
    *,
    size: int,
    samples: int | None,
    seed: int,
    part: Part,
    crop: Crop,
    buckets: Sequence[Shape],
    say: Say,
) -> None:
    """One pass over the source, behind the shards that are there already."""
    source = task.open()
    for note in source.notes():
        say(f"{task.name}: {note}")
    done = sorted(home.glob("shard-*.safetensors"))
    read, kept, left = _progress(done)
    per_shard = max(1, min(SHARD_SAMPLES, SHARD_BYTES // (32 * size * size // 64)))
    number = len(done)
    pending: list[Sample] = []
    names: list[str] = []

    def flush() -> None:
        nonlocal number, kept
        if pending:
            _write_shard(home / f"shard-{number:05d}.safetensors", vae, pending, source.mirrored, read, left)
            number, kept = number + 1, kept + len(pending)
            pending.clear()

    for item in source.read(size=size, samples=samples, seed=seed, start=read, part=part, crop=crop, buckets=buckets):
        read += 1
        if isinstance(item, LeftOut):
            left[item.reason] += 1
            names += [f"{item.name}: {item.reason}"] if len(names) < NAMES_KEPT else []
            continue
        pending.append(item)
        if len(pending) == per_shard:
            flush()
    flush()
    reasons = ", ".join(f"{count} {reason}" for reason, count in left.most_common())
    if not kept:
        raise InputError(f"{task.name}: none of {read} images in {task.source} can be used: {reasons or 'it is empty'}")
    if left:
        say(f"{task.name}: {left.total()} of {read} images left out: {reasons}; named in {home / 'index.json'}")
    facts = {"source": task.source, "read": read, "kept": kept, "left_out": dict(left), "such_as": names}
    write_atomic(home / "index.json", json.dumps(facts, indent=2))


def _progress(done: list[Path]) -> tuple[int, int, Counter[str]]:
    """Entries read, samples kept and what was left out, as the last whole shard says."""
    kept = 0
    read, left = 0, Counter[str]()
    for path in done:
        with _open(path) as file:
            facts = json.loads(file.metadata()["progress"])
            kept += sum(file.get_slice(f"mean{shape}").get_shape()[0] for shape in _shapes(file))
        read, left = int(facts["read"]), Counter(facts["left_out"])
    return read, kept, left


def _shapes(file: safe_open) -> list[str]:
    """What the names of a shard's tensors end in: "" where all of its samples have one shape, else "-HxW" of each."""
    names: list[str] = file.keys()  # type: ignore[no-untyped-call]
    return sorted(name.removeprefix("mean") for name in names if name.startswith("mean"))


def _write_shard(
    path: Path, vae: AutoencoderKL, samples: Sequence[Sample], mirrored: bool, read: int, left: Counter[str]
) -> None:
    by_shape: dict[str, list[Sample]] = {}
    for sample in samples:
        by_shape.setdefault(f"-{sample.image.shape[0]}x{sample.image.shape[1]}", []).append(sample)
    tensors: dict[str, Tensor] = {}
    captions = {shape: [sample.caption for sample in found] for shape, found in by_shape.items()}
    for shape, found in by_shape.items():
        ending = shape if len(by_shape) > 1 else ""
        tensors[f"mean{ending}"], tensors[f"std{ending}"] = _encode_shape(vae, [s.image for s in found], mirrored)
    texts = {
        "captions": json.dumps(captions if len(captions) > 1 else next(iter(captions.values()))),
        "progress": json.dumps({"read": read, "left_out": left}),
    }
    write_atomic(path, save(tensors, metadata=texts))


def _encode_shape(vae: AutoencoderKL, images: Sequence[np.ndarray], mirrored: bool) -> tuple[Tensor, Tensor]:
    """Posterior mean and std (n, F, C, h, w) fp16 of images of one shape."""
    at_once = max(1, 2**22 // images[0].size)  # a batch of 4 million values keeps the encoder's memory small
    means, stds = [], []
    for start in range(0, len(images), at_once):
        batch = np.stack(images[start : start + at_once])
        flips = [batch, np.ascontiguousarray(batch[:, :, ::-1])] if mirrored else [batch]
        encoded = [encode_images(vae, flip) for flip in flips]
        means.append(torch.stack([mean for mean, _ in encoded], 1))  # (n, F, C, h, w)
        stds.append(torch.stack([std for _, std in encoded], 1))
    return torch.cat(means), torch.cat(stds)


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove its folder, it will be made again") from None


class TextEmbedder:
    """Captions to text embeddings; those of a task are encoded once and kept on the disk."""

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: Tokenizer, home: Path | None = None) -> None:
        self.text_encoder, self.tokenizer, self.home = text_encoder, tokenizer, home
        self._known: dict[str, Tensor] = {}
        self._shards = 0
        if home is not None:
            self._read_shards()

    @classmethod
    def of_teacher(cls, teacher: Path, text_encoder: CLIPTextModel, cache: Path) -> TextEmbedder:
        """An embedder whose folder in the cache is keyed by the teacher's text encoder and tokenizer."""
        parts = hash_checkpoint(teacher / "text_encoder") + hash_checkpoint(teacher / "tokenizer")
        home = cache / f"text-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
        return cls(text_encoder, Tokenizer.from_folder(teacher / "tokenizer"), home)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (N, 77, D) of the captions, fp32, on the text encoder's device."""
        self._known |= self._encode(captions)
        return to_device(torch.stack([self._known[c] for c in captions]), self.text_encoder.device).float()

    def prepare(self, captions: Sequence[str], *, writes: bool = True) -> None:
        """Encode what is new among the captions, and keep it on the disk."""
        new = list(dict.fromkeys(c for c in captions if c not in self._known))
        for start in range(0, len(new), TEXTS_A_SHARD):
            encoded = self._encode(new[start : start + TEXTS_A_SHARD])
            if self.home is None or not writes:
                self._known |= encoded
                continue
            if not encoded:  # another run with this cache had written them when this one looked
                continue
            path = self.home / f"shard-{self._shards:05d}.safetensors"
            texts = {"captions": json.dumps(list(encoded))}
            write_atomic(path, save({"hidden": torch.stack(list(encoded.values()))}, metadata=texts))
            self._read_shards()

    def _read_shards(self) -> None:
        assert self.home is not None
        for path in sorted(self.home.glob("shard-*.safetensors"))[self._shards :]:
            with _open(path) as file:
                hidden = file.get_tensor("hidden")  # (n, 77, D) fp16, memory-mapped
                self._known |= dict(zip(json.loads(file.metadata()["captions"]), hidden, strict=True))
            self._shards += 1

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """fp16 embeddings (77, D) of those captions that are not known yet."""
        new = [c for c in dict.fromkeys(captions) if c not in self._known]
        found: dict[str, Tensor] = {}
        for start in range(0, len(new), 64):
            batch = new[start : start + 64]
            ids = torch.from_numpy(self.tokenizer.encode(batch)).to(self.text_encoder.device)
            found |= dict(zip(batch, self.text_encoder(ids).last_hidden_state.half().cpu(), strict=True))
        return found

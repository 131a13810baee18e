"""Latents of a task's images, computed once: the VAE never learns.

    CACHE/flowers-train-1f2e.../    shard-00000.safetensors ...   posterior mean and std, fp16, of each sample
                                    index.json                    written last: counts, what was left out and why

A shard holds the same entries of the source whoever writes it, and is written whole: several processes take turns, and
an interrupted pass goes on with the shards that are missing. The key is a hash of source, VAE and resolution, so a
changed image or another teacher makes a new folder. Training reads the shards memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch import Tensor

from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import check_writable, write_atomic
from kdc_edge.train.data.images import LeftOut, Shape
from kdc_edge.train.data.latents import Latents, open_shard, shapes_in
from kdc_edge.train.data.source import Pending, Selection, read_samples
from kdc_edge.train.data.tasks import Task
from kdc_edge.train.data.transfer import to_device
from kdc_edge.train.processes import ALONE, Processes

CACHE = "cache"  # RUN/cache, where no other folder is given
SHARD_BYTES = 64 * 2**20
SHARD_ENTRIES = 1024  # at most
TELL_EVERY_SEC = 30.0
NAMES_KEPT = 20  # of the samples left out, in index.json
ENCODED_ON_CPU = 2**22  # values of images at once: 5 of 512 pixels, which keeps the encoder's memory small
ENCODED_ON_GPU = 2**23

Say = Callable[[str], None]


def cache_key(task: Task, selection: Selection, *, vae_sha256: str, bf16: bool = False) -> str:
    """Sixteen digits that change with anything that changes the latents."""
    chosen = selection
    facts: list[object] = [
        task.open().fingerprint(), vae_sha256, chosen.size, chosen.samples, chosen.seed, chosen.part,
        *([chosen.crop] if chosen.crop != "center" else []), *([chosen.buckets] if chosen.buckets else []),
        *(["bf16"] if bf16 else []),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@torch.inference_mode()
def encode_images(vae: AutoencoderKL, images: np.ndarray, *, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """uint8 (N, H, W, 3) -> posterior mean and std (N, C, h, w) fp16, times the scaling factor."""
    batch = to_device(torch.from_numpy(images), vae.device).permute(0, 3, 1, 2)
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=bf16):
        found = vae.encode(batch.to(vae.dtype) / 127.5 - 1)
    if not hasattr(found, "latent_dist"):
        raise CheckpointError(f"the VAE is an {type(vae).__name__}, and training needs an AutoencoderKL's encoder")
    posterior = found.latent_dist
    scale = vae.config.scaling_factor
    return (posterior.mean * scale).half().cpu(), (posterior.std * scale).half().cpu()


def check_cache(folder: Path) -> None:
    """Raise InputError for a cache that is empty and could not be written, before anything else is."""
    if not any(folder.glob("*/index.json")):
        check_writable(folder / "latents")


def cache_latents(
    task: Task, vae: AutoencoderKL, folder: Path, selection: Selection, *,
    vae_sha256: str, bf16: bool = False, say: Say = lambda _: None, processes: Processes = ALONE,
) -> Latents:  # fmt: skip
    """The task's latents, encoded unless `folder` has them, in bfloat16 where asked. Collective.

    Raises InputError when no sample is left.
    """
    home = folder / f"{task.name}-{selection.part}-{cache_key(task, selection, vae_sha256=vae_sha256, bf16=bf16)}"
    index = home / "index.json"
    if not all(processes.together(index.is_file)):  # another run may write it at this moment
        source = task.open()
        tell = say if processes.index == 0 else (lambda _: None)
        for note in source.notes():
            tell(f"{task.name}: {note}")
        pending = _counted(source.pending(selection), lambda count: tell(f"{task.name}: {count} images encoded so far"))
        encoder = _Encoder(vae, source.mirrored, bf16)
        per_shard = max(1, min(SHARD_ENTRIES, SHARD_BYTES // (32 * selection.size**2 // 64)))
        read = processes.together(lambda: _encode_share(pending, home, per_shard, encoder, processes))
        if len(set(read)) > 1:
            raise InputError(f"{task.name}: a stream broke off behind {min(read)} samples: start again, to go on there")
        processes.once(lambda: _write_index(task, index, say))
    shards, captions = [], []
    for path in sorted(home.glob("shard-*.safetensors")):
        with open_shard(path) as file:
            texts = json.loads(file.metadata()["captions"])
            for shape in shapes_in(file):
                shards.append((file.get_tensor(f"mean{shape}"), file.get_tensor(f"std{shape}")))
                captions += texts[shape] if isinstance(texts, dict) else texts
    return Latents(shards, captions)


@dataclass(frozen=True)
class _Encoder:
    """Images of one shape to posterior mean and std (n, F, C, h, w) fp16."""

    vae: AutoencoderKL
    mirrored: bool  # encode their mirror images too
    bf16: bool

    @property
    def values_at_once(self) -> int:
        return ENCODED_ON_CPU if self.vae.device.type == "cpu" else ENCODED_ON_GPU

    def __call__(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        batch = np.stack(images)
        sides = [batch, np.ascontiguousarray(batch[:, :, ::-1])] if self.mirrored else [batch]
        means, stds = zip(*(encode_images(self.vae, side, bf16=self.bf16) for side in sides), strict=True)
        return torch.stack(means, 1), torch.stack(stds, 1)


def _counted(pending: Iterable[Pending], tell: Callable[[int], None]) -> Iterator[Pending]:
    """The same, and a line now and then that says how far it is."""
    told = time.monotonic()
    for count, sample in enumerate(pending):
        if time.monotonic() - told > TELL_EVERY_SEC:
            tell(count)
            told = time.monotonic()
        yield sample


def _encode_share(
    pending: Iterable[Pending], home: Path, per_shard: int, encoder: _Encoder, processes: Processes
) -> int:
    """Write this process's shards, but for those that are there already; how many entries the source has."""
    entries = 0
    for shard, numbered in groupby(enumerate(pending), lambda entry: entry[0] // per_shard):
        path = home / f"shard-{shard:05d}.safetensors"
        if shard % processes.count == processes.index and not _is_whole(path):
            entries += _write_shard(path, (sample for _, sample in numbered), encoder)
        else:
            entries += sum(1 for _ in numbered)
    return entries


def _is_whole(path: Path) -> bool:
    """Not so of shards of earlier versions that hold other entries; those of a finished pass are read as they are."""
    if not path.is_file():
        return False
    with open_shard(path) as file:
        return "entries" in file.metadata()


def _write_shard(path: Path, pending: Iterable[Pending], encoder: _Encoder) -> int:
    """Encode samples, those of one shape together, while the next ones are read; how many there were."""
    entries, left = 0, list[tuple[str, str]]()
    captions: dict[Shape, list[str]] = {}
    images: dict[Shape, list[np.ndarray]] = {}  # not encoded yet
    encoded: dict[Shape, list[tuple[Tensor, Tensor]]] = {}

    def encode(shape: Shape) -> None:
        encoded.setdefault(shape, []).append(encoder(images.pop(shape)))

    for item in read_samples(pending):
        entries += 1
        if isinstance(item, LeftOut):
            left.append((item.name, item.reason))
            continue
        shape = item.image.shape[0], item.image.shape[1]
        captions.setdefault(shape, []).append(item.caption)
        images.setdefault(shape, []).append(item.image)
        if len(images[shape]) == max(1, encoder.values_at_once // item.image.size):
            encode(shape)
    for shape in list(images):
        encode(shape)
    endings = {shape: "-{}x{}".format(*shape) if len(encoded) > 1 else "" for shape in encoded}
    tensors: dict[str, Tensor] = {}
    for shape, parts in encoded.items():
        for name, found in zip(("mean", "std"), zip(*parts, strict=True), strict=True):
            tensors[f"{name}{endings[shape]}"] = torch.cat(found)
    texts = {
        "captions": json.dumps({endings[shape]: found for shape, found in captions.items()}),
        "entries": str(entries),
        "left_out": json.dumps(left),
    }
    write_atomic(path, save(tensors, metadata=texts))
    return entries


def _write_index(task: Task, path: Path, say: Say) -> None:
    """What the shards hold together. Raises InputError where that is nothing."""
    read, left = 0, list[tuple[str, str]]()
    for shard in sorted(path.parent.glob("shard-*.safetensors")):
        with open_shard(shard) as file:
            read += int(file.metadata()["entries"])
            left += json.loads(file.metadata()["left_out"])
    counts = Counter(reason for _, reason in left)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if read == len(left):
        raise InputError(f"{task.name}: none of {read} images in {task.source} can be used: {reasons or 'it is empty'}")
    if left:
        say(f"{task.name}: {len(left)} of {read} images left out: {reasons}; named in {path}")
    such_as = [f"{name}: {reason}" for name, reason in left[:NAMES_KEPT]]
    facts = {"source": task.source, "read": read, "kept": read - len(left), "left_out": counts, "such_as": such_as}
    write_atomic(path, json.dumps(facts, indent=2))

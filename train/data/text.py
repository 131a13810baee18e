"""Text embeddings of captions, computed once: the text encoder never learns.

CACHE/text-9ab8.../    shard-5f0c....safetensors ...    embeddings of unique captions, fp16
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import CLIPTextModel

from kdc_edge.diffusers_folder import hash_checkpoint
from kdc_edge.files import write_atomic
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.data.latents import open_shard
from kdc_edge.train.data.transfer import to_device
from kdc_edge.train.processes import ALONE, Processes

TEXTS_A_SHARD = 256


class TextEmbedder:
    """Captions to text embeddings; those of a task are encoded once and kept on the disk."""

    def __init__(self, text_encoder: CLIPTextModel, tokenizer: Tokenizer, home: Path | None = None) -> None:
        self.text_encoder, self.tokenizer, self.home = text_encoder, tokenizer, home
        self._known: dict[str, Tensor] = {}
        self._kept: set[str] = set()  # of these, on the disk
        self._shards: set[str] = set()  # that are read
        if home is not None:
            self._read_shards(home)

    @classmethod
    def of_teacher(cls, teacher: Path, text_encoder: CLIPTextModel, cache: Path) -> TextEmbedder:
        """An embedder whose folder in the cache is keyed by the teacher's text encoder and tokenizer."""
        parts = hash_checkpoint(teacher / "text_encoder") + hash_checkpoint(teacher / "tokenizer")
        home = cache / f"text-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
        return cls(text_encoder, Tokenizer.from_folder(teacher / "tokenizer"), home)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (N, 77, D) of the captions, fp32, on the text encoder's device."""
        self._encode_new(captions)
        return to_device(torch.stack([self._known[c] for c in captions]), self.text_encoder.device).float()

    def prepare(self, captions: Sequence[str], processes: Processes = ALONE) -> None:
        """Encode what is not on the disk yet of the captions, each process a share, and keep it there. Collective.

        Also what an evaluation has encoded before: the last bits depend on the captions beside it in a batch, and a
        resumed run is to find those that the run trained with.
        """
        if self.home is None:
            self._encode_new(captions)
            return
        home = self.home
        share = list(dict.fromkeys(captions))[processes.index :: processes.count]

        def encode() -> None:
            new = [c for c in share if c not in self._kept]
            for start in range(0, len(new), TEXTS_A_SHARD):
                left = [c for c in new[start : start + TEXTS_A_SHARD] if c not in self._kept]
                if not left:  # another run with this cache had written them when this one looked
                    continue
                encoded = self._encode(left)
                texts = json.dumps(left)
                path = home / f"shard-{hashlib.sha256(texts.encode()).hexdigest()[:16]}.safetensors"
                hidden = torch.stack(list(encoded.values()))
                write_atomic(path, save({"hidden": hidden}, metadata={"captions": texts}))
                self._read_shards(home)

        processes.together(encode)
        self._read_shards(home)

    def _read_shards(self, home: Path) -> None:
        """Those that were written since the last time."""
        for path in sorted(home.glob("shard-*.safetensors")):
            if path.name not in self._shards:
                with open_shard(path) as file:
                    hidden = file.get_tensor("hidden")  # (n, 77, D) fp16, memory-mapped
                    found = dict(zip(json.loads(file.metadata()["captions"]), hidden, strict=True))
                self._known |= found
                self._kept |= found.keys()
                self._shards.add(path.name)

    def _encode_new(self, captions: Sequence[str]) -> None:
        if new := [c for c in dict.fromkeys(captions) if c not in self._known]:
            self._known |= self._encode(new)

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """fp16 embeddings (77, D) of captions, each of which is there once."""
        found: dict[str, Tensor] = {}
        for start in range(0, len(captions), 64):
            batch = captions[start : start + 64]
            ids = torch.from_numpy(self.tokenizer.encode(batch)).to(self.text_encoder.device)
            found |= dict(zip(batch, self.text_encoder(ids).last_hidden_state.half().cpu(), strict=True))
        return found

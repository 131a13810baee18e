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
        self._known |= self._encode(captions)
        return to_device(torch.stack([self._known[c] for c in captions]), self.text_encoder.device).float()

    def prepare(self, captions: Sequence[str], processes: Processes = ALONE) -> None:
        """Encode what is new among the captions, each process a share, and keep it on the disk. Collective."""
        if self.home is None:
            self._known |= self._encode(captions)
            return
        home = self.home
        share = list(dict.fromkeys(captions))[processes.index :: processes.count]

        def encode() -> None:
            new = [c for c in share if c not in self._known]
            for start in range(0, len(new), TEXTS_A_SHARD):
                encoded = self._encode(new[start : start + TEXTS_A_SHARD])
                if not encoded:  # another run with this cache had written them when this one looked
                    continue
                texts = json.dumps(list(encoded))
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
                    self._known |= dict(zip(json.loads(file.metadata()["captions"]), hidden, strict=True))
                self._shards.add(path.name)

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

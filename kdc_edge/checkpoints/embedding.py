"""Textual inversion: learned vectors as new tokens of a checkpoint (Gal et al. 2022, arXiv 2208.01618).

    embedding = Embedding.parse("cat-toy.safetensors:<cat-toy>")
    embedding.add(text_weights, text_config, Path("tokenizer"))          # rows of the table, entries of the tokenizer

Several vectors are several tokens, `<cat-toy>`, `<cat-toy>_1`, ..., as diffusers' load_textual_inversion names them;
a prompt names the first and the tokenizer puts the others behind it.
"""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdc_edge.checkpoints.single_file import refuse_pickle
from kdc_edge.errors import BundleError, CheckpointError
from kdc_edge.files import read_json
from kdc_edge.tokenizer import Tokenizer, write_vocabulary
from kdc_edge.weight_files import read_header

TABLE = "embeddings.token_embedding.weight"
AUTOMATIC = ("emb_params", "string_to_param", "string_to_param.*", "*")  # the tensor's name in Automatic1111's layout
MAX_VECTORS = 75


@dataclass(frozen=True)
class Embedding:
    """A textual inversion's file, and the token that prompts name it by: None for the file's own."""

    path: Path
    token: str | None = None

    @classmethod
    def parse(cls, text: str) -> Embedding:
        """FILE or FILE:TOKEN."""
        name, colon, token = text.rpartition(":")
        return cls(Path(name), token) if colon and name and token and not Path(text).exists() else cls(Path(text))

    def check(self) -> tuple[str, str, list[int]]:
        """The token, the tensor's name and its shape, by the header. Raises CheckpointError for others."""
        refuse_pickle(self.path)
        shapes, _ = read_header(self.path)
        if {"clip_l", "clip_g"} <= shapes.keys():
            raise CheckpointError(
                f"{self.path} is a textual inversion of Stable Diffusion XL, which cannot be used here"
            )
        name, shape = next(iter(shapes.items())) if len(shapes) == 1 else ("", [])
        name, shape = next(((key, list(shapes[key])) for key in AUTOMATIC if key in shapes), (name, list(shape)))
        vectors = 1 if len(shape) == 1 else shape[0] if shape else 0
        if len(shape) not in (1, 2) or not 1 <= vectors <= MAX_VECTORS:
            raise CheckpointError(f"{self.path} is no textual inversion: it should hold one table of vectors")
        token = self.token or (self.path.stem if name in AUTOMATIC else name)
        if not token or token != token.strip() or len(token.split()) > 1 or not token.isprintable():
            raise CheckpointError(f"--embedding {self.path}: {token!r:.80} is no token: give a word, FILE:TOKEN")
        return token, name, shape

    def add(self, weights: MutableMapping[str, Any], config: dict[str, object], tokenizer: Path) -> str:
        """Add the vectors to the text encoder's table and their tokens to the tokenizer's folder; the line to say."""
        import torch
        from safetensors.torch import load_file

        token, name, _ = self.check()
        vectors = load_file(self.path)[name]
        vectors = vectors.reshape(-1, vectors.shape[-1])  # (tokens, D)
        key = next((k for k in (TABLE, f"text_model.{TABLE}") if k in weights), None)
        if key is None or (width := weights[key].shape[1]) != vectors.shape[1]:
            wide = "no table" if key is None else f"{width} channels a token"
            raise CheckpointError(
                f"{self.path} does not fit this checkpoint: it has {vectors.shape[1]} channels a token and the text"
                f" encoder {wide}; it is of another model"
            )
        table = weights[key].float()
        names = [token, *(f"{token}_{i}" for i in range(1, len(vectors)))]
        first = _add_tokens(tokenizer, names, self.path)
        if first > len(table):
            raise CheckpointError(f"{tokenizer} has {first} tokens and the text encoder {len(table)}: save them again")
        # Rows behind the tokenizer's last token are padding of the table, which the vectors take over.
        weights[key] = torch.cat([table[:first], vectors.float(), table[first + len(vectors) :]])
        config["vocab_size"] = len(weights[key])
        return f"{self.path.name}: {token} in a prompt is {len(names)} token{'s' if len(names) > 1 else ''}"


def _add_tokens(folder: Path, names: list[str], path: Path) -> int:
    """Write tokens behind a tokenizer's last one, in every layout of its folder; the first one's id."""
    try:
        write_vocabulary(folder)
        first = Tokenizer.from_folder(folder).size
        known = Tokenizer.from_folder(folder).tokens
    except BundleError as error:
        raise CheckpointError(str(error)) from None
    for name in names:
        if name in known:
            raise CheckpointError(
                f"{name} is a token of this checkpoint already: name it otherwise, --embedding {path}:TOKEN"
            )
    rules = {
        str(first + i): {
            "content": name, "normalized": True, "special": False,
            "lstrip": False, "rstrip": False, "single_word": False,
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    config_path, old, new = folder / "tokenizer_config.json", folder / "added_tokens.json", folder / "tokenizer.json"
    config = read_json(config_path, CheckpointError) if config_path.exists() else {}
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] = {**config["added_tokens_decoder"], **rules}  # type: ignore[dict-item]
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")
    if new.exists():
        whole = read_json(new, CheckpointError)
        listed = whole.get("added_tokens")
        entries = [{"id": int(index), **entry} for index, entry in rules.items()]
        whole["added_tokens"] = [*(listed if isinstance(listed, list) else ()), *entries]
        new.write_text(json.dumps(whole, ensure_ascii=False), "utf-8")
    tokens = read_json(old, CheckpointError) if old.exists() else {}
    tokens |= {name: first + i for i, name in enumerate(names)}
    old.write_text(json.dumps(tokens, indent=2, ensure_ascii=False), "utf-8")
    return first

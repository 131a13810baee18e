"""Prompt weights and long prompts, by the rules of AUTOMATIC1111's interface.

    >>> parse("a (red:1.3) flower, [faint]")
    [('a ', 1.0), ('red', 1.3), (' flower, ', 1.0), ('faint', 0.9090909090909091)]

`(text)` weighs 1.1, `(text:1.3)` 1.3, `[text]` 1 / 1.1; nested brackets multiply; a backslash makes a bracket text. A
bracket without its partner, and a pair with nothing in it, are text too: of a smiley, nothing is lost.

A prompt longer than the text encoder reads goes through it in chunks of 75 tokens, whose hidden states the U-Net reads
one after the other. Weights multiply the hidden states of their tokens; the mean over a chunk is then restored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdc_edge.tokenizer import Tokenizer

ROUND, SQUARE = 1.1, 1 / 1.1  # weights of a pair of brackets
MAX_DEPTH = 32  # of brackets in brackets
MAX_WEIGHT = 10.0  # beyond it, what is written is taken for text
MAX_CHUNKS = 8  # of a prompt; what is longer is cut off
PIECES = re.compile(r"\\[\\()\[\]]|:\s*+(\d++(?:\.\d*+)?|\.\d++)\s*+\)|[()\[\]]|[^\\()\[\]:]++|.", re.DOTALL)
CLOSED_BY = {")": "(", "]": "["}

Weighted = list[tuple[str, float]]


@dataclass
class _Piece:
    text: str
    weight: float = 1.0


def parse(prompt: str) -> Weighted:
    """The prompt as texts with their weights, in order; neighbours of equal weight are one text."""
    pieces: list[_Piece] = []
    opened: list[tuple[str, int]] = []  # brackets that wait for their partner, and their places
    for match in PIECES.finditer(prompt):
        text, number = match[0], match[1]
        closing = ")" if number is not None else text
        start = opened[-1][1] if opened and opened[-1][0] == CLOSED_BY.get(closing) else None
        filled = start is not None and any(piece.text.strip() for piece in pieces[start + 1 :])
        weight = ROUND if closing == ")" else SQUARE
        if number is not None:
            weight = float(number)
        if start is not None and filled and weight <= MAX_WEIGHT:
            opened.pop()
            pieces[start].text = ""  # the bracket itself
            for piece in pieces[start + 1 :]:
                piece.weight *= weight
            continue
        if start is not None:
            opened.pop()
        if text in ("(", "[") and len(opened) < MAX_DEPTH:
            opened.append((text, len(pieces)))
        pieces.append(_Piece(text[1:] if len(text) == 2 and text[0] == "\\" else text))
    found: Weighted = []
    for piece in pieces:
        if found and math.isclose(found[-1][1], piece.weight):
            found[-1] = (found[-1][0] + piece.text, found[-1][1])
        elif piece.text:
            found.append((piece.text, piece.weight))
    return found


@dataclass(frozen=True)
class Tokens:
    """The tokens of several texts, all in the same number of chunks."""

    ids: NDArray[np.int64]  # (T * chunks, 77), the chunks of a text one after the other
    weights: NDArray[np.float32]  # (T * chunks, 77)
    chunks: int = 1

    @property
    def length(self) -> int:
        """Hidden states that the U-Net reads of a text."""
        return self.chunks * int(self.ids.shape[1])

    def join(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hidden states of the chunks (T * chunks, 77, D), weighted and in a row: (T, chunks * 77, D)."""
        weighed = hidden
        if (self.weights != 1).any():
            weighed = hidden * self.weights[..., None]
            before, after = (np.mean(h, axis=(1, 2), keepdims=True, dtype=np.float64) for h in (hidden, weighed))
            safe = np.abs(after) > 1e-6 * np.abs(hidden).max()
            weighed = (weighed * np.where(safe, before / np.where(safe, after, 1), 1)).astype(np.float32)
        return weighed.reshape(-1, self.length, hidden.shape[2])


def plain(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """The texts as they are, each in one chunk; what is too long is cut off."""
    ids = tokenizer.encode(texts)
    return Tokens(ids, np.ones(ids.shape, np.float32))


def weighted(tokenizer: Tokenizer, texts: Sequence[str], *, max_chunks: int = MAX_CHUNKS) -> Tokens:
    """The texts with their weights, in as many chunks as the longest needs; shorter ones get empty chunks.

    Raises InputError for a prompt that is no text.
    """
    room = tokenizer.max_length - 2  # start and end
    rows = [_row(tokenizer, text, room * max_chunks) for text in texts]
    chunks = max(1, *(math.ceil(len(ids) / room) for ids, _ in rows))
    ids = np.full((len(rows), chunks, tokenizer.max_length), tokenizer.pad_id, np.int64)
    weights = np.ones(ids.shape, np.float32)
    ids[:, :, 0] = tokenizer.start_id
    for i, (found, factors) in enumerate(rows):
        for c in range(chunks):
            part = found[c * room : (c + 1) * room]
            ids[i, c, 1 : len(part) + 1] = part
            ids[i, c, len(part) + 1] = tokenizer.end_id
            weights[i, c, 1 : len(part) + 1] = factors[c * room : (c + 1) * room]
    return Tokens(ids.reshape(-1, ids.shape[2]), weights.reshape(-1, ids.shape[2]), chunks)


def overflow(tokenizer: Tokenizer, text: str, *, max_chunks: int) -> int:
    """Tokens of the text that are cut off."""
    return max(0, len(_row(tokenizer, text, 4 * len(text))[0]) - (tokenizer.max_length - 2) * max_chunks)


def unread(tokenizer: Tokenizer, text: str, name: str, max_chunks: int | None) -> str:
    """What the model does not read of a text, as a line; "" where it reads all. A plain text has None for chunks."""
    begin = f"the {name} is longer than the model reads: left out"
    if max_chunks is None:
        return f"{begin} is {cut[:80]!r}" if (cut := tokenizer.overflow(text)) else ""
    if not (tokens := overflow(tokenizer, text, max_chunks=max_chunks)):
        return ""
    fixed = "; this bundle's U-Net has a fixed text length, a checkpoint's reads more" if max_chunks == 1 else ""
    return f"{begin} are its last {tokens} tokens{fixed}"


def _row(tokenizer: Tokenizer, text: str, most: int) -> tuple[list[int], list[float]]:
    """Ids and weights of the text's tokens, start and end left out."""
    ids: list[int] = []
    weights: list[float] = []
    tokenizer.check(text)
    for part, weight in parse(text):
        found = tokenizer.ids(part, most - len(ids))
        ids += found
        weights += [weight] * len(found)
    return ids, weights

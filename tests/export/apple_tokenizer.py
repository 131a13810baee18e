"""The tokenizer of Apple's Swift package, after BPETokenizer.swift and BPETokenizer+Reading.swift in
apple/ml-stable-diffusion (swift/StableDiffusion/tokenizer). For ASCII, where Swift's characters are code points.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

UNKNOWN = "<|endoftext|>"


class AppleTokenizer:
    """Reads vocab.json and merges.txt of `folder`."""

    def __init__(self, folder: Path) -> None:
        self.vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text("utf-8"))
        self.merges: dict[tuple[str, str], int] = {}
        *lines, _ = (folder / "merges.txt").read_text("utf-8").split("\n")  # what has no line end behind it is not read
        for rank, line in enumerate(lines):
            if line and line[0] != "#":
                first, second = line.split(" ")
                self.merges[first, second] = rank

    def ids(self, text: str) -> list[int]:
        """Of the words alone, without start, end and padding."""
        unknown = self.vocabulary[UNKNOWN]
        return [self.vocabulary.get(token, unknown) for token in self.encode(text)]

    def encode(self, text: str) -> list[str]:
        words = [word for word in text.strip().lower().split(" ") if word]
        return [token for word in words for token in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[str]:
        tokens = list(word)
        tokens[-1] += "</w>"
        while True:
            pairs = {pair for pair in itertools.pairwise(tokens) if pair in self.merges}
            if not pairs:
                return tokens
            tokens = _update(tokens, min(pairs, key=lambda pair: self.merges[pair]))


def _update(tokens: list[str], bigram: tuple[str, str]) -> list[str]:
    found, index = [], 0
    while index < len(tokens):
        try:
            match = tokens.index(bigram[0], index)
        except ValueError:
            return found + tokens[index:]
        found += tokens[index:match]
        whole = match + 1 < len(tokens) and tokens[match + 1] == bigram[1]
        found.append("".join(bigram) if whole else bigram[0])
        index = match + (2 if whole else 1)
    return found

"""The vocabulary of Resources/, with which Apple's Swift package reads added tokens.

Apple's BPETokenizer.swift (apple/ml-stable-diffusion) reads vocab.json and merges.txt alone. It puts a prompt in lower
case, splits it at spaces, takes the characters of a word, the last one with "</w>" behind it, and joins the pair of the
lowest rank until no pair is left. A piece without an id is <|endoftext|>. An added token is therefore one piece where
pairs of higher ranks join what the vocabulary's own pairs leave of it:

    < cat - toy ></w>    toy ></w>,  - toy></w>,  cat -toy></w>,  < cat-toy></w>

Parts of a token have no id: a word with such a pair that is not the token would lose both pieces. So every pair has an
angle bracket, and words without one are read as before. Tokens of two pieces need none: where their pair is in another
word, that word ends in the token, and transformers reads the token there too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from kdc_edge.tokenizer import Tokenizer, read_vocabulary

Pair = tuple[str, str]
END_OF_WORD = "</w>"
COMMENT = "#"  # Apple's package leaves out lines of merges.txt that begin with it, pairs too


@dataclass(frozen=True)
class SwiftVocabulary:
    """What Apple's package reads: the ids of pieces, and the pairs in the order of their ranks."""

    vocab: dict[str, int]
    merges: list[Pair]
    split: tuple[str, ...]  # added tokens that are not read
    several: dict[str, str]  # tokens of several vectors: the token -> all of them

    def notes(self) -> list[str]:
        """Lines for the user: tokens that are not read, and tokens to be written in another way."""
        found = []
        if self.split:
            found.append(
                f"Apple's Swift package splits these added tokens into letters: {', '.join(self.split)}; it reads those"
                " with an angle bracket, such as --embedding FILE:'<name>'"
            )
        if written := [text for token, text in self.several.items() if token not in self.split]:
            found.append(f"Apple's Swift package needs tokens of several vectors written out: {', '.join(written)}")
        return found


def read_swift_vocabulary(folder: Path) -> SwiftVocabulary:
    """The vocabulary of a `tokenizer` folder, with the pieces and pairs of its added tokens. Raises BundleError."""
    tokenizer = Tokenizer.from_folder(folder)
    vocab, merges = read_vocabulary(folder)
    ranks = {pair: rank for rank, pair in enumerate(merges) if not pair[0].startswith(COMMENT)}
    size, split, read = len(vocab), [], dict(vocab)
    for token, index in tokenizer.added.items():
        piece = f"{token.lower()}{END_OF_WORD}"
        twin = read.get(piece, 0) >= size  # in lower case, it is another added token
        joined = None if twin else _join(token.lower(), ranks, len(merges))
        if joined is None:
            split.append(token)
            continue
        ranks |= joined
        merges += joined
        read[piece] = index
    return SwiftVocabulary(read, merges, tuple(split), tokenizer.several)


def _join(word: str, ranks: Mapping[Pair, int], rank: int) -> dict[Pair, int] | None:
    """The pairs that make the word one piece, ranked from `rank` on; None where other words would change.

    Swift's characters are those that are seen, each of one code point or several: only ASCII is sure.
    """
    if not word.isascii() or not word.isprintable() or " " in word:
        return None
    joined: dict[Pair, int] = {}
    while len(pieces := _split(word, {**ranks, **joined})) > 1:
        pairs = [pair for pair in pairwise(pieces) if not pair[0].startswith(COMMENT)]
        bracketed = [pair for pair in pairs if set("<>") & set("".join(pair).removesuffix(END_OF_WORD))]
        if not (possible := bracketed or (pairs if len(pieces) == 2 else [])):
            return None
        joined[possible[-1]] = rank + len(joined)
    return joined


def _split(word: str, ranks: Mapping[Pair, int]) -> list[str]:
    """The pieces that Apple's tokenizer makes of a word."""
    pieces = [*word[:-1], word[-1] + END_OF_WORD]
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        first, second = min(known, key=ranks.__getitem__)
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == (first, second):
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return pieces

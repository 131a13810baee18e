"""Prompts to token ids: CLIP's byte-pair encoding, equal to transformers' CLIPTokenizer.

A tokenizer folder holds vocab.json and merges.txt, or tokenizer.json alone (transformers 5 saves nothing else),
mostly tokenizer_config.json, and in older folders added_tokens.json and special_tokens_map.json; all are untrusted.

    >>> Tokenizer.clip().encode(["a photo of a red flower"])[0, :8].tolist()
    [49406, 320, 1125, 539, 320, 736, 4055, 49407]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from kdc_edge.errors import BundleError, InputError
from kdc_edge.files import read_bounded, read_json, write_atomic

CLIP_FOLDER = Path(__file__).parent / "assets" / "clip-bpe"
CLIP_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words (Radford et al. 2021; openai/CLIP simple_tokenizer.py): letters together, digits one by one.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Characters of a prompt that are read: the first of these that gives more tokens than fit. Few prompts need more than
# the first; the last bounds what white space can cost.
READ_CHARS = (2_000, 20_000, 200_000)
MAX_FILE_BYTES = 16 * 2**20
MAX_LENGTH = 1024  # beyond it, tokenizer_config.json means "no limit noted"


class Tokenizer:
    """Texts to ids, each text framed by a start and an end token, cut and padded to `max_length`."""

    def __init__(
        self, read: Callable[[], tokenizers.Tokenizer], words: tokenizers.Tokenizer, *,
        start_id: int, end_id: int, pad_id: int, max_length: int,
    ) -> None:  # fmt: skip
        """`words` is the vocabulary; `read` reads it once more after each `release`."""
        self._read = read
        self._held: tokenizers.Tokenizer | None = words
        self.start_id = start_id
        self.end_id = end_id
        self.pad_id = pad_id
        self.max_length = max_length
        size = words.get_vocab_size(with_added_tokens=False)
        # Tokens beside vocab.json, such as those of textual inversion, with their ids.
        self.added = {t.content: i for i, t in sorted(words.get_added_tokens_decoder().items()) if i >= size}
        self.several = _several(words)

    @classmethod
    def clip(cls) -> Tokenizer:
        """OpenAI's vocabulary, 49,408 entries, which every Stable Diffusion 1.x checkpoint uses."""
        return cls.from_folder(CLIP_FOLDER)

    @classmethod
    def from_folder(cls, path: Path | str, *, check: Callable[[], object] | None = None) -> Tokenizer:
        """Open a diffusers `tokenizer` folder; `check` is called whenever its files are about to be read.

        Raises BundleError for a file that is missing or malformed.
        """
        if check:
            check()
        folder = Path(path)
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, BundleError) if config_path.exists() else {}
        map_path = folder / "special_tokens_map.json"
        if "added_tokens_decoder" not in config and map_path.exists():
            config = {**config, **read_json(map_path, BundleError)}
        vocab, merges = read_vocabulary(folder)
        added = _added_tokens(folder, config)
        special = {
            role: _special_token(role, default, config, vocab, added, config_path)
            for role, default in (("bos", START), ("eos", END), ("unk", END), ("pad", END))
        }
        try:
            bpe = models.BPE(
                vocab,
                merges,
                unk_token=special["unk"].content,
                end_of_word_suffix="</w>",
                continuing_subword_prefix="",
                fuse_unk=False,
            )
        except Exception as error:  # the library raises nothing narrower
            raise BundleError(f"{folder} holds no byte-pair vocabulary: {error}") from None
        words = tokenizers.Tokenizer(bpe)
        words.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        # Written in a prompt, these are tokens too; transformers takes them out of the text in this order.
        names = {token.content for token in special.values()}
        words.add_tokens([_token(rules, special=rules["content"] in names) for _, rules in sorted(added.items())])
        words.add_special_tokens([*special.values(), *_extra_tokens(config)])
        ids = {role: words.token_to_id(token.content) or 0 for role, token in special.items()}
        return cls(
            lambda: cls.from_folder(path, check=check)._words,
            words,
            start_id=ids["bos"],
            end_id=ids["eos"],
            pad_id=ids["pad"],
            max_length=_read_length(config, config_path),
        )

    @property
    def _words(self) -> tokenizers.Tokenizer:
        words = self._held
        if words is None:
            words = self._held = self._read()
        return words

    def release(self) -> None:
        """Let the vocabulary go, 11 MB of memory for CLIP's; the next text reads the files again, in 0.1 s."""
        self._held = None

    @property
    def size(self) -> int:
        """How many tokens there are, added ones included; ids are below it."""
        return self._words.get_vocab_size(with_added_tokens=True)

    @property
    def tokens(self) -> frozenset[str]:
        return frozenset(self._words.get_vocab(with_added_tokens=True))

    def encode(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Ids of the texts: (B, max_length). What is too long is cut off; `overflow` tells what that is.

        Raises InputError for a prompt that is no text.
        """
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int64)  # (B, 77)
        for row, text in zip(ids, texts, strict=True):
            framed = [self.start_id, *self._encode(text).ids[: self.max_length - 2], self.end_id]
            row[: len(framed)] = framed
        return ids

    def count(self, text: str) -> int:
        """How many tokens the text has, start and end not counted: up to `max_length` - 2 fit (CLIP: 75).

        Of a text that is far too long, its beginning is counted.
        """
        return len(self._encode(text).ids)

    def ids(self, text: str, most: int) -> list[int]:
        """Ids of the text alone, without start and end, `most` at most. Raises InputError for what is no text."""
        return list(self._encode(text, most).ids[: max(0, most)])

    def overflow(self, text: str) -> str:
        """The end of the text that `encode` cuts off; "" when all of it fits."""
        offsets = self._encode(text).offsets
        fits = self.max_length - 2
        text = self._spread(text)
        return text[offsets[fits][0] :] if len(offsets) > fits else ""

    def check(self, text: str) -> None:
        """Raise InputError for a prompt that is no text."""
        if not isinstance(text, str):
            raise InputError(f"a prompt must be text, not {type(text).__name__}: {text!r:.80}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the prompt holds half a character (a lone surrogate) at {error.start}: write it anew"
            ) from None

    def _encode(self, text: str, enough: int | None = None) -> tokenizers.Encoding:
        """Of a text that is far too long, the beginning: more than `enough` tokens, or all that a prompt takes."""
        self.check(text)
        enough = self.max_length if enough is None else enough
        for most in READ_CHARS:
            found = self._words.encode(self._spread(text[:most]), add_special_tokens=False)
            if most >= len(text) or len(found.ids) > enough:
                break
        return found

    def _spread(self, text: str) -> str:
        """Tokens of several vectors written out, as diffusers' maybe_convert_prompt does: <x> to <x> <x>_1 <x>_2."""
        if not self.several:
            return text
        there = set(self._words.encode(text, add_special_tokens=False).tokens)
        for token, all_of_it in self.several.items():
            if token in there:
                text = text.replace(token, all_of_it)
        return text


def _several(words: tokenizers.Tokenizer) -> dict[str, str]:
    """Added tokens that others continue, named with _1, _2, ...: the token -> all of them."""
    added = {token.content for token in words.get_added_tokens_decoder().values()}
    found = {}
    for token in sorted(added):
        rest = takewhile(added.__contains__, (f"{token}_{i}" for i in count(1)))
        if more := list(rest):
            found[token] = " ".join([token, *more])
    return found


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the pairs in the order in which they are joined, from a `tokenizer` folder.

    vocab.json and merges.txt win; where neither is there, tokenizer.json is read. Raises BundleError.
    """
    together = folder / "tokenizer.json"
    if (folder / "vocab.json").exists() or (folder / "merges.txt").exists() or not together.exists():
        vocab = _check_vocab(read_json(folder / "vocab.json", BundleError), folder / "vocab.json")
        lines = _read_text(folder / "merges.txt").replace("\r\n", "\n").split("\n")
        return vocab, _check_merges(lines, vocab, folder / "merges.txt")
    model = read_json(together, BundleError).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not _are_merges(model.get("merges")):
        raise BundleError(f"{together} holds no byte-pair vocabulary: save the tokenizer again")
    vocab = _check_vocab(model["vocab"], together)
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return vocab, _check_merges(lines, vocab, together)


def write_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt where only tokenizer.json is: Apple's and older programs read those."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return
    save_vocabulary(folder, *read_vocabulary(folder))


def save_vocabulary(folder: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
    write_atomic(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    write_atomic(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))


def _are_merges(found: object) -> bool:
    """Older files have "a b", newer ones ["a", "b"]."""
    return isinstance(found, list) and all(
        isinstance(m, str) or (isinstance(m, list) and len(m) == 2 and all(isinstance(x, str) for x in m))
        for m in found
    )


def _read_text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_FILE_BYTES, BundleError).decode()
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: a tokenizer needs vocab.json and merges.txt") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read as text: {error}") from None


def _check_vocab(found: Mapping[str, object], path: Path) -> dict[str, int]:
    """Token -> id. The ids must be 0 ... n - 1, each once: the text encoder's table has no holes."""
    vocab = {token: index for token, index in found.items() if isinstance(index, int) and type(index) is int}
    if not vocab or len(vocab) < len(found) or set(vocab.values()) != set(range(len(vocab))):
        raise BundleError(f"{path} should give every token an id of its own, from 0 without a gap")
    return vocab


def _check_merges(lines: Sequence[str], vocab: Mapping[str, int], path: Path) -> list[tuple[str, str]]:
    """The pairs in the order in which they are joined. A "#version" line may come first."""
    first = 1 if lines and lines[0].startswith("#version") else 0
    merges = []
    for number, line in enumerate(lines[first:], first + 1):
        if not line:
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise BundleError(
                f"{path}, line {number}: {line!r:.80} joins no two tokens of the vocabulary (vocab.json) to a third"
            )
        merges.append((left, right))
    return merges


Rules = Mapping[str, object]  # of an added token: its content, and how it is found in a text


def _added_tokens(folder: Path, config: Mapping[str, object]) -> dict[int, Rules]:
    """Tokens beside the vocabulary, such as those of textual inversion, by the id that their file gives.

    tokenizer_config.json's added_tokens_decoder wins; else tokenizer.json's added_tokens over the older
    added_tokens.json. Ids are the order alone: as in transformers, they go on from the vocabulary's last.
    """
    found: dict[object, object] = {}
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        found = dict(decoder)
    else:
        old, new = folder / "added_tokens.json", folder / "tokenizer.json"
        if old.exists():
            tokens = read_json(old, BundleError)
            if not all(isinstance(index, int) for index in tokens.values()):
                raise BundleError(f"{old} should give every token an id: save the tokenizer again")
            found = {index: {"content": content, "normalized": True} for content, index in tokens.items()}
        listed = read_json(new, BundleError).get("added_tokens") if new.exists() else None
        for rules in listed if isinstance(listed, list) else ():
            if isinstance(rules, dict) and isinstance(rules.get("id"), int | str):
                found[rules.get("id")] = rules
    return {
        int(index): rules
        for index, rules in found.items()
        if isinstance(index, int | str) and str(index).isdecimal() and isinstance(rules, dict) and _content(rules)
    }


def _content(rules: Rules) -> str | None:
    content = rules.get("content")
    return content if isinstance(content, str) and content else None


def _token(rules: Rules, *, special: bool = False) -> AddedToken:
    flags = {name: rules.get(name) is True for name in ("lstrip", "rstrip", "normalized", "single_word")}
    return AddedToken(str(rules["content"]), special=special or rules.get("special") is True, **flags)


def _extra_tokens(config: Mapping[str, object]) -> list[AddedToken]:
    """Special tokens without a role, by name alone or with their rules."""
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    tokens = [{"content": t} if isinstance(t, str) else t for t in (found if isinstance(found, list) else ())]
    return [_token(rules, special=True) for rules in tokens if isinstance(rules, dict) and _content(rules)]


def _special_token(
    role: str,
    default: str,
    config: Mapping[str, object],
    vocab: Mapping[str, int],
    added: Mapping[int, Rules],
    path: Path,
) -> AddedToken:
    """A special token as tokenizer_config.json has it.

    Older files give a dict with the rules by which it is found in a text, newer ones a name and the rules
    among the added tokens.
    """
    found = config.get(f"{role}_token") or default
    rules = found if isinstance(found, dict) else {"content": found}
    content = rules.get("content")
    known = next((token for token in added.values() if token["content"] == content), None)
    if not isinstance(content, str) or (known is None and content not in vocab):
        raise BundleError(f"{path} names the {role}_token {content!r:.80}, which vocab.json does not hold")
    return _token(known or rules, special=True)


def _read_length(config: Mapping[str, object], path: Path) -> int:
    length = config.get("model_max_length") or CLIP_LENGTH
    if not isinstance(length, int | float) or not length >= 3:
        raise BundleError(f"{path} has model_max_length = {length!r:.80}; it must be 3 or more, such as 77")
    return int(length) if length <= MAX_LENGTH else CLIP_LENGTH

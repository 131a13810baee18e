"""Added tokens in Apple's vocab.json and merges.txt: by Apple's algorithm, the ids are those of transformers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from kdc_edge.export.coreml.swift_tokens import read_swift_vocabulary
from kdc_edge.tokenizer import CLIP_FOLDER, read_vocabulary, save_vocabulary
from kdc_edge.train.teachers import GARDEN_TEACHER
from tests.export.apple_tokenizer import AppleTokenizer

FOLDERS = {"clip": CLIP_FOLDER, "garden": GARDEN_TEACHER / "tokenizer"}
TOKENS = [
    "<garden-cat>", "<cat>", *(f"<cat>_{i}" for i in range(1, 13)), "<fat-cat>", "x<cat>", "<Big-Cat>", "<#>",
    "easy<negative>v1.2", "<<3", "<midjourney-style>",
]  # fmt: skip
TWO_PIECES = {"clip": ["easynegative", "rosette", "zqx"], "garden": ["sks"]}
SPLIT = ["bad-hands-5", "unaestheticxlv31", "#cat", "schön", "two words"]
PROMPTS = [
    *TOKENS,
    "a photo of a <garden-cat> and a <cat> in the garden",
    "<fat-cat> <cat>  <garden-cat> <fat-cat>",
    f"a {' '.join(f'<cat>_{i}' for i in range(12, 0, -1))} <cat>",
    " A red flower beside A <Big-Cat> x<cat> <#> <<3",
]


def with_tokens(source: Path, folder: Path, tokens: list[str]) -> Path:
    """A copy of a tokenizer's folder with added tokens behind its last one."""
    shutil.copytree(source, folder)
    size = len(read_vocabulary(folder)[0])
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(tokens)}))
    return folder


def resources_of(tokenizer: Path, folder: Path) -> Path:
    folder.mkdir()
    words = read_swift_vocabulary(tokenizer)
    save_vocabulary(folder, words.vocab, words.merges)
    return folder


@pytest.fixture(scope="module", params=FOLDERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The name of a vocabulary, the tokenizer's folder, and Apple's files of it."""
    root = tmp_path_factory.mktemp(request.param)
    folder = with_tokens(FOLDERS[request.param], root / "tokenizer", TOKENS + TWO_PIECES[request.param] + SPLIT)
    assert list(read_swift_vocabulary(folder).split) == SPLIT
    return request.param, folder, resources_of(folder, root / "Resources")


def test_apples_ids_of_added_tokens_are_those_of_transformers(made: tuple[str, Path, Path]) -> None:
    name, folder, resources = made
    theirs = CLIPTokenizer.from_pretrained(folder)
    apples = AppleTokenizer(resources)
    size = len(read_vocabulary(folder)[0])
    for i, token in enumerate(TOKENS + TWO_PIECES[name]):
        assert apples.ids(token) == [size + i]
    for prompt in [*PROMPTS, *(f"a {token} flower" for token in TWO_PIECES[name])]:
        assert apples.ids(prompt) == theirs(prompt, add_special_tokens=False).input_ids, prompt


def test_other_words_are_read_as_before(made: tuple[str, Path, Path], tmp_path: Path) -> None:
    """Words of the vocabulary, two in one, and with what stands in words of prompts; and by the pairs themselves."""
    name, _folder, resources = made
    before, after = AppleTokenizer(resources_of(FOLDERS[name], tmp_path / "before")), AppleTokenizer(resources)
    known = [token.removesuffix("</w>") for token in sorted(before.vocabulary) if token.endswith("</w>")]
    words = [word for word in known if word.isascii() and not set("<>") & set(word)]
    rng = random.Random(19)
    joints = ["", "-", "_", "'", ".", ",", ":", "|", "#", "5", "cat", "hands-5"]
    for _ in range(200):
        prompt = " ".join(
            rng.choice(words) + (rng.choice(joints) + rng.choice([*words, ""]) if rng.random() < 0.5 else "")
            for _ in range(rng.randint(1, 20))
        )
        assert after.ids(prompt) == before.ids(prompt)
    endings = {f"{token}</w>" for token in TWO_PIECES[name]}
    added = after.merges.keys() - before.merges.keys()
    assert len(added) > 20
    for first, second in added:
        joined = first + second
        assert joined in endings or set("<>") & set(joined.removesuffix("</w>")), joined


def test_notes_say_what_to_write(tmp_path: Path) -> None:
    for tokens, said in (
        ([], []),
        (["<x>", "sks"], []),
        (["<x>", "<x>_1", "<x>_2"], ["needs tokens of several vectors written out: <x> <x>_1 <x>_2"]),
        (["bad-hands-5"], ["splits these added tokens into letters: bad-hands-5; it reads those with"]),
        (["<cat>", "<CAT>"], ["splits these added tokens into letters: <CAT>; "]),  # it reads lower case
    ):
        folder = with_tokens(FOLDERS["garden"], tmp_path / str(len(list(tmp_path.iterdir()))), tokens)
        notes = read_swift_vocabulary(folder).notes()
        assert len(notes) == len(said)
        assert all(wanted in note for wanted, note in zip(said, notes, strict=True))

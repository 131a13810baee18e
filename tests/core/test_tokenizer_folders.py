"""kdc_edge.tokenizer from folders: configurations, added tokens, damaged files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CLIPTokenizer

from kdc_edge.errors import BundleError
from kdc_edge.tokenizer import CLIP_FOLDER, Tokenizer
from tests.core.tokenizer_cases import (
    DECODER,
    END,
    GARDEN_FOLDER,
    NAMES,
    ODD,
    PROMPTS,
    RULES,
    SD2,
    START,
    Pair,
    folder_with,
)


def test_the_pad_token_is_the_configs(tmp_path: Path) -> None:
    padded = Tokenizer.from_folder(folder_with(SD2, tmp_path)).encode(["a"])[0].tolist()
    assert padded == [49406, 320, 49407] + [0] * 74


LEARNED = ["<purple-cat>", "learned2", "<s1>", "<s1> <s2>", "\u00c9l\u00e8ve"]  # by textual inversion
OLD = {token: 49408 + i for i, token in enumerate(LEARNED)}
IDS = {str(index): token for token, index in OLD.items()}
ADDED: dict[str, dict[str, Any]] = {  # file -> content, in the layouts of transformers 4.0 to 5
    "added_tokens.json": {"added_tokens.json": OLD},
    "added_tokens.json, ids with gaps": {"added_tokens.json": {t: 2 * i for t, i in OLD.items()}},
    "added_tokens.json and roles apart": {
        "tokenizer_config.json": {"model_max_length": 77}, "added_tokens.json": OLD,
        "special_tokens_map.json": {"pad_token": "!", "bos_token": {"content": START, **RULES}, "eos_token": END},
    },
    "decoder": {
        "tokenizer_config.json": {**DECODER, "added_tokens_decoder": {
            **DECODER["added_tokens_decoder"], **{i: {"content": t, "special": False, **RULES} for i, t in IDS.items()},
        }},
    },
    "decoder, found otherwise": {
        "tokenizer_config.json": {**DECODER, "added_tokens_decoder": {
            "49408": {"content": "<purple-cat>", **RULES, "normalized": False},
            "49409": {"content": "learned2", **RULES, "single_word": True},
            "49410": {"content": "<s1>", **RULES, "lstrip": True, "rstrip": True, "special": True},
        }},
        "added_tokens.json": {"not read": 49408},
    },
    "padded with an added token": {
        "tokenizer_config.json": {**NAMES, "pad_token": "<pad>"}, "added_tokens.json": {"<pad>": 49408},
    },
    "extra special tokens": {"tokenizer_config.json": {**NAMES, "extra_special_tokens": ["<purple-cat>"]}},
    "additional special tokens": {
        "tokenizer_config.json": {**NAMES, "additional_special_tokens": ["<purple-cat>", "learned2"]},
        "added_tokens.json": {"learned2": 49408, "<purple-cat>": 49409},
    },
}  # fmt: skip
WITH_LEARNED = [
    "a <purple-cat> sits", "a<purple-cat>b", "A <PURPLE-CAT> x <Purple-Cat>",
    "my learned2, Learned2 learned23 xlearned2", "<s1> <s2>", "<s1><s2>", "  <s1>   <s2>  ",
    "\u00c9l\u00e8ve e\u0301le\u0300ve", "<purple-cat>" * 100, "<|endoftext|><s1>",
]  # fmt: skip


@pytest.fixture(scope="module", params=[*ADDED, "saved by transformers 5", "saved beside the vocabulary"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("learned")
    if request.param in ADDED:
        folder = folder_with(NAMES, place)
        for name, content in ADDED[request.param].items():
            (folder / name).write_text(json.dumps(content))
        return folder
    theirs = CLIPTokenizer.from_pretrained(folder_with(NAMES, place / "plain"))
    theirs.add_tokens(LEARNED)
    theirs.save_pretrained(place)
    if request.param == "saved beside the vocabulary":
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(CLIP_FOLDER / name, place / name)
        (place / "added_tokens.json").write_text(json.dumps({"<unread>": 49408}))
    return place


def test_added_tokens_equal_transformers_in_every_layout(learned: Path) -> None:
    pair = Pair(learned)
    texts = WITH_LEARNED + PROMPTS[::4]
    ours, theirs = pair.ours.encode(texts), pair.expected(texts)
    assert [text for text, a, b in zip(texts, ours, theirs, strict=True) if not np.array_equal(a, b)] == []


def test_added_tokens_are_one_token_each(tmp_path: Path) -> None:
    folder = folder_with(NAMES, tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps(OLD))
    ours = Tokenizer.from_folder(folder)
    assert ours.encode(["a <purple-cat> learned2"])[0, :5].tolist() == [49406, 320, 49408, 49409, 49407]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("vocab.json", None, "missing"),
        ("merges.txt", None, "missing"),
        ("vocab.json", "{", "cannot be read as JSON"),
        ("vocab.json", "[" * 100_000, "cannot be read as JSON"),
        ("vocab.json", "[]", "should hold a JSON object"),
        ("vocab.json", "{}", "id of its own"),
        ("vocab.json", '{"a": "0"}', "id of its own"),
        ("vocab.json", '{"a": 0, "b": 0}', "id of its own"),
        ("vocab.json", '{"a": 1, "b": 2}', "id of its own"),
        ("vocab.json", '{"a": -1, "b": 0}', "id of its own"),
        ("vocab.json", '{"a": true, "b": 0}', "id of its own"),
        ("vocab.json", '{"a": 0}', "vocab.json"),
        ("vocab.json", " " * (16 * 2**20 + 1), "larger than 16 MiB"),
        ("merges.txt", " " * (16 * 2**20 + 1), "larger than 16 MiB"),
        ("merges.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("merges.txt", "#version: 0.2\nabc\n", "line 2"),
        ("merges.txt", "zzzz qqqq\n", "line 1"),
        ("merges.txt", "a b c\n", "line 1"),
        ("added_tokens.json", '{"<cat>": "1"}', "give every token an id"),
        ("added_tokens.json", "[]", "should hold a JSON object"),
        ("special_tokens_map.json", '{"pad_token": "no such token"}', "pad_token"),
        ("tokenizer_config.json", "nonsense", "cannot be read as JSON"),
        ("tokenizer_config.json", '{"pad_token": "no such token"}', "pad_token"),
        ("tokenizer_config.json", '{"pad_token": 5}', "pad_token"),
        ("tokenizer_config.json", '{"eos_token": {"content": null}}', "eos_token"),
        ("tokenizer_config.json", '{"model_max_length": 2}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": "77"}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length"),
        ("tokenizer_config.json", '{"model_max_length": -77}', "model_max_length"),
    ],
)
def test_a_malformed_folder_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes | None, said: str
) -> None:
    folder = folder_with(NAMES, tmp_path, GARDEN_FOLDER)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BundleError, match=said) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("noted", "used"), [(77, 77), (16, 16), (10**30, 77), (None, 77), (77.0, 77)])
def test_the_length_is_the_configs(tmp_path: Path, noted: object, used: int) -> None:
    folder = folder_with({**NAMES, "model_max_length": noted}, tmp_path, GARDEN_FOLDER)
    assert Tokenizer.from_folder(folder).encode(["a red flower " * 40]).shape == (1, used)


def test_odd_config_values_are_ignored(tmp_path: Path) -> None:
    config = {**NAMES, "added_tokens_decoder": [1, 2], "surplus": {"deep": [None]}}
    plain = Tokenizer.from_folder(folder_with(NAMES, tmp_path / "a", GARDEN_FOLDER))
    odd = Tokenizer.from_folder(folder_with(config, tmp_path / "b", GARDEN_FOLDER))
    assert np.array_equal(plain.encode(ODD[:40]), odd.encode(ODD[:40]))


def test_windows_line_ends_in_merges_change_nothing(tmp_path: Path) -> None:
    folder = folder_with(NAMES, tmp_path, GARDEN_FOLDER)
    before = Tokenizer.from_folder(folder).encode(ODD[:40])
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert np.array_equal(before, Tokenizer.from_folder(folder).encode(ODD[:40]))


def test_the_vocabulary_ships_with_its_licence() -> None:
    assert "MIT License" in (CLIP_FOLDER / "LICENSE").read_text("utf-8")


def test_a_vocabulary_that_was_let_go_is_checked_and_read_again(tmp_path: Path) -> None:
    folder = shutil.copytree(GARDEN_FOLDER, tmp_path / "tokenizer")
    checks: list[str] = []
    tokenizer = Tokenizer.from_folder(folder, check=lambda: checks.append("once more"))
    before = tokenizer.encode(["a red flower, [faint]", ""])
    tokenizer.release()
    assert len(checks) == 1  # not before it is needed
    assert (tokenizer.encode(["a red flower, [faint]", ""]) == before).all()
    assert tokenizer.size == Tokenizer.from_folder(folder).size
    assert len(checks) == 2
    tokenizer.release()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(BundleError, match=r"vocab\.json"):
        tokenizer.encode(["a red flower"])

"""kdc_edge.tokenizer against transformers' CLIPTokenizer, with the full vocabulary and the garden's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdc_edge.errors import InputError
from kdc_edge.tokenizer import Tokenizer
from tests.core.tokenizer_cases import CONFIGS, GARDEN_FOLDER, PROMPTS, Pair, folder_with


@pytest.fixture(scope="module", params=[*CONFIGS, "none", "garden"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    place = tmp_path_factory.mktemp("tokenizer")
    if request.param == "garden":
        return Pair(GARDEN_FOLDER)
    return Pair(folder_with(CONFIGS.get(request.param), place))


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


def test_odd_prompts_equal_transformers(pair: Pair) -> None:
    ours, theirs = pair.ours.encode(PROMPTS), pair.expected(PROMPTS)
    assert ours.dtype == np.int64
    assert ours.shape == (len(PROMPTS), 77)
    assert [text for text, a, b in zip(PROMPTS, ours, theirs, strict=True) if not np.array_equal(a, b)] == []


def test_any_text_equals_transformers(pair: Pair) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=120), min_size=1, max_size=4))
    def check(texts: list[str]) -> None:
        assert np.array_equal(pair.ours.encode(texts), pair.expected(texts))

    check()


def test_count_equals_transformers(pair: Pair) -> None:
    for text in PROMPTS[::3]:
        assert pair.ours.count(text) == len(pair.theirs(text, add_special_tokens=False)["input_ids"])


def test_the_known_prompt(clip: Tokenizer) -> None:
    ids = clip.encode(["a photo of a red flower"])[0].tolist()
    assert ids == [49406, 320, 1125, 539, 320, 736, 4055, 49407] + [49407] * 69
    assert (clip.start_id, clip.end_id, clip.pad_id, clip.max_length) == (49406, 49407, 49407, 77)


def test_no_texts_give_no_rows(clip: Tokenizer) -> None:
    assert clip.encode([]).shape == (0, 77)


def test_overflow_is_what_encode_cuts_off(clip: Tokenizer) -> None:
    words = [f"w{i}" for i in range(60)]  # "w" and each digit: up to three tokens a word
    text = " ".join(words)
    lost = clip.overflow(text)
    assert lost
    assert text.endswith(lost)
    kept = text[: -len(lost)]
    assert clip.count(kept) == 75
    assert clip.count(kept) + clip.count(lost) == clip.count(text)
    assert np.array_equal(clip.encode([kept]), clip.encode([text]))


def test_overflow_counts_from_the_text_as_it_was_typed(clip: Tokenizer) -> None:
    """Case, spaces and composed accents change on the way to tokens; what is shown is the user's own text."""
    text = "É  E\u0301\n\n" * 40 + "THE END"
    assert clip.overflow(text).endswith("THE END")
    assert text.endswith(clip.overflow(text))


def test_overflow_is_empty_when_all_fits(clip: Tokenizer) -> None:
    assert clip.overflow("") == ""
    assert clip.count("a " * 75) == 75
    assert clip.overflow("a " * 75) == ""
    assert clip.overflow("a " * 75 + "b") == "b"


@pytest.mark.parametrize(
    ("text", "said"),
    [("half \ud83d", "lone surrogate"), ("a" * 3000 + "\ud83d", "at 3000"), (None, "NoneType"), (b"a", "bytes")],
)
def test_a_prompt_that_cannot_be_used_is_refused_in_one_line(clip: Tokenizer, text: Any, said: str) -> None:
    for use in (lambda: clip.encode([text]), lambda: clip.count(text), lambda: clip.overflow(text)):
        with pytest.raises(InputError, match=said) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert clip.encode(["a" * 2000]).shape == (1, 77)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 3000,
        "a" * 5000,
        "\U0001f600" * 3000,
        " " * 15_000 + "red flower",
        "red\n" * 10_000 + "x",
        "red " + " " * 150_000 + "x",
    ],
)
def test_a_long_prompt_is_cut_as_transformers_cuts_it(pair: Pair, text: str) -> None:
    assert np.array_equal(pair.ours.encode([text]), pair.expected([text]))
    lost = pair.ours.overflow(text)
    assert text.endswith(lost)
    assert bool(lost) == (pair.ours.count(text) > 75)

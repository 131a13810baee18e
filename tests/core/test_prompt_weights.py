"""Prompt weights: AUTOMATIC1111's rules, against a formula of its own, and prompts longer than one chunk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kdc_edge.errors import InputError
from kdc_edge.pipeline import Pipeline
from kdc_edge.prompt_weights import MAX_CHUNKS, overflow, parse, plain, weighted
from kdc_edge.request import Request
from kdc_edge.tokenizer import CLIP_FOLDER, Tokenizer
from tests.bench.rows import MODEL
from tests.core.test_pipeline import Unet, decode


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        # The examples of AUTOMATIC1111's own parser that have partners for all brackets.
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("((two)) [[faint]]", [("two", 1.21), (" ", 1), ("faint", 1 / 1.21)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
        ("(red : 1.3 )", [("red ", 1.3)]),
        ("(a:.5)(b:0)", [("a", 0.5), ("b", 0)]),
        # What parses to nothing is text.
        ("a smiley :) and (: too", [("a smiley :) and (: too", 1)]),
        ("(unbalanced", [("(unbalanced", 1)]),
        ("a () [ ] b)", [("a () [ ] b)", 1)]),
        ("(a]", [("(a]", 1)]),
        ("a: b, 16:9", [("a: b, 16:9", 1)]),
        ("(red:11)", [("(red:11)", 1)]),
        ("[red:1.3)", [("[red:1.3)", 1)]),
        ("C:\\dir\\", [("C:\\dir\\", 1)]),
        ("", []),
    ],
)  # fmt: skip
def test_brackets(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in expected], rtol=1e-9)


def test_a_crafted_prompt_takes_no_time() -> None:
    assert parse("(" * 20_000 + "a" + ")" * 20_000)[0][1] == pytest.approx(1.1**32)
    assert parse("(a:" + "1" * 100_000) == [("(a:" + "1" * 100_000, 1)]
    for text in ("(" * 50_000, ":" * 50_000, "(:1" * 20_000, "\\" * 50_000):
        assert "".join(part for part, _ in parse(text)) == text.replace("\\\\", "\\")


def embed(**inputs: np.ndarray) -> np.ndarray:
    """Hidden states (B, 77, 8) that tell each token and each place."""
    ids = inputs["input_ids"][..., None]
    places = np.arange(77)[None, :, None]
    return np.asarray(np.sin(ids * np.arange(1, 9) / 7) + places / 50, np.float32)


def test_weights_scale_tokens_and_the_mean_stays(clip: Tokenizer) -> None:
    """Against the rule written out token by token."""
    tokens = weighted(clip, ["a (red:1.5) [flower]", "a fish"])
    hidden = embed(input_ids=tokens.ids)
    found = tokens.join(hidden)
    np.testing.assert_array_equal(tokens.ids, clip.encode(["a red flower", "a fish"]))
    expected = hidden[0].copy()
    for place, weight in ((2, 1.5), (3, 1 / 1.1)):  # start, a, red, flower
        for channel in range(8):
            expected[place, channel] *= weight
    expected *= hidden[0].mean() / expected.mean()
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)
    np.testing.assert_allclose(found[1], hidden[1], rtol=1e-6)


def test_without_weights_it_is_the_plain_prompt(clip: Tokenizer) -> None:
    texts = ["a red flower", "", "a " * 75]
    tokens, expected = weighted(clip, texts), plain(clip, texts)
    assert np.array_equal(tokens.ids, expected.ids)
    hidden = embed(input_ids=tokens.ids)
    assert tokens.join(hidden).tobytes() == hidden.tobytes()


def test_long_prompts_are_chunks_in_a_row(clip: Tokenizer) -> None:
    text = "a " * 75 + "(red flower:1.2)"
    tokens = weighted(clip, [text, "a fish"])
    assert tokens.chunks == 2
    expected = clip.encode(["a " * 75, "red flower", "a fish", ""])
    np.testing.assert_array_equal(tokens.ids, expected)
    assert tokens.weights[1, :4].tolist() == pytest.approx([1, 1.2, 1.2, 1])
    joined = tokens.join(embed(input_ids=tokens.ids))
    assert joined.shape == (2, 154, 8)
    np.testing.assert_allclose(joined[0, :77], embed(input_ids=expected[:1])[0])
    assert weighted(clip, ["a " * 10_000]).chunks == MAX_CHUNKS
    assert weighted(clip, [text], max_chunks=1).ids.shape == (1, 77)
    assert [overflow(clip, text, max_chunks=n) for n in (1, 2)] == [2, 0]
    assert overflow(clip, "x " * 5_000, max_chunks=8) == 5_000 - 8 * 75


def test_textual_inversion_tokens_work_in_brackets(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CLIP_FOLDER, tmp_path / "tokenizer"))
    (folder / "added_tokens.json").write_text(json.dumps({"<garden-rose>": 49408}))
    tokenizer = Tokenizer.from_folder(folder)
    tokens = weighted(tokenizer, ["a (<garden-rose>:1.3) here"])
    ((place,),) = np.nonzero(tokens.ids[0] == 49408)
    assert tokens.weights[0, place] == np.float32(1.3)


def make(max_chunks: int) -> Pipeline:
    return Pipeline(
        MODEL,
        Tokenizer.clip(),
        {"text_encoder": embed, "unet": Unet(), "vae_decoder": decode},
        max_chunks=max_chunks,
    )


def test_the_pipeline_reads_weights_where_it_is_asked_to() -> None:
    pipeline = make(MAX_CHUNKS)
    unet = pipeline.components["unet"]
    assert isinstance(unet, Unet)

    def last(*requests: Request) -> np.ndarray:
        *_, found = (done.latents for done in pipeline.run(*requests) if done.latents is not None)
        return found

    heavy, taken = Request("a (red:2) fish", steps=2, weighted=True), Request("a (red:2) fish", steps=2)
    assert np.abs(last(heavy) - last(taken)).max() > 1e-4
    long = Request("a " * 100, "short", steps=2, weighted=True)
    assert [batch[0] for batch in pipeline.batches([heavy, long])] == [heavy, long]
    with pytest.raises(InputError, match="equally many chunks"):
        last(heavy, long)
    assert last(long).shape == (1, 4, 16, 16)
    list(pipeline.prepare(long))
    assert unet.prepared[0]["encoder_hidden_states"][1] == 154
    fixed = make(1)
    assert len(fixed.batches([heavy, long])[0]) == 2
    with pytest.raises(InputError, match="half a character"):
        pipeline.check(Request("\ud800", weighted=True))

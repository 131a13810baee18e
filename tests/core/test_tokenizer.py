"""kdc_edge.tokenizer against transformers' CLIPTokenizer, with the full vocabulary and the garden's."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from kdc_edge.errors import BundleError, InputError
from kdc_edge.tokenizer import CLIP_FOLDER, Tokenizer

GARDEN_FOLDER = Path(__file__).parents[2] / "train" / "assets" / "garden-teacher" / "tokenizer"

# The three ways in which tokenizer_config.json of published checkpoints writes the special tokens.
RULES = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
START, END = "<|startoftext|>", "<|endoftext|>"
NAMES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END, "model_max_length": 77}
SD1 = {
    **{f"{role}_token": {"__type": "AddedToken", "content": END, **RULES} for role in ("eos", "unk")},
    "bos_token": {"__type": "AddedToken", "content": START, **RULES},
    "pad_token": END,
    "model_max_length": 77,
}
SD2 = {**SD1, "pad_token": "!"}
DECODER = {
    **NAMES,
    "added_tokens_decoder": {
        "49406": {"content": START, "special": True, **RULES},
        "49407": {"content": END, "special": True, **RULES, "normalized": False},
    },
}
CONFIGS: dict[str, dict[str, Any]] = {"names": NAMES, "sd1": SD1, "sd2": SD2, "decoder": DECODER}

ODD = [
    "",
    " ",
    "\t\n\r\n ",
    "a",
    "a photo of a red flower",
    "A PHOTO OF A RED FLOWER",
    "  spaces   everywhere\u00a0\u2003\u3000here ",
    "line\nbreak\r\nand\ttab",
    "it's we're I'd you'll they've I'm don't IT'S 's 'S ''s",
    "1234567890 3.14 1,000,000 ½ ² Ⅷ ٣٤ ५ 一二三",
    "wow! great !! !!! ?!",
    "(masterpiece:1.3), [best|worst], {a|b} <lora:x:0.8>",
    "<b>bold</b> &amp; &lt;i&gt; &nbsp; <!-- c --> &#39;",
    "https://example.org/a?b=c&d=e#f user@example.org",
    "<|endoftext|>",
    "<|startoftext|>",
    "a <|endoftext|> b",
    "a<|endoftext|>b<|startoftext|>c",
    "<|ENDOFTEXT|> <|StartOfText|>",
    "<|endoftext|> <|endoftext|><|endoftext|>!",
    "<| endoftext |> <|endoftext|",
    "café naïve Zürich Ångström ñandú",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "İstanbul ıI ẞß ǅ ﬁ ﬂ Å Ω K",
    "Σίσυφος ΑΘΗΝΑ ἀρχή",
    "Красный цветок ЁЖИК",
    "红色的花 在草地上",
    "赤い花、青い蝶。カタカナ ﾊﾝｶｸ",
    "빨간 꽃 \u1112\u1161\u11ab",
    "زهرة حمراء جميلة",
    "פרח אדום שָׁלוֹם",
    "लाल फूल क्षत्रिय",
    "ดอกไม้สีแดง",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "zero\u200bwidth\u200cnon\u200djoiner\ufeffbom\u2060word",
    "soft\u00adhyphen",
    "😀 🌸🌺 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 ☕️ ❤️",
    "😀text😀",
    "hello\x00world\x01\x02\x1b[31m\x7f\x85",
    "\ufffd \uffff \U0010ffff \ue000",
    "Z̷̢̛a̸̡͝l̵̨͠g̶̛͜o̴̢͠",
    "𝕱𝖆𝖓𝖈𝖞 𝓽𝓮𝔁𝓽 ｆｕｌｌ ｗｉｄｔｈ",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "a" * 300,
    "!" * 300,
    "😀" * 120,
    "word " * 400,
    " ".join(f"w{i}" for i in range(400)),
    "a red flower " * 6 + "<|endoftext|> tail",
    "— – … “quotes” ‘single’ «guillemets» • § ¶ † ‰ € £ ¥ ©®™",
    "under_score __init__ snake_case camelCase kebab-case",
    "C++ C# .NET 3D 4k 8K 16:9 f/1.8 1/250s ISO100",
    "a\u0300\u0301\u0302\u0303",
    "\\ / | ~ ` ^ # $ % & * + = @",
]


def random_prompts(n: int) -> list[str]:
    """Words, signs and odd characters in every mixture, the same on every run."""
    rng = random.Random(0)
    pieces = [
        "flower",
        "RED",
        "l'eau",
        "'s",
        " ",
        "  ",
        "\n",
        "!",
        "1",
        "99",
        "é",
        "e\u0301",
        "花",
        "🌸",
        "ß",
        "İ",
    ]
    pieces += [END, START, "<|", "|>", "\u200d", "\x07", "شي", ".", ",", "-", "_", "(", ":1.2)", "ﬁ", "½"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(n)]


PROMPTS = [prompt[:2000] for prompt in ODD + random_prompts(250)]


def folder_with(config: dict[str, Any] | None, place: Path, source: Path = CLIP_FOLDER) -> Path:
    place.mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, place / name)
    if config is not None:
        (place / "tokenizer_config.json").write_text(json.dumps(config))
    return place


class Pair:
    """Our tokenizer and transformers', from one folder."""

    def __init__(self, folder: Path) -> None:
        self.ours = Tokenizer.from_folder(folder)
        self.theirs = CLIPTokenizer.from_pretrained(folder)

    def expected(self, texts: list[str]) -> np.ndarray:
        options = {"padding": "max_length", "truncation": True, "max_length": self.ours.max_length}
        return np.array(self.theirs(texts, **options)["input_ids"])


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


def test_the_pad_token_is_the_configs(tmp_path: Path) -> None:
    padded = Tokenizer.from_folder(folder_with(SD2, tmp_path)).encode(["a"])[0].tolist()
    assert padded == [49406, 320, 49407] + [0] * 74


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

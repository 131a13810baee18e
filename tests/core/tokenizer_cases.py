"""Folders of a tokenizer as checkpoints have them, and prompts of every kind."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import CLIPTokenizer

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

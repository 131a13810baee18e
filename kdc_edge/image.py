"""Images: from the decoder's floats to pixels, to a PNG that says how it was made, and back.

    pixels = to_pixels(image)                                                 # uint8 (B, H, W, 3)
    save_png(Path("out.png"), pixels[0], {"prompt": "a red flower", "Steps": 20, "Seed": 1})
    read_parameters(Path("out.png"))                            # {"prompt": ..., "Steps": "20", "Seed": "1"}

The parameters are one text chunk in the form that AUTOMATIC1111's interface and its relatives read:

    a red flower
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 1, Size: 64x64, Model: "garden, small"
"""

from __future__ import annotations

import io
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from kdc_edge.errors import InputError
from kdc_edge.files import unwritable, write_atomic

Pixels = NDArray[np.uint8]  # (H, W, 3)

# A linear fit of SD 1.x's decoder: keturn, "Decoding latents to RGB without upscaling", Hugging Face forums, 2022.
SD1_LATENT_TO_RGB = np.array(
    [[0.298, 0.207, 0.208], [0.187, 0.286, 0.173], [-0.158, 0.189, 0.264], [-0.184, -0.271, -0.473]]
)
CHUNK = "parameters"
NEGATIVE = "Negative prompt: "
NAME = r"\w[\w \-/]++"
# Possessive throughout: a crafted text is refused in one pass instead of 2**n.
SETTING = re.compile(rf'\s*+({NAME}):\s*+("(?:\\.|[^\\"])*+"|(?!")[^,]*+)(?:,|$)')
SETTINGS = re.compile(rf"(?:{SETTING.pattern})++")


def to_pixels(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The decoder's output (B, 3, H, W) in [-1, 1] as pixels (B, H, W, 3), as diffusers does.

    Raises InputError for values that are no numbers, which an overflow in half precision leaves.
    """
    if np.isnan(images).any():
        raise InputError("the image holds values that are no numbers: keep the decoder in fp32")
    halved = images.astype(np.float32) * np.float32(0.5)
    unit: NDArray[np.float32] = np.clip(halved + np.float32(0.5), 0, 1)
    return (unit * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def preview(latents: NDArray[np.floating], vae_scale: int) -> NDArray[np.uint8]:
    """Latents (B, C, h, w), as the U-Net has them, as small images (B, h, w, 3), without the decoder.

    In colour for Stable Diffusion 1.x; for other models, whose colours are unknown, the mean of the channels in grey.
    """
    channels = latents.shape[1]
    to_rgb = SD1_LATENT_TO_RGB if (channels, vae_scale) == (4, 8) else np.full((channels, 3), 1 / channels)
    finite = np.nan_to_num(latents, posinf=0, neginf=0)  # of an overflow, which the decoder's image tells
    return to_pixels(np.einsum("bchw,cr->brhw", finite, to_rgb))


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two uint8 images of one shape, in dB; infinite when they are equal."""
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise InputError(f"two uint8 images of one size are needed, not {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    mean_square = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def grid(images: Sequence[Pixels], columns: int) -> Pixels:
    """Images of one size side by side, row by row, white where none is left: (rows * H, columns * W, 3)."""
    if not len(images) or columns < 1:
        raise InputError(f"a grid needs an image and a column, not {len(images)} and {columns}")
    if len({image.shape for image in images}) > 1:
        raise InputError("a grid needs images of one size: make them with the same width and height")
    height, width, _ = images[0].shape
    rows = math.ceil(len(images) / columns)
    cells = np.full((rows * columns, height, width, 3), 255, np.uint8)
    cells[: len(images)] = images
    cells = cells.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)  # (r, H, c, W, 3)
    return cells.reshape(rows * height, columns * width, 3)


def save_png(
    path: Path | str, pixels: Pixels, parameters: Mapping[str, object] | None = None, *, new: bool = False
) -> None:
    """Write pixels, uint8 (H, W, 3), as a PNG: whole, or not at all. Raises InputError as `encode_png` does, and
    for a place that cannot be written; with `new`, FileExistsError where there is a file of this name."""
    try:
        write_atomic(Path(path), encode_png(pixels, parameters), new=new)
    except OSError as error:
        if new and Path(path).is_file():
            raise
        raise unwritable(Path(path), error) from None


def encode_png(pixels: Pixels, parameters: Mapping[str, object] | None = None) -> bytes:
    """Pixels, uint8 (H, W, 3), as the bytes of a PNG.

    `parameters` holds "prompt", "negative_prompt" and settings by the names that user interfaces know, such
    as "Steps". Line breaks and control characters become spaces; to the tokenizer a line break is one too.
    Raises InputError for other pixels, and for a setting's name that could not be read back.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise InputError(f"a PNG needs uint8 pixels of shape (H, W, 3), not {pixels.dtype} {pixels.shape}")
    chunks = PngImagePlugin.PngInfo()
    if parameters is not None:
        chunks.add_text(CHUNK, format_parameters(parameters))  # iTXt (UTF-8) where Latin-1 is not enough
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_parameters(path: Path | str) -> dict[str, str]:
    """What `save_png` or a relative of AUTOMATIC1111's interface wrote; {} when the PNG says nothing.

    Only the head of the file is read, no pixels are decoded. Raises InputError for a file that is no PNG, or
    one with an image or a text of a size that only an attack has.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                text = image.info.get(CHUNK)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path} claims an absurd number of pixels: do not open it") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for a broken PNG
        reason = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read as a PNG: {reason:.200}") from None
    return parse_parameters(text) if isinstance(text, str) else {}


def format_parameters(parameters: Mapping[str, object]) -> str:
    """The text of the chunk: the prompt's line, the negative prompt's if there is one, the settings'."""
    lines = [_one_line(parameters.get("prompt", ""))]
    if negative := _one_line(parameters.get("negative_prompt", "")):
        lines.append(NEGATIVE + negative)
    settings = {name: value for name, value in parameters.items() if name not in ("prompt", "negative_prompt")}
    if unreadable := [name for name in settings if not re.fullmatch(NAME, name)]:
        raise InputError(f"the parameter's name {unreadable[0]!r} cannot be read back: use letters and spaces")
    lines.append(", ".join(f"{name}: {_quoted(_one_line(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def parse_parameters(text: str) -> dict[str, str]:
    """The other way. Prompts of several lines, which other programs write, are understood too."""
    lines = text.split("\n")
    has_settings = len(lines) > 1 and (not lines[-1] or SETTINGS.fullmatch(lines[-1]) is not None)
    settings = lines.pop() if has_settings else ""
    starts = [i for i, line in enumerate(lines) if i > 0 and line.startswith(NEGATIVE)]
    end = starts[0] if starts else len(lines)
    found = {"prompt": "\n".join(lines[:end])}
    if starts:
        found["negative_prompt"] = "\n".join(lines[end:]).removeprefix(NEGATIVE)
    for name, value in SETTING.findall(settings):
        found[name] = _unquoted(value)
    return found


def _one_line(value: object) -> str:
    """The value's text without control characters; lone surrogates, which UTF-8 cannot encode, are replaced."""
    text = str(value).replace("\r\n", "\n").encode("utf-8", "replace").decode()
    return "".join(" " if unicodedata.category(character) == "Cc" else character for character in text)


def _quoted(value: str) -> str:
    plain = value == value.strip() and not any(mark in value for mark in ',:"')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value

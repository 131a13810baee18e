"""Untrusted image files as square RGB arrays: every oddity is either handled or named, none ends a run.

    read_image(Path("rose.jpg"), size=512)      # uint8 (512, 512, 3), or LeftOut with the reason

Handled: EXIF rotation, CMYK, palettes, grey, transparency (on white), 16 and 32 bits a channel, animations (the
first image). Left out: what cannot be read, is cut short, is too small, or unpacks to too many pixels or bytes.
What has to be converted is converted in strips, so that an image is in memory twice at most.
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

Crop = Literal["center", "random"]  # of the square that an image is cut to

MAX_PIXELS = 100_000_000  # more is a mistake or a decompression bomb
MAX_BYTES = 2**28  # as the file has its samples: 67 million pixels of RGBA, half as many with 16 bits a channel
STRIP_PIXELS = 2**22  # converted at a time
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".bin", ".ckpt"})
ENLARGED_AT_MOST = 4  # times; a smaller image is left out


@dataclass(eq=False)
class LeftOut(Exception):
    """A sample that is not trained on: what it is called, and why (a few words, so that they can be counted)."""

    name: str
    reason: str


def read_image(
    content: Path | bytes | Image.Image, *, size: int, name: str = "", crop: Crop = "center", seed: int = 0
) -> np.ndarray:
    """An image's middle square, reduced or enlarged to `size` pixels a side: uint8 (size, size, 3).

    A random square's place depends on `name` and `seed`.
    Raises LeftOut for an image that cannot be used.
    """
    name = name or str(content)[:200]
    place = random.Random(f"{seed} {name}").random() if crop == "random" else 0.5
    try:
        with warnings.catch_warnings():  # Pillow warns of odd metadata, and of bombs, which are refused below
            warnings.simplefilter("ignore")
            if isinstance(content, Image.Image):
                return _square(content, size, name, place)
            opened = io.BytesIO(content) if isinstance(content, bytes) else content
            with Image.open(opened, formats=FORMATS) as image:
                return _square(image, size, name, place)
    except LeftOut:
        raise
    except Image.DecompressionBombError:
        raise LeftOut(name, f"more than {MAX_PIXELS // 10**6} million pixels") from None
    except FileNotFoundError:
        raise LeftOut(name, "missing") from None
    except Exception:  # Pillow's decoders raise whatever comes: OSError, SyntaxError, struct.error, ValueError
        raise LeftOut(name, "cannot be read as an image") from None


def _square(image: Image.Image, size: int, name: str, place: float) -> np.ndarray:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise LeftOut(name, f"more than {MAX_PIXELS // 10**6} million pixels")
    if width * height * _bytes_a_pixel(image) > MAX_BYTES:
        raise LeftOut(name, f"unpacks to more than {MAX_BYTES // 2**20} MiB")
    if min(width, height) * ENLARGED_AT_MOST < size:
        raise LeftOut(name, f"smaller than {-(-size // ENLARGED_AT_MOST)} pixels")
    ImageOps.exif_transpose(image, in_place=True)
    square = ImageOps.fit(_to_rgb(image), (size, size), Image.Resampling.LANCZOS, centering=(place, place))
    return np.array(square)  # a copy that may be written to


def _bytes_a_pixel(image: Image.Image) -> int:
    """What Pillow keeps of a pixel, or what the file has of it where that is more: a decoder may hold both."""
    channels = len(image.getbands())
    kept = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}.get(image.mode, 4)
    bits = image.tag_v2.get(258) or 8 if isinstance(image, TiffImagePlugin.TiffImageFile) else 8  # BitsPerSample
    stored = sum(bits) if isinstance(bits, tuple) else bits * channels
    if any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):
        stored = max(stored, 16 * channels)
    return max(kept, -(-stored // 8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a channel: Pillow's own conversion clips
        largest = image.getextrema()[1]
        top = 65535.0 if isinstance(largest, int | float) and largest > 255 else 255.0
        return _in_strips(image, lambda strip: _scaled(strip, top))
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The image as RGB, converted some rows at a time."""
    found = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        strip.info = image.info  # a palette's transparent colour
        found.paste(convert(strip), (0, top))
    return found


def _scaled(image: Image.Image, top: float) -> Image.Image:
    values = np.asarray(image, np.float64)
    return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, with_alpha).convert("RGB")

"""Untrusted image files as square RGB arrays: every oddity is either handled or named, none ends a run.

    read_image(Path("rose.jpg"), size=512)      # uint8 (512, 512, 3), or LeftOut with the reason

Handled: EXIF rotation, CMYK, palettes, grey, transparency (on white), 16 and 32 bits a channel, animations (the
first image). Left out: what cannot be read, is cut short, is too small, or unpacks to too many pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000  # more is a mistake or a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
PICKLES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".bin", ".ckpt"})
ENLARGED_AT_MOST = 4  # times; a smaller image is left out


@dataclass(eq=False)
class LeftOut(Exception):
    """A sample that is not trained on: what it is called, and why (a few words, so that they can be counted)."""

    name: str
    reason: str


def read_image(content: Path | bytes | Image.Image, *, size: int, name: str = "") -> np.ndarray:
    """An image's middle square, reduced or enlarged to `size` pixels a side: uint8 (size, size, 3).

    Raises LeftOut for an image that cannot be used.
    """
    name = name or str(content)[:200]
    try:
        with warnings.catch_warnings():  # Pillow warns of odd metadata, and of bombs, which are refused below
            warnings.simplefilter("ignore")
            if isinstance(content, Image.Image):
                return _square(content, size, name)
            opened = io.BytesIO(content) if isinstance(content, bytes) else content
            with Image.open(opened, formats=FORMATS) as image:
                return _square(image, size, name)
    except LeftOut:
        raise
    except Image.DecompressionBombError:
        raise LeftOut(name, f"more than {MAX_PIXELS // 10**6} million pixels") from None
    except FileNotFoundError:
        raise LeftOut(name, "missing") from None
    except Exception:  # Pillow's decoders raise whatever comes: OSError, SyntaxError, struct.error, ValueError
        raise LeftOut(name, "cannot be read as an image") from None


def _square(image: Image.Image, size: int, name: str) -> np.ndarray:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise LeftOut(name, f"more than {MAX_PIXELS // 10**6} million pixels")
    if min(width, height) * ENLARGED_AT_MOST < size:
        raise LeftOut(name, f"smaller than {-(-size // ENLARGED_AT_MOST)} pixels")
    upright = ImageOps.exif_transpose(image)
    square = ImageOps.fit(_to_rgb(upright), (size, size), Image.Resampling.LANCZOS)
    return np.array(square)  # a copy that may be written to


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a channel: Pillow's own conversion clips
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")

"""Untrusted image files, decoded within limits: every oddity is either handled or named.

    image = decode(Path("rose.jpg"))                       # upright, RGB; BadImage with the reason
    image, mask = decode("rose.jpg"), decode_mask("mask.png", transparent_is_masked=True)

Handled: EXIF rotation, CMYK, palettes, grey, transparency (on white), 16 and 32 bits a channel, animations (the
first image). Refused: what cannot be read, is cut short, or unpacks to too many pixels or bytes.
What has to be converted is converted in strips, so that an image is in memory twice at most.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

MAX_PIXELS = 100_000_000  # more is a mistake or a decompression bomb
MAX_BYTES = 2**28  # as the file has its samples: 67 million pixels of RGBA, half as many with 16 bits a channel
STRIP_PIXELS = 2**22  # converted at a time
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
ImageLike = Path | str | bytes | Image.Image  # a file, a file's content, or an opened image


class BadImage(Exception):
    """An image that is not used, and why (a few words)."""


def decode(content: ImageLike, check: Callable[[tuple[int, int]], None] = lambda _: None) -> Image.Image:
    """The image upright and in RGB. `check` gets width and height, as stored, before anything is decoded.

    Raises BadImage.
    """
    return _opened(content, check, _to_rgb)


def at_most(pixels: int) -> Callable[[tuple[int, int]], None]:
    """A `check` that refuses larger images."""

    def check(sides: tuple[int, int]) -> None:
        if sides[0] * sides[1] > pixels:
            raise BadImage(f"more than {pixels / 1e6:g} million pixels")

    return check


def decode_mask(
    content: ImageLike,
    check: Callable[[tuple[int, int]], None] = lambda _: None,
    *,
    transparent_is_masked: bool = False,
) -> Image.Image:
    """A mask upright and in grey: white is masked. Raises BadImage.

    Transparent pixels are not masked; with `transparent_is_masked`, they alone are where the mask has any, as in
    OpenAI's images interface.
    """

    def grey(image: Image.Image) -> Image.Image:
        if not image.has_transparency_data:
            return _to_rgb(image).convert("L")
        if transparent_is_masked:
            alpha = (image if image.mode in ("RGBA", "LA") else image.convert("RGBA")).getchannel("A")
            if alpha.getextrema()[0] != 255:
                return ImageOps.invert(alpha)
        return _in_strips(image, lambda strip: _on(strip, 0)).convert("L")

    return _opened(content, check, grey)


def _opened(
    content: ImageLike, check: Callable[[tuple[int, int]], None], convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    def upright(image: Image.Image) -> Image.Image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels")
        if width * height * _bytes_a_pixel(image) > MAX_BYTES:
            raise BadImage(f"unpacks to more than {MAX_BYTES // 2**20} MiB")
        check(image.size)
        if image is content:  # the caller's own stays as it is
            return convert(ImageOps.exif_transpose(image))
        ImageOps.exif_transpose(image, in_place=True)
        return convert(image)

    try:
        with warnings.catch_warnings():  # Pillow warns of odd metadata, and of bombs, which are refused below
            warnings.simplefilter("ignore")
            if isinstance(content, Image.Image):
                return upright(content)
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS) as image:
                return upright(image)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"more than {MAX_PIXELS // 10**6} million pixels") from None
    except FileNotFoundError:
        raise BadImage("missing") from None
    except Exception:  # Pillow's decoders raise whatever comes: OSError, SyntaxError, struct.error, ValueError
        raise BadImage("cannot be read as an image") from None


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
        return _in_strips(image, lambda strip: _on(strip, 255))
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


def _on(image: Image.Image, grey: int) -> Image.Image:
    with_alpha = image.convert("RGBA")
    ground = Image.new("RGBA", with_alpha.size, (grey, grey, grey, 255))
    return Image.alpha_composite(ground, with_alpha).convert("RGB")

"""The garden: procedural 64x64 images of flowers, butterflies and fish, with their captions.

Everything in kdc-edge can be tried, tested and trained offline on it. A `Scene` is five attributes; its
caption names each of them and its image shows each of them, so an image can be checked against its
prompt exactly (see judge.py). One combination in ten is held out of training, to see whether prompts compose.

    scene = Scene("flower", "purple", "five", "yellow", "sky")
    scene.caption    # "a purple flower with five petals and a yellow center on a sky background"
    render(scene, np.random.default_rng(0)).save("flower.png")
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SIZE = 64
SUPERSAMPLE = 4  # drawn this many times larger, then reduced: smooth edges

Split = Literal["train", "heldout", "all"]
Rgb = tuple[int, int, int]

COLORS: dict[str, Rgb] = {
    "red": (216, 44, 48),
    "orange": (246, 138, 30),
    "yellow": (250, 212, 32),
    "pink": (246, 130, 178),
    "purple": (134, 62, 176),
    "blue": (44, 104, 216),
    "white": (250, 250, 248),
}
BACKGROUNDS: dict[str, Rgb] = {
    "sky": (158, 208, 240),
    "sand": (224, 206, 164),
    "grass": (66, 128, 66),
    "dark": (38, 40, 58),
}
COUNTS = {"four": 4, "five": 5, "six": 6, "eight": 8}
PATTERNS = ("plain", "spots", "stripes")
PLURALS = {"flower": "flowers", "butterfly": "butterflies", "fish": "fish"}
SUBJECTS = tuple(PLURALS)

INK: Rgb = (24, 22, 30)
STEM: Rgb = (28, 86, 40)


@dataclass(frozen=True)
class Scene:
    """What a garden image shows. `detail` is a petal count for flowers, a pattern for the others."""

    subject: str
    color: str
    detail: str
    accent: str  # the flower's centre, the pattern's colour; "none" on a plain wing
    background: str

    @property
    def caption(self) -> str:
        where = f"on a {self.background} background"
        if self.subject == "flower":
            return (
                f"{_a(self.color)} {self.color} flower with {self.detail} petals"
                f" and {_a(self.accent)} {self.accent} center {where}"
            )
        if self.detail == "plain":
            return f"a plain {self.color} {self.subject} {where}"
        return f"{_a(self.color)} {self.color} {self.subject} with {self.accent} {self.detail} {where}"

    @property
    def heldout(self) -> bool:
        """Kept out of training? Decided by a hash of everything but the background: one in ten."""
        key = f"{self.subject} {self.color} {self.detail} {self.accent}"
        return hashlib.sha256(key.encode()).digest()[0] % 10 == 0

    @property
    def attributes(self) -> dict[str, str]:
        return {
            "subject": self.subject,
            "color": self.color,
            "detail": self.detail,
            "accent": self.accent,
            "background": self.background,
        }


def _a(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


@cache
def scenes(subject: str, split: Split = "all") -> tuple[Scene, ...]:
    """Every scene of a subject ("flower", "butterfly", "fish"), in a fixed order."""
    details = tuple(COUNTS) if subject == "flower" else PATTERNS

    def of_subject() -> Iterator[Scene]:
        for color, detail, background in itertools.product(COLORS, details, BACKGROUNDS):
            for accent in ("none",) if detail == "plain" else (c for c in COLORS if c != color):
                yield Scene(subject, color, detail, accent, background)

    wanted = {"train": (False,), "heldout": (True,), "all": (False, True)}[split]
    return tuple(s for s in of_subject() if s.heldout in wanted)


def draw_scenes(subject: str, count: int, *, seed: int, split: Split = "train") -> list[Scene]:
    """`count` seeded scenes of a subject; every detail equally often, then the other attributes uniformly."""
    rng = np.random.default_rng([seed, SUBJECTS.index(subject)])
    by_detail: dict[str, list[Scene]] = {}
    for scene in scenes(subject, split):
        by_detail.setdefault(scene.detail, []).append(scene)
    groups = list(by_detail.values())
    return [group[rng.integers(len(group))] for group in (groups[rng.integers(len(groups))] for _ in range(count))]


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The scene as a (64, 64) RGB image; `rng` chooses position, size and rotation."""
    side = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    {"flower": _flower, "butterfly": _butterfly, "fish": _fish}[scene.subject](image, scene, rng)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def render_many(chosen: list[Scene], *, seed: int) -> np.ndarray:
    """Renders of the scenes as uint8 (N, 64, 64, 3); image i depends on `seed` and i alone."""
    return np.stack([np.asarray(render(s, np.random.default_rng([seed, i]))) for i, s in enumerate(chosen)])


# --- drawing. Lengths are in units of the final image's pixels, times SUPERSAMPLE at the last moment. ---


def _box(x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
    k = SUPERSAMPLE
    return ((x - rx) * k, (y - ry) * k, (x + rx) * k, (y + ry) * k)


def _shade(color: Rgb, factor: float) -> Rgb:
    return (int(color[0] * factor), int(color[1] * factor), int(color[2] * factor))


def _placed(rng: np.random.Generator, x: float, y: float) -> tuple[float, float, float]:
    """A jittered centre and a size factor."""
    return x + rng.uniform(-3, 3), y + rng.uniform(-3, 3), rng.uniform(0.9, 1.1)


def _flower(image: Image.Image, scene: Scene, rng: np.random.Generator) -> None:
    k, n = SUPERSAMPLE, COUNTS[scene.detail]
    x, y, s = _placed(rng, 32, 27)
    draw = ImageDraw.Draw(image)
    foot = x + rng.uniform(-5, 5)
    draw.line([(x * k, y * k), (foot * k, image.height)], fill=STEM, width=round(2.4 * k))
    color = COLORS[scene.color]
    reach, turn = 11.5 * s, rng.uniform(0, 2 * math.pi)
    long, wide = 9.0 * s, min(8.6, 33.0 / n) * s
    for petal in range(n):
        angle = turn + 2 * math.pi * petal / n
        stamp = Image.new("L", image.size, 0)
        ImageDraw.Draw(stamp).ellipse(_box(x + reach, y, long, wide), fill=255)
        stamp = stamp.rotate(-math.degrees(angle), center=(x * k, y * k))
        rim = Image.new("L", image.size, 0)
        ImageDraw.Draw(rim).ellipse(_box(x + reach, y, long + 0.5, wide + 0.5), fill=255)
        rim = rim.rotate(-math.degrees(angle), center=(x * k, y * k))
        image.paste(_shade(color, 0.72), mask=rim)
        image.paste(color, mask=stamp)
    draw.ellipse(_box(x, y, 6.2 * s, 6.2 * s), fill=_shade(COLORS[scene.accent], 0.8))
    draw.ellipse(_box(x, y, 5.6 * s, 5.6 * s), fill=COLORS[scene.accent])


def _patterned(image: Image.Image, body: Image.Image, scene: Scene, marks: list[tuple[float, ...]]) -> None:
    """Fill the mask `body` with the scene's colour, and its marks (boxes) with the accent, inside it only."""
    image.paste(COLORS[scene.color], mask=body)
    if scene.detail == "plain":
        return
    pattern = Image.new("L", image.size, 0)
    draw = ImageDraw.Draw(pattern)
    for mark in marks:
        (draw.ellipse if scene.detail == "spots" else draw.rectangle)(mark, fill=255)
    image.paste(COLORS[scene.accent], mask=ImageChops.multiply(pattern, body))


def _butterfly(image: Image.Image, scene: Scene, rng: np.random.Generator) -> None:
    k = SUPERSAMPLE
    x, y, s = _placed(rng, 32, 32)
    wings = [(side * 11.5 * s, -6.5 * s, 11.5 * s, 9.5 * s) for side in (-1, 1)]
    wings += [(side * 8.5 * s, 10.0 * s, 8.5 * s, 7.5 * s) for side in (-1, 1)]
    rim, body = Image.new("L", image.size, 0), Image.new("L", image.size, 0)
    marks: list[tuple[float, ...]] = []
    for dx, dy, rx, ry in wings:
        ImageDraw.Draw(rim).ellipse(_box(x + dx, y + dy, rx + 1.0, ry + 1.0), fill=255)
        ImageDraw.Draw(body).ellipse(_box(x + dx, y + dy, rx, ry), fill=255)
        if scene.detail == "spots":
            marks.append(_box(x + dx, y + dy, 0.44 * ry, 0.44 * ry))
        else:
            marks += [_box(x + dx + at * rx, y + dy, 1.5 * s, ry) for at in (-0.5, 0.3)]
    image.paste(INK, mask=rim)
    _patterned(image, body, scene, marks)
    draw = ImageDraw.Draw(image)
    for side in (-1, 1):
        draw.line(
            [(x * k, (y - 12 * s) * k), ((x + side * 5 * s) * k, (y - 19 * s) * k)],
            fill=INK,
            width=round(1.2 * k),
        )
    draw.ellipse(_box(x, y, 1.9 * s, 14.5 * s), fill=INK)


def _fish(image: Image.Image, scene: Scene, rng: np.random.Generator) -> None:
    k = SUPERSAMPLE
    x, y, s = _placed(rng, 32, 32)
    heading = 1 if rng.random() < 0.5 else -1  # the way it swims
    color, draw = COLORS[scene.color], ImageDraw.Draw(image)

    def polygon(points: list[tuple[float, float]], fill: Rgb) -> None:
        draw.polygon([((x + heading * px * s) * k, (y + py * s) * k) for px, py in points], fill=fill)

    fin = _shade(color, 0.78)
    polygon([(-12, 0), (-25.5, -11.5), (-21.5, 0), (-25.5, 11.5)], INK)
    polygon([(-13, 0), (-24.2, -9.6), (-20.4, 0), (-24.2, 9.6)], fin)
    polygon([(-7, -10), (3, -18.5), (8, -10)], INK)
    polygon([(-5, -10), (2.8, -16.8), (6.4, -10)], fin)
    draw.ellipse(_box(x, y, 19.0 * s, 12.5 * s), fill=INK)
    body = Image.new("L", image.size, 0)
    ImageDraw.Draw(body).ellipse(_box(x, y, 18.0 * s, 11.5 * s), fill=255)
    if scene.detail == "spots":
        marks = [
            _box(x + heading * px * s, y + py * s, 3.0 * s, 3.0 * s)
            for px, py in ((-10, 0), (-2, -5), (-1, 5.5), (6, 0.5))
        ]
    else:
        marks = [_box(x + heading * px * s, y, 1.9 * s, 12 * s) for px in (-11, -3.5, 4)]
    _patterned(image, body, scene, [tuple(m) for m in marks])
    draw.ellipse(_box(x + heading * 12 * s, y - 3 * s, 2.5 * s, 2.5 * s), fill=(252, 252, 252))
    draw.ellipse(_box(x + heading * 12.6 * s, y - 3 * s, 1.4 * s, 1.4 * s), fill=INK)

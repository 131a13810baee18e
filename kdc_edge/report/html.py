"""Building blocks for one HTML report in one file: no script, no request to anywhere, light and dark.

    blocks = [paragraph("What was done."), line_chart(...), data_table(header, rows)]
    html = page("Quickstart", [Section("Training", blocks)], lead="Two tasks, one student.")

The HTML is in page.html.j2 and blocks.html.j2, which escape all text; a block that has been built is `Markup`.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from kdc_edge.report.charts import clean

SMALL_IMAGE = 128  # pixels a side; up to here pixels are shown as they are, not smoothed
CARD_IMAGE = 256  # pixels a side; larger ones are reduced, so that a page of many stays light
AMPLIFIED = 8  # times, the differences between images
MOST_HEAT = 72  # per cent of the colour in the strongest cell, so that its number stays readable

# The second defence: text that was not escaped could run nothing and fetch nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

HERE = Path(__file__).parent
TEMPLATES = Environment(
    loader=FileSystemLoader(HERE), autoescape=True, finalize=clean, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
BLOCKS: Any = TEMPLATES.get_template("blocks.html.j2").module


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Markup]


def page(
    title: str, sections: Sequence[Section], *, lead: str = "", subject: str = "", footer: str = "Made by kdc-edge."
) -> str:
    """The whole document; `subject` is a line above the title, and in the window's title beside it."""
    style = Markup((HERE / "style.css").read_text("utf-8"))  # our own file
    return TEMPLATES.get_template("page.html.j2").render(
        title=title, sections=sections, lead=lead, subject=subject, footer=footer, policy=POLICY, style=style
    )


def paragraph(text: str, *, small: bool = False) -> Markup:
    return _block("paragraph", text, small)


def bullets(lines: Iterable[str], *, small: bool = False) -> Markup:
    return _block("bullets", lines, small)


def folded(summary: str, lines: Iterable[str]) -> Markup:
    """Lines behind a summary that opens them."""
    return _block("folded", summary, lines)


def tiles(figures: Sequence[tuple[str, str]]) -> Markup:
    """A few figures worth reading first: ("44 %", "fewer parameters")."""
    return _block("tiles", figures)


def side_by_side(*blocks: Markup) -> Markup:
    """Blocks in columns where the window is wide enough, else one below the other."""
    return _block("side_by_side", blocks)


def data_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", marked: Collection[int] = ()
) -> Markup:
    """A table whose first column names the row; columns of numbers stand at the right, the rows `marked` stand out."""
    right = [i > 0 and _numeric([row[i] for row in rows]) for i in range(len(header))]
    return _block("data_table", header, rows, right, marked, title)


def heat_table(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    title: str,
    corner: str = "",
    digits: int = 2,
    higher_is_better: bool = True,
) -> Markup:
    """Numbers on a ground that is the stronger, the better the number: for R[i][j], a row a task trained."""
    known = [v for _, values in rows for v in values if v is not None and math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def cell(value: float | None) -> tuple[str, str]:
        """Share of the colour in per cent, and the number."""
        if value is None or not math.isfinite(value):
            return "0", "–"
        share = (value - low) / (high - low) if high > low else 0.5
        return f"{(share if higher_is_better else 1 - share) * MOST_HEAT:.0f}", f"{value:.{digits}f}"

    return _block("heat_table", columns, [(name, [cell(v) for v in values]) for name, values in rows], title, corner)


def image_grid(rows: Sequence[tuple[str, Sequence[np.ndarray | None]]], captions: Sequence[str]) -> Markup:
    """The same prompts (`captions`, one a column) from several models (one a row); None where one failed.

    Images are uint8 (H, W, 3).
    """
    shown = [
        (name, [None if p is None else _Png.of(p, f"{c}, by {name}") for c, p in zip(captions, images, strict=True)])
        for name, images in rows
    ]
    return _block("image_grid", captions, shown)


@dataclass(frozen=True)
class Card:
    """An image under its name; beside it, where there is a reference, its difference to that."""

    name: str
    note: str
    pixels: np.ndarray  # uint8 (H, W, 3)
    reference: np.ndarray | None = None  # of the same shape

    def images(self) -> list[_Png]:
        shown = [_Png.of(_reduced(self.pixels), f"Image of {self.name}")]
        if self.reference is not None:
            apart = np.abs(self.pixels.astype(np.int16) - self.reference) * AMPLIFIED
            difference = _reduced(np.minimum(apart, 255).astype(np.uint8))
            shown.append(_Png.of(difference, f"Difference to the reference, {AMPLIFIED} times, of {self.name}"))
        return shown


def image_cards(cards: Sequence[Card]) -> Markup:
    """Images with their amplified differences, as many in a row as the window holds."""
    return _block("image_cards", [(card.name, card.note, card.images()) for card in cards])


def command(text: str) -> Markup:
    """A command line, to be copied; an option stays in one line with its value."""
    program, *options = text.split(" --")
    return _block("command", program, options)


def downloads(files: Sequence[tuple[str, str, str]]) -> Markup:
    """Files inside the page: (name, media type, text)."""
    return _block("downloads", [(name, kind, base64.b64encode(text.encode()).decode()) for name, kind, text in files])


@dataclass(frozen=True)
class _Png:
    """An image as a page holds it."""

    png: str  # base64
    width: int
    height: int
    alt: str

    @classmethod
    def of(cls, pixels: np.ndarray, alt: str) -> _Png:
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG", optimize=True)
        return cls(base64.b64encode(out.getvalue()).decode(), pixels.shape[1], pixels.shape[0], alt)

    @property
    def small(self) -> bool:
        return max(self.width, self.height) <= SMALL_IMAGE


def _reduced(pixels: np.ndarray) -> np.ndarray:
    factor = math.ceil(max(pixels.shape[:2]) / CARD_IMAGE)
    return pixels if factor == 1 else np.asarray(Image.fromarray(pixels).reduce(factor))


def _block(name: str, *values: object) -> Markup:
    """A macro of blocks.html.j2."""
    made: Markup = getattr(BLOCKS, name)(*values)
    return made


def _numeric(cells: Sequence[str]) -> bool:
    """Whether a column reads as numbers: "12", "-0.5", "3.2 MB", "×2", unknown as a dash."""
    known = [cell for cell in cells if cell.strip() not in ("", "-", "–", "—", "equal", "reference")]
    return bool(known) and all(re.match(r"[-+−×]?\s?[\d.]", cell.strip()) for cell in known)

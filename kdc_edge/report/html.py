"""Building blocks for one HTML report in one file: no script, no request to anywhere, light and dark.

    blocks = [paragraph("What was done."), line_chart(...), data_table(header, rows)]
    html = page("Quickstart", [Section("Training", blocks)], lead="Two tasks, one student.")

Plain text goes in and is escaped; a block that has been built is `Html`, and only that is taken as it is.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from kdc_edge.report.charts import Html, bar_chart, escape, line_chart, stacked_bars
from kdc_edge.report.style import CSS

__all__ = [
    "Card",
    "Html",
    "Section",
    "bar_chart",
    "bullets",
    "command",
    "data_table",
    "downloads",
    "heat_table",
    "image_cards",
    "image_grid",
    "line_chart",
    "page",
    "paragraph",
    "side_by_side",
    "stacked_bars",
    "tiles",
]

SMALL_IMAGE = 128  # pixels a side; up to here pixels are shown as they are, not smoothed
CARD_IMAGE = 256  # pixels a side; larger ones are reduced, so that a page of many stays light
AMPLIFIED = 8  # times, the differences between images
MOST_HEAT = 72  # per cent of the colour in the strongest cell, so that its number stays readable

# Belt and braces: even text that slipped through unescaped could run and fetch nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Html]


def page(title: str, sections: Sequence[Section], *, lead: str = "", footer: str = "") -> str:
    """The whole document."""
    listed = "".join(f'<li><a href="#s{i}">{escape(s.title)}</a></li>' for i, s in enumerate(sections, 1))
    nav = f'<nav aria-label="Contents"><ol>{listed}</ol></nav>' if len(sections) > 1 else ""
    body = "\n".join(
        f'<section id="s{i}" aria-labelledby="h{i}">\n<h2 id="h{i}">{escape(section.title)}</h2>\n'
        + "\n".join(section.blocks)
        + "\n</section>"
        for i, section in enumerate(sections, 1)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{f'<p class="lead">{escape(lead)}</p>' if lead else ""}
{nav}
</header>
<main>
{body}
</main>
<footer><p class="small">{escape(footer or "Made by kdc-edge.")}</p></footer>
</body>
</html>
"""


def paragraph(text: str, *, small: bool = False) -> Html:
    return Html(f"<p{_small(small, '')}>{escape(text)}</p>")


def bullets(lines: Iterable[str], *, small: bool = False) -> Html:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return Html(f"<ul{_small(small, 'list')}>{items}</ul>")


def tiles(figures: Sequence[tuple[str, str]]) -> Html:
    """A few figures worth reading first: ("44 %", "fewer parameters")."""
    items = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in figures)
    return Html(f'<dl class="tiles">{items}</dl>')


def side_by_side(*blocks: Html) -> Html:
    """Blocks in columns where the window is wide enough, else one below the other."""
    return Html(f'<div class="side">{"".join(f"<div>{block}</div>" for block in blocks)}</div>')


def data_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> Html:
    """A table whose first column names the row; columns of numbers stand at the right."""
    right = [i > 0 and _numeric([row[i] for row in rows]) for i in range(len(header))]
    marks = [' class="right"' if r else "" for r in right]
    head = "".join(f'<th scope="col"{m}>{escape(h)}</th>' for h, m in zip(header, marks, strict=True))
    lines = []
    for row in rows:
        name = f'<th scope="row">{escape(row[0])}</th>'
        cells = "".join(f"<td{m}>{escape(c)}</td>" for c, m in zip(row[1:], marks[1:], strict=True))
        lines.append(f"<tr>{name}{cells}</tr>")
    return _table("data", title, title or header[0], head, lines)


def heat_table(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    title: str,
    corner: str = "",
    digits: int = 2,
    higher_is_better: bool = True,
) -> Html:
    """Numbers on a ground that is the stronger, the better the number: for R[i][j], a row a task trained."""
    known = [v for _, values in rows for v in values if v is not None and math.isfinite(v)]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    head = f'<th scope="col">{escape(corner)}</th>' + "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    lines = []
    for name, values in rows:
        cells = ""
        for value in values:
            if value is None or not math.isfinite(value):
                cells += '<td class="none" style="--share: 0">–</td>'
                continue
            share = (value - low) / (high - low) if high > low else 0.5
            share = share if higher_is_better else 1 - share
            cells += f'<td style="--share: {share * MOST_HEAT:.0f}">{value:.{digits}f}</td>'
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return _table("heat", title, title, head, lines)


def image_grid(rows: Sequence[tuple[str, Sequence[np.ndarray | None]]], captions: Sequence[str]) -> Html:
    """The same prompts (`captions`, one a column) from several models (one a row); None where one failed.

    Images are uint8 (H, W, 3).
    """
    head = "<td></td>" + "".join(f'<th scope="col">{escape(caption)}</th>' for caption in captions)
    lines = []
    for name, images in rows:
        cells = "".join(
            f"<td>{_image(pixels, f'{caption}, by {name}')}</td>"
            for caption, pixels in zip(captions, images, strict=True)
        )
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return _table("images", "", "Images", head, lines)


@dataclass(frozen=True)
class Card:
    """An image under its name; beside it, where there is a reference, what differs from that."""

    name: str
    note: str
    pixels: np.ndarray  # uint8 (H, W, 3)
    reference: np.ndarray | None = None  # of the same shape


def image_cards(cards: Sequence[Card]) -> Html:
    """Images with their amplified differences, as many in a row as the window holds."""
    items = []
    for card in cards:
        shown = _image(_reduced(card.pixels), f"Image of {card.name}")
        if card.reference is not None:
            apart = np.abs(card.pixels.astype(np.int16) - card.reference) * AMPLIFIED
            difference = _reduced(np.minimum(apart, 255).astype(np.uint8))
            shown += _image(difference, f"Difference to the reference, {AMPLIFIED} times, of {card.name}")
        caption = f'{escape(card.name)}<span class="small">{escape(card.note)}</span>'
        items.append(f'<li><figure><div class="pair">{shown}</div><figcaption>{caption}</figcaption></figure></li>')
    return Html(f'<ul class="cards">{"".join(items)}</ul>')


def _reduced(pixels: np.ndarray) -> np.ndarray:
    factor = math.ceil(max(pixels.shape[:2]) / CARD_IMAGE)
    return pixels if factor == 1 else np.asarray(Image.fromarray(pixels).reduce(factor))


def command(text: str) -> Html:
    """A command line, to be copied; an option stays in one line with its value."""
    first, *options = text.split(" --")
    parts = [escape(first), *(f'<span class="option">--{escape(option)}</span>' for option in options)]
    return Html(f"<pre>{' '.join(parts)}</pre>")


def downloads(files: Sequence[tuple[str, str, str]]) -> Html:
    """Files inside the page: (name, media type, text)."""
    links = []
    for name, kind, text in files:
        content = base64.b64encode(text.encode()).decode()
        link = f'<a download="{escape(name)}" href="data:{escape(kind)};base64,{content}">{escape(name)}</a>'
        links.append(f"<li>{link}</li>")
    return Html(f'<ul class="list">{"".join(links)}</ul>')


def _image(pixels: np.ndarray | None, alt: str) -> str:
    if pixels is None:
        return '<div class="missing">no image</div>'
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    height, width = pixels.shape[:2]
    small = ' class="small-image"' if max(height, width) <= SMALL_IMAGE else ""
    data = base64.b64encode(out.getvalue()).decode()
    size = f'width="{width}" height="{height}"'
    return f'<img{small} src="data:image/png;base64,{data}" {size} alt="{escape(alt)}"/>'


def _table(kind: str, title: str, label: str, head: str, lines: Sequence[str]) -> Html:
    """In a box that scrolls by itself, with the keyboard too, when the window is narrower than the table."""
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    return Html(
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="{kind}">{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _numeric(cells: Sequence[str]) -> bool:
    """Whether a column reads as numbers: "12", "-0.5", "3.2 MiB", "×2", unknown as a dash."""
    known = [cell for cell in cells if cell.strip() not in ("", "-", "–", "—", "exact")]
    return bool(known) and all(re.match(r"[-+−×]?\s?[\d.]", cell.strip()) for cell in known)


def _small(small: bool, kind: str) -> str:
    names = " ".join(name for name in (kind, "small" if small else "") if name)
    return f' class="{names}"' if names else ""

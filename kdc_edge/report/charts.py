"""Line and bar charts as inline SVG, from pure functions: no script, nothing to fetch. (Scatter: scatter.py.)

    line_chart({"with replay": [(0, 0.9), (100, 0.2)]}, title="Loss", x_label="step", y_label="loss")

Each gives a `<figure>` that is also well-formed XML. Colours are the page's (classes c0 to c5, style.py): a
palette that colour-blind readers can tell apart (Okabe and Ito); the lines differ in their dashes too.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NewType

Html = NewType("Html", str)  # text that has been escaped; what the building blocks give and take

COLOURS = 6
MAX_POINTS = 300  # a line; more than the screen shows
WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 52

Points = Sequence[tuple[float, float]]


def escape(text: object) -> Html:
    """Text for an element or an attribute. Control characters, which no HTML or XML may hold, are dropped."""
    return Html(html.escape("".join(c for c in str(text) if c.isprintable() or c in "\t\n")))


def line_chart(series: Mapping[str, Points], *, title: str, x_label: str, y_label: str, log_y: bool = False) -> Html:
    """Lines over a common x. Values that cannot be drawn are left out: none that is not finite, and on a
    logarithmic axis none below or at zero. Neighbours are averaged where a line has more than 300 points."""
    kept = {name: [p for p in points if _drawable(p, log_y)] for name, points in series.items()}
    lines = {name: _thin(points) for name, points in kept.items()}
    drawn = [p for points in lines.values() for p in points]
    if not drawn:
        return figure(title, Html(""), '<p class="small">Nothing to show yet.</p>')
    xs, ys = [p[0] for points in kept.values() for p in points], [p[1] for p in drawn]
    x_ticks = nice_ticks(min(xs), max(xs), 5)
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else nice_ticks(min(ys), max(ys), 5)
    x_low, x_high = _near_ticks(min(xs), max(xs), x_ticks)
    y_low, y_high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        place = _share(y, y_low, y_high, log_y)
        return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)

    floor = HEIGHT - BOTTOM
    parts = [f'<text class="label" x="0" y="14">{escape(y_label)}</text>']
    for tick in y_ticks:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 9}" y="{y:.1f}" dy=".35em">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    for tick in (t for t in x_ticks if x_low <= t <= x_high):
        x = across(tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>')
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{floor + 21}">{number(tick)}</text>')
    parts.append(f'<text class="label end" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}">{escape(x_label)}</text>')
    for i, (name, points) in enumerate(lines.items()):
        if points:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
            x, y = points[-1]
            said = f"{escape(name)}: {number(y)} at {escape(x_label)} {number(x)}"
            parts.append(f'<polyline class="line c{i % COLOURS}" points="{path}"/>')
            parts.append(
                f'<circle class="dot c{i % COLOURS}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="4">'
                f"<title>{said}</title></circle>"
            )
    ends = "; ".join(f"{name} ends at {number(points[-1][1])}" for name, points in lines.items() if points)
    scale = ", logarithmic" if log_y else ""
    described = f"{title}. Line chart of {y_label}{scale} over {x_label}: {ends}."
    return figure(title, legend(list(lines)), svg(HEIGHT, described, parts))


def bar_chart(values: Mapping[str, float], *, title: str, unit: str) -> Html:
    """Horizontal bars from zero, each under its name and beside its value, in the order given."""
    longest = max((v for v in values.values() if math.isfinite(v)), default=0.0)
    row, parts = 57, []
    for i, (name, value) in enumerate(values.items()):
        share = max(value, 0.0) / longest if longest > 0 and math.isfinite(value) else 0.0
        width, top = max(share * (WIDTH - 150), 2.0), i * row
        parts.append(f'<text class="name" x="0" y="{top + 18}">{escape(shorten(name))}</text>')
        parts.append(f'<rect class="bar" x="0" y="{top + 27}" width="{width:.1f}" height="15" rx="3"/>')
        said = escape(f"{number(value)} {unit}".strip())
        parts.append(f'<text class="value" x="{width + 10:.1f}" y="{top + 35}" dy=".35em">{said}</text>')
    listed = "; ".join(f"{name}: {number(value)} {unit}" for name, value in values.items())
    return figure(title, Html(""), svg(max(row * len(values), 1), f"{title}. Bar chart: {listed}.", parts))


def stacked_bars(rows: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> Html:
    """Horizontal bars of parts that add up, each under its name and beside its sum; every row has the same parts."""
    parts_of = list(next(iter(rows.values()), {}))
    longest = max((sum(parts.values()) for parts in rows.values()), default=0.0)
    row, drawn = 57, []
    for i, (name, parts) in enumerate(rows.items()):
        top, left = i * row, 0.0
        drawn.append(f'<text class="name" x="0" y="{top + 18}">{escape(shorten(name))}</text>')
        for j, value in enumerate(parts.values()):
            width = value / longest * (WIDTH - 110) if longest > 0 else 0.0
            drawn.append(
                f'<rect class="part f{j % COLOURS}" x="{left:.1f}" y="{top + 27}" width="{width:.1f}" height="18"/>'
            )
            left += width
        said = escape(f"{number(sum(parts.values()))} {unit}".strip())
        drawn.append(f'<text class="value" x="{left + 10:.1f}" y="{top + 36}" dy=".35em">{said}</text>')
    listed = "; ".join(
        f"{name}: {number(sum(parts.values()))} {unit}, of which "
        + ", ".join(f"{part} {number(value)}" for part, value in parts.items())
        for name, parts in rows.items()
    )
    described = f"{title}. Stacked bar chart: {listed}."
    return figure(title, legend(parts_of, "part"), svg(max(row * len(rows), 1), described, drawn))


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from below `low` to above `high`, some `about` of them."""
    if not high > low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around the range; with 2 and 5 between them where it spans less than two decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    steps = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    every = max(1, math.ceil((last - first) / 6))
    ticks = [m * 10.0**p for p in range(first, last, every) for m in steps] + [10.0**last]
    inside = [t for t in ticks if low <= t <= high]
    below = [t for t in ticks if t < low][-1:]
    above = [t for t in ticks if t > high][:1]
    return [*below, *inside, *above]


def number(value: float) -> str:
    """Three significant digits without trailing zeros: 0.025, 1.5, 12,000, 3e-05."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}"


def _near_ticks(low: float, high: float, ticks: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis: a tick where one is close (step 1 of 1,500 begins at 0), else the value itself."""
    close = (high - low) * 0.03
    if close == 0:
        return ticks[0], ticks[-1]
    return (
        ticks[0] if low - ticks[0] <= close else low,
        ticks[-1] if ticks[-1] - high <= close else high,
    )


def _share(y: float, low: float, high: float, log: bool) -> float:
    """Where y lies between low (0) and high (1)."""
    if log:
        y, low, high = math.log(y), math.log(low), math.log(high)
    return (y - low) / (high - low) if high > low else 0.5


def _drawable(point: tuple[float, float], log: bool) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1]) and (point[1] > 0 or not log)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    cuts = [i * len(points) // MAX_POINTS for i in range(MAX_POINTS + 1)]
    groups = [points[a:b] for a, b in pairwise(cuts)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def shorten(name: str, most: int = 48) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


_KEYS = {  # viewBox, drawing
    "line": ("26 8", '<line class="line c{}" x1="1" x2="25" y1="4" y2="4"/>'),
    "part": ("12 12", '<rect class="part f{}" width="12" height="12"/>'),
    "dot": ("12 12", '<circle class="dot c{}" cx="6" cy="6" r="5"/>'),
}


def legend(names: Sequence[str], kind: str = "line") -> Html:
    if len(names) < 2:
        return Html("")
    size, drawing = _KEYS[kind]
    key = f'<svg class="key {kind}-key" viewBox="0 0 {size}" aria-hidden="true">{drawing}</svg>'
    items = "".join(f"<li>{key.format(i % COLOURS)}{escape(name)}</li>" for i, name in enumerate(names))
    return Html(f'<ul class="legend">{items}</ul>')


def svg(height: int, described: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(described)}">'
        + "".join(parts)
        + "</svg>"
    )


def figure(title: str, legend: Html, body: str) -> Html:
    return Html(f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}{body}</figure>')

"""Line and bar charts as inline SVG, from pure functions: no script, nothing to fetch. (Scatter: scatter.py.)

    line_chart({"with replay": [(0, 0.9), (100, 0.2)]}, title="Loss", x_label="step", y_label="loss")

Each gives a `<figure>` that is also well-formed XML. Colours are the page's (classes c0 to c5, style.css): a
palette that colour-blind readers can tell apart (Okabe and Ito); the lines differ in their dashes too.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup

COLOURS = 6
MAX_POINTS = 300  # a line; more than the screen shows
WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 52
KEY = 24  # height of a line's key in a file
ROW = 57  # height of a horizontal bar with its name

Points = Sequence[tuple[float, float]]


def clean(text: object) -> str:
    """Text without control characters, which no HTML or XML may hold; `Markup` as it is."""
    if isinstance(text, Markup):
        return text
    return "".join(c for c in str(text) if c.isprintable() or c in "\t\n")


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """An element of HTML or SVG, its text escaped and its fractions rounded to tenths; `class_="bar"` sets `class`."""
    given = Markup().join(
        Markup(' {}="{}"').format(
            name.rstrip("_").replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else clean(value)
        )
        for name, value in attributes.items()
    )
    if not children:
        return Markup("<{}{}/>").format(tag, given)
    return Markup("<{0}{1}>{2}</{0}>").format(tag, given, Markup().join(map(clean, children)))


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", class_=kind, x1=x1, y1=y1, x2=x2, y2=y2)


def line_chart(series: Mapping[str, Points], *, title: str, x_label: str, y_label: str, log_y: bool = False) -> Markup:
    """Lines over a common x. Values that cannot be drawn are left out: none that is not finite, and on a
    logarithmic axis none below or at zero. Neighbours are averaged where a line has more than 300 points."""
    kept = {name: [p for p in points if _drawable(p, log_y)] for name, points in series.items()}
    lines = {name: _thin(points) for name, points in kept.items()}
    drawn = [p for points in lines.values() for p in points]
    if not drawn:
        return figure(title, note="Nothing to show yet.")
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

    inside = [tick for tick in x_ticks if x_low <= tick <= x_high]
    parts = axes(x_label, y_label, inside, y_ticks, across, down, HEIGHT - BOTTOM)
    for i, (name, points) in enumerate(lines.items()):
        if points:
            path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
            x, y = points[-1]
            said = element("title", f"{name}: {number(y)} at {x_label} {number(x)}")
            parts.append(element("polyline", class_=f"line c{i % COLOURS}", points=path))
            parts.append(element("circle", said, class_=f"dot c{i % COLOURS}", cx=across(x), cy=down(y), r=4))
    ends = "; ".join(f"{name} ends at {number(points[-1][1])}" for name, points in lines.items() if points)
    scale = ", logarithmic" if log_y else ""
    described = f"{title}. Line chart of {y_label}{scale} over {x_label}: {ends}."
    return figure(title, svg(HEIGHT, described, parts), keys=list(lines))


def axes(
    x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float],
    across: Callable[[float], float], down: Callable[[float], float], floor: float,
) -> list[Markup]:  # fmt: skip
    """Labels, ticks and the grid; `across` and `down` place a value, `floor` is where the x axis lies."""
    parts = [element("text", y_label, class_="label", x=0, y=14)]
    for tick in y_ticks:
        y = down(tick)
        parts.append(line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(element("text", number(tick), class_="tick end", x=LEFT - 9, y=y, dy=".35em"))
    parts.append(line(LEFT, floor, WIDTH - RIGHT, floor, "axis"))
    for tick in x_ticks:
        x = across(tick)
        parts.append(line(x, floor, x, floor + 5, "axis"))
        parts.append(element("text", number(tick), class_="tick mid", x=x, y=floor + 21))
    return [*parts, element("text", x_label, class_="label end", x=WIDTH - RIGHT, y=floor + BOTTOM - 5)]


def bar_chart(values: Mapping[str, float], *, title: str, unit: str) -> Markup:
    """Horizontal bars from zero, each under its name and beside its value, in the order given."""
    longest = max((v for v in values.values() if math.isfinite(v)), default=0.0)
    parts = []
    for i, (name, value) in enumerate(values.items()):
        share = max(value, 0.0) / longest if longest > 0 and math.isfinite(value) else 0.0
        width, top = max(share * (WIDTH - 150), 2.0), i * ROW
        parts.append(element("rect", class_="bar", x=0, y=top + 27, width=width, height=15, rx=3))
        parts += _bar_texts(name, f"{number(value)} {unit}", top, width)
    listed = "; ".join(f"{name}: {number(value)} {unit}" for name, value in values.items())
    return figure(title, svg(ROW * len(values), f"{title}. Bar chart: {listed}.", parts))


def spread_chart(values: Mapping[str, Sequence[float]], *, title: str) -> Markup:
    """Horizontal bars of means, with a dot a value and a line of one standard deviation each way."""
    longest = max((max(v) for v in values.values()), default=0.0)
    parts = []

    def across(value: float) -> float:
        return max(value, 0.0) / longest * (WIDTH - 150) if longest > 0 else 0.0

    for i, (name, found) in enumerate(values.items()):
        top, mean = i * ROW, statistics.mean(found)
        std = statistics.stdev(found) if len(found) > 1 else 0.0
        middle, end = top + 34.5, max(map(across, [mean + std, *found]))
        parts.append(element("rect", class_="bar", x=0, y=top + 27, width=max(across(mean), 2.0), height=15, rx=3))
        parts.append(line(across(mean - std), middle, across(mean + std), middle, "deviation"))
        parts += [element("circle", class_="seed", cx=across(value), cy=middle, r=3.5) for value in found]
        parts += _bar_texts(name, f"{mean:.3f}", top, end)
    listed = "; ".join(f"{name}: {statistics.mean(found):.3f}" for name, found in values.items())
    return figure(title, svg(ROW * len(values), f"{title}. Bar chart of means: {listed}.", parts))


def stacked_bars(rows: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> Markup:
    """Horizontal bars of parts that add up, each under its name and beside its sum; every row has the same parts."""
    longest = max((sum(parts.values()) for parts in rows.values()), default=0.0)
    drawn = []
    for i, (name, parts) in enumerate(rows.items()):
        top, left = i * ROW, 0.0
        for j, value in enumerate(parts.values()):
            width = value / longest * (WIDTH - 110) if longest > 0 else 0.0
            drawn.append(element("rect", class_=f"part f{j % COLOURS}", x=left, y=top + 27, width=width, height=18))
            left += width
        drawn += _bar_texts(name, f"{number(sum(parts.values()))} {unit}", top, left)
    listed = "; ".join(
        f"{name}: {number(sum(parts.values()))} {unit}, of which "
        + ", ".join(f"{part} {number(value)}" for part, value in parts.items())
        for name, parts in rows.items()
    )
    keys = list(next(iter(rows.values()), {}))
    return figure(title, svg(ROW * len(rows), f"{title}. Stacked bar chart: {listed}.", drawn), keys=keys, kind="part")


def _bar_texts(name: str, value: str, top: float, end: float) -> list[Markup]:
    """The name above a bar, and the value behind its end."""
    return [
        element("text", shorten(name), class_="name", x=0, y=top + 18),
        element("text", value.strip(), class_="value", x=end + 10, y=top + 36, dy=".35em"),
    ]


def standalone(chart: Markup, title: str, *, keys: Sequence[str] = ()) -> str:
    """A chart's plot as an SVG file of its own, with the title, a line chart's keys and the style sheet in it."""
    height, inside = re.findall(rf'<svg class="plot" viewBox="0 0 {WIDTH} (\d+)"[^>]*>(.*)</svg>', chart, re.DOTALL)[0]
    style = Path(__file__).with_name("style.css").read_text("utf-8")
    ground = element("rect", x=-16, y=-44, width="100%", height="100%", style="fill: var(--ground)")
    legend = []
    for i, name in enumerate(keys):
        y = int(height) + KEY * i + 12
        legend += [line(LEFT, y, LEFT + 40, y, f"line c{i % COLOURS}")]
        legend += [element("text", name, class_="tick", x=LEFT + 52, y=y, dy=".35em")]
    return element(
        "svg", element("style", Markup(style)), ground, element("text", title, class_="name", x=0, y=-16),
        Markup(inside), *legend, xmlns="http://www.w3.org/2000/svg", class_="plot", font_family="sans-serif",
        viewBox=f"-16 -44 {WIDTH + 32} {int(height) + 60 + KEY * len(keys)}",
    ) + "\n"  # fmt: skip


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


_KEYS = {  # viewBox, tag, attributes
    "line": ("0 0 26 8", "line", {"x1": 1, "x2": 25, "y1": 4, "y2": 4}),
    "part": ("0 0 12 12", "rect", {"width": 12, "height": 12}),
    "dot": ("0 0 12 12", "circle", {"cx": 6, "cy": 6, "r": 5}),
}


def figure(title: str, plot: str = "", *, keys: Sequence[str] = (), kind: str = "line", note: str = "") -> Markup:
    """A plot under its title, with a legend where it has more than one `key`, and a note below it."""
    blocks = [element("figcaption", title)]
    if len(keys) > 1:
        size, tag, attributes = _KEYS[kind]
        colour = "f" if kind == "part" else "c"
        drawn = [element(tag, class_=f"{kind} {colour}{i % COLOURS}", **attributes) for i in range(len(keys))]
        signs = [element("svg", d, class_=f"key {kind}-key", viewBox=size, aria_hidden="true") for d in drawn]
        items = [element("li", sign, name) for sign, name in zip(signs, keys, strict=True)]
        blocks.append(element("ul", *items, class_="legend"))
    blocks += [Markup(plot)] if plot else []
    blocks += [element("p", note, class_="small")] if note else []
    return element("figure", *blocks, class_="chart")


def svg(height: int, described: str, parts: Sequence[Markup]) -> Markup:
    return element(
        "svg", *parts, class_="plot", viewBox=f"0 0 {WIDTH} {max(height, 1)}", role="img", aria_label=described
    )

"""A scatter chart with a name at every point, as inline SVG.

    scatter_chart([Point("onnx-fp16", 0.25, 128, "onnx")], title="...", x=Axis("time, s"), y=Axis("memory, MB"))

Names are placed where they cover neither a point nor another name. Letters are larger where the chart is drawn small,
so names are placed twice, for wide and for narrow charts, and the style sheet shows one of the two. An axis that spans
a factor of four or more is logarithmic, unless it is linear by nature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kdc_edge.report.charts import (
    BOTTOM,
    COLOURS,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    axes,
    element,
    figure,
    line,
    log_ticks,
    nice_ticks,
    number,
    shorten,
    svg,
)

LOG_FROM = 4  # largest / smallest
FLOOR = 330  # of the plot; taller than other charts: names need room
DOT, RING = 5.5, 9.5  # radii
CRAMPED = 26  # letters of a name where there is no room for all of it
AIR = 34  # between the chart's left end and the first tick: a short name
LETTER = {"wide": (7.8, 16), "narrow": (10.4, 21)}  # width of a letter and height of a line, in the chart's units


@dataclass(frozen=True)
class Point:
    name: str
    x: float
    y: float
    group: str = ""  # points of a group have one colour
    chosen: bool = False  # stands out


@dataclass(frozen=True)
class Axis:
    label: str
    limit: float | None = None  # a line across the chart
    limit_label: str = ""
    linear: bool = False  # of decibels, which are logarithms already


Box = tuple[float, float, float, float]  # left, top, right, bottom


def scatter_chart(points: Sequence[Point], *, title: str, x: Axis, y: Axis, groups: Sequence[str] = ()) -> Markup:
    """Points with their names; `groups` gives the colours their order where several charts share them.

    Raises ValueError for values that are not finite.
    """
    if not points:
        return figure(title, note="Nothing to show.")
    across, x_ticks = _scale([p.x for p in points], x, LEFT + AIR, WIDTH - RIGHT)
    down, y_ticks = _scale([p.y for p in points], y, FLOOR, TOP)
    parts = axes(x.label, y.label, x_ticks, y_ticks, across, down, FLOOR)
    if x.limit is not None:
        parts.append(line(across(x.limit), TOP, across(x.limit), FLOOR, "limit"))
    if y.limit is not None:
        parts.append(line(LEFT, down(y.limit), WIDTH - RIGHT, down(y.limit), "limit"))
    groups = list(dict.fromkeys([*groups, *(p.group for p in points)]))
    places = [(across(p.x), down(p.y)) for p in points]
    for kind, (letter, height) in LETTER.items():
        parts += _names(points, places, kind, letter, height)
    for p, (left, top) in zip(points, places, strict=True):
        if p.chosen:
            parts.append(element("circle", class_="ring", cx=left, cy=top, r=RING))
        said = element("title", f"{_whole(p)}: {number(p.x)} {x.label}, {number(p.y)} {y.label}")
        colour = groups.index(p.group) % COLOURS
        parts.append(element("circle", said, class_=f"dot c{colour}", cx=left, cy=top, r=DOT))
    listed = "; ".join(f"{_whole(p)}{' (chosen)' if p.chosen else ''}: {number(p.x)}, {number(p.y)}" for p in points)
    limits = [axis.limit_label for axis in (x, y) if axis.limit is not None]
    described = f"{title}. Scatter chart of {y.label} over {x.label}, each as x, y: {listed}."
    described += "".join(f" A line marks {label}." for label in limits)
    note = "; ".join(f"dashed: {label}" for label in limits)
    return figure(title, svg(FLOOR + BOTTOM, described, parts), keys=groups, kind="dot", note=note)


def _scale(
    values: Sequence[float], axis: Axis, begin: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """From a value to its place between two ends of the chart, and the ticks."""
    if not all(math.isfinite(v) for v in values):
        raise ValueError("a chart cannot show values that are not finite")
    known = [*values, *([] if axis.limit is None else [axis.limit])]
    low, high = min(known), max(known)
    log = not axis.linear and low > 0 and high / low >= LOG_FROM
    ticks = log_ticks(low, high) if log else nice_ticks(low, high, 5)
    measure = math.log if log else float
    first, last = measure(ticks[0]), measure(ticks[-1])

    def place(value: float) -> float:
        return begin + (measure(value) - first) / (last - first) * (end - begin)

    return place, ticks


def _whole(point: Point) -> str:
    """The name without the help of a colour."""
    return f"{point.group} {point.name}".strip()


def _names(
    points: Sequence[Point], places: Sequence[tuple[float, float]], kind: str, letter: float, height: float
) -> list[Markup]:
    """Every point's name near it, with a thin line to it where it had to go further; lines lie below the names."""
    lines, names = [], []
    radii = [RING if p.chosen else DOT for p in points]
    taken = [(x - r - 1, y - r - 1, x + r + 1, y + r + 1) for (x, y), r in zip(places, radii, strict=True)]
    # The chosen first, then crowded points: the others have more room to choose from.
    order = sorted(range(len(points)), key=lambda i: (not points[i].chosen, -_neighbours(places, i)))
    for i in order:
        x, y = places[i]
        whole, cut = shorten(points[i].name), shorten(points[i].name, CRAMPED)
        beside = (x - len(cut) * letter - DOT - 4, y - height / 2, x - DOT - 4, y + height / 2)
        shown, found = next(
            (
                (name, box)
                for name in (whole, cut)
                for box in _around(x, y, len(name) * letter, height, radii[i])
                if _inside(box) and not any(_meet(box, t) for t in taken)
            ),
            (cut, beside),
        )
        taken.append(found)
        left, top, right, bottom = found
        nearest_x, nearest_y = min(max(x, left), right), min(max(y, top), bottom)
        if math.hypot(nearest_x - x, nearest_y - y) > 2 * radii[i]:
            lines.append(line(x, y, nearest_x, nearest_y, f"leader {kind}"))
        mark = " strong" if points[i].chosen else ""
        at = "end" if right < x else "mid" if left < x < right else ""
        start = {"end": right, "mid": (left + right) / 2, "": left}[at]
        middle = (top + bottom) / 2
        names.append(element("text", shown, class_=f"point {kind}{mark} {at}", x=start, y=middle, dy=".35em"))
    return lines + names


def _neighbours(places: Sequence[tuple[float, float]], i: int) -> int:
    x, y = places[i]
    return sum(abs(a - x) < 120 and abs(b - y) < 40 for a, b in places)


def _around(x: float, y: float, width: float, height: float, radius: float) -> Iterator[Box]:
    """Boxes of a name near its point: beside it, above, below, then in wider circles."""
    for gap in (radius + 3, 16, 30, 46, 64, 84, 106, 130):
        for angle in (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 65, 295, 115, 245):
            dx, dy = math.cos(math.radians(angle)), -math.sin(math.radians(angle))
            # The box's nearest edge or corner lies at `gap` in that direction.
            left = x + dx * gap - (width if dx < -0.3 else 0 if dx > 0.3 else width / 2)
            top = y + dy * gap - (height if dy < -0.3 else 0 if dy > 0.3 else height / 2)
            yield left, top, left + width, top + height


def _inside(box: Box) -> bool:
    left, top, right, bottom = box
    return left >= LEFT + 2 and right <= WIDTH and top >= TOP - 12 and bottom <= FLOOR - 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

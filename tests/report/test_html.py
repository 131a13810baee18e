"""The HTML page: text stays text, nothing is fetched, charts are well formed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from kdc_edge.bench.page import render
from kdc_edge.bench.record import Report
from kdc_edge.report.charts import HEIGHT, bar_chart, line_chart, log_ticks, nice_ticks, standalone
from kdc_edge.report.html import (
    Section,
    bullets,
    data_table,
    heat_table,
    image_grid,
    page,
    paragraph,
    side_by_side,
    tiles,
)
from tests.bench.rows import HOSTILE, MACHINE, make_row


class Reader(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def hostile_page() -> str:
    h = HOSTILE
    pixels = np.zeros((64, 64, 3), np.uint8)
    chart = line_chart({h: [(0, 1), (1, 2)], "other": [(0, 1)]}, title=h, x_label=h, y_label=h)
    blocks = [
        paragraph(h),
        bullets([h]),
        tiles([(h, h)]),
        side_by_side(chart, bar_chart({h: 1.0}, title=h, unit=h)),
        data_table([h, h], [[h, h]], title=h),
        heat_table([h], [(h, [1.0])], title=h, corner=h),
        image_grid([(h, [pixels])], [h]),
    ]
    return page(h, [Section(h, blocks), Section("next", [])], lead=h, footer=h)


@pytest.mark.parametrize(
    "text", [hostile_page(), render(Report(MACHINE, (make_row(HOSTILE, prompt=HOSTILE),)), "html")]
)
def test_text_cannot_become_markup(text: str) -> None:
    reader = Reader()
    reader.feed(text)
    tags = {tag for tag, _ in reader.tags}
    assert "script" not in tags
    assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
    assert "&lt;script&gt;" in text


def test_the_page_fetches_nothing() -> None:
    text = hostile_page()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    reader = Reader()
    reader.feed(text)
    sources = [v for _, attributes in reader.tags for k, v in attributes.items() if k in ("src", "href", "action")]
    assert sources
    assert all(v is not None and v.startswith(("data:image/png;base64,", "#")) for v in sources)
    targets = {attributes.get("id") for _, attributes in reader.tags}
    assert {v[1:] for v in sources if v and v.startswith("#")} <= targets


def test_every_image_has_a_text_and_small_ones_stay_pixelated() -> None:
    small, large = np.zeros((64, 64, 3), np.uint8), np.zeros((512, 512, 3), np.uint8)
    grid = ET.fromstring(image_grid([("teacher", [small, None]), ("student", [large, small])], ["red", "blue"]))
    images = list(grid.iter("img"))
    assert [image.get("alt") for image in images] == ["red, by teacher", "red, by student", "blue, by student"]
    assert [image.get("class") for image in images] == ["small-image", None, "small-image"]
    assert "no image" in "".join(grid.itertext())


CURVE = [(float(i), 1 / (1 + i)) for i in range(1000)]


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "series",
    [
        {"a": CURVE, HOSTILE: CURVE[:10]},
        {"one point": [(3.0, 0.5)]},
        {"flat": [(0.0, 2.0), (5.0, 2.0)], "empty": []},
        {"broken": [(0.0, float("nan")), (1.0, 0.0), (2.0, -3.0), (3.0, 4.0)]},
        {"nothing": [(0.0, float("inf"))]},
        {"control": [(0.0, 1e-9), (1e9, 1e12)], "\x00\x1b": [(0.0, 1.0)]},
    ],
)
def test_line_charts_are_well_formed_and_stay_inside(series: dict[str, list[tuple[float, float]]], log_y: bool) -> None:
    figure = ET.fromstring(line_chart(series, title="T", x_label="x", y_label="y", log_y=log_y))
    for line in figure.iter("polyline"):
        points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
        assert len(points) <= 300
        assert all(0 <= x <= 560 and 0 <= y <= 330 for x, y in points)
        assert all(a[0] <= b[0] for a, b in pairwise(points))


def test_a_line_chart_in_a_file_has_its_keys_below_the_plot_and_inside() -> None:
    lines = {"a < b": [(0.0, 1.0), (1.0, 2.0)], "c": [(0.0, 2.0)]}
    plain = line_chart(lines, title="T", x_label="x", y_label="y")
    file = ET.fromstring(standalone(plain, "T", keys=list(lines)))
    texts = {element.text: float(element.attrib["y"]) for element in file if element.tag.endswith("text")}
    top, height = (float(file.attrib["viewBox"].split()[i]) for i in (1, 3))
    assert HEIGHT < texts["a < b"] < texts["c"] < top + height
    drawn = [element.attrib["class"] for element in file if element.attrib.get("class", "").startswith("line ")]
    assert drawn == ["line c0", "line c1"] * 2  # the lines, and their keys


def test_bars_are_in_proportion() -> None:
    chart = ET.fromstring(bar_chart({"a": 4.0, "b": 1.0, "c": 0.0, HOSTILE: -1.0}, title="T", unit="ms"))
    widths = [float(bar.attrib["width"]) for bar in chart.iter("rect")]
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.01)
    assert widths[2] == widths[3] == 2.0
    assert "4 ms" in "".join(chart.itertext())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1, 1500, [0, 500, 1000, 1500]), (-3, 4, [-4, -2, 0, 2, 4]), (5, 5, None)],
)
def test_ticks_are_nice(low: float, high: float, expected: list[float] | None) -> None:
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert expected is None or ticks == expected


def test_log_ticks_frame_the_values() -> None:
    assert log_ticks(0.03, 0.9) == [0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    assert log_ticks(2e-6, 3.0)[0] <= 2e-6
    assert len(log_ticks(1e-12, 1e12)) < 10


def test_heat_is_stronger_where_the_number_is_better() -> None:
    def shares(higher_is_better: bool) -> list[str]:
        table = heat_table(
            ["a", "b"], [("r", [0.1, 0.9]), ("s", [None, 0.5])], title="R", higher_is_better=higher_is_better
        )
        return [str(cell.get("style")) for cell in ET.fromstring(table).iter("td")]

    assert shares(True) == ["--share: 0", "--share: 72", "--share: 0", "--share: 36"]
    assert shares(False) == ["--share: 72", "--share: 0", "--share: 0", "--share: 36"]


def test_numbers_stand_at_the_right() -> None:
    table = ET.fromstring(data_table(["Run", "Loss", "Note"], [["1", "−0.5", "good"], ["2", "–", "3 bad"]]))
    assert [cell.get("class") for cell in table.iter("td")] == ["right", None] * 2

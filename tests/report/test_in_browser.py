"""The page of a benchmark in a real browser: it fits, reads in the dark and aloud, fetches nothing, gives its data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdc_edge.bench.page import benchmark_page
from kdc_edge.bench.record import Disturbance, Psnr, Report, Row, Timings, from_json
from tests.bench.rows import FAILED, HOSTILE, MACHINE, make_row, timing
from tests.report.browser import Browser

pytestmark = pytest.mark.browser

WINDOWS = [(1280, False), (1280, True), (390, False), (390, True)]

# Text that can be seen and is too pale for its ground (WCAG 2, 4.5 to 1), as [text, ratio].
PALE = """(() => {
  const luminance = c => { const [r, g, b] = c.map(v => { v /= 255;
      return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 });
    return .2126 * r + .7152 * g + .0722 * b };
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const parse = c => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data] };
  const ground = e => { for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c.slice(0, 3) }
    return [255, 255, 255] };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.tagName === 'title' || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = parse(e instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [luminance(ink), luminance(ground(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) found.push([e.textContent.slice(0, 40), ratio]);
  }
  return found;
})()"""

# Names of points that cover each other or leave their chart.
COLLISIONS = """(() => {
  const found = [];
  for (const plot of document.querySelectorAll('.plot')) {
    const seen = [...plot.querySelectorAll('.point')].filter(e => getComputedStyle(e).display !== 'none');
    const boxes = seen.map(e => [e.textContent, e.getBoundingClientRect()]);
    const whole = plot.getBoundingClientRect();
    boxes.forEach(([name, a], i) => {
      if (a.left < whole.left - 1 || a.right > whole.right + 1) found.push(name + ' leaves');
      for (const [other, b] of boxes.slice(i + 1)) {
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 2 && down > 4) found.push(name + ' over ' + other);
      }
    });
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    opened = Browser()
    yield opened
    opened.close()


def measured(name: str, target: str | None, sec: float, mb: float, size_mb: float, db: float | None) -> Row:
    stages = {f.name: timing(sec / 25, sec / 20) for f in dataclasses.fields(Timings)} | {
        "end_to_end": timing(sec, sec)
    }
    return make_row(
        name, target=target, precision=name.partition("-")[2] or None, engine=target or "torch", parity=None,
        timings=Timings(**stages), peak_rss_bytes=int(mb * 1e6), size_bytes=int(size_mb * 1e6),
        reference=target is None, psnr=None if target is None else Psnr("torch:checkpoint", db),
        disturbance=Disturbance(verdict="the machine was disturbed: other processes used 60 % of the processor"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def report() -> Report:
    """The garden's numbers, where many points lie close together; a failure; and a name that is an attack."""
    rows = [
        measured("checkpoint", None, 1.43, 907, 13.4, None),
        measured("onnx-fp32", "onnx", 0.90, 140, 14.9, 89.0),
        measured("onnx-fp16", "onnx", 0.727, 135, 7.61, 65.0),
        measured("openvino-fp32", "openvino", 0.495, 249, 15.7, None),
        measured("openvino-w8", "openvino", 0.388, 248, 5.58, 42.1),
        measured("openvino-w4", "openvino", 0.409, 249, 5.24, 36.5),
        measured("openvino-int8", "openvino", 0.396, 276, 5.70, 23.5),
        measured("openvino-int8-hybrid", "openvino", 0.417, 256, 5.60, 33.0),
        FAILED,
        measured(HOSTILE, "onnx", 0.6, 300, 9.0, 50.0),
    ]
    return Report(MACHINE, tuple(rows), command="kdc-edge bench --format html")


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    images = [None if r.failure else random.integers(0, 255, (1, 512, 512, 3), np.uint8) for r in report.rows]
    path = tmp_path_factory.mktemp("page") / "bench.html"
    path.write_text(benchmark_page(report, images))
    return path


@pytest.mark.parametrize(("width", "dark"), WINDOWS)
def test_the_page_fits_its_window_and_can_be_read(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == dark
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.evaluate("document.images.length") == 1 + 8 * 2
    assert browser.evaluate(PALE) == []
    assert browser.evaluate(COLLISIONS) == []
    assert browser.evaluate("document.scripts.length") == 0
    assert (
        browser.evaluate("performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length")
        == 0
    )
    assert browser.complaints == []


def test_the_page_can_be_heard(browser: Browser, page: Path) -> None:
    """What a screen reader is given: headings in order, landmarks, and a name for every image and chart."""
    browser.open(page, width=1280)
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    seen = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    roles = {role for role, _ in seen}
    assert {"main", "navigation", "banner", "contentinfo", "table", "rowheader", "columnheader"} <= roles
    headings = [name for role, name in seen if role == "heading"]
    assert headings == [
        "openvino-w8: 388 ms, 248 MB", "In short", "Speed, memory, size, quality", "Where the time goes", "Images",
        "Every row", "Conditions", "Data",
    ]  # fmt: skip
    images = [name for role, name in seen if role == "image"]
    assert len(images) == 17 + 4
    assert all(images)
    speed = next(name for name in images if name.startswith("Time and memory"))
    assert " openvino w8 (chosen): 0.388, 248; " in speed  # told apart without the colours
    assert browser.complaints == []


def test_the_data_can_be_downloaded(browser: Browser, page: Path, report: Report, tmp_path: Path) -> None:
    browser.open(page, width=390)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for name in ("bench.json", "bench.csv"):
        browser.evaluate(f"document.querySelector('a[download=\"{name}\"]').click()")
        deadline = time.monotonic() + 60
        while not (tmp_path / name).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert from_json((tmp_path / "bench.json").read_text("utf-8")) == report
    assert (tmp_path / "bench.csv").read_text("utf-8").count("\n") >= len(report.rows) + 1

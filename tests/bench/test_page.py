"""What the page of a benchmark says and draws; test_page_in_browser.py looks at it as a reader does."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from kdc_edge.bench.budget import Budget, decide
from kdc_edge.bench.page import benchmark_blocks, benchmark_page
from kdc_edge.bench.record import Psnr, Report, from_json
from kdc_edge.report.charts import stacked_bars
from kdc_edge.report.html import Card, command, image_cards
from kdc_edge.report.scatter import Axis, Point, scatter_chart
from tests.bench.rows import FAILED, HOSTILE, MACHINE, make_row, timing

FAST = make_row("onnx-fp16", 0.5, psnr=Psnr("torch:x", 24.0))
GOOD = make_row("openvino-int8", 1.0, target="openvino", precision="int8", psnr=Psnr("torch:x", 42.0))
SLOW = make_row("onnx-fp32", 9.0, precision="fp32", psnr=Psnr("torch:x", None))


def images_in(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_the_decision_comes_first() -> None:
    decision = decide([FAST, GOOD, SLOW], Budget(min_psnr_db=30))
    title, sentence = decision.title, decision.sentence
    assert title == "openvino-int8: 375 ms, 262 MB"
    assert sentence == (
        "For this machine and at least 30 dB: openvino-int8, 375 ms an image, 262 MB of memory at the peak,"
        " 3.1 MB on disk, 42.0 dB against PyTorch."
    )
    page = benchmark_page(Report(MACHINE, (FAST, GOOD, SLOW)))
    assert page.index(f"<h1>{title}</h1>") < page.index(sentence) < page.index("<h2")
    assert page.index("kdc-edge generate") < page.index("quality</h2>")


def test_a_decision_without_a_choice_says_what_is_nearest_or_that_all_failed() -> None:
    decision = decide([FAST, SLOW], Budget(max_sec=1.0, min_psnr_db=30))
    assert decision.title == "Nothing meets at most 1 s an image, at least 30 dB"
    assert decision.sentence == "The nearest on this machine: onnx-fp16, 24.0 dB where at least 30 dB are asked."
    assert decide([FAILED], Budget()).title == "Nothing could be measured"
    page = benchmark_page(Report(MACHINE, (FAILED,)))
    assert "coreml was not measured: needs macOS" in page
    assert "Where the time goes" not in page


def test_what_was_not_measured_is_folded_and_random_weights_are_named() -> None:
    rows = (FAST, FAILED, dataclasses.replace(GOOD, random_weights=True))
    page = benchmark_page(Report(MACHINE, rows), [np.zeros((1, 8, 8, 3), np.uint8)] * 3)
    table, details = page[page.index("<table") : page.index("</table>")], page[page.index("<details>") :]
    assert "coreml" not in table
    assert "<summary>1 of 3 rows were not measured</summary>" in details
    assert "coreml was not measured: needs macOS" in details
    title = re.search("<title>(.*)</title>", page)
    assert title is not None
    assert "kdc-482m with random weights" in title[1]
    assert page.count("The weights are random") == 3  # in short, beside the images, conditions
    assert ", random weights</span>" in page
    assert "random" not in benchmark_page(Report(MACHINE, (FAST, FAILED)))


def test_the_data_in_the_page_is_the_report() -> None:
    report = Report(MACHINE, (FAST, FAILED), command="kdc-edge bench")
    page = benchmark_page(report)
    links = dict(re.findall(r'<a download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', page))
    assert from_json(base64.b64decode(links["bench.json"])) == report
    assert base64.b64decode(links["bench.csv"]).startswith(b"name,")


def test_a_difference_is_amplified_against_the_reference_of_the_same_request() -> None:
    flat = np.full((64, 64, 3), 100, np.uint8)
    rows = [
        make_row("torch", target=None, precision=None, reference=True),
        make_row("torch", target=None, precision=None, reference=True, steps=4),
        make_row("a", psnr=Psnr("torch", 40.0)),
        make_row("b", psnr=Psnr("torch", 40.0), steps=4),
        make_row("alone", steps=9),
    ]
    images = [image[None] for image in (flat, flat + 50, flat + 2, flat + 43, flat)]
    shown = images_in(benchmark_page(Report(MACHINE, tuple(rows)), images))
    assert [int(p[0, 0, 0]) for p in shown] == [100, 150, 102, 2 * 8, 143, 7 * 8, 100]


def test_each_row_shows_another_prompt() -> None:
    more = ("a blue fish", "a pink flower")
    rows = [
        make_row("torch", target=None, precision=None, reference=True, more_prompts=more),
        *(make_row(name, psnr=Psnr("torch", 40.0), more_prompts=more) for name in "abc"),
    ]
    of_prompts = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (100, 110, 120)])
    page = benchmark_page(Report(MACHINE, tuple(rows)), [of_prompts[:2], *[of_prompts + 1] * 3])
    assert [int(p[0, 0, 0]) for p in images_in(page)] == [100, 111, 8, 101, 8, 111, 8]  # the reference made two
    assert page.count("; “a blue fish”") == 2
    assert "An image of each, of one prompt after the other" in page


def test_strong_differences_end_at_white_and_large_images_are_reduced() -> None:
    pixels = np.zeros((512, 768, 3), np.uint8)
    made, apart = images_in(image_cards([Card("a", "", pixels, pixels + 200)]))
    assert made.shape == apart.shape == (171, 256, 3)
    assert (apart == 255).all()


def test_an_option_stays_with_its_value() -> None:
    made = ET.fromstring(command("kdc-edge generate 'a <b>' --steps 20 --bundle x"))
    assert [e.text for e in made.iter("span")] == ["--steps 20", "--bundle x"]
    assert "".join(made.itertext()) == "kdc-edge generate 'a <b>' --steps 20 --bundle x"


def test_blocks_for_other_reports_hold_charts_table_and_conditions() -> None:
    html = "".join(benchmark_blocks([FAST, GOOD, FAILED], MACHINE))
    assert html.count("<figure") == 4
    assert "coreml was not measured: needs macOS" in html
    assert "How it was measured" in html
    assert "".join(benchmark_blocks([], MACHINE)).count("<figure") == 0


def test_what_cannot_run_here_stands_in_the_chart_of_quality_by_its_proof() -> None:
    elsewhere = make_row("coreml-w8", target="coreml", timings=None, peak_rss_bytes=None, failure="needs macOS")
    charts, note, *_ = benchmark_blocks([FAST, elsewhere], MACHINE)
    assert "by the proof of their export, which made other images: coreml-w8." in note
    speed, quality = charts.split("<figure")[1:]
    assert ">fp16<" in speed
    assert ">w8<" not in speed
    assert ">fp16<" in quality
    assert ">w8<" in quality
    assert "51.7" in quality  # its parity


# the charts

POINTS = [Point(f"bundle-{i}", 1 + i % 3 * 0.01, 100 + i % 4 * 0.5, "onnx") for i in range(12)]


@pytest.mark.parametrize(
    "points",
    [
        POINTS,
        [Point(HOSTILE, 1.0, 2.0), Point("b", 1000.0, 0.001, "g", chosen=True)],
        [Point("one", 5.0, 5.0)],
        [Point("zero", 0.0, 0.0), Point("minus", -3.0, 1.0)],
    ],
)
def test_scatter_charts_are_well_formed_and_stay_inside(points: list[Point]) -> None:
    html = scatter_chart(points, title=HOSTILE, x=Axis("x", 4.0, "most"), y=Axis("y", linear=True))
    figure = ET.fromstring(html)
    dots = [
        e for e in figure.iter("circle") if (e.get("class") or "").startswith("dot") and e.find("title") is not None
    ]
    assert len(dots) == len(points)
    for dot in dots:
        assert 62 <= float(dot.attrib["cx"]) <= 560
        assert 0 <= float(dot.attrib["cy"]) <= 330
    for kind in ("wide", "narrow"):
        names = [e.text for e in figure.iter("text") if kind in (e.get("class") or "").split()]
        assert len(names) == len(points)


def test_greater_values_lie_to_the_right_and_above_also_on_a_logarithmic_axis() -> None:
    for spread in (1.0, 1000.0):
        points = [Point("a", 1.0, 1.0), Point("b", 2.0, 2.0), Point("c", 2.0 + spread, 2.0 + spread)]
        figure = ET.fromstring(scatter_chart(points, title="T", x=Axis("x"), y=Axis("y")))
        dots = [e for e in figure.iter("circle") if e.find("title") is not None]
        across, down = [float(d.attrib["cx"]) for d in dots], [float(d.attrib["cy"]) for d in dots]
        assert across == sorted(across)
        assert down == sorted(down, reverse=True)
        # Doubling is a tenth of the way to a thousandfold on a logarithmic axis, and nothing on a linear one.
        if spread > 1:
            assert (across[1] - across[0]) > 0.05 * (across[2] - across[0])


def test_names_are_whole_where_there_is_room_and_cut_where_there_is_none() -> None:
    name = "captions, the teacher's images, twice"

    def drawn(count: int) -> list[str | None]:
        points = [Point(name, x % 5, x // 5) for x in range(count)]
        figure = ET.fromstring(scatter_chart(points, title="T", x=Axis("x"), y=Axis("y")))
        return [e.text for e in figure.iter("text") if "wide" in (e.get("class") or "").split()]

    assert drawn(3) == [name] * 3
    assert {text if text == name else str(text)[-1] for text in drawn(60)} == {name, "…"}


def test_a_value_that_is_none_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="not finite"):
        scatter_chart([Point("a", float("nan"), 1.0)], title="T", x=Axis("x"), y=Axis("y"))
    assert "Nothing to show" in scatter_chart([], title="T", x=Axis("x"), y=Axis("y"))


def test_stacked_bars_are_in_proportion_and_said() -> None:
    rows = {"a": {"text": 1.0, "steps": 3.0}, HOSTILE: {"text": 0.5, "steps": 0.5}}
    figure = ET.fromstring(stacked_bars(rows, title="T", unit="s"))
    drawn = [e for e in figure.iter("rect") if "x" in e.attrib]
    widths = [float(e.attrib["width"]) for e in drawn]
    assert widths[1] == pytest.approx(3 * widths[0], rel=0.01)
    assert widths[2] == pytest.approx(widths[0] / 2, rel=0.01)
    assert float(drawn[1].attrib["x"]) == pytest.approx(widths[0], abs=0.1)
    assert any("a: 4 s, of which text 1, steps 3" in e.attrib.get("aria-label", "") for e in figure.iter("svg"))


def test_the_bars_show_what_an_image_takes_on_average() -> None:
    """Two images, of a first step and three others; start-up is the cold image without loading and compiling."""
    assert GOOD.timings is not None
    stages = dataclasses.replace(
        GOOD.timings, unet_first_step=timing(1, 3), unet_step=timing(1, 1, 1, 2, 2, 2), end_to_end=timing(9, 9),
        load=timing(2), compile=timing(3), cold=timing(11),
    )  # fmt: skip
    html = "".join(benchmark_blocks([dataclasses.replace(GOOD, timings=stages)], MACHINE))
    assert "U-Net, first step 2, U-Net, other steps 4.5, " in html
    assert "openvino-int8: 11 s, of which load 2, compile 3, the rest, with the first image 6." in html


def test_rows_stand_by_their_time_and_the_chosen_one_is_marked() -> None:
    page = benchmark_page(Report(MACHINE, (FAILED, SLOW, GOOD, FAST)))
    rows = re.findall(r'<tr( class="marked")?><th scope="row">([^<]+)</th>', page)
    assert rows == [("", "onnx-fp16"), (' class="marked"', "openvino-int8"), ("", "onnx-fp32")]


def test_model_images_and_machine_stand_above_the_title() -> None:
    page = benchmark_page(Report(MACHINE, (GOOD,)))
    subject = "kdc-482m, 64 × 64 in 20 steps, A &lt;fast&gt; processor, 2 cores"
    assert f"<title>openvino-int8: 375 ms, 262 MB ({subject})</title>" in page
    assert page.index(f'<p class="small">{subject}</p>') < page.index("<h1>")

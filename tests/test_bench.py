"""The stopwatch against a clock that the test turns, failures as rows, and reports that parse."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest

from kdc_edge.bench import measure as stopwatch
from kdc_edge.bench.charts import log_ticks, nice_ticks
from kdc_edge.bench.measure import measure, measure_in_fresh_process, peak_rss_bytes, picture_parity
from kdc_edge.bench.page import (
    Section,
    bar_chart,
    bullets,
    data_table,
    heat_table,
    line_chart,
    page,
    paragraph,
    picture_grid,
    side_by_side,
    tiles,
)
from kdc_edge.bench.record import Environment, Report, Row, Timing, Timings, from_json, here, to_json
from kdc_edge.bench.report import Format, digits, render
from kdc_edge.bundle import (
    Check,
    ComponentInfo,
    Manifest,
    Model,
    Parity,
    Provenance,
    Tensor,
    list_files,
    write_manifest,
)
from kdc_edge.errors import InputError, KdcError
from kdc_edge.pipeline import Component, Pipeline, Request
from kdc_edge.tokenizer import Tokenizer

MODEL = Model(
    unet_parameters=7,
    latent_channels=4,
    latent_size=16,
    latent_unit=8,
    vae_scale=4,
    scaling_factor=1.0,
    scheduler={"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
)
HOSTILE = "<script>alert('x')</script> & \"quotes\" | *pipe*"


def make_pipeline(work: Callable[[str], None] = lambda _: None) -> Pipeline:
    """The real pipeline on components that say who they are and answer with constants."""

    def text_encoder(**inputs: np.ndarray) -> np.ndarray:
        work("text_encoder")
        return np.zeros((*inputs["input_ids"].shape, 8), np.float32)

    def unet(**inputs: np.ndarray) -> np.ndarray:
        work("unet")
        return inputs["sample"] * np.float32(0.1)

    def vae_decoder(**inputs: np.ndarray) -> np.ndarray:
        work("vae_decoder")
        height, width = inputs["latent_sample"].shape[2:]
        return np.full((1, 3, height * 4, width * 4), 0.5, np.float32)

    components: dict[str, Component] = {"text_encoder": text_encoder, "unet": unet, "vae_decoder": vae_decoder}
    return Pipeline(MODEL, Tokenizer.clip(), components)


# What the child processes open, by name.


def open_fake(
    folder: Path, *, engine: str | None, device: str | None, threads: int | None, low_memory: bool
) -> Pipeline:
    print(f"engines talk: {folder} {engine} {device} {threads} {low_memory}")
    return make_pipeline()


def open_refused(*_: object, **__: object) -> Pipeline:
    raise KdcError("this engine\nrefuses")


def open_too_large(*_: object, **__: object) -> Pipeline:
    raise MemoryError


def open_killed(*_: object, **__: object) -> Pipeline:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def open_crash(*_: object, **__: object) -> Pipeline:
    print("engine: illegal instruction", file=sys.stderr, flush=True)
    os._exit(3)


def open_broken(*_: object, **__: object) -> Pipeline:
    raise ZeroDivisionError("inside the engine")


def open_endless(folder: Path, **_: object) -> Pipeline:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(120)
    raise AssertionError


def make_bundle(folder: Path, checks: Sequence[Check] = ()) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 1000)
    tensor = Tensor(dtype="float32", shape=[1])
    info = ComponentInfo(files=["weights"], inputs={"x": tensor}, outputs={"y": tensor})
    manifest = Manifest(
        target="onnx",
        precision="fp16",
        model=MODEL,
        components={"unet": info},
        files=list_files(folder),
        parity=Parity(reference="PyTorch", conditions="a test", checks=list(checks)),
        provenance=Provenance(checkpoint="c", checkpoint_sha256="0" * 64, packages={}, created="today"),
    )
    write_manifest(folder, manifest)
    return folder


def check(what: str, psnr_db: float | None) -> Check:
    return Check(what=what, psnr_db=psnr_db, threshold_db=35.0, max_abs_error=0.0)


def timing(*samples_sec: float) -> Timing:
    made = Timing.of(samples_sec)
    assert made is not None
    return made


def make_row(name: str = "onnx-fp16", scale: float = 1.0, **changes: object) -> Row:
    stages = {f.name: timing(scale * 0.25, scale * 0.5) for f in dataclasses.fields(Timings)}
    row = Row(
        name=name,
        folder=f"bundles/{name}",
        target="onnx",
        precision="fp16",
        engine="onnxruntime",
        device=None,
        threads=2,
        low_memory=False,
        size_bytes=3 * 2**20,
        parity=check("picture", 51.7),
        prompt="a red flower",
        negative_prompt="",
        steps=20,
        guidance=7.5,
        guidance_mode=None,
        guidance_interval=(0.0, 1.0),
        sampler="ddim",
        width=64,
        height=64,
        seed=1,
        repeats=2,
        warmup=1,
        timings=Timings(**stages),
        peak_rss_bytes=250 * 2**20,
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


FAILED = make_row("coreml", timings=None, peak_rss_bytes=None, parity=None, failure="needs macOS")
MACHINE = Environment("Linux", "A <fast> processor", 2, 24 * 2**30, "3.11.7", {"kdc-edge": "0.1.0"})


# measuring


def test_laps_are_what_the_components_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pictures, steps = 100.0, -1, 0  # preparing encodes the prompt too: picture 0, which takes no time

    def work(component: str) -> None:
        """Picture n takes n times as long; a first step 5, the others 2."""
        nonlocal now, pictures, steps
        if component == "text_encoder":
            pictures, steps = pictures + 1, 0
        steps += component == "unet"
        units = {"text_encoder": 1.0, "unet": 5.0 if steps == 1 else 2.0, "vae_decoder": 3.0}[component]
        now += units * pictures

    def opener() -> Pipeline:
        nonlocal now
        pipeline = make_pipeline(work)
        now += 7.0
        return pipeline

    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now)
    found = measure(opener, Request("a red flower", steps=4, sampler="ddim"), repeats=3, warmup=1)
    timings = found.timings
    assert timings.load.samples_sec == (7.0,)
    assert timings.first_picture.samples_sec == (1.0 + 5.0 + 3 * 2.0 + 3.0,)
    assert timings.tokenize.samples_sec == (0.0, 0.0, 0.0)
    assert timings.text_encoder.samples_sec == (2.0, 3.0, 4.0)  # the first picture was for warm-up
    assert timings.unet_first_step.samples_sec == (10.0, 15.0, 20.0)
    assert timings.unet_step is not None
    assert timings.unet_step.samples_sec == (4.0,) * 3 + (6.0,) * 3 + (8.0,) * 3
    assert timings.vae_decoder.samples_sec == (6.0, 9.0, 12.0)
    assert timings.end_to_end.samples_sec == (30.0, 45.0, 60.0)
    assert timings.end_to_end.median_sec == 45.0
    assert timings.end_to_end.p90_sec == pytest.approx(57.0)
    assert found.pixels.shape == (64, 64, 3)
    assert (found.pixels == found.pixels[0, 0, 0]).all()


def test_stages_add_up_to_the_end_to_end() -> None:
    timings = measure(make_pipeline, Request("a", steps=5), repeats=2, warmup=0).timings
    assert timings.unet_step is not None
    whole = [timings.tokenize, timings.text_encoder, timings.unet_first_step, timings.unet_step, timings.vae_decoder]
    total = sum(sum(stage.samples_sec) for stage in whole)
    assert total == pytest.approx(sum(timings.end_to_end.samples_sec), rel=1e-6)
    assert timings.first_picture.median_sec == timings.end_to_end.samples_sec[0]


def test_a_picture_of_one_step_has_no_later_steps() -> None:
    assert measure(make_pipeline, Request("a", steps=1, sampler="ddim"), repeats=2, warmup=0).timings.unet_step is None


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_counts_out_of_range_are_refused(repeats: int, warmup: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--(repeats|warmup)"):
        measure(make_pipeline, Request("a"), repeats=repeats, warmup=warmup)
    with pytest.raises(InputError, match=r"--(repeats|warmup)"):
        measure_in_fresh_process(tmp_path, Request("a"), repeats=repeats, warmup=warmup)


def test_statistics_are_numpys() -> None:
    samples = np.random.default_rng(0).random(17).tolist()
    made = timing(*samples)
    assert made.median_sec == np.sort(samples)[8]
    assert made.p90_sec == pytest.approx(np.quantile(samples, 0.9))
    assert Timing.of([]) is None


def test_peak_memory_is_a_high_water_mark() -> None:
    size_bytes = 60 * 2**20
    before = psutil.Process().memory_info().rss
    block = np.ones(size_bytes, np.uint8)
    del block
    peak = peak_rss_bytes()
    assert peak is not None
    assert before + size_bytes * 0.9 < peak <= psutil.virtual_memory().total


def test_a_bundle_in_its_own_process(tmp_path: Path) -> None:
    pictures = [check("unet", 20.0), check("picture", None), check("picture of seed 2", 51.7)]
    folder = make_bundle(tmp_path / "flowers", pictures)
    # The parent's size must not be taken for the child's: fill this process, then look at the row.
    block = np.ones(256 * 2**20, np.uint8)
    row, pixels = measure_in_fresh_process(
        folder, Request("a", steps=2, width=96), repeats=2, warmup=1, threads=1, opener=f"{__name__}:open_fake"
    )
    assert row.failure is None
    assert row.timings is not None
    assert len(row.timings.end_to_end.samples_sec) == 2
    assert (row.name, row.target, row.precision, row.engine) == ("flowers", "onnx", "fp16", "onnxruntime")
    assert (row.width, row.height, row.size_bytes, row.threads) == (96, 64, 1000, 1)
    assert row.parity == pictures[2]
    assert row.peak_rss_bytes is not None
    assert 10 * 2**20 < row.peak_rss_bytes < block.nbytes
    assert pixels is not None
    assert pixels.shape == (64, 96, 3)
    np.testing.assert_array_equal(pixels, make_pipeline().generate(Request("a", steps=2, width=96)))


@pytest.mark.parametrize(
    ("opener", "reason"),
    [
        ("open_refused", "^this engine refuses$"),
        ("open_too_large", "out of memory"),
        ("open_killed", "SIGKILL.*out of memory"),
        ("open_crash", "code 3: engine: illegal instruction"),
        ("open_broken", "ZeroDivisionError: inside the engine"),
    ],
)
def test_a_failing_child_becomes_a_row_with_its_reason(opener: str, reason: str, tmp_path: Path) -> None:
    row, pixels = measure_in_fresh_process(
        make_bundle(tmp_path / "b"), Request("a"), repeats=1, warmup=0, opener=f"{__name__}:{opener}"
    )
    assert row.failure is not None
    assert re.search(reason, row.failure)
    assert (row.timings, row.peak_rss_bytes, pixels) == (None, None, None)
    assert (row.size_bytes, row.width) == (1000, 64)  # what the folder says of itself stays


def test_a_folder_that_is_no_bundle_becomes_a_row(tmp_path: Path) -> None:
    row, pixels = measure_in_fresh_process(tmp_path / "nowhere", Request("a"), repeats=1, warmup=0)
    assert row.failure is not None
    assert "nowhere" in row.failure
    assert pixels is None


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    row, _ = measure_in_fresh_process(
        make_bundle(tmp_path / "b"),
        Request("a"),
        repeats=1,
        warmup=0,
        opener=f"{__name__}:open_endless",
        timeout_sec=0.2,
    )
    assert row.failure == "not done after 0.2 seconds"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where this process was started with it ignored, as background jobs are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_child(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "b")
    seen: list[int] = []

    def interrupt() -> None:
        for _ in range(1000):
            if (folder / "pid").is_file() and (text := (folder / "pid").read_text()):
                seen.append(int(text))
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        measure_in_fresh_process(
            folder, Request("a"), repeats=1, warmup=0, opener=f"{__name__}:open_endless", timeout_sec=30
        )
    thread.join()
    assert seen
    assert not psutil.pid_exists(seen[0])


def test_the_worst_picture_is_the_parity(tmp_path: Path) -> None:
    def worst(*checks: Check) -> Check | None:
        folder = make_bundle(tmp_path / str(len(list(tmp_path.iterdir()))), checks)
        return picture_parity(Manifest.model_validate_json((folder / "kdc-edge.json").read_text()))

    assert worst(check("unet", 10.0)) is None
    assert worst(check("picture", None)) == check("picture", None)
    assert worst(check("picture", None), check("image 2", 40.0), check("picture", 50.0)) == check("image 2", 40.0)


# reports


def test_json_keeps_everything() -> None:
    report = Report(here(), (make_row(), FAILED))
    text = to_json(report)
    assert from_json(text) == report
    assert render(report.rows, report.environment, "json") == text
    plain = json.loads(text)
    assert plain["schema"] == "kdc-edge/bench/1"
    assert plain["rows"][0]["timings"]["end_to_end"]["samples_sec"] == [0.25, 0.5]
    assert plain["rows"][1]["timings"] is None


@pytest.mark.parametrize(
    ("damage", "field"),
    [({"schema": "kdc-edge/bench/2"}, "schema"), ({"extra": 1}, "extra"), ({"rows": [{}]}, "rows")],
)
def test_another_document_is_refused(damage: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        from_json(json.dumps({**json.loads(to_json(Report(MACHINE, ()))), **damage}))


def test_csv_has_a_line_a_row_in_base_units() -> None:
    first, second = csv.DictReader(io.StringIO(render([make_row(prompt='a, "b"'), FAILED], MACHINE, "csv")))
    assert first["prompt"] == 'a, "b"'
    assert float(first["end_to_end_median_sec"]) == 0.375
    assert float(first["load_p90_sec"]) == pytest.approx(0.475)
    assert int(first["peak_rss_bytes"]) == 250 * 2**20
    assert float(first["parity_psnr_db"]) == 51.7
    assert (second["failure"], second["end_to_end_median_sec"], second["parity_psnr_db"]) == ("needs macOS", "", "")
    assert render([], MACHINE, "csv").startswith("name,")


def test_markdown_has_one_unit_a_column_and_its_conditions() -> None:
    slow = make_row("a|b", scale=4, steps=8, parity=check("picture", None))
    text = render([make_row(), slow, FAILED], MACHINE, "md")
    head, rule, *lines = (line for line in text.splitlines() if line.startswith("|"))
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (head, rule, *lines)]
    assert len({len(line) for line in cells}) == 1
    columns = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in zip(*cells, strict=True)}
    assert columns["Bundle"][1:] == ["onnx-fp16", "a\\|b", "coreml"]
    assert columns["Picture, s"][1:] == ["0.375", "1.50", "–"]
    assert columns["Parity, dB"][1:] == ["51.7", "exact", "–"]
    assert columns["Peak, MiB"][1:] == ["250", "250", "–"]
    for condition in ("64 × 64", "20 / 8 steps", "guidance 7.5", "ddim", "seed 1", "coreml failed: needs macOS"):
        assert condition in text
    assert "A \\<fast\\> processor, 2 cores, 24.0 GiB" in text


def test_the_terminal_table_shows_every_column() -> None:
    text = render([make_row("[bold]x"), FAILED], MACHINE, "table")
    assert "[bold]x" in text
    assert "coreml failed: needs macOS" in text
    line = next(line for line in text.splitlines() if "[bold]x" in line)
    assert line.split() == ["[bold]x", "3.00", *["375"] * 6, "475", "250", "51.7"]


def test_digits_are_three() -> None:
    said = [digits(v) for v in (0, 0.00123456, 1.5, 12.345, 99.96, 123.4, 12345.6)]
    assert said == ["0", "0.00123", "1.50", "12.3", "100", "123", "12,346"]


@pytest.mark.parametrize("format", ["table", "md", "csv", "json", "html"])
def test_every_format_takes_failures_alone(format: Format) -> None:
    assert "needs macOS" in render([FAILED], MACHINE, format)


# the page


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
        picture_grid([(h, [pixels])], [h]),
    ]
    return page(h, [Section(h, blocks), Section("next", [])], lead=h, footer=h)


@pytest.mark.parametrize("text", [hostile_page(), render([make_row(HOSTILE, prompt=HOSTILE)], MACHINE, "html")])
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


def test_every_picture_has_a_text_and_small_ones_stay_pixelated() -> None:
    small, large = np.zeros((64, 64, 3), np.uint8), np.zeros((512, 512, 3), np.uint8)
    grid = ET.fromstring(picture_grid([("teacher", [small, None]), ("student", [large, small])], ["red", "blue"]))
    images = list(grid.iter("img"))
    assert [image.get("alt") for image in images] == ["red, by teacher", "red, by student", "blue, by student"]
    assert [image.get("class") for image in images] == ["small-picture", None, "small-picture"]
    assert "no picture" in "".join(grid.itertext())


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

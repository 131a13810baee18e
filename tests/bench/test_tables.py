"""The record and its formats: documents that keep everything, tables that parse."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from kdc_edge.bench.page import ReportFormat, render
from kdc_edge.bench.record import (
    SCHEMA,
    Disturbance,
    Environment,
    PromptQuality,
    Psnr,
    Report,
    Row,
    Timing,
    Timings,
    from_json,
    here,
    read_report,
    to_json,
)
from kdc_edge.bench.tables import digits
from kdc_edge.errors import InputError
from kdc_edge.manifest import Check
from tests.bench.rows import FAILED, MACHINE, check, make_row

SCHEMA_PAGE = (Path(__file__).parents[2] / "docs" / "bench-schema.md").read_text("utf-8")


def test_json_keeps_everything() -> None:
    report = Report(here(), (make_row(), FAILED))
    text = to_json(report)
    assert from_json(text) == report
    assert render(report, "json") == text
    plain = json.loads(text)
    assert plain["schema"] == "kdc-edge/bench/3"
    assert plain["rows"][0]["timings"]["end_to_end"]["samples_sec"] == [0.25, 0.5]
    assert plain["rows"][1]["timings"] is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"schema": "kdc-edge/bench/1"}, "is kdc-edge/bench/1 and this kdc-edge reads kdc-edge/bench/3: measure again"),
        ({"schema": "another"}, "schema"),
        ({"extra": 1}, "extra"),
        ({"rows": [{}]}, "rows"),
    ],
)
def test_another_document_is_refused(damage: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        from_json(json.dumps({**json.loads(to_json(Report(MACHINE, ()))), **damage}))


def test_csv_has_a_line_a_row_in_base_units() -> None:
    first, second = csv.DictReader(io.StringIO(render(Report(MACHINE, (make_row(prompt='a, "b"'), FAILED)), "csv")))
    assert first["prompt"] == 'a, "b"'
    assert float(first["end_to_end_sec"]) == 0.375
    assert float(first["end_to_end_std_sec"]) == pytest.approx(0.25 / 2**0.5)
    assert float(first["load_p90_sec"]) == pytest.approx(0.475)
    assert int(first["peak_rss_bytes"]) == 250 * 2**20
    assert float(first["parity"]) == 51.7
    assert (second["failure"], second["end_to_end_sec"], second["parity"]) == ("needs macOS", "", "")
    assert render(Report(MACHINE, ()), "csv").startswith("name,")


def test_markdown_has_one_unit_a_column_and_its_conditions() -> None:
    slow = make_row("a|b", scale=4, steps=8, parity=check("image", None))
    text = render(Report(MACHINE, (make_row(), slow, FAILED)), "md")
    head, rule, *lines = (line for line in text.splitlines() if line.startswith("|"))
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (head, rule, *lines)]
    assert len({len(line) for line in cells}) == 1
    columns = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in zip(*cells, strict=True)}
    assert columns["Bundle"][1:] == ["onnx-fp16", "a\\|b", "coreml"]
    assert columns["Image, s"][1:] == ["0.375", "1.50", "–"]
    assert columns["Parity, dB"][1:] == ["51.7", "equal", "–"]
    assert columns["Peak, MB"][1:] == ["262", "262", "–"]
    for condition in (
        "64 × 64",
        "20 / 8 steps",
        "guidance 7.5",
        "ddim",
        "seed 1",
        "coreml was not measured: needs macOS",
    ):
        assert condition in text
    assert "A \\<fast\\> processor, 2 cores, 25.8 GB" in text


def test_the_terminal_table_shows_every_column() -> None:
    text = render(Report(MACHINE, (make_row("[bold]x"), FAILED)), "table")
    assert "[bold]x" in text
    assert "coreml was not measured: needs macOS" in text
    line = next(line for line in text.splitlines() if "[bold]x" in line)
    assert line.split() == ["[bold]x", "3.15", *["375"] * 6, "475", "262", "–", "51.7"]


def test_the_widest_table_cuts_no_name_and_no_number() -> None:
    quality = PromptQuality({"prompt_accuracy": 0.97, "exact": 0.85}, 40, "0" * 64)
    common = {"energy_joules": 123.4, "prompt_quality": quality, "size_bytes": 1_380_000_000}
    rows = (
        make_row("openvino-int8-hybrid", sampler="dpm++2m-karras", reference=True, scale=4.0, **common),
        make_row("few-steps", steps=4, sampler="ddim", guidance=1.0, psnr=Psnr("x", 33.3), **common),
    )
    text = render(Report(MACHINE, rows), "table")
    assert "…" not in text
    for part in ("openvino-int8-hybrid ", "few-steps ", "dpm++2m-karras ", " 1,380 ", " reference ", "accuracy"):
        assert part in text


def test_digits_are_three() -> None:
    said = [digits(v) for v in (0, 0.00123456, 1.5, 12.345, 99.96, 123.4, 12345.6)]
    assert said == ["0", "0.00123", "1.50", "12.3", "100", "123", "12,346"]


@pytest.mark.parametrize("format", ["table", "md", "csv", "json", "html"])
def test_every_format_takes_failures_alone(format: ReportFormat) -> None:
    assert "needs macOS" in render(Report(MACHINE, (FAILED,)), format)


def test_quality_stands_beside_speed() -> None:
    disturbed = Disturbance(
        others_share=0.37, verdict="the machine was disturbed: other processes used 37 % of the processor"
    )
    rows = (
        make_row("fp32", reference=True, energy_joules=12.5),
        make_row(
            "fp16", psnr=Psnr("bundles/fp32, the most precise here", 41.23), disturbance=disturbed, compute_dtype="bf16"
        ),
        make_row("int8", prompt_quality=PromptQuality({"prompt_accuracy": 0.95, "exact": 0.75}, 32, "0" * 64)),
        make_row("copy", psnr=Psnr("bundles/fp32, the most precise here", None)),
    )
    text = render(Report(MACHINE, rows), "md")
    head, _, *lines = (line for line in text.splitlines() if line.startswith("|"))
    columns = {
        line[0]: line[1:]
        for line in zip(*([c.strip() for c in line.split("|")[1:-1]] for line in (head, *lines)), strict=True)
    }
    assert columns["PSNR, dB"] == ("reference", "41.2", "–", "equal")
    assert columns["Prompt accuracy"] == ("–", "–", "0.950", "–")
    assert columns["Energy, J"] == ("12.5", "–", "–", "–")
    assert columns["Engine"][1] == "onnxruntime, 2 threads, bf16"
    assert "fp16: the machine was disturbed: other processes used 37 % of the processor." in text
    assert "PSNR compares the image, made from the same noise, with that of bundles/fp32" in text
    assert "32 prompts, an image each, for prompt accuracy." in text


# the schema


@pytest.mark.parametrize("kind", [Report, Environment, Row, Timings, Timing, Disturbance, Psnr, PromptQuality, Check])
def test_the_schema_is_documented_field_by_field(kind: type) -> None:
    """A table under each name, with exactly the fields that there are, in their order."""
    section = SCHEMA_PAGE.split(f"\n## {kind.__name__}\n", 1)[1].split("\n## ")[0]
    found = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    schema = TypeAdapter(kind).json_schema()
    assert found == list(schema["properties"])


def test_the_documented_schema_is_this_one() -> None:
    assert f"`{SCHEMA}`" in SCHEMA_PAGE


def test_a_report_in_a_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    report = Report(MACHINE, (make_row(),))
    path = tmp_path / "bench.json"
    path.write_text(to_json(report))
    assert read_report(path) == report
    for text, words in (("{", "no kdc-edge/bench/3 report"), ("[1]", "no kdc-edge/bench/3 report"), ("[" * 9999, "no")):
        path.write_text(text)
        with pytest.raises(InputError, match=words) as refused:
            read_report(path)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="does not exist"):
        read_report(tmp_path / "nowhere.json")

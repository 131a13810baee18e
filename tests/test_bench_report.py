"""The record and its formats: documents that keep everything, tables that parse."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from kdc_edge.bench.record import Report, from_json, here, to_json
from kdc_edge.bench.report import Format, digits, render
from kdc_edge.errors import InputError
from tests.bench_rows import FAILED, MACHINE, check, make_row


def test_json_keeps_everything() -> None:
    report = Report(here(), (make_row(), FAILED))
    text = to_json(report)
    assert from_json(text) == report
    assert render(report, "json") == text
    plain = json.loads(text)
    assert plain["schema"] == "kdc-edge/bench/2"
    assert plain["rows"][0]["timings"]["end_to_end"]["samples_sec"] == [0.25, 0.5]
    assert plain["rows"][1]["timings"] is None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"schema": "kdc-edge/bench/1"}, "is kdc-edge/bench/1 and this kdc-edge reads kdc-edge/bench/2: measure again"),
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
    assert float(first["end_to_end_median_sec"]) == 0.375
    assert float(first["load_p90_sec"]) == pytest.approx(0.475)
    assert int(first["peak_rss_bytes"]) == 250 * 2**20
    assert float(first["parity_psnr_db"]) == 51.7
    assert (second["failure"], second["end_to_end_median_sec"], second["parity_psnr_db"]) == ("needs macOS", "", "")
    assert render(Report(MACHINE, ()), "csv").startswith("name,")


def test_markdown_has_one_unit_a_column_and_its_conditions() -> None:
    slow = make_row("a|b", scale=4, steps=8, parity=check("picture", None))
    text = render(Report(MACHINE, (make_row(), slow, FAILED)), "md")
    head, rule, *lines = (line for line in text.splitlines() if line.startswith("|"))
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in (head, rule, *lines)]
    assert len({len(line) for line in cells}) == 1
    columns = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in zip(*cells, strict=True)}
    assert columns["Bundle"][1:] == ["onnx-fp16", "a\\|b", "coreml"]
    assert columns["Picture, s"][1:] == ["0.375", "1.50", "–"]
    assert columns["Parity, dB"][1:] == ["51.7", "exact", "–"]
    assert columns["Peak, MB"][1:] == ["262", "262", "–"]
    for condition in ("64 × 64", "20 / 8 steps", "guidance 7.5", "ddim", "seed 1", "coreml failed: needs macOS"):
        assert condition in text
    assert "A \\<fast\\> processor, 2 cores, 24.0 GiB" in text


def test_the_terminal_table_shows_every_column() -> None:
    text = render(Report(MACHINE, (make_row("[bold]x"), FAILED)), "table")
    assert "[bold]x" in text
    assert "coreml failed: needs macOS" in text
    line = next(line for line in text.splitlines() if "[bold]x" in line)
    assert line.split() == ["[bold]x", "3.15", *["375"] * 6, "475", "262", "51.7"]


def test_digits_are_three() -> None:
    said = [digits(v) for v in (0, 0.00123456, 1.5, 12.345, 99.96, 123.4, 12345.6)]
    assert said == ["0", "0.00123", "1.50", "12.3", "100", "123", "12,346"]


@pytest.mark.parametrize("format", ["table", "md", "csv", "json", "html"])
def test_every_format_takes_failures_alone(format: Format) -> None:
    assert "needs macOS" in render(Report(MACHINE, (FAILED,)), format)

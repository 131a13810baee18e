"""kdc_edge.text: how values and foreign texts read."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from kdc_edge.cli.project import command_line
from kdc_edge.hub import label
from kdc_edge.text import (
    csv_cell,
    decibels,
    encodable,
    invalid_field,
    last_line,
    markdown_table,
    megabytes,
    message,
    one_line,
    printable,
)


@given(st.text(), st.integers(3, 400))
def test_text_from_outside_is_one_printable_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit


def test_escape_sequences_are_made_visible() -> None:
    assert printable("red\x1b[31m\u202eflower") == "red\\x1b[31m\\u202eflower"


def test_a_name_that_is_no_utf8_can_stand_in_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert encodable("café 花") == "café 花"
    assert encodable(name) == "caf\\udce9"
    monkeypatch.setattr(sys, "argv", ["kdc-edge", "export", name])
    assert label(tmp_path / name) == "caf\\udce9"
    assert command_line() == "kdc-edge export 'caf\\udce9'"


def test_one_line_is_the_first_of_a_message_or_the_class() -> None:
    assert one_line(ValueError("no such node\n  at line 3")) == "no such node"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert one_line(ValueError("x" * 1000), limit=50) == "x" * 47 + "..."
    assert last_line("warning\nout of memory\n\n", "it said nothing") == "out of memory"
    assert last_line("\n", "it said nothing") == "it said nothing"


def test_an_invalid_field_is_named() -> None:
    class Row(BaseModel):
        files: dict[str, int]

    with pytest.raises(ValidationError) as caught:
        Row.model_validate({"files": {"a\nb": "x"}})
    assert invalid_field(caught.value).startswith("files.a b: Input should be a valid integer")


def test_units() -> None:
    assert [megabytes(12_660_000), megabytes(1_380_400_000)] == ["12.7 MB", "1,380 MB"]
    assert [decibels(None), decibels(math.inf), decibels(41.23)] == ["equal", "equal", "41.2 dB"]


def test_markdown_cells_keep_their_bars() -> None:
    assert markdown_table(("a", "b"), [(1, "x|y")], align="-r") == "| a | b |\n| --- | --: |\n| 1 | x\\|y |\n"


@given(st.text(max_size=2000))
def test_a_message_is_printable_and_bounded(text: str) -> None:
    shown = message(f"{text}: export it again")
    assert shown.isprintable()
    assert len(shown) <= 480
    assert shown.endswith(": export it again")


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_cell_that_a_spreadsheet_would_compute_is_quoted(cell: str) -> None:
    assert csv_cell(cell) == f"'{cell}"
    assert [csv_cell(value) for value in ("onnx-fp16", -1.5, None)] == ["onnx-fp16", -1.5, None]

"""The report of benchmarks/peers.py: its table, and rounds that add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import main, table

RUN = {"load_sec": 1.0, "first_step_sec": 3.0, "decode_sec": 0.5, "total_sec": 7.0, "peak_rss_bytes": 2 * 10**9}


def cells_of(*step_sec: list[float]) -> list[str]:
    """Of the table's one row, whose runs took these times between steps."""
    runs = [RUN | {"step_sec": seconds} for seconds in step_sec]
    lines = table({"rows": {"ours": {"runs": runs, "size_bytes": 10**9}}}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    return [cell.strip() for cell in lines[-1].strip("|").split("|")]


def test_a_step_is_the_median_over_all_runs() -> None:
    assert cells_of([1.0, 2.0], [4.0]) == ["ours", "2.00 s", "7.0 s", "", "3.0 s", "2.00 GB", "1.00 GB"]


def test_runs_of_one_step_have_no_time_between_steps() -> None:
    assert cells_of([], []) == ["ours", "", "7.0 s", "", "3.0 s", "2.00 GB", "1.00 GB"]


def test_rounds_add_up_but_not_under_other_conditions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(steps: int) -> None:
        options = ["--work", tmp_path, "--steps", steps, "--rounds", 1, "--only", "diffusers eager, fp32"]
        monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, [tmp_path, *options])])
        main()

    run = RUN | {"step_sec": [1.0]}
    done = subprocess.CompletedProcess([], 0, json.dumps(run).encode())
    monkeypatch.setattr("benchmarks.peers.subprocess.run", lambda *_, **__: done)
    call(4)
    call(4)
    report = tmp_path / "guided.json"
    before = report.read_text()
    assert json.loads(before)["rows"]["diffusers eager, fp32"]["runs"] == [run, run]
    with pytest.raises(SystemExit):
        call(1)
    assert "has rounds under other conditions" in capsys.readouterr().err
    assert report.read_text() == before

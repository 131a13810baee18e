"""Two reports side by side: rows that belong together, and differences that are more than noise."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from kdc_edge.bench.compare import Change, compare, ratio_interval, render_changes
from kdc_edge.bench.record import Disturbance, Report, Row, Timings
from kdc_edge.errors import InputError
from tests.bench.rows import FAILED, MACHINE, make_row, timing


def taken(*samples_sec: float, name: str = "onnx-fp16", **changes: object) -> Row:
    """A row whose every stage took these times."""
    stages = {f.name: timing(*samples_sec) for f in dataclasses.fields(Timings)}
    return make_row(name, timings=Timings(**stages), **changes)


def report(*rows: Row) -> Report:
    return Report(MACHINE, rows)


def image(old: Report, new: Report) -> Change:
    """The change of the first row's time for an image."""
    return next(c for c in compare(old, new) if c.value == "end_to_end_sec")


STEADY = (1.0, 1.01, 0.99, 1.0, 1.02)


def test_the_same_samples_differ_by_nothing() -> None:
    change = image(report(taken(*STEADY)), report(taken(*STEADY)))
    assert (change.ratio, change.verdict) == (1.0, "within the noise")
    assert change.low is not None
    assert change.high is not None
    assert change.low < 1 < change.high


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, "slower"), (0.8, "faster"), (1.04, "within the noise"), (0.96, "within the noise")]
)
def test_a_difference_counts_where_it_is_more_than_processes_differ(factor: float, verdict: str) -> None:
    change = image(report(taken(*STEADY)), report(taken(*(s * factor for s in STEADY))))
    assert change.ratio == pytest.approx(factor)
    assert change.verdict == verdict


def test_three_processes_a_side_tell_smaller_differences() -> None:
    old = [taken(*(s * f for s in STEADY)) for f in (1.0, 1.002, 0.998)]
    new = [taken(*(s * f * 1.04 for s in STEADY)) for f in (1.0, 1.002, 0.998)]
    assert image(report(*old), report(*new)).verdict == "slower"
    assert image(report(*old[:2]), report(*new)).verdict == "within the noise"


def test_processes_that_differ_widen_the_interval() -> None:
    steady = ratio_interval([STEADY, STEADY, STEADY], [STEADY, STEADY, STEADY])
    unsteady = [tuple(s * f for s in STEADY) for f in (1.0, 1.3, 0.8)]
    wide = ratio_interval(unsteady, unsteady)
    assert steady is not None
    assert wide is not None
    assert wide[0] < 0.9 < steady[0] < 1 < steady[1] < 1.1 < wide[1]


def test_the_interval_is_rarely_wrong() -> None:
    """Two sets from one log-normal distribution: a 95 % interval should miss 1 about one time in twenty."""
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        old, new = np.exp(rng.normal(0, 0.1, (2, 15)))
        interval = ratio_interval([old.tolist()], [new.tolist()])
        assert interval is not None
        missed += not interval[0] <= 1 <= interval[1]
    assert missed <= 20


def test_one_sample_a_side_has_no_spread() -> None:
    change = image(report(taken(1.0)), report(taken(3.0)))
    assert (change.ratio, change.low, change.verdict) == (3.0, None, "one sample a side: its spread is not known")


def test_a_disturbed_machine_is_said_where_a_difference_is_claimed() -> None:
    disturbed = Disturbance(verdict="the machine was disturbed: other processes used 37 % of the processor")
    slower = tuple(s * 2 for s in STEADY)
    change = image(report(taken(*STEADY, disturbance=disturbed)), report(taken(*slower)))
    assert change.verdict == "slower, but the machine was disturbed (old)"
    assert image(report(taken(*STEADY)), report(taken(*STEADY, disturbance=disturbed))).verdict == "within the noise"


def test_rows_are_matched_by_what_they_are() -> None:
    old = report(taken(1.0, 1.0, name="before"), taken(1.0, 1.0, steps=4), taken(1.0, 1.0, threads=1), FAILED)
    new = report(
        taken(2.0, 2.0, name="after"), taken(3.0, 3.0, steps=4), taken(1.0, 1.0, precision="fp32"), FAILED
    )  # fmt: skip
    changes = compare(old, new)
    ratios = {c.what: c.ratio for c in changes if c.value == "end_to_end_sec"}
    assert ratios == {
        "before, 20 steps of ddim, 2 threads": 2.0,  # another name, and the only one of its kind
        "onnx-fp16, 4 steps of ddim, 2 threads": 3.0,
    }
    said = {c.what: c.verdict for c in changes if not c.value}
    assert said["onnx-fp16, 20 steps of ddim, 1 thread"] == "not in the new report"
    assert said["onnx-fp16, 20 steps of ddim, 2 threads"] == "not in the old report"
    assert said["coreml, 20 steps of ddim, 2 threads"] == "old: needs macOS; new: needs macOS"


def test_two_of_a_kind_with_other_names_are_not_guessed() -> None:
    old, new = report(taken(1.0, name="a"), taken(1.0, name="b")), report(taken(1.0, name="c"))
    assert [c.verdict for c in compare(old, new)] == [
        "not in the new report", "not in the new report", "not in the old report",
    ]  # fmt: skip


def test_memory_and_size_are_ratios_too() -> None:
    old, new = report(taken(1.0)), report(taken(1.0, peak_rss_bytes=500 * 2**20))
    found = {c.value: (c.ratio, c.verdict) for c in compare(old, new)}
    assert found["peak_rss_bytes"] == (2.0, "more")
    assert found["size_bytes"] == (1.0, "within 1 %")
    assert "energy_joules" not in found  # known on neither side


CHANGES = compare(report(taken(*STEADY), FAILED), report(taken(*(s * 2 for s in STEADY))))


def test_changes_as_json_and_csv() -> None:
    plain = json.loads(render_changes(CHANGES, "json"))
    assert plain == [dataclasses.asdict(change) for change in CHANGES]
    lines = list(csv.DictReader(io.StringIO(render_changes(CHANGES, "csv"))))
    assert float(lines[0]["ratio"]) == pytest.approx(2.0)
    assert len(lines) == len(CHANGES)


@pytest.mark.parametrize("format", ["table", "md"])
def test_changes_for_people(format: str) -> None:
    text = render_changes(CHANGES, format)
    line = next(line for line in text.splitlines() if " image " in line)
    for words in ("onnx-fp16", "1.00 s", "2.00 s", "2.000", "slower"):
        assert words in line
    assert "not in the new report" in text


def test_another_format_is_refused() -> None:
    with pytest.raises(InputError, match="table, md, csv, json"):
        render_changes(CHANGES, "html")


def test_csv_cells_are_not_computed_by_a_spreadsheet() -> None:
    lines = list(csv.DictReader(io.StringIO(render_changes([dataclasses.replace(CHANGES[0], what="=1+1")], "csv"))))
    assert lines[0]["what"] == "'=1+1"

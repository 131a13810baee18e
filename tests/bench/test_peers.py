"""The table of benchmarks/peers.py."""

from __future__ import annotations

from benchmarks.peers import table


def cells_of(*step_sec: list[float]) -> list[str]:
    """Of the table's one row, whose runs took these times between steps."""
    times = {"load_sec": 1.0, "first_step_sec": 3.0, "decode_sec": 0.5, "total_sec": 7.0, "peak_rss_bytes": 2 * 10**9}
    runs = [times | {"step_sec": seconds} for seconds in step_sec]
    lines = table({"rows": {"ours": {"runs": runs, "size_bytes": 10**9}}}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    return [cell.strip() for cell in lines[-1].strip("|").split("|")]


def test_a_step_is_the_median_over_all_runs() -> None:
    assert cells_of([1.0, 2.0], [4.0]) == ["ours", "2.00 s", "7.0 s", "", "3.0 s", "2.00 GB", "1.00 GB"]


def test_runs_of_one_step_have_no_time_between_steps() -> None:
    assert cells_of([], []) == ["ours", "", "7.0 s", "", "3.0 s", "2.00 GB", "1.00 GB"]

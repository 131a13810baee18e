"""What the machine tells of itself: counters of energy that start over, and other processes that are seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdc_edge.bench.sensors import Energy, Watch, verdict


def zone(root: Path, number: int, name: str, microjoules: int) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_energy_is_the_sum_of_the_packages_whose_counters_start_over(tmp_path: Path) -> None:
    first, second = zone(tmp_path, 0, "package-0", 100), zone(tmp_path, 1, "package-1", 999_000)
    platform = zone(tmp_path, 2, "psys", 0)
    energy = Energy(tmp_path)
    assert energy.joules == 0
    for folder, microjoules in ((first, 400_100), (second, 99_000), (platform, 800_000)):
        (folder / "energy_uj").write_text(f"{microjoules}\n")
    energy.read()
    assert energy.joules == pytest.approx(0.4 + 0.1)
    (first / "energy_uj").write_text("600100\n")
    energy.read()
    assert energy.joules == pytest.approx(0.7)


def test_energy_is_unknown_where_no_counter_can_be_read(tmp_path: Path) -> None:
    assert Energy(tmp_path / "nowhere").joules is None
    (zone(tmp_path, 0, "package-0", 100) / "energy_uj").unlink()  # as for who may not read it
    assert Energy(tmp_path).joules is None


@pytest.mark.parametrize(
    ("others", "frequency", "samples", "words"),
    [
        (0.37, [], [1.0, 1.0], "the machine was disturbed: other processes used 37 % of the processor"),
        (0.09, [3000.0, 2800.0], [1.0, 1.05, 0.97, 1.0, 1.02], None),
        (None, [3000.0, 2600.0], [1.0], "the machine was disturbed: its frequency went between 3000 and 2600 MHz"),
        (None, [], [1.0, 1.0, 1.3, 1.3], "times of the same image lie 26 % apart"),
        (0.5, [], [1.0, 1.0, 1.3, 1.3], "50 % of the processor; times of the same image"),
        (0.0, [], [1.0, 1.0, 1.0, 1.0, 9.0], None),  # one slow image of five does not move the median
        (0.0, [], [0.0, 0.0], None),
    ],
)
def test_a_disturbed_machine_is_told_by_what_shows_it(
    others: float | None, frequency: list[float], samples: list[float], words: str | None
) -> None:
    found = verdict(others, frequency, samples)
    if words is None:
        assert found is None
    else:
        assert found is not None
        assert words in found


def test_a_process_that_is_slow_all_its_life_shows_beside_others() -> None:
    fast, slow = [1.0] * 8, [1.3] * 2
    assert verdict(None, [], fast + slow, [fast, fast]) is None
    found = verdict(None, [], fast + slow, [fast, fast, slow])
    assert found == "the machine was disturbed: medians of 3 processes lie 30 % apart"


@pytest.fixture
def burners() -> Iterator[None]:
    """Other processes, one a processor, that compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("burners")
def test_other_processes_are_seen() -> None:
    watch = Watch()
    time.sleep(1.5)
    watch.look()
    found = watch.disturbance([1.0, 1.0])
    assert found.others_share is not None
    assert 0.1 < found.others_share <= 1
    assert found.verdict is not None
    assert "other processes used" in found.verdict


def test_our_own_work_is_not_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(10.0, 100.0, 1.0), (12.0, 101.5, 2.5)])  # seconds: of the clock, of all work, of ours
    monkeypatch.setattr("kdc_edge.bench.sensors._clocks", lambda: next(clocks))
    monkeypatch.setattr("kdc_edge.bench.sensors._processors", lambda: [0, 1])
    watch = Watch()
    watch.look()
    assert watch.disturbance([1.0]).others_share == 0.0


def test_too_short_a_time_says_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(10.0, 100.0, 1.0), (10.1, 100.1, 1.0)])
    monkeypatch.setattr("kdc_edge.bench.sensors._clocks", lambda: next(clocks))
    watch = Watch()
    watch.look()
    assert watch.disturbance([0.1]).others_share is None


def test_then_what_came_before_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter([(10.0, 100.0, 1.0), (12.0, 103.0, 1.0), (12.1, 103.1, 1.1)])
    monkeypatch.setattr("kdc_edge.bench.sensors._clocks", lambda: next(clocks))
    monkeypatch.setattr("kdc_edge.bench.sensors._processors", lambda: [0, 1])
    watch = Watch(earlier=Watch())
    watch.look()
    assert watch.disturbance([0.1]).others_share == pytest.approx(3.0 / 4.2, abs=1e-4)

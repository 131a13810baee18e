"""The experiments' command: cells are kept, the page says what was found, expected or not."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from kdc_edge.errors import InputError
from kdc_edge.train.tools.experiment_report import bars, spread, write_report
from kdc_edge.train.tools.experiments import (
    GRIDS,
    STRATEGIES,
    Cell,
    Size,
    cells,
    check_size,
    first_task_config,
    main,
    shared_first_task,
)
from tests.forks import FORKS
from tests.train.test_loop import config


def test_cells_run_side_by_side_share_their_first_task_and_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--samples",
        "4",
        "--images",
        "2",
        "--eval-steps",
        "1",
        "--seeds",
        "1",
    ]
    command = ["--out", str(tmp_path), "--grid", "replay", *small, "--condition", "no replay", "replay 20 %"]
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORKS)  # which have PyTorch in memory
    main([*command, "--jobs", "2"])
    assert capsys.readouterr().out.count("/2 replay-") == 2
    command.append("teacher")
    main(command)
    results = [json.loads(p.read_text("utf-8")) for p in sorted((tmp_path / "cells").glob("*/result.json"))]
    no_replay, replay, teacher = results
    assert no_replay["matrix"][0] == replay["matrix"][0]
    assert teacher["matrix"] == []
    assert {tuple(r["final"]) for r in results} == {("flowers", "butterflies", "fish")}
    page = (tmp_path / "experiments.md").read_text("utf-8")
    assert "| teacher | " in page
    assert "| no replay | " in page
    assert (tmp_path / "experiments-replay-forgetting.svg").read_text("utf-8").startswith("<svg")
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / "cells").glob("*/result.json"))]
    main(command)
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "cells").glob("*/result.json"))] == before
    captions = "captions, the teacher's images"
    main(["--out", str(tmp_path), "--grid", "strategies", "--condition", captions, *small])
    (kept,) = (tmp_path / "cells").glob("strategies-captions-the-teachers-images-s0/result.json")
    found = json.loads(kept.read_text("utf-8"))
    assert found["matrix"][0] == no_replay["matrix"][0]
    assert 10 < found["remembered_bytes"] < 100  # one caption
    assert found["training_seconds"] > 0
    page = (tmp_path / "experiments.md").read_text("utf-8")
    assert f"| {captions} | " in page
    assert "experiments-strategies-memory.svg" in page


def test_the_whole_grid_is_every_condition_of_every_seed() -> None:
    found = cells(tuple(GRIDS), Size(seeds=3))
    assert len(found) == 2 + 3 * (5 + 6 + 7 + 2)  # the teacher and the student at step 0 have no seed
    assert len({cell.name for cell in found}) == len(found)
    with pytest.raises(InputError, match="--grid 'taste' is unknown"):
        cells(["taste"], Size())
    with pytest.raises(InputError, match="in none of these grids"):
        cells(["losses"], Size(), ["no replay"])


def test_cells_that_share_a_first_task_ask_for_the_same_run() -> None:
    asked: dict[str, list[object]] = {}
    for cell in cells(("replay", "strategies"), Size(seeds=1)):
        if (name := shared_first_task(cell)) is not None:
            settings = STRATEGIES[cell.condition] if cell.grid == "strategies" else {"replay": 7}
            asked.setdefault(name, []).append(first_task_config(config(**{"samples": 100, "seed": 0, **settings})))
    assert sorted(asked) == ["ewc-first-task-s0", "replay-first-task-s0"]
    for same in asked.values():
        assert len(same) > 1
        assert all(one == same[0] for one in same)


def test_cells_of_another_size_are_not_mixed(tmp_path: Path) -> None:
    check_size(tmp_path, Size(steps=2))
    check_size(tmp_path, Size(steps=2, seeds=9))
    for other in (Size(steps=3), Size(steps=2, eval_steps=1)):
        with pytest.raises(InputError, match="cells of another size"):
            check_size(tmp_path, other)


def test_cells_of_an_earlier_version_had_the_usual_evaluation_steps(tmp_path: Path) -> None:
    (tmp_path / "size.json").write_text('{"steps": 2, "batch_size": 16, "samples": 1200, "images": 48}')
    check_size(tmp_path, Size(steps=2))
    assert json.loads((tmp_path / "size.json").read_text("utf-8"))["eval_steps"] == 12


def result(condition: str, seed: int, matrix: list[list[float]]) -> dict[str, object]:
    final = dict(zip(("flowers", "butterflies", "fish"), ({"prompt_accuracy": v} for v in matrix[-1]), strict=True))
    return {
        "grid": "replay", "condition": condition, "seed": seed, "final": final, "matrix": matrix, "seconds": 60,
    }  # fmt: skip


@pytest.mark.parametrize(("kept", "verdict"), [(0.88, "it holds"), (0.6, "it does not hold")])
def test_the_page_says_what_was_found_whether_expected_or_not(tmp_path: Path, kept: float, verdict: str) -> None:
    found = [result("no replay", s, [[0.9, 0, 0], [0.5, 0.9, 0], [0.4, 0.5, 0.9]]) for s in (0, 1)]
    found += [result("replay 5 %", s, [[0.9, 0, 0], [kept, 0.9, 0], [kept, kept, 0.9]]) for s in (0, 1)]
    found += [result("all data jointly", 0, [[0.9, 0.9, 0.9]])]
    write_report(tmp_path, found, GRIDS, {"steps": 1, "batch_size": 1, "samples": 1, "images": 2, "eval_steps": 2})
    page = (tmp_path / "experiments.md").read_text("utf-8")
    assert page.count(verdict) == 2
    assert "| no replay | 0.400 ± 0.000 (2) |" in page
    for linked in ("experiments-replay-average.svg", "experiments-replay-forgetting.svg"):
        assert linked in page
        assert (tmp_path / linked).is_file()


def test_strategies_are_shown_against_what_they_remember(tmp_path: Path) -> None:
    found = [
        result(condition, 0, [[quality, quality, quality]])
        | {"grid": grid, "remembered_bytes": size, "training_seconds": 60.0}
        for grid, condition, quality, size in (
            ("replay", "no replay", 0.5, 0),
            ("replay", "replay 5 %", 0.9, 740_000),
            ("strategies", "LwF", 0.8, 9),
        )
    ]
    write_report(tmp_path, found, GRIDS, {"steps": 1, "batch_size": 1, "samples": 1, "images": 2, "eval_steps": 2})
    page = (tmp_path / "experiments.md").read_text("utf-8")
    assert "| | flowers | butterflies | fish | average | forgetting | MB remembered | seconds |" in page
    row = "| 0.900 (1) | 0.900 (1) | 0.900 (1) | 0.900 (1) | 0.000 (1) | 0.740 (1) | 60 (1) |"
    assert f"| replay of latents {row}" in page
    plot = (tmp_path / "experiments-strategies-memory.svg").read_text("utf-8")
    assert "replay of latents: 0.74 MB remembered, 0.9 average" in plot


def test_means_deviations_and_bars() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000 (3)"
    assert spread([0.5]) == "0.500 (1)"
    assert spread([]) == ""
    drawing = bars({"a < b": [0.2, 0.4], "c": [0.6]}, "title")
    assert "a &lt; b" in drawing
    assert drawing.count("<circle") == 3
    assert Cell("replay", "replay 5 %", 1).name == "replay-replay-5-percent-s1"

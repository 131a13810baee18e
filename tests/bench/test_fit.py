"""What is chosen within a budget, what is measured next, and the command that does both."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from kdc_edge.bench.budget import Budget, choose, generate_command, nearest, quality_db, shortfalls
from kdc_edge.bench.case import Case
from kdc_edge.bench.record import Psnr, Row, Timings
from kdc_edge.bench.search import MODES, Candidate, Mode, Trial, expected_sec, in_order, next_trial, search
from kdc_edge.cli.fit import _export
from kdc_edge.diffusers_folder import hash_checkpoint
from kdc_edge.formats import find_format
from kdc_edge.request import Request
from tests.bench.rows import check, lines_until, make_bundle, make_row, timing
from tests.cli.test_commands import complaint, run

MB = 10**6


def row(
    name: str, sec: float, mb: int, db: float | None, *, steps: int = 20, size_mb: int = 5, **changes: object
) -> Row:
    """A measured bundle; `db` None is its reference."""
    stages = {f.name: timing(sec / 25) for f in dataclasses.fields(Timings)} | {"end_to_end": timing(sec)}
    psnr = None if db is None else Psnr("torch:checkpoint", db)
    common = {"peak_rss_bytes": mb * MB, "psnr": psnr, "steps": steps, "size_bytes": size_mb * MB, "parity": None}
    return make_row(name, timings=Timings(**stages), **{**common, **changes})  # type: ignore[arg-type]


FAST = row("fast", 1.0, 300, 24.0)
GOOD = row("good", 2.0, 300, 40.0)
SAME = row("same", 2.05, 200, 35.0)  # as fast, within the noise
SLOW = row("slow", 9.0, 100, 60.0, size_mb=20)
TORCH = row("torch", 0.1, 50, None, target=None, precision=None, reference=True)
BROKEN = make_row("broken", timings=None, failure="the process was ended by SIGKILL: most likely out of memory")
ROWS = [TORCH, BROKEN, FAST, GOOD, SAME, SLOW]


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(), "fast"),
        (Budget(min_psnr_db=30), "same"),  # as fast as "good", with less memory
        (Budget(min_psnr_db=36), "good"),
        (Budget(min_psnr_db=30, max_memory_bytes=150 * MB), "slow"),
        (Budget(min_psnr_db=50, max_sec=9.0, max_size_bytes=20 * MB), "slow"),  # the limits themselves are allowed
        (Budget(min_psnr_db=50, max_sec=8.9), None),
        (Budget(max_size_bytes=4 * MB), None),
        (Budget(max_memory_bytes=60 * MB), None),  # a checkpoint is no choice
    ],
)
def test_the_cheapest_within_the_budget(budget: Budget, name: str | None) -> None:
    chosen = choose(ROWS, budget)
    assert (None if chosen is None else chosen.name) == name
    if chosen is not None:
        assert shortfalls(chosen, budget) == []


def test_more_steps_come_before_less_time_and_the_first_sampler_before_both_are_equal() -> None:
    few, many = row("few", 1.0, 300, 60.0, steps=4), row("many", 8.0, 300, 31.0, steps=20)
    assert choose([few, many], Budget(max_sec=10)) is many
    assert choose([few, many], Budget(max_sec=5)) is few
    first, second = row("a", 3.0, 300, 40.0, sampler="euler"), row("b", 2.0, 300, 40.0, sampler="ddim")
    assert choose([first, second], Budget()) is first


def test_what_is_missed_and_by_how_much() -> None:
    budget = Budget(max_size_bytes=10 * MB, max_sec=3, max_memory_bytes=200 * MB, min_psnr_db=30)
    assert [s.words for s in shortfalls(SLOW, budget)] == [
        "20.0 MB where at most 10.0 MB are asked", "9.00 s where at most 3.00 s are asked",
    ]  # fmt: skip
    memory, psnr = shortfalls(FAST, budget)
    assert memory.factor == pytest.approx(1.5)
    assert psnr.factor == pytest.approx(2.0, rel=0.01)  # six decibels
    assert psnr.words == "24.0 dB where at least 30 dB are asked"
    assert budget.describe().startswith("at most 10.0 MB on disk, at most 3 s an image, at most 200 MB of memory")


def test_the_nearest_misses_by_the_smallest_factor() -> None:
    assert nearest(ROWS, Budget(max_sec=1.9, min_psnr_db=30)) is GOOD  # 2.0 / 1.9
    assert nearest(ROWS, Budget(max_memory_bytes=90 * MB)) is SLOW
    assert nearest([TORCH, BROKEN], Budget()) is None
    unknown = row("unknown", 1.0, 10, None)
    assert quality_db(unknown) is None
    assert shortfalls(unknown, Budget(min_psnr_db=1))[0].factor == math.inf
    assert nearest([unknown, FAST], Budget(min_psnr_db=90)) is FAST


def test_quality_is_the_psnr_or_of_a_reference_the_proof() -> None:
    assert quality_db(GOOD) == 40.0
    equal = dataclasses.replace(GOOD, psnr=Psnr("x", None))
    assert quality_db(equal) == math.inf
    proved = row("reference", 1.0, 10, None, reference=True, parity=check("image", 89.0))
    assert quality_db(proved) == 89.0


def test_the_command_makes_the_row_again() -> None:
    asked = dataclasses.replace(
        GOOD, prompt="it's red", steps=8, sampler="euler", guidance=4.0, guidance_mode="sequential", low_memory=True,
        threads=3, seed=7, device="GPU", negative_prompt="blue",
    )  # fmt: skip
    words = shlex.split(generate_command(asked))
    assert words[:5] == ["kdc-edge", "generate", "it's red", "--bundle", "bundles/good"]
    options = dict(zip(words[5:-1:2], words[6::2], strict=True))
    assert options == {
        "--steps": "8", "--scheduler": "euler", "--guidance": "4", "--guidance-mode": "sequential", "--seed": "7",
        "--negative-prompt": "blue", "--device": "GPU", "--threads": "3", "--width": "64", "--height": "64",
    }  # fmt: skip
    assert words[-1] == "--low-memory"
    assert "--plain-prompt" not in words
    for literal in ({"prompt": "a (red) flower"}, {"negative_prompt": "[blue]"}):  # text to a benchmark, not weights
        assert "--plain-prompt" in shlex.split(generate_command(dataclasses.replace(GOOD, **literal)))


# What is measured next.

SMALL = Candidate(Path("small"), 5 * MB, 25.0, Request("a"))
LARGE = Candidate(Path("large"), 20 * MB, 60.0, Request("a"))


def test_the_proved_come_first_then_the_small() -> None:
    unproved = Candidate(Path("unproved"), MB, None, Request("a"))
    assert in_order([unproved, SMALL, LARGE], Budget(min_psnr_db=30)) == [LARGE, unproved, SMALL]
    assert in_order([LARGE, SMALL], Budget()) == [SMALL, LARGE]


def measured_in_turn(budget: Budget, answers: Mapping[tuple[str, int, Mode], Row], steps: list[int]) -> list[str]:
    """Which rows the search asks for, when these are the answers."""
    tried: dict[Trial, Row] = {}
    asked = []
    while (todo := next_trial([SMALL, LARGE], steps, ["ddim"], MODES, budget, tried)) is not None:
        mode = "low" if todo.mode.low_memory else todo.mode.guidance_mode
        asked.append(f"{todo.folder} {todo.steps} {mode}")
        tried[todo] = answers[str(todo.folder), todo.steps, todo.mode]
    return asked


BATCHED, SEQUENTIAL, LOW = MODES


def test_a_level_that_fits_is_the_last_and_is_measured_whole() -> None:
    answers = {
        ("small", 20, BATCHED): row("small", 2.0, 300, 40.0),
        ("large", 20, BATCHED): row("large", 9.0, 300, 60.0),
    }
    assert measured_in_turn(Budget(max_sec=3), answers, [8, 20]) == ["small 20 batched", "large 20 batched"]


def test_fewer_steps_where_time_is_missed_but_not_where_it_is_hopeless() -> None:
    # A step takes sec / 25: eight steps of "small" are expected to take 2.08 s, of "large" 9.4 s.
    answers = {
        ("small", 20, BATCHED): row("small", 4.0, 300, 40.0), ("large", 20, BATCHED): row("large", 18.0, 300, 60.0),
        ("small", 8, BATCHED): row("small", 2.1, 300, 40.0, steps=8),
    }  # fmt: skip
    found = answers["large", 20, BATCHED]
    assert expected_sec(found, 8) == pytest.approx(18.0 - 12 * 18.0 / 25)
    assert measured_in_turn(Budget(max_sec=3), answers, [20, 8]) == [
        "small 20 batched", "large 20 batched", "small 8 batched",
    ]  # fmt: skip
    heun = dataclasses.replace(found, sampler="heun")  # 39 calls of the U-Net, then 15
    assert expected_sec(heun, 8) == pytest.approx(18.0 - 24 * 18.0 / 25)


def test_thrifty_modes_only_where_memory_is_missed_and_its_lesson_is_kept() -> None:
    heavy = dataclasses.replace(row("small", 1.0, 500, 40.0))
    answers = {
        ("small", 20, BATCHED): heavy, ("small", 20, SEQUENTIAL): heavy,
        ("small", 20, LOW): row("small", 9.0, 90, 40.0), ("large", 20, BATCHED): BROKEN,
        ("large", 20, SEQUENTIAL): BROKEN, ("large", 20, LOW): BROKEN, ("small", 8, LOW): row("small", 2.0, 90, 40.0),
    }  # fmt: skip
    asked = measured_in_turn(Budget(max_sec=7, max_memory_bytes=100 * MB), answers, [20, 8])
    assert asked == [
        "small 20 batched", "small 20 sequential", "small 20 low",
        "large 20 batched", "large 20 sequential", "large 20 low", "small 8 low",
    ]  # fmt: skip
    light = {("small", 20, BATCHED): row("small", 9.0, 90, 40.0), ("large", 20, BATCHED): row("large", 99.0, 90, 60.0)}
    assert len(measured_in_turn(Budget(max_sec=3, max_memory_bytes=100 * MB), light, [20])) == 2


def test_without_steps_every_bundle_is_measured_with_its_own() -> None:
    few = dataclasses.replace(SMALL, request=Request("a", steps=4, sampler="ddim", guidance=1.0))
    trials = [Trial(Path("small"), 4, "ddim", BATCHED), Trial(Path("large"), 20, "dpm++2m", BATCHED)]
    quick, slow = row("small", 2.0, 300, 40.0, steps=4, sampler="ddim"), row("large", 9.0, 300, 60.0, sampler="dpm++2m")
    tried: dict[Trial, Row] = {}
    for trial, answer in zip(trials, (quick, slow), strict=True):
        assert next_trial([few, LARGE], [], [], MODES, Budget(max_sec=3), tried) == trial
        tried[trial] = answer
    assert next_trial([few, LARGE], [], [], MODES, Budget(max_sec=3), tried) is None
    assert choose([quick, slow], Budget(max_sec=3)) is quick
    assert choose([quick, slow], Budget()) is slow  # where time allows, the image of more steps


def test_what_is_too_large_is_not_measured() -> None:
    assert next_trial([LARGE], [20], ["ddim"], MODES, Budget(max_size_bytes=19 * MB), {}) is None


@pytest.mark.usefixtures("opener")
def test_a_search_measures_the_reference_once_a_level(tmp_path: Path) -> None:
    folders = [make_bundle(tmp_path / name) for name in ("a", "b")]
    base = Case(Path(), Request("a", sampler="ddim"), repeats=1, warmup=0)
    found = list(
        search(
            [Candidate(folder, 1000, 50.0, base.request) for folder in folders],
            base,
            steps=[2, 3],
            budget=Budget(max_sec=1e-9),
            modes=[BATCHED],
            reference=folders[0],
        )
    )
    assert [len(f.rows) for f in found] == [1, 2, 3, 3]  # two steps are hopeless after three
    last = found[-1]
    assert last.complete
    assert [r.name for r in last.rows] == ["a", "a", "b"]
    assert all(r.psnr and r.psnr.db is None for r in last.rows if not r.reference)
    assert choose(last.rows, Budget(max_sec=60)) is not None


def test_a_search_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock stands still at the very end: 0 seconds are left, not an unknown number."""
    monkeypatch.setattr("kdc_edge.bench.search.time.monotonic", lambda: 100.0)
    candidates = [Candidate(make_bundle(tmp_path / "a"), 1000, 50.0, Request("a"))]
    (found,) = search(candidates, Case(Path(), Request("a")), steps=[2], budget=Budget(), budget_sec=0.0)
    assert (found.rows, found.complete) == ([], False)


# The command.


def test_fit_names_a_bundle_and_writes_the_page(
    checkpoint: Path, bundle: Path, bundle_fp32: Path, tmp_path: Path
) -> None:
    for root in (bundle, bundle_fp32):
        shutil.copytree(root, tmp_path / "bundles" / root.name)
    damaged = tmp_path / "bundles" / "onnx-damaged"
    shutil.copytree(bundle, damaged)
    (damaged / "unet" / "model.onnx").write_bytes(b"")
    common = ("fit", checkpoint, "--no-export", "--repeats", 1, "--warmup", 0)
    done = run(*common, "--steps", "2", "--json", "--out", "fit.html", "--out", "fit.md", cwd=tmp_path)
    assert "left out: bundles/onnx-damaged/unet/model.onnx has 0 bytes" in done.stderr
    document = json.loads(done.stdout)
    rows = document["report"]["rows"]
    assert [r["engine"] for r in rows] == ["torch", "onnxruntime", "onnxruntime"]
    assert document["met"]
    assert document["complete"]
    assert document["choice"] in ("onnx-fp16", "onnx-fp32")
    assert (tmp_path / "fit.md").read_text("utf-8").startswith(f"# {document['choice']}: ")
    words = shlex.split(document["command"])
    assert words[words.index("--bundle") + 1] == f"bundles/{document['choice']}"
    page = (tmp_path / "fit.html").read_text("utf-8")
    assert document["choice"] in page
    assert page.count("data:image/png;base64,") == 1 + 2 * 2
    made = run(*words[1:], "--out", "made.png", cwd=tmp_path).stdout
    assert made.strip() == "made.png"  # the command can be run as it stands

    shutil.rmtree(tmp_path / "bundles" / "onnx-fp32")
    shutil.rmtree(damaged)
    text = run("fit", *common[2:], "--steps", "1", "--max-memory", "1MB", cwd=tmp_path, code=1)
    assert "nothing meets at most 1.0 MB of memory" in text.stderr
    assert "The nearest on this machine: onnx-fp" in text.stdout
    assert "low memory" in text.stdout  # it was tried


def test_of_several_students_the_bundle_of_the_most_steps_within_the_budget_is_named(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    """Each with its own steps; another checkpoint's bundle is left out, and nothing is exported."""
    few = shutil.copytree(checkpoint, tmp_path / "few")
    (few / "sampling.json").write_text('{"scheduler": "ddim", "steps": 1, "guidance": 1.0}')
    for name, steps, source in (("guided", 2, checkpoint), ("few", 1, few), ("other", 1, None)):
        made = shutil.copytree(bundle, tmp_path / "bundles" / name)
        manifest = json.loads((made / "kdc-edge.json").read_text("utf-8"))
        manifest["model"]["sampling"] = {"scheduler": "ddim", "steps": steps, "guidance": 1.0}
        manifest["provenance"]["checkpoint_sha256"] = hash_checkpoint(source) if source else "0" * 64
        (made / "kdc-edge.json").write_text(json.dumps(manifest))
    done = run("fit", checkpoint, "few", "--repeats", 1, "--warmup", 0, "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert {(r["folder"], r["steps"]) for r in document["report"]["rows"]} == {
        ("bundles/guided", 2), ("bundles/few", 1),
    }  # fmt: skip
    assert "--bundle bundles/guided --steps 2" in document["command"]
    assert "left out: bundles/other was exported from another checkpoint" in done.stderr


def test_a_bundle_for_another_machine_is_a_row_when_all_formats_are_asked_for(
    bundle: Path, coreml_bundle: Path, tmp_path: Path
) -> None:
    for root in (bundle, coreml_bundle):
        shutil.copytree(root, tmp_path / "bundles" / root.name)
    common = ("fit", "--repeats", 1, "--warmup", 0, "--steps", 1, "--scheduler", "ddim", "--json")
    names = [row["name"] for row in json.loads(run(*common, cwd=tmp_path).stdout)["report"]["rows"]]
    assert names == [bundle.name]
    rows = json.loads(run(*common, "--formats", "all", cwd=tmp_path).stdout)["report"]["rows"]
    found = {row["name"]: row for row in rows}
    assert set(found) == {bundle.name, coreml_bundle.name}
    row = found[coreml_bundle.name]
    assert row["timings"] is None
    assert row["size_bytes"] > 0
    assert row["peak_rss_bytes"] is None
    assert "measure it where its engine runs" in row["failure"]


def test_the_projects_own_export_is_not_what_fit_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are for one format, and refused for others."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kdc-edge.toml").write_text('[export]\ntarget = "coreml"\nattention = "split-einsum"\n')
    said = _export(tmp_path / "nowhere", find_format("onnx", "fp16"), tmp_path / "out")
    assert said is not None
    assert said.startswith("no checkpoint at ")


def test_budgets_that_cannot_be_read_or_met_by_nothing(checkpoint: Path, tmp_path: Path) -> None:
    assert "--max-size 'much' is no size" in complaint("fit", checkpoint, "--max-size", "much", cwd=tmp_path)
    for option, value, words in (
        ("--max-sec", 0, "is no time"), ("--max-sec", "inf", "is no time"), ("--min-psnr", "nan", "is no number"),
        ("--max-memory", "0MB", "is no size"), ("--max-size", "9" * 400 + "GB", "is no size"),
        ("--guidance", 101, "guidance 101.0 is out of range"),
    ):  # fmt: skip
        assert words in complaint("fit", checkpoint, option, value, cwd=tmp_path)
    assert "'magic'" in complaint("fit", checkpoint, "--scheduler", "ddim,magic", cwd=tmp_path, code=2)
    assert "0 steps" in complaint("fit", checkpoint, "--steps", "20,0", cwd=tmp_path)
    assert "'loud' is unknown" in complaint("fit", checkpoint, "--guidance-mode", "loud", cwd=tmp_path, code=2)
    assert "onnx-int3" in complaint("fit", checkpoint, "--formats", "onnx-int3", cwd=tmp_path, code=2)
    assert ".html" in complaint("fit", checkpoint, "--out", "fit.doc", cwd=tmp_path)
    assert "nothing to measure" in complaint("fit", checkpoint, "--no-export", cwd=tmp_path)
    assert "nothing to measure" in complaint("fit", checkpoint, "--max-size", "0.1MB", cwd=tmp_path)


def test_ctrl_c_keeps_the_rows_so_far_and_says_that_more_was_to_come(
    bundle: Path, bundle_fp32: Path, tmp_path: Path
) -> None:
    """Without a checkpoint: the bundles as they are, the most precise of them the reference."""
    for root in (bundle, bundle_fp32):
        shutil.copytree(root, tmp_path / "bundles" / root.name)
    program = "from kdc_edge.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "fit", "--steps", "1", "--repeats", "3", "--scheduler", "ddim", "--json"],
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )  # fmt: skip
    assert process.stderr is not None
    first = lines_until(process.stderr, "onnx-fp16: ")[0]  # the smaller one; the other is being measured now
    assert first == "0/8 measurement 1 of 2, bundles/onnx-fp16: starting\n"
    process.send_signal(signal.SIGINT)
    found, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-2:] == ["interrupted: the rows so far are kept", "kdc-edge: interrupted"]
    document = json.loads(found)
    assert [r["name"] for r in document["report"]["rows"]] == ["onnx-fp16"]
    assert (document["choice"], document["complete"]) == ("onnx-fp16", False)

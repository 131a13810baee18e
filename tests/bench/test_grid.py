"""Many measurements in a row: every combination, a budget that holds, references, limits, names."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdc_edge.bench.case import Case, describe, grid, references, with_own
from kdc_edge.bench.record import PromptQuality, Psnr, Row
from kdc_edge.bench.reference import compare_images
from kdc_edge.bench.runner import Measured, Tell, run
from kdc_edge.bench.tables import columns
from kdc_edge.bench.values import NAMES, Limit, broken_limits, labels, show, values
from kdc_edge.errors import InputError
from kdc_edge.request import Request
from kdc_edge.train.garden.assets import GARDEN_TEACHER
from tests.bench.rows import FAILED, FEW_STEPS, MODEL, make_bundle, make_row

BASE = Case(Path(), Request("x"))


def test_a_grid_is_every_combination_in_order() -> None:
    cases = grid(
        ["torch:runs/1/checkpoint", Path("bundles/a")], Case(Path(), Request("x"), engine="openvino"), steps=[4, 20],
        threads=[1, 2], guidance_modes=["batched", "sequential"],
    )  # fmt: skip
    assert len(cases) == 16
    found = [(str(c.folder), c.engine, c.threads, c.request.steps, c.request.guidance_mode) for c in cases]
    assert found[0] == ("runs/1/checkpoint", "torch", 1, 4, "batched")
    assert found[1] == ("runs/1/checkpoint", "torch", 1, 4, "sequential")
    assert found[-1] == ("bundles/a", "openvino", 2, 20, "sequential")
    assert len(set(found)) == 16


def test_a_folder_is_measured_as_it_asks_to_be_used(tmp_path: Path) -> None:
    few = make_bundle(tmp_path / "few", model=FEW_STEPS)
    plain = make_bundle(tmp_path / "plain")
    euler = make_bundle(
        tmp_path / "euler", model=MODEL.model_copy(update={"scheduler": {"_class_name": "EulerDiscreteScheduler"}})
    )

    def asked(folder: Path, **given: Any) -> tuple[str, int, float]:
        values = {"sampler": None, "steps": None, "guidance": None, "tell": said.append} | given
        request = with_own(replace(BASE, folder=folder), **values).request
        return request.sampler, request.steps, request.guidance

    said: list[str] = []
    assert asked(few) == ("ddim", 4, 1.0)
    assert asked(plain) == ("dpm++2m", 20, 7.5)
    assert asked(euler) == ("euler", 20, 7.5)
    assert asked(few, sampler="lcm", steps=2) == ("lcm", 2, 1.0)
    assert not said
    assert asked(few, guidance=7.5) == ("ddim", 4, 7.5)
    assert said == [f"{few}: guidance 7.5 is given to a student that was trained without: 1 is faster and truer to it"]
    assert asked(tmp_path / "nowhere") == ("dpm++2m", 20, 7.5)  # its row says that nothing is there


def test_what_a_report_cannot_hold_is_refused() -> None:
    name = os.fsdecode(b"b\xe9")
    for change in ({"folder": Path(name)}, {"request": Request(name)}, {"request": Request("x", name)}):
        with pytest.raises(InputError, match="is no UTF-8, which a report is"):
            replace(BASE, **change)  # type: ignore[arg-type]


def test_the_size_of_a_checkpoint_is_that_of_the_weights_that_are_loaded(tmp_path: Path) -> None:
    folder = shutil.copytree(GARDEN_TEACHER, tmp_path / "c")
    weights = ("unet", "vae", "text_encoder")
    size = sum(path.stat().st_size for part in weights for path in (folder / part).glob("*.safetensors"))
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(unet, unet.with_suffix(".fp16.safetensors"))
    assert describe(replace(BASE, folder=folder)).size_bytes == size


def test_rows_of_other_steps_say_so_and_have_their_own_reference(tmp_path: Path) -> None:
    cases = [
        with_own(
            replace(BASE, folder=make_bundle(tmp_path / name, model=model)), sampler=None, steps=None, guidance=None
        )
        for name, model in (("few", FEW_STEPS), ("plain", MODEL))
    ]
    assert [c.request for c in references("torch:c", cases)] == [c.request for c in cases]
    rows = [
        make_row(c.folder.name, steps=c.request.steps, sampler=c.request.sampler, guidance=c.request.guidance)
        for c in cases
    ]
    cells = {column.header: column.cells for column in columns(show(rows))}
    assert cells["Steps"] == ("4", "20")
    assert cells["Sampler"] == ("ddim", "dpm++2m")
    assert cells["Guidance"] == ("1", "7.5")
    failed = [rows[0], replace(rows[1], timings=None)]
    assert "Steps" not in {column.header for column in columns(show(failed))}


def test_a_reference_makes_each_image_once() -> None:
    cases = grid(["a", "b"], BASE, steps=[4, 20], threads=[1, 2], guidance_modes=["batched", "sequential"])
    found = references("torch:c", cases)
    assert [(str(c.folder), c.engine, c.request.steps, c.repeats, c.warmup) for c in found] == [
        ("c", "torch", 4, 1, 0),
        ("c", "torch", 20, 1, 0),
    ]


@pytest.mark.usefixtures("opener")
def test_one_case_a_row_whatever_becomes_of_it(tmp_path: Path) -> None:
    good = make_bundle(tmp_path / "good")
    base = Case(Path(), Request("a", steps=2), repeats=1, warmup=0)
    rows = [m.row for m in run(grid([good, tmp_path / "nowhere"], base))]
    assert rows[0].failure is None
    assert "nowhere" in str(rows[1].failure)


def test_the_budget_bounds_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case takes 6 seconds of a clock that the test turns, or what is left."""
    now = 100.0
    asked: list[float | None] = []

    def measure(case: Case, *, timeout_sec: float | None, tell: Tell) -> Measured:  # noqa: ARG001
        nonlocal now
        asked.append(timeout_sec)
        enough = timeout_sec is None or timeout_sec >= 6
        now += 6 if enough else timeout_sec or 0
        return Measured(
            make_row(case.folder.name, steps=case.request.steps, failure=None if enough else "not done after 4 seconds")
        )

    monkeypatch.setattr("kdc_edge.bench.runner.measure_in_fresh_process", measure)
    monkeypatch.setattr("kdc_edge.bench.runner.time.monotonic", lambda: now)
    cases = grid([make_bundle(tmp_path / "b")], BASE, steps=[2, 4, 5])
    first, second, third = (m.row for m in run(cases, budget_sec=10))
    assert asked == [10, 4]
    assert first.failure is None
    assert second.failure == "not done after 4 seconds: --budget-sec ended it"
    assert third.failure == "not reached: --budget-sec was used up"
    assert (third.size_bytes, third.steps) == (1000, 5)  # what is known without measuring stays
    assert [m.row.failure for m in run(cases)] == [None] * 3


# quality


def measured(value: int | None, **changes: object) -> Measured:
    """A row with an image of one colour."""
    pixels = None if value is None else np.full((1, 64, 64, 3), value, np.uint8)
    failure = "broken" if value is None else None
    return Measured(make_row(**{"psnr": None, "failure": failure, **changes}), pixels)  # type: ignore[arg-type]


def test_the_checkpoint_is_the_reference() -> None:
    baseline = measured(100, name="ckpt", folder="ckpt", target=None, precision=None, engine="torch")
    rows = compare_images([measured(100), measured(110), measured(None), baseline], [measured(0)])
    assert rows[0].psnr == Psnr("torch:ckpt", None)  # equal to the last bit
    assert rows[1].psnr is not None
    assert rows[1].psnr.db == pytest.approx(20 * math.log10(255 / 10))
    assert (rows[2].psnr, rows[2].failure) == (None, "broken")
    assert (rows[3].psnr, rows[3].reference) == (None, True)
    assert not rows[0].reference


def test_another_folder_is_the_reference() -> None:
    rows = compare_images([measured(100)], [measured(101, folder="elsewhere/fp32")])
    assert rows[0].psnr is not None
    assert rows[0].psnr.reference == "elsewhere/fp32"
    assert not rows[0].reference


def test_images_of_several_prompts_count_by_the_worst_that_both_made() -> None:
    reference, row = measured(100, target=None, precision=None), measured(100)
    made, expected = (
        np.stack([np.full((64, 64, 3), value, np.uint8) for value in values])
        for values in ((101, 110, 255), (101, 105))
    )
    both = [dataclasses.replace(row, pixels=made), dataclasses.replace(reference, pixels=expected)]
    found = compare_images(both)[0].psnr
    assert found is not None
    assert found.db == pytest.approx(20 * math.log10(255 / 5))


def test_else_the_most_precise_of_the_same_checkpoint_and_request() -> None:
    rows = compare_images(
        [
            measured(100, precision="fp16"),
            measured(102, precision="fp32", folder="bundles/onnx-fp32"),
            measured(103, precision="fp32", steps=4),  # another image, and alone in it
            measured(104, precision="fp16", checkpoint_sha256="1" * 64),  # of another checkpoint
            measured(105, target="openvino", precision="int8"),
        ]
    )
    assert [row.reference for row in rows] == [False, True, False, False, False]
    assert [row.psnr and row.psnr.reference for row in rows] == [
        "bundles/onnx-fp32, the most precise here", None, None, None, "bundles/onnx-fp32, the most precise here",
    ]  # fmt: skip


# names and limits


def test_labels_say_what_differs_and_are_all_different() -> None:
    rows = [make_row(), make_row(steps=4), make_row(steps=4), make_row("other"), make_row("other", folder="x/other")]
    assert labels(rows) == [
        "onnx-fp16, 20 steps", "onnx-fp16, 4 steps (1)", "onnx-fp16, 4 steps (2)", "bundles/other, 20 steps",
        "x/other, 20 steps",
    ]  # fmt: skip
    assert labels([make_row(threads=1), make_row(threads=2, low_memory=True)]) == [
        "onnx-fp16, 1 thread", "onnx-fp16, 2 threads, low memory",
    ]  # fmt: skip
    assert labels([make_row()]) == ["onnx-fp16"]


def test_every_value_has_a_name() -> None:
    row = make_row(prompt_quality=PromptQuality({"prompt_accuracy": 0.9}, 8, "0" * 64), psnr=Psnr("x", None))
    found = values(row)
    assert set(found) == set(NAMES)
    assert found["end_to_end_sec"] == 0.375
    assert (found["psnr"], found["prompt_accuracy"], found["clip_score"]) == (math.inf, 0.9, None)
    assert set(values(FAILED)) == set(NAMES)


def lines(limits: list[Limit], *rows: Row) -> list[str]:
    return broken_limits(limits, show(rows))


def test_limits_are_kept_or_named() -> None:
    psnr, fast = Limit.parse("psnr=30", "under"), Limit.parse("end_to_end_sec=0.3", "over")
    good = make_row("good", psnr=Psnr("x", 30.0), scale=0.5)
    assert lines([psnr, fast], good) == []
    assert lines([psnr], make_row("equal", psnr=Psnr("x", None)), make_row("itself", reference=True)) == []
    assert lines([fast], make_row("itself", reference=True)) == ["itself: end_to_end_sec is 0.375, over 0.3"]
    assert lines([psnr, fast], make_row("bad", psnr=Psnr("x", 29.96))) == [
        "bad: psnr is 29.96, under 30",
        "bad: end_to_end_sec is 0.375, over 0.3",
    ]
    assert lines([psnr], make_row("alone")) == ["alone: psnr is not known"]
    assert lines([psnr], FAILED) == ["coreml: needs macOS"]
    assert lines([], FAILED) == []


@pytest.mark.parametrize("text", ["psnr", "psnr=", "psnr=much", "psnr=nan", "speed=3", "=3", ""])
def test_a_limit_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--fail-under"):
        Limit.parse(text, "under")

"""Progress where there is no terminal: lines now and then with the time to go, or one a stage with its time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kdc_edge.bench.case import Case
from kdc_edge.bench.runner import Doing
from kdc_edge.cli.progress import LINE_EVERY_SEC, MeasuringBar, ProgressBar, Stages
from kdc_edge.request import Request


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time now, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr("kdc_edge.cli.progress.time.monotonic", lambda: now[0])
    return now


def test_a_line_at_once_then_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(40, done=10) as progress:
        progress.step(10, "step")
        for done in (20, 21):  # the second comes too soon
            clock[0] += LINE_EVERY_SEC if done == 21 else 60.0
            progress.step(done, "\x1b[31mstep")
        for _ in range(2):
            progress.step(40, "step")
    assert capsys.readouterr().err.splitlines() == [
        "10/40 step", "20/40 \\x1b[31mstep, 0:02:00 to go", "40/40 step"
    ]  # fmt: skip


def test_measurements_are_weighed_by_their_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """2 images of 10 steps, then 2 of 30; and a search that goes on after what was planned."""
    first = Case(Path("a"), Request("x", steps=10), repeats=1, warmup=1)
    second, third = (replace(first, folder=Path(name), request=Request("x", steps=30)) for name in "bc")
    with MeasuringBar([first, second]) as progress:
        for case, share in ((first, 0.0), (first, 0.5), (second, 0.5), (third, 0.0)):
            progress.tell(case, Doing("image", share))
            clock[0] += 10.0
    assert capsys.readouterr().err.splitlines() == [
        "0/80 measurement 1 of 2, a: image",
        "10/80 measurement 1 of 2, a: image, 0:01:10 to go",
        "50/80 measurement 2 of 2, b: image, 0:00:12 to go",
        "80/140 measurement 3 of 3, c: image, 0:00:22 to go",
    ]


def test_a_stage_is_one_line_that_begins_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages("converting unet"):
        assert capsys.readouterr().err == "converting unet ... "
    assert re.fullmatch(r"\d+\.\d s\n", capsys.readouterr().err)


def test_what_is_said_in_a_stage_has_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages("converting unet"):
        stages.say("conv_in stays in [float]")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["converting unet ... ", "conv_in stays in [float]"]
    assert re.fullmatch(r"converting unet: \d+\.\d s", lines[2])


def test_a_long_stage_says_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("kdc_edge.cli.progress.time.monotonic", lambda: clock[0])
    with Stages()("calibrating") as tell:
        for done in range(1, 7):
            clock[0] += 12.0
            tell(f"{done} of 6")
    assert capsys.readouterr().err == "calibrating ... 3 of 6 ... 6 of 6 ... 72.0 s\n"


def test_a_stage_that_fails_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="no"), stages("converting unet"):
        raise ValueError("no")
    assert capsys.readouterr().err == "converting unet ... \n"

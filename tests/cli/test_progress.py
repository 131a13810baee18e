"""Stages of long work: one line each with its time where stderr is no terminal."""

from __future__ import annotations

import re

import pytest

from kdc_edge.cli.progress import Stages


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


def test_a_stage_that_fails_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="no"), stages("converting unet"):
        raise ValueError("no")
    assert capsys.readouterr().err == "converting unet ... \n"

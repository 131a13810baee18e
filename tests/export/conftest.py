"""Exports to every target of checkpoints that differ from the session's in one network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdc_edge.bundle import Bundle
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from tests.export.editing import PROMPT
from tests.export.test_coreml import start_from_packages_of


@pytest.fixture(params=["onnx", "openvino", "coreml"])
def target(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def export_fp16(
    request: pytest.FixtureRequest, target: str, traced_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Bundle]:  # fmt: skip
    """A function of a checkpoint, proved on PROMPT where no other prompts are given; for Core ML its network that is of
    the class `anew` is converted, the others are the session's."""
    del traced_once

    def export(checkpoint: Path, anew: str, options: object = None, **asked: Any) -> Bundle:
        if target == "coreml":
            start_from_packages_of(request.getfixturevalue("coreml_bundle"), monkeypatch, anew=anew)
        made = ExportRequest(checkpoint, tmp_path / "out", target, "fp16", **{"prompts": [PROMPT], **asked})
        return export_checkpoint(made, options)

    return export

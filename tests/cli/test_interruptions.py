"""kill -9 at random moments: the resumed run ends with the uninterrupted one's weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.forks import Fork

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("moments", [1, pytest.param(20, marks=pytest.mark.full)])
def test_killed_runs_end_with_the_same_weights(tmp_path: Path, moments: int) -> None:
    program = "import runpy\nrunpy.run_module('tests.cli.interrupted', run_name='__main__')"
    running = Fork(program, tmp_path, moments, 5, cwd=ROOT, output=tmp_path / "killer")
    assert running.wait(1800) == 0, running.err[-2000:]
    said = json.loads(running.out)
    assert len(said["kills"]) == moments
    weights = "checkpoint/unet/diffusion_pytorch_model.safetensors"
    whole = load_file(tmp_path / "whole" / weights)
    for run in said["runs"]:
        cut = load_file(tmp_path / run / weights)
        assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items()), run
        logs = [
            [json.loads(line)["losses"] for line in (tmp_path / r / "metrics.jsonl").read_text("utf-8").splitlines()]
            for r in ("whole", run)
        ]
        assert logs[0] == logs[1]
        assert not list((tmp_path / run / "state").glob(".*"))

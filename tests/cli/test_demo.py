"""The first minute: an image in an empty folder, from the bundle that ships."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import kdc_edge
from kdc_edge.bundle import DEMO_BUNDLE, Bundle
from kdc_edge.cli.prompt_quality import open_scorer
from kdc_edge.image import read_parameters
from kdc_edge.train.garden.scenes import SUBJECTS, draw_scenes
from tests.cli.test_commands import complaint, run

PROMPT = "a purple flower with five petals and a yellow center on a sky background"


def test_an_empty_folder_gives_an_image(tmp_path: Path) -> None:
    done = run("generate", PROMPT, cwd=tmp_path)
    assert "the demonstration that ships with kdc-edge" in done.stderr
    said = read_parameters(tmp_path / done.stdout.strip())
    assert said["prompt"] == PROMPT
    assert (said["Steps"], said["CFG scale"]) == ("4", "1.0")


def test_bundles_of_ones_own_come_first(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "mine").symlink_to(bundle)
    assert "no bundle given: bundles/mine" in run("generate", "x", "--steps", 1, cwd=tmp_path).stderr
    assert "no bundles in bundles/" in complaint("bench", cwd=tmp_path / "bundles")


def test_the_demonstration_is_small_whole_and_draws_what_is_asked() -> None:
    demo = Bundle.open(DEMO_BUNDLE)
    assert demo.verify() > 0
    assert sum(path.stat().st_size for path in DEMO_BUNDLE.rglob("*") if path.is_file()) < 4_000_000
    assert demo.manifest.parity is not None
    assert demo.manifest.model.sampling is not None
    prompts = [scene.caption for subject in SUBJECTS for scene in draw_scenes(subject, 16, seed=3, split="heldout")]
    images = kdc_edge.Pipeline.open()(prompts, seed=0).images
    assert open_scorer(prompts, None)(np.stack([np.asarray(i) for i in images])).values["prompt_accuracy"] > 0.9


def test_demo_needs_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "kdc_edge.runtimes.onnxruntime", raising=False)
    assert "pip install 'kdc-edge[onnx]'" in complaint("generate", "x", cwd=tmp_path)

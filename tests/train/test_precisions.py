"""Forgetting by precision: a bundle's images beside its checkpoint's, from the same prompts and noise."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kdc_edge.cli.app import app
from kdc_edge.noise import initial_latents
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.quality import evaluate
from kdc_edge.train.quality.evaluate import EVALUATION, Evaluated, Score, evaluation_noise, open_generator
from kdc_edge.train.quality.precisions import QualityDrop, compare
from tests.bench.test_cli import few_steps
from tests.cli.test_commands import complaint, run


def evaluated(by_image: list[float], grey: int = 100) -> Evaluated:
    score = Score({"prompt_accuracy": float(np.mean(by_image))}, tuple(by_image))
    return Evaluated(score, np.full((len(by_image), 8, 8, 3), grey, np.uint8))


def test_what_is_lost_is_paired_image_by_image() -> None:
    own = {"a": evaluated([1.0, 0.8, 0.6, 0.8]), "b": evaluated([1.0, 1.0]), "c": evaluated([0.6, 0.8])}
    found = compare(own, {"a": evaluated([0.8, 0.8, 0.6, 0.6]), "b": evaluated([1.0, 1.0]), "c": evaluated([0, 0])})
    assert found.lost["a"].mean == pytest.approx(0.1)
    assert found.lost["a"].stderr == pytest.approx(np.std([0.2, 0, 0, 0.2], ddof=1) / 2)
    assert found.lost["a"].within_noise
    assert found.lost["b"] == QualityDrop(0.0, 0.0, True)
    # The last task's loss is no forgetting; the earlier ones' mean is, with the error of a mean of two.
    assert found.added_forgetting is not None
    assert found.added_forgetting.mean == pytest.approx(0.05)
    assert found.added_forgetting.stderr == pytest.approx((found.lost["a"].stderr or 0) / 2)
    assert found.lost["c"].within_noise is False
    assert (found.psnr_db, found.worst_psnr_db) == (None, None)


def test_a_single_task_cannot_be_forgotten_and_distances_have_no_spread() -> None:
    own, other = (
        Evaluated(Score({"kid": kid}), np.full((2, 8, 8, 3), grey, np.uint8)) for kid, grey in ((1, 9), (3, 8))
    )
    found = compare({"a": own}, {"a": other})
    assert found.added_forgetting is None
    assert found.lost["a"] == QualityDrop(2, None, None)  # the greater distance is the worse
    assert found.psnr_db == found.worst_psnr_db == pytest.approx(20 * math.log10(255))


def test_noise_comes_in_batches_that_are_drawn_by_their_place() -> None:
    noise = evaluation_noise(20, (4, 16, 16), seed=7)
    assert np.array_equal(evaluation_noise(20, (4, 16, 16), 7, range(15, 18)), noise[15:18])
    assert noise.shape == (20, 4, 16, 16)
    np.testing.assert_array_equal(noise[:16], initial_latents((16, 4, 16, 16), 7))
    np.testing.assert_array_equal(noise[16:], initial_latents((4, 4, 16, 16), 7 + 16))
    assert [evaluate.batch_size(side) for side in (16, 32, 64, 96, 500)] == [16, 16, 4, 1, 1]


def test_a_bundle_is_asked_for_the_images_of_its_checkpoint(
    checkpoint: Path, bundle_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "batch_size", lambda side: 2)  # three images in two batches  # noqa: ARG005
    prompts = ["a red flower", "a blue butterfly", "a red flower"]
    assert open_generator(bundle_fp32).request == EVALUATION
    expected = open_generator(checkpoint, steps=2, guidance=3.0)(prompts, seed=5)
    found = open_generator(bundle_fp32, steps=2, guidance=3.0)(prompts, seed=5)
    assert found.shape == expected.shape == (3, 64, 64, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(expected[0].astype(int) - expected[2]).max() > 10  # the noise is each image's own


def test_a_few_step_bundle_is_evaluated_as_it_was_trained(bundle_fp32: Path, tmp_path: Path) -> None:
    said: list[str] = []
    few = few_steps(bundle_fp32, tmp_path / "few")
    assert open_generator(few, tell=said.append).conditions == "2 steps of DDIM, guidance 1"
    assert not said
    assert open_generator(few, guidance=4, sampler="lcm", tell=said.append).conditions == "2 steps of LCM, guidance 4"
    assert len(said) == 1


def test_eval_gives_a_row_a_precision(checkpoint: Path, bundle: Path, bundle_fp32: Path, tmp_path: Path) -> None:
    for root in (bundle, bundle_fp32):
        shutil.copytree(root, tmp_path / "bundles" / root.name)
    damaged = tmp_path / "bundles" / "damaged"
    shutil.copytree(bundle, damaged)
    graph = damaged / "unet" / "model.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    asked = ["eval", checkpoint, "--images", 2, "--steps", 1]
    asked += ["--task", "flowers=garden:flowers", "--task", "butterflies=garden:butterflies"]
    document = json.loads(run(*asked, "--bundles", "bundles", "--json", cwd=tmp_path).stdout)
    rows = {row["name"]: row for row in document["bundles"]}
    assert list(rows) == ["damaged", "onnx-fp16", "onnx-fp32"]
    assert "has changed since it was exported" in rows["damaged"]["failure"]
    for name in ("onnx-fp16", "onnx-fp32"):
        row = rows[name]
        assert row["failure"] is None
        assert set(row["quality"]) == set(document["quality"]) == {"flowers", "butterflies"}
        lost = document["quality"]["flowers"] - row["quality"]["flowers"]
        assert row["added_forgetting"]["mean"] == row["lost"]["flowers"]["mean"] == pytest.approx(lost)
        assert row["worst_psnr_db"] > 35
    assert rows["onnx-fp16"]["psnr_db"] < (rows["onnx-fp32"]["psnr_db"] or math.inf)

    text = run(*asked, "--bundles", bundle, cwd=tmp_path).stdout
    assert "the last row of R by precision, prompt_accuracy" in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")][-2:] == ["checkpoint", "onnx-fp16"]


def test_bundles_of_another_checkpoint_are_refused(own_bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    manifest = own_bundle / "kdc-edge.json"
    found = json.loads(manifest.read_text("utf-8"))
    found["provenance"]["checkpoint_sha256"] = "0" * 64
    manifest.write_text(json.dumps(found))
    task = ("--task", "flowers=garden:flowers")
    assert "exported from another checkpoint" in complaint(
        "eval", checkpoint, *task, "--bundles", own_bundle, cwd=tmp_path
    )
    assert "nowhere" in complaint("eval", checkpoint, *task, "--bundles", "nowhere", cwd=tmp_path)
    assert "--caption is for the tasks of --task" in complaint("eval", checkpoint, "--caption", "a {}", cwd=tmp_path)


def test_a_history_of_another_version_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kdc_edge.cli.evaluate import _history

    (tmp_path / "results.json").write_text('{"tasks": ["a"], "prompt_accuracy": [[0.9]]}')
    assert _history(tmp_path) is None
    assert "is of another kdc-edge" in capsys.readouterr().err


def test_images_of_a_checkpoint_are_of_the_side_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a teacher's are that another model's images are compared with."""
    assert open_generator(GARDEN_TEACHER, steps=1, side=32)(["a red fish"], seed=7).shape == (1, 32, 32, 3)
    asked: list[object] = []
    monkeypatch.setattr(evaluate, "open_generator", lambda _, **more: asked.append(more.get("side")))
    monkeypatch.setattr(evaluate, "evaluate_tasks", lambda *_, **__: 1 / 0)
    call = ["eval", str(GARDEN_TEACHER), "--teacher", "garden", "--task", "fish=garden:fish", "--images", "2"]
    assert isinstance(CliRunner().invoke(app, call).exception, ZeroDivisionError)
    assert asked == [64, None]

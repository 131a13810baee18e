"""kdc-edge bench as a user types it: rows whatever happens, exit codes, what is kept after Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kdc_edge.cli.app import app
from kdc_edge.cli.prompt_quality import open_scorer
from kdc_edge.errors import InputError
from kdc_edge.train.garden.scenes import draw_scenes, render_many
from tests.bench.rows import lines_until
from tests.cli.test_commands import complaint, run

COMMAND = [sys.executable, "-c", "from kdc_edge.cli import main; main()", "bench"]
QUICK = ("--steps", 1, "--repeats", 2, "--warmup", 0, "--threads", 1)


def few_steps(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle that asks for 2 steps of DDIM without guidance."""
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "kdc-edge.json").read_text())
    manifest["model"]["sampling"] = {"scheduler": "ddim", "steps": 2, "guidance": 1.0}
    (folder / "kdc-edge.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def measured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good bundle, a damaged one, and what bench wrote of both."""
    root = tmp_path_factory.mktemp("bench")
    damaged = Path(shutil.copytree(bundle, root / "damaged"))
    model = damaged / "unet" / "model.onnx"
    model.write_bytes(b"x" * model.stat().st_size)
    lost = Path(shutil.copytree(bundle, root / "lost"))
    (lost / "vae_decoder" / "model.onnx").unlink()
    run("bench", bundle, damaged, lost, *QUICK, "--format", "json", "--out", "bench.json", cwd=root)
    return root


def test_a_failing_bundle_is_a_row_with_its_reason(measured: Path) -> None:
    good, damaged, lost = json.loads((measured / "bench.json").read_text("utf-8"))["rows"]
    assert good["failure"] is None
    assert len(good["timings"]["end_to_end"]["samples_sec"]) == 2
    assert good["timings"]["compile"] is None  # ONNX Runtime compiles as it loads
    assert good["timings"]["load"]["median_sec"] > 0
    assert good["timings"]["cold"]["median_sec"] > good["timings"]["load"]["median_sec"]
    assert (good["provider"], good["precision"], good["threads"]) == ("CPUExecutionProvider", "fp16", 1)
    assert "has changed since it was exported" in damaged["failure"]
    assert "is missing" in lost["failure"]
    assert damaged["timings"] is lost["timings"] is None


def test_a_few_step_bundle_is_measured_in_its_own_steps(bundle: Path, tmp_path: Path) -> None:
    """Its PSNR too: the reference makes the same image."""
    few = few_steps(bundle, tmp_path / "few")
    common = ("bench", few, "--repeats", 1, "--warmup", 0, "--reference", bundle, "--format", "json")
    done = run(*common, cwd=tmp_path)
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["sampler"], row["steps"], row["guidance"]) == ("ddim", 2, 1.0)
    assert row["psnr"] == {"reference": str(bundle), "db": None}
    assert "trained without" not in done.stderr
    done = run(*common, "--steps", "1,3", "--guidance", 4, cwd=tmp_path)
    rows = json.loads(done.stdout)["rows"]
    assert [(row["sampler"], row["steps"], row["guidance"]) for row in rows] == [("ddim", 1, 4.0), ("ddim", 3, 4.0)]
    assert done.stderr.count("guidance 4 is given to a student that was trained without") == 1


def test_limits_set_the_exit_code(bundle: Path, tmp_path: Path) -> None:
    done = run("bench", bundle, *QUICK, "--fail-over", "end_to_end_sec=1e-6", "--fail-under", "psnr=30",
               "--format", "csv", cwd=tmp_path, code=1)  # fmt: skip
    assert done.stdout.startswith("name,")  # the rows are written all the same
    last = done.stderr.strip().splitlines()[-1]
    assert "end_to_end_sec is" in last
    assert "psnr is not known" in last
    run("bench", bundle, *QUICK, "--reference", bundle, "--fail-under", "psnr=30", "--fail-over", "end_to_end_sec=3600",
        cwd=tmp_path)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fail-under", "speed=3"], "'speed' is not measured: choose from"),
        (["--threads", "1,two"], "--threads '1,two' is not understood"),
        (["--steps", ""], "--steps"),
        (["--guidance", "nan"], "guidance nan is out of range"),
        (["--guidance-interval", "nan:1"], "--guidance-interval 'nan:1' is not understood"),
        (["--scheduler", "ddim,"], "has an empty place"),
        (["--budget-sec", "0"], "--budget-sec 0 is no time"),
        (["--format", "xml"], "choose from table"),
        (["--prompts", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--reference", "nowhere"], "--reference nowhere: no bundle at nowhere"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: list[str], words: str, bundle: Path, tmp_path: Path) -> None:
    code = 2 if "choose from" in words else 1  # a choice that does not exist
    assert words in complaint("bench", bundle, *arguments, cwd=tmp_path, code=code)


def test_an_engine_that_is_not_installed_is_a_row(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ModuleNotFoundError('no', name='onnxruntime')")
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [*COMMAND, str(bundle), "--format", "json"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    (row,) = json.loads(done.stdout)["rows"]
    assert row["failure"].endswith("needs onnxruntime, which is not installed: pip install 'kdc-edge[onnx]'")
    assert done.stderr.splitlines()[-1] == "kdc-edge: nothing could be measured: see the reasons above"


def test_ctrl_c_keeps_the_rows_so_far(bundle: Path, tmp_path: Path) -> None:
    """An image of 1 step, then one of 900, in which it is interrupted, then another."""
    command = [*COMMAND, str(bundle), "--steps", "1,900,2", "--repeats", "9", "--format", "json", "--out", "found.json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )  # fmt: skip
    assert process.stderr is not None
    first = lines_until(process.stderr, f"1/3 {bundle}: ")[0]
    assert first == f"0/{(1 + 900 + 2) * 10} measurement 1 of 3, {bundle}: starting\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: the rows so far are written" in said.splitlines()
    rows = json.loads((tmp_path / "found.json").read_text("utf-8"))["rows"]
    assert [(row["steps"], row["failure"]) for row in rows] == [(1, None), (900, "interrupted"), (2, "interrupted")]
    assert len(rows[0]["timings"]["end_to_end"]["samples_sec"]) == 9


def test_compare_reads_what_bench_writes(measured: Path) -> None:
    found = run("bench", "--compare", "bench.json", "bench.json", cwd=measured).stdout
    assert "within the noise" in found
    assert "has changed since it was exported" in " ".join(found.split())
    old = json.loads((measured / "bench.json").read_text("utf-8")) | {"schema": "kdc-edge/bench/1"}
    (measured / "old.json").write_text(json.dumps(old))
    done = run("bench", "--compare", "old.json", "bench.json", cwd=measured, code=1)
    assert done.stderr == (
        "kdc-edge: old.json: this report is kdc-edge/bench/1 and this kdc-edge reads kdc-edge/bench/3: measure again\n"
    )
    assert "a.json does not exist" in complaint("bench", "--compare", "a.json", "b.json", cwd=measured)
    for unread in (["damaged"], ["--fail-over", "end_to_end_sec=1"]):  # a limit that is not looked at is always kept
        said = complaint("bench", "--compare", "bench.json", "bench.json", *unread, cwd=measured, code=2)
        assert "--compare reads two reports: leave bundles" in said
    (measured / "kdc-edge.toml").write_text('[bench]\nfail-over = ["end_to_end_sec=1"]\n')
    assert run("bench", "--compare", "bench.json", "bench.json", cwd=measured).stdout == found
    (measured / "kdc-edge.toml").unlink()


# prompts


def test_prompts_of_the_garden_are_judged() -> None:
    scenes = draw_scenes("flower", 12, seed=1)
    score = open_scorer([scene.caption for scene in scenes], None)
    right = score(render_many(scenes, seed=3))
    assert right.values["prompt_accuracy"] > 0.9
    assert right.prompts == 12
    wrong = score(render_many(draw_scenes("fish", 12, seed=1), seed=3))
    assert wrong.values["prompt_accuracy"] < 0.6
    assert wrong.prompts_sha256 == right.prompts_sha256


def test_other_prompts_need_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"not all are captions of the garden.*clip-vit-base-patch16"):
        open_scorer(["a red flower with five petals and a yellow center on a sky background", "a photo"], tmp_path)
    (tmp_path / "clip-vit-base-patch16").mkdir()
    (tmp_path / "clip-vit-base-patch16" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no CLIP as safetensors"):  # before anything is measured
        open_scorer(["a photo"], tmp_path)


def test_prompts_add_a_quality_to_the_row(bundle: Path, tmp_path: Path) -> None:
    captions = [scene.caption for scene in draw_scenes("flower", 2, seed=1)]
    (tmp_path / "prompts.txt").write_text("\n".join(captions))
    arguments = [bundle, *QUICK, "--prompts", tmp_path / "prompts.txt", "--format", "json"]
    done = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)  # PyTorch is imported here
    (row,) = json.loads(done.stdout)["rows"]
    assert row["prompt_quality"]["prompts"] == 2
    assert 0 <= row["prompt_quality"]["values"]["prompt_accuracy"] <= 1
    assert np.isfinite(row["prompt_quality"]["values"]["exact"])

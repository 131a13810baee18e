"""Commands with a single file and with additions; other models refused by every command before PyTorch loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdc_edge.bench.case import Case, describe
from kdc_edge.bench.runner import Measured
from kdc_edge.checkpoints.assemble import open_checkpoint, read_sources
from kdc_edge.diffusers_folder import hash_checkpoint
from kdc_edge.errors import CheckpointError
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from kdc_edge.train.teachers import GARDEN_TEACHER
from kdc_edge.weight_files import WEIGHTS
from tests.bench.rows import make_bundle, make_row
from tests.checkpoints.conftest import Model
from tests.checkpoints.original import original_state, save, small_networks
from tests.cli.test_commands import run

SCHEDULER = "scheduler/scheduler_config.json"
KINDS = {
    "8 channels": (
        "unet/config.json",
        {"in_channels": 8},
        "in_channels = 8 where the VAE has 4: an image-to-image model",
    ),
    "classes": ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
    "SDXL": ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "'StableDiffusionXLPipeline'"),
    "SD3": ("model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "'StableDiffusion3Pipeline'"),
    "Flux": ("model_index.json", {"_class_name": "FluxPipeline"}, "'FluxPipeline'"),
    "flow matching": (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
    "EDM": (SCHEDULER, {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    "another VAE": ("vae/config.json", {"_class_name": "VQModel"}, "class 'VQModel'"),
    "no square": ("unet/config.json", {"sample_size": [16, 24]}, "sample_size = [16, 24], which is no square"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "in_channels = 9 where the VAE has 4: an inpainting model"),
    "LCM": ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256: a latent consistency model"),
}
NO_TEACHERS = ("inpainting", "LCM")  # these are exported and generate
FILES = {
    "SDXL file": ("conditioner.embedders.0.x", "is Stable Diffusion XL"),
    "SD3 file": ("model.diffusion_model.joint_blocks.0.x", "is Stable Diffusion 3"),
    "Flux file": ("double_blocks.0.x", "is Flux"),
    "pickle": ("", "is a pickle, which can run code"),
}


def teacher_of(kind: str, folder: Path) -> tuple[Path, str]:
    if kind in FILES:
        name, said = FILES[kind]
        path = folder / ("x.safetensors" if name else "x.ckpt")
        save_file({name: torch.zeros(1)} if name else {}, path)
        return path, said
    file, change, said = KINDS[kind]
    teacher = Path(shutil.copytree(GARDEN_TEACHER, folder / "teacher"))
    (teacher / file).write_text(json.dumps(json.loads((teacher / file).read_text()) | change))
    return teacher, said


def commands(kind: str, teacher: Path) -> list[list[str]]:
    place = str(teacher)
    found = [
        ["init", "--preset", "garden-student", "--from", place, "--out", "out"],
        ["train", "--teacher", place, "--out", "out"],
        ["train", "--teacher", place, "--out", "out", "--dry-run"],
        ["export", place, "--out", "out"],
        ["generate", "a", "--bundle", place, "--out", "out"],
        ["train-decoder", "--from", place, "--out", "out"],
    ]
    return found[:3] if kind in NO_TEACHERS else found


@pytest.mark.parametrize("kind", [*KINDS, *FILES])
def test_every_command_refuses_it_by_name_at_once(tmp_path: Path, kind: str) -> None:
    teacher, said = teacher_of(kind, tmp_path)
    for command in commands(kind, teacher):
        started = time.perf_counter()
        done = run(*command, cwd=tmp_path, code=1)
        assert time.perf_counter() - started < 2, command
        assert said in done.stderr, command
        assert len(done.stderr.strip().splitlines()[-1]) < 500
        assert not (tmp_path / "out").exists(), command


@pytest.mark.parametrize("kind", ["SDXL file", "classes", "flow matching", "another VAE"])
def test_nothing_heavy_is_imported_for_a_refusal(tmp_path: Path, kind: str) -> None:
    """PyTorch and its libraries take seconds, longer than a refusal may."""
    teacher, said = teacher_of(kind, tmp_path)
    program = (
        "import sys\nfrom kdc_edge.cli import main\n"
        f"for command in {commands(kind, teacher)[:4]!r}:\n"
        "    sys.argv = ['kdc-edge', *command]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == 1, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(said) == 4


def test_a_single_file_goes_through_the_commands(sd1: Model, tmp_path: Path) -> None:
    done = run(
        "generate", "a red flower", "--bundle", sd1.file, "--out", "x.png", "--steps", 1, "--width", 64, "--height", 64,
        cwd=tmp_path,
    )  # fmt: skip
    assert "sd1.safetensors: Stable Diffusion 1.x" in done.stderr
    assert (tmp_path / "x.png").is_file()
    done = run("init", "--preset", "kdc-482m", "--from", sd1.file, "--out", "s", cwd=tmp_path, code=1)
    assert "320/640/1280/1280 channels and the teacher's 32/64/128/128" in done.stderr


@pytest.fixture
def small_file(sd1: Model, tmp_path: Path) -> Path:
    """A single file of two stages: images of 128 pixels."""
    pipeline = SimpleNamespace(**small_networks(), text_encoder=sd1.pipeline.text_encoder)
    return save(original_state(pipeline), tmp_path / "small.safetensors")


def measured_at_once(case: Case, **_: object) -> Measured:
    """Without a child process."""
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    row = replace(describe(case), timings=make_row().timings, peak_rss_bytes=1, width=8, height=8)
    return Measured(row, pixels)


def test_bench_fit_info_and_eval_take_a_single_file(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdc_edge.bench.runner.measure_in_fresh_process", measured_at_once)
    folder = open_checkpoint(small_file)
    facts = json.loads(run("info", small_file, "--json", cwd=tmp_path).stdout)
    assert (facts["kind"], facts["latent_size"], facts["vae_scale"]) == ("checkpoint", 64, 2)
    made = make_bundle(tmp_path / "bundles" / "onnx-fp16", checkpoint_sha256=hash_checkpoint(folder))
    quick = ("--steps", 1, "--repeats", 1, "--warmup", 0)
    done = run("bench", made, "--reference", small_file, *quick, "--format", "json", cwd=tmp_path)
    (row,) = json.loads(done.stdout)["rows"]
    assert row["psnr"]["reference"] == str(folder)
    document = json.loads(run("fit", small_file, "--no-export", *quick, "--json", cwd=tmp_path).stdout)
    assert [r["name"] for r in document["report"]["rows"]] == [folder.name, "onnx-fp16"]
    assert document["choice"] == "onnx-fp16"
    asked = ("--task", "flowers=garden:flowers", "--images", 2, "--steps", 1, "--json")
    document = json.loads(run("eval", small_file, *asked, cwd=tmp_path).stdout)
    assert document["checkpoint"] == str(folder)
    assert document["scores"]["flowers"]


def test_eval_measures_what_is_put_to_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    name = "down_blocks.0.attentions.0.proj_in"
    width = load_file(checkpoint / "unet" / WEIGHTS["unet"])[f"{name}.weight"].shape[0]
    save_file(
        {f"unet.{name}.lora_A.weight": torch.randn(1, width), f"unet.{name}.lora_B.weight": torch.randn(width, 1)},
        tmp_path / "lora.safetensors",
    )
    save_file({"<x>": torch.randn(128)}, tmp_path / "token.safetensors")
    vae = load_file(checkpoint / "vae" / WEIGHTS["vae"])
    shutil.copytree(checkpoint / "vae", tmp_path / "vae")
    save_file({n: t * 1.1 for n, t in vae.items()}, tmp_path / "vae" / WEIGHTS["vae"])
    asked = ("eval", checkpoint, "--task", "flowers=garden:flowers", "--images", 2, "--steps", 1, "--json")
    more = ("--lora", "lora.safetensors:0.5", "--vae", "vae", "--embedding", "token.safetensors")
    plain = json.loads(run(*asked, cwd=tmp_path).stdout)
    done = run(*asked, *more, cwd=tmp_path)
    assert "lora.safetensors: fused into 1 layers, weight 0.5" in done.stderr
    assert "token.safetensors: <x> in a prompt is 1 token" in done.stderr
    changed = json.loads(done.stdout)
    roles = [source.role for source in read_sources(Path(changed["checkpoint"]))]
    assert roles == ["checkpoint", "vae", "lora", "embedding"]
    assert changed["scores"] != plain["scores"]


def test_additions_are_named_in_the_student(tmp_path: Path) -> None:
    name = "mid_block.attentions.0.proj_in"
    lora = {f"unet.{name}.lora_A.weight": torch.ones(1, 80), f"unet.{name}.lora_B.weight": torch.ones(80, 1)}
    save_file(lora, tmp_path / "x.safetensors")
    more = ("--lora", "x.safetensors:0.5")
    done = run("init", "--preset", "garden-student", "--from", "garden", "--out", "student", *more, cwd=tmp_path)
    assert "x.safetensors: fused into 1 layers, weight 0.5" in done.stderr
    sources = json.loads((tmp_path / "student" / "sources.json").read_text())["sources"]
    assert [s["name"] for s in sources] == ["garden-teacher", "x.safetensors"]
    done = run("init", "--preset", "kdc-482m", "--out", "s", *more, cwd=tmp_path, code=1)
    assert "give one with --from" in done.stderr
    done = run("export", "student", "--prediction-type", "v", "--out", "b", cwd=tmp_path, code=2)
    assert "--prediction-type 'v' is unknown" in done.stderr


def test_additions_are_named_in_the_manifest(own_checkpoint: Path, traced_once: None, tmp_path: Path) -> None:  # noqa: ARG001
    sources = [{"role": "lora", "name": "x.safetensors", "sha256": "0" * 64, "weight": 0.5}]
    (own_checkpoint / "sources.json").write_text(json.dumps({"sources": sources}))
    out = tmp_path / "bundle"
    bundle = export_checkpoint(ExportRequest(own_checkpoint, out, "onnx", "fp32", verify=False))
    assert [source.model_dump() for source in bundle.manifest.provenance.sources] == sources
    done = run("generate", "a", "--bundle", out, "--lora", "x.safetensors", cwd=tmp_path, code=1)
    assert "a bundle is fixed" in done.stderr
    (own_checkpoint / "sources.json").write_text(json.dumps({"sources": [{"role": "x"}]}))
    with pytest.raises(CheckpointError, match=r"sources.json is damaged"):
        read_sources(own_checkpoint)

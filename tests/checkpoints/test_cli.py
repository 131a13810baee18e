"""Commands with a single file and with additions; other models refused by every command before PyTorch loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdc_edge.checkpoints.assemble import read_sources
from kdc_edge.errors import CheckpointError
from kdc_edge.export.targets import ExportRequest, export_checkpoint
from kdc_edge.train.teachers import GARDEN_TEACHER
from tests.checkpoints.conftest import Model
from tests.cli.test_commands import run

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
}
FILES = {
    "SDXL file": ("conditioner.embedders.0.x", "is Stable Diffusion XL"),
    "SD3 file": ("model.diffusion_model.joint_blocks.0.x", "is Stable Diffusion 3"),
    "Flux file": ("double_blocks.0.x", "is Flux"),
}


def teacher_of(kind: str, folder: Path) -> tuple[Path, str]:
    if kind in FILES:
        name, said = FILES[kind]
        save_file({name: torch.zeros(1)}, folder / "x.safetensors")
        return folder / "x.safetensors", said
    file, change, said = KINDS[kind]
    teacher = Path(shutil.copytree(GARDEN_TEACHER, folder / "teacher"))
    (teacher / file).write_text(json.dumps(json.loads((teacher / file).read_text()) | change))
    return teacher, said


def commands(teacher: Path) -> list[list[str]]:
    place = str(teacher)
    return [
        ["init", "--preset", "garden-student", "--from", place, "--out", "out"],
        ["train", "--teacher", place, "--out", "out"],
        ["train", "--teacher", place, "--out", "out", "--dry-run"],
        ["export", place, "--out", "out"],
        ["generate", "a", "--bundle", place, "--out", "out"],
        ["train-decoder", "--from", place, "--out", "out"],
    ]


@pytest.mark.parametrize("kind", [*KINDS, *FILES])
def test_every_command_refuses_it_by_name_at_once(tmp_path: Path, kind: str) -> None:
    teacher, said = teacher_of(kind, tmp_path)
    for command in commands(teacher):
        started = time.perf_counter()
        done = run(*command, cwd=tmp_path, code=1)
        assert time.perf_counter() - started < 2, command
        assert said in done.stderr, command
        assert len(done.stderr.strip().splitlines()[-1]) < 500
        assert not (tmp_path / "out").exists(), command


def test_nothing_heavy_is_imported_for_a_refusal(tmp_path: Path) -> None:
    """PyTorch and its libraries take seconds, longer than a refusal may."""
    teacher, said = teacher_of("SDXL file", tmp_path)
    program = (
        "import sys\nfrom kdc_edge.cli import main\n"
        f"for command in {commands(teacher)[:4]!r}:\n"
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

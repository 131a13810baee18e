"""Single files in the original key layout, against diffusers' pipeline of the same weights.

Their names are made by tests/checkpoints/original.py, which knows nothing of diffusers' conversion.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from safetensors.torch import load_file
from torch import Tensor

from kdc_edge.checkpoints import Additions, assemble, open_checkpoint
from kdc_edge.checkpoints.single_file import GUIDANCE, read_single_file
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.request import Request
from kdc_edge.runtimes import open_pipeline
from kdc_edge.samplers import sampler_for
from tests.checkpoints.conftest import Model
from tests.checkpoints.original import State, make_pipeline, original_state, original_vae, save, small_networks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
EQUAL_DB = 55  # rounding to 8 bits alone leaves 59
PROMPT = "a red flower"


def distance(folder: Path, theirs: Any, prompt: str = PROMPT, side: int = 64) -> float:
    """PSNR of our image to that of diffusers' pipeline, dB: both by the checkpoint's own scheduler."""
    ours = open_pipeline(folder)
    sampler, _ = sampler_for(ours.model.scheduler)
    theirs.set_progress_bar_config(disable=True)
    image = theirs(
        prompt, guidance_scale=4.0, num_inference_steps=2, generator=torch.Generator("cpu").manual_seed(1),
        output_type="np", width=side, height=side,
    ).images[0]  # fmt: skip
    request = Request(prompt, steps=2, guidance=4.0, seed=1, sampler=sampler, width=side, height=side)
    error = np.mean((ours.generate(request) - np.asarray(image) * 255.0) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def test_the_tensors_are_as_many_as_the_published_models_have(sd1: Model) -> None:
    names = [n for n in load_file(sd1.file) if not n.startswith(("model_ema", "betas"))]
    kinds = ("model.diffusion_model", "first_stage_model", "cond_stage_model")
    assert [sum(n.startswith(kind) for n in names) for kind in kinds] == [686, 248, 197]


@pytest.mark.parametrize("version", [1, 2])
def test_a_single_file_gives_the_image_of_diffusers(sd1: Model, sd2: Model, version: int) -> None:
    model = (sd1, sd2)[version - 1]
    said: list[str] = []
    folder = open_checkpoint(model.file, say=said.append)
    assert distance(folder, model.pipeline) > EQUAL_DB
    assert read_model(folder).image_size == {1: 512, 2: 768}[version]
    about = {
        1: "Stable Diffusion 1.x in its original layout, 512 pixels, prediction epsilon",
        2: "Stable Diffusion 2.x in its original layout, 768 pixels, prediction v_prediction (as Stable Diffusion 2.1;"
        " the file does not say: give --prediction-type epsilon for 2.x-base)",
    }
    assert about[version] in said[0]
    assert ("EMA weights too" in said[1]) == (version == 1)


def test_the_folder_is_made_once_and_names_its_file(sd1: Model, tmp_path: Path) -> None:
    said: list[str] = []
    first = open_checkpoint(sd1.file, say=said.append)
    assert open_checkpoint(str(sd1.file), say=said.append) == first
    (source,) = json.loads((first / "sources.json").read_text())["sources"]
    assert (source["role"], source["name"]) == ("checkpoint", "sd1.safetensors")
    assert len(source["sha256"]) == 64
    other = tmp_path / sd1.file.name
    other.write_bytes(sd1.file.read_bytes())
    assert open_checkpoint(other) != first


def test_a_cache_of_another_user_serves_and_one_that_cannot_be_written_is_named(
    sd1: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_checkpoint(sd1.file)

    def refuse(_: Path) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "exclusive", refuse)
        assert open_checkpoint(sd1.file) == folder
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDC_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="cannot be written: Not a directory; choose another place, by KDC_EDGE_CACHE"):
        open_checkpoint(sd1.file)


def test_half_precision_stays_as_it_is(sd1: Model, tmp_path: Path) -> None:
    state = {n: t.half() if n.startswith("model.") else t for n, t in original_state(sd1.pipeline).items()}
    state = {n: t.bfloat16() if n.startswith("first_stage_model.") else t for n, t in state.items()}
    folder = open_checkpoint(save(state, tmp_path / "half.safetensors"))
    unet, vae = sd1.pipeline.unet.conv_in.weight.half(), sd1.pipeline.vae.decoder.conv_in.weight.bfloat16()
    name = "diffusion_pytorch_model.safetensors"
    assert torch.equal(load_file(folder / "unet" / name)["conv_in.weight"], unet)
    assert torch.equal(load_file(folder / "vae" / name)["decoder.conv_in.weight"], vae)


@pytest.mark.parametrize(
    ("mark", "metadata", "wanted", "prediction", "size"),
    [
        ({}, {}, "epsilon", "epsilon", 64),
        ({}, {"modelspec.prediction_type": "epsilon"}, None, "epsilon", 64),
        ({}, {"ss_v_parameterization": "True"}, None, "v_prediction", 96),
        ({"v_pred": torch.zeros(0)}, {}, None, "v_prediction", 96),
        ({"v_pred": torch.zeros(0)}, {}, "epsilon", "epsilon", 64),
    ],
)
def test_what_the_unet_predicts_is_the_users_word_or_the_files(
    sd2: Model, tmp_path: Path, mark: State, metadata: dict[str, str], wanted: str | None, prediction: str, size: int
) -> None:
    state = {n: t for n, t in load_file(sd2.file).items() if "first_stage" not in n} | mark
    found = read_single_file(save(state, tmp_path / "v.safetensors", metadata), wanted)
    assert (found.scheduler["prediction_type"], found.unet["sample_size"]) == (prediction, size)


def test_a_file_of_zero_terminal_snr_says_so(sd1: Model, tmp_path: Path) -> None:
    state = original_state(sd1.pipeline) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    found = read_single_file(save(state, tmp_path / "z.safetensors")).scheduler
    assert (found["_class_name"], found["rescale_betas_zero_snr"], found["timestep_spacing"]) == (
        "DDIMScheduler", True, "trailing",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["original", "prefixed", "diffusers", "folder"])
def test_another_vae_takes_its_place(sd1: Model, tmp_path: Path, kind: str) -> None:
    vae = make_pipeline(2).vae
    states = {"original": original_vae(vae), "diffusers": vae.state_dict()}
    states["prefixed"] = {f"first_stage_model.{n}": t for n, t in original_vae(vae).items()}
    path = tmp_path / "vae"
    if kind == "folder":
        vae.save_pretrained(path)
    else:
        path = save(states[kind], tmp_path / "vae.safetensors")
    whole = {n: t for n, t in original_state(sd1.pipeline).items() if not n.startswith("first_stage_model")}
    alone = save(whole, tmp_path / "no-vae.safetensors")
    with pytest.raises(CheckpointError, match=r"has no VAE .first_stage_model.: give one with --vae FILE"):
        open_checkpoint(alone)
    folder = open_checkpoint(alone, Additions(vae=path))
    found = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == vae.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in vae.state_dict().items())
    if kind == "original":
        again = open_checkpoint(open_checkpoint(sd1.file), Additions(vae=path))
        assert [s["role"] for s in json.loads((again / "sources.json").read_text())["sources"]] == [
            "checkpoint",
            "checkpoint",
            "vae",
        ]
        assert (again / "vae" / "config.json").read_text() == (folder / "vae" / "config.json").read_text()


def test_a_vae_that_is_not_whole_is_refused(sd1: Model, tmp_path: Path) -> None:
    vae = sd1.pipeline.vae
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    part = {n: t for n, t in vae.state_dict().items() if n != "decoder.conv_out.bias"}
    file = save(part, tmp_path / "part.safetensors")
    for path, said in ((tmp_path / "vae", "has no diffusion_pytorch"), (file, "it has no vae.decoder.conv_out.bias")):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(open_checkpoint(sd1.file), Additions(vae=path))


def test_a_vae_of_other_latents_is_refused(sd1: Model, tmp_path: Path) -> None:
    vae = sd1.pipeline.vae
    vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text()) | {"scaling_factor": 0.13025}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"scaling_factor 0.13025 and the checkpoint's VAE 0.18215"):
        open_checkpoint(open_checkpoint(sd1.file), Additions(vae=tmp_path / "vae"))


D = "model.diffusion_model."
FIRST = f"{D}input_blocks.0.0.weight"
REFUSED: dict[str, tuple[State, str]] = {
    "Stable Diffusion XL": (
        {FIRST: torch.zeros(8, 4, 3, 3), f"{D}label_emb.0.0.weight": torch.zeros(8, 8)}, "is Stable Diffusion XL",
    ),
    "Stable Diffusion 3": ({f"{D}joint_blocks.0.x": torch.zeros(1)}, "is Stable Diffusion 3"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "is Flux"),
    "another transformer": ({"diffusion_model.layers.0.x": torch.zeros(1)}, "is a diffusion transformer"),
    "a LoRA": ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "is a LoRA: give it as --lora"),
    "a token": ({"emb_params": torch.zeros(1, 8)}, "is a textual inversion: give it as --embedding"),
    "a VAE": ({"decoder.conv_in.weight": torch.zeros(1)}, "is a VAE: give it as --vae"),
    "a ControlNet": ({"control_model.input_hint_block.0.weight": torch.zeros(1)}, "is a ControlNet"),
    "a network of diffusers": ({"down_blocks.0.x": torch.zeros(1)}, "name the checkpoint's folder"),
    "something else": ({"x": torch.zeros(1)}, f"it has no tensor {FIRST}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    state, said = REFUSED[name]
    path = save(state, tmp_path / "x.safetensors")
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=said.replace(".", r"\.")) as caught:
        open_checkpoint(path)
    assert time.perf_counter() - started < 2
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", GUIDANCE)
def test_a_latent_consistency_models_file_gives_the_image_of_diffusers(sd1: Model, tmp_path: Path, name: str) -> None:
    """Of LatentConsistencyModelPipeline, whose U-Net reads the guidance scale; under either name of the projection."""
    networks = small_networks(time_cond_proj_dim=256)
    networks["unet"].time_embedding.cond_proj.weight.data *= 5  # so that the guidance scale shows
    parts = sd1.pipeline.components | networks | {"scheduler": LCMScheduler()}
    del parts["image_encoder"]
    theirs = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    state = original_state(theirs)
    state[f"{D}{name}"] = state.pop(f"{D}{GUIDANCE[0]}")
    said: list[str] = []
    folder = open_checkpoint(save(state, tmp_path / "lcm.safetensors"), say=said.append)
    assert "768 pixels" in said[0]
    assert "is a latent consistency model that reads the guidance scale: LCMScheduler is taken" in said[1]
    assert (read_model(folder).guidance_embedding, read_model(folder).latent_size) == (256, 96)
    assert distance(folder, theirs) > EQUAL_DB
    with pytest.raises(CheckpointError, match="time_cond_proj_dim = 256: a latent consistency model that reads"):
        open_checkpoint(tmp_path / "lcm.safetensors", as_teacher=True)


def test_an_inpainting_models_file_is_one(sd1: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDC_EDGE_CACHE", str(tmp_path / "cache"))
    state = original_state(sd1.pipeline) | {FIRST: torch.zeros(32, 9, 3, 3)}
    assert read_model(open_checkpoint(save(state, tmp_path / "x.safetensors"))).inpainting


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({FIRST: torch.zeros(32, 8, 3, 3)}, "in_channels = 8 where the VAE has 4: an image-to-image model"),
        ({f"{D}label_emb.weight": torch.zeros(10, 128)}, "num_class_embeds = 10: it needs a class"),
        ({f"{D}middle_block.0.in_layers.2.weight": None}, "it has no unet.mid_block.resnets.0.conv1.weight"),
        ({f"{D}out.2.bias": torch.zeros(5)}, r"it has \[5\], not \[4\], for unet.conv_out.bias"),
        ({"cond_stage_model.transformer.": None}, "has no text encoder .cond_stage_model."),
    ],
)
def test_files_of_other_shapes_are_refused_before_a_folder_is_made(
    sd1: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: dict[str, Tensor | None], said: str
) -> None:
    monkeypatch.setenv("KDC_EDGE_CACHE", str(tmp_path / "cache"))
    state = original_state(sd1.pipeline)
    for name, tensor in edit.items():
        state = {n: t for n, t in state.items() if not n.startswith(name)} | ({} if tensor is None else {name: tensor})
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(save(state, tmp_path / "x.safetensors"))
    assert not any(p.is_dir() for p in (tmp_path / "cache").rglob("*") if p.parent.name == "checkpoints")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch()
    with pytest.raises(CheckpointError, match=r"is a pickle, which can run code: take the .safetensors file"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="no file at"):
        open_checkpoint(tmp_path / "missing.safetensors")

"""LoRAs of every format, against the formula and diffusers' own fusion; kohya's names against diffusers'."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdc_edge.checkpoints import Additions, Lora, open_checkpoint
from kdc_edge.checkpoints.single_file import UNET as UNET_PREFIX
from kdc_edge.checkpoints.single_file import original_names
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.quiet import quiet
from kdc_edge.train.teachers import GARDEN_TEACHER
from tests.checkpoints.conftest import Model
from tests.checkpoints.test_single_file import EQUAL_DB, distance

State = dict[str, Tensor]
UNET = "diffusion_pytorch_model.safetensors"
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "up_blocks.0.resnets.1.conv1"
TEXT = "encoder.layers.0.mlp.fc1"


def weights(folder: Path) -> State:
    """Of U-Net and text encoder, by diffusers' names."""
    text = load_file(folder / "text_encoder" / "model.safetensors")
    return load_file(folder / "unet" / UNET) | {f"text.{n.removeprefix('text_model.')}": t for n, t in text.items()}


@pytest.fixture(scope="module")
def before() -> State:
    return weights(GARDEN_TEACHER)


@pytest.fixture(scope="module")
def pairs(before: State) -> dict[str, tuple[Tensor, Tensor]]:
    """up and down of rank 2 for a linear layer, one of a list, a convolution and a text encoder's layer."""
    torch.manual_seed(0)
    found = {}
    for name in (LINEAR, OUT, CONV, f"text.{TEXT}"):
        shape = before[f"{name}.weight"].shape
        up = torch.randn(shape[0], 2, *([1, 1] if len(shape) == 4 else []))
        found[name] = (up, torch.randn(2, *shape[1:]))
    return found


def fused(before: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """The definition, output channel by output channel."""
    rank, delta = down.shape[0], torch.zeros(before.shape)
    for o in range(before.shape[0]):
        delta[o] = sum((up[o, r].reshape(()) * down[r] for r in range(rank)), torch.zeros(before.shape[1:]))
    return before.float() + scale * delta


def kohya(pairs: dict[str, tuple[Tensor, Tensor]], alpha: float | None) -> State:
    state: State = {}
    for name, (up, down) in pairs.items():
        flat = name.replace("text.", "lora_te_text_model_") if name.startswith("text.") else f"lora_unet_{name}"
        flat = flat.replace(".", "_")
        state |= {f"{flat}.lora_up.weight": up, f"{flat}.lora_down.weight": down}
        if alpha is not None:
            state[f"{flat}.alpha"] = torch.tensor(alpha)
    return state


def dotted(pairs: dict[str, tuple[Tensor, Tensor]], up_name: str, down_name: str) -> State:
    state: State = {}
    for name, (up, down) in pairs.items():
        full = name.replace("text.", "text_encoder.text_model.") if name.startswith("text.") else f"unet.{name}"
        state |= {f"{full}{up_name}": up, f"{full}{down_name}": down}
    return state


def old_processors(pairs: dict[str, tuple[Tensor, Tensor]]) -> State:
    """diffusers before 0.18: only of attention, without a network's name."""
    state: State = {}
    for name in (LINEAR, OUT):
        full = name.replace("to_out.0", "to_out").replace(".to_", ".processor.to_")
        state |= {f"{full}_lora.up.weight": pairs[name][0], f"{full}_lora.down.weight": pairs[name][1]}
    return state


def write(state: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in state.items()}, path, metadata)
    return path


ORIGINAL = {  # of the garden's U-Net, which has two layers a stage as Stable Diffusion
    LINEAR: "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    OUT: "middle_block.1.transformer_blocks.0.attn2.to_out.0",
    CONV: "output_blocks.1.0.in_layers.2",
}


def renamed(state: State, prefix: str, delimiter: str) -> State:
    """kohya's names with the original layout's of the U-Net's layers."""
    for layer, original in ORIGINAL.items():
        flat, new = f"lora_unet_{layer.replace('.', '_')}.", prefix + original.replace(".", delimiter) + "."
        state = {name.replace(flat, new): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    "kind", ["kohya", "no alpha", "peft", "diffusers", "old", "metadata", "original", "original, dotted"]
)
def test_a_lora_is_added_by_its_formula(
    pairs: dict[str, tuple[Tensor, Tensor]], before: State, tmp_path: Path, kind: str
) -> None:
    config = {"unet.lora_alpha": 3, "unet.r": 2, "text_encoder.lora_alpha": 3, "text_encoder.r": 2}
    states: dict[str, tuple[State, float]] = {
        "kohya": (kohya(pairs, 1.0), 1 / 2),
        "no alpha": (kohya(pairs, None), 1),
        "peft": (dotted(pairs, ".lora_B.weight", ".lora_A.weight"), 1),
        "diffusers": (dotted(pairs, ".lora.up.weight", ".lora.down.weight"), 1),
        "old": (old_processors(pairs), 1),
        "metadata": (dotted(pairs, ".lora_B.weight", ".lora_A.weight"), 3 / 2),
        "original": (renamed(kohya(pairs, 1.0), "lora_unet_", "_"), 1 / 2),
        "original, dotted": (renamed(kohya(pairs, 1.0), "diffusion_model.", "."), 1 / 2),
    }
    state, scale = states[kind]
    path = write(
        state, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)} if kind == "metadata" else None
    )
    said: list[str] = []
    folder = open_checkpoint(GARDEN_TEACHER, Additions(loras=(Lora.parse(f"{path}:0.8"),)), say=said.append)
    layers = 2 if kind == "old" else 4
    assert f"x.safetensors: fused into {layers} layers, weight 0.8" in said
    after = weights(folder)
    changed = {name for name in after if not torch.equal(after[name], before[name].to(after[name].dtype))}
    assert changed == {f"{name}.weight" for name in list(pairs)[: layers if kind != "old" else 2]}
    for name in changed:
        up, down = pairs[name.removesuffix(".weight")]
        torch.testing.assert_close(after[name], fused(before[name], up, down, 0.8 * scale), rtol=1e-5, atol=1e-5)
    sources = json.loads((folder / "sources.json").read_text())["sources"]
    assert [(s["role"], s["name"], s["weight"]) for s in sources[1:]] == [("lora", "x.safetensors", 0.8)]


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("kind", ["kohya", "peft"])
def test_a_fused_lora_equals_diffusers_fused_pipeline(before: State, tmp_path: Path, kind: str) -> None:
    """Every linear and convolutional layer of U-Net and text encoder, tensor by tensor, and an image of both."""
    torch.manual_seed(2)
    pairs = {}
    for name, tensor in before.items():
        if tensor.ndim > 1 and "embeddings" not in name:
            up = 0.1 * torch.randn(tensor.shape[0], 2, *[1] * (tensor.ndim - 2))
            pairs[name.removesuffix(".weight")] = (up, 0.1 * torch.randn(2, *tensor.shape[1:]))
    state = kohya(pairs, 3.0) if kind == "kohya" else dotted(pairs, ".lora_B.weight", ".lora_A.weight")
    path = write(state, tmp_path / "x.safetensors")
    with quiet():
        theirs = StableDiffusionPipeline.from_pretrained(GARDEN_TEACHER, torch_dtype=torch.float32)
        assert distance(GARDEN_TEACHER, theirs) > EQUAL_DB
        theirs.load_lora_weights(path)
        theirs.fuse_lora(lora_scale=0.7)
        theirs.unload_lora_weights()
    wanted = {f"text.{name.removeprefix('text_model.')}": t for name, t in theirs.text_encoder.state_dict().items()}
    wanted |= theirs.unet.state_dict()
    said: list[str] = []
    folder = open_checkpoint(GARDEN_TEACHER, Additions(loras=(Lora(path, 0.7),)), say=said.append)
    assert f"x.safetensors: fused into {len(pairs)} layers, weight 0.7" in said
    after = weights(folder)
    assert after.keys() == wanted.keys()
    assert {n for n in wanted if not torch.equal(wanted[n], before[n].float())} == {f"{n}.weight" for n in pairs}
    for name, tensor in wanted.items():
        torch.testing.assert_close(after[name].float(), tensor, rtol=1e-5, atol=1e-6)
    assert distance(folder, theirs) > EQUAL_DB
    assert distance(GARDEN_TEACHER, theirs) < 40  # the LoRA shows


def test_every_layer_of_kohya_is_the_one_that_diffusers_takes(before: State) -> None:
    """Names of all layers of linear maps in attention, as diffusers' own conversion translates them."""
    from kdc_edge.checkpoints.lora import _find, _index, split_name

    names = [n.removesuffix(".weight") for n in before if ".attn" in n and n.endswith(".weight") and "norm" not in n]
    state = {
        f"lora_unet_{n.replace('.', '_')}.lora_{side}.weight": torch.zeros(1) for n in names for side in ("up", "down")
    }
    theirs, _ = _convert_non_diffusers_lora_to_diffusers(dict(state))
    places = {"unet": _index(before), "text_encoder": {}}
    found = {_find(split_name(name)[0], places) for name in theirs}
    assert found == {_find(split_name(name)[0], places) for name in state}
    assert found == {("unet", f"{n}.weight") for n in names}
    assert len(names) == 16 * 8


def test_original_names_are_those_that_diffusers_translates(before: State, sd2: Model) -> None:
    """All of them, by diffusers' conversion of whole files; those of attention, by its conversion of LoRAs too."""
    config = json.loads((GARDEN_TEACHER / "unet" / "config.json").read_text("utf-8"))
    unet = {n: t for n, t in before.items() if not n.startswith("text.")}
    for settings, state in ((config, unet), (dict(sd2.pipeline.unet.config), sd2.pipeline.unet.state_dict())):
        names = original_names(n.rpartition(".")[0] for n in state)
        original = {f"{UNET_PREFIX}{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in state.items()}
        theirs = convert_ldm_unet_checkpoint(original, settings)
        assert theirs.keys() == state.keys()
        assert all(theirs[n] is t for n, t in state.items())
    attention = [n.removesuffix(".weight") for n in unet if ".attn" in n and n.endswith(".weight") and "norm" not in n]
    names = original_names(n.removesuffix(".weight") for n in unet)
    sides = [f"lora_{side}.weight" for side in ("up", "down")]
    lora = {f"lora_unet_{names[n].replace('.', '_')}.{side}": torch.zeros(1) for n in attention for side in sides}
    plain = {f"lora_unet_{n.replace('.', '_')}.{side}": torch.zeros(1) for n in attention for side in sides}
    mapped = _maybe_map_sgm_blocks_to_diffusers(lora, SimpleNamespace(layers_per_block=2))
    found, wanted = (_convert_non_diffusers_lora_to_diffusers(state)[0].keys() for state in (mapped, plain))
    assert found == wanted
    assert len(found) == 2 * len(attention)


def test_a_middle_matrix_is_part_of_the_product(before: State, tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = before[f"{CONV}.weight"].shape
    up, mid, down = torch.randn(shape[0], 2, 1, 1), torch.randn(2, 3, 3, 3), torch.randn(3, shape[1], 1, 1)
    flat = f"lora_unet_{CONV.replace('.', '_')}"
    state = {f"{flat}.lora_up.weight": up, f"{flat}.lora_mid.weight": mid, f"{flat}.lora_down.weight": down}
    path = write(state, tmp_path / "x.safetensors")
    after = weights(open_checkpoint(GARDEN_TEACHER, Additions(loras=(Lora(path),))))
    with torch.no_grad():  # as three convolutions in a row
        x = torch.randn(1, shape[1], 5, 5)
        f = torch.nn.functional.conv2d
        wanted = f(f(f(x, down), mid, padding=1), up)
        found = f(x, after[f"{CONV}.weight"] - before[f"{CONV}.weight"].float(), padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_several_loras_add_up(pairs: dict[str, tuple[Tensor, Tensor]], before: State, tmp_path: Path) -> None:
    path = write(kohya(pairs, None), tmp_path / "x.safetensors")
    twice = Additions(loras=(Lora(path, 0.5), Lora(path, -0.25)))
    after = weights(open_checkpoint(GARDEN_TEACHER, twice))[f"{LINEAR}.weight"]
    torch.testing.assert_close(after, fused(before[f"{LINEAR}.weight"], *pairs[LINEAR], 0.25), rtol=1e-5, atol=1e-5)


def test_layers_that_are_nowhere_are_counted(pairs: dict[str, tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    strange = {
        "lora_unet_strange.lora_up.weight": torch.zeros(1, 1),
        "lora_unet_strange.lora_down.weight": torch.zeros(1, 1),
    }
    said: list[str] = []
    path = write(kohya(pairs, None) | strange, tmp_path / "x.safetensors")
    open_checkpoint(GARDEN_TEACHER, Additions(loras=(Lora(path),)), say=said.append)
    assert any("left out are 1 that it has no layer for, such as lora_unet_strange" in line for line in said)


one = torch.zeros(1, 1)
FLAT = f"lora_unet_{LINEAR.replace('.', '_')}"
REFUSED: dict[str, tuple[State, str]] = {
    "Stable Diffusion XL": ({"lora_te1_x.lora_down.weight": one}, "is a LoRA of Stable Diffusion XL"),
    "Flux": ({"transformer.x.lora_A.weight": one}, "is a LoRA of a diffusion transformer"),
    "LoHa": ({f"{FLAT}.hada_w1_a": one}, "is a LoHa, no LoRA"),
    "DoRA": ({f"{FLAT}.dora_scale": one, f"{FLAT}.lora_down.weight": one}, "is a DoRA, no LoRA"),
    "a checkpoint": ({"conv_in.weight": one}, "is no LoRA: it has no pair"),
    "another model": (
        {f"{FLAT}.lora_down.weight": torch.zeros(2, 999), f"{FLAT}.lora_up.weight": torch.zeros(32, 2)},
        "does not fit this checkpoint.*and the weight .32, 32.",
    ),
    "no layer": ({"lora_unet_x.lora_down.weight": one, "lora_unet_x.lora_up.weight": one}, "fits no layer"),
    "half a pair": ({f"{FLAT}.lora_down.weight": one}, "is damaged: .* not one down and one up"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fused_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KDC_EDGE_CACHE", str(tmp_path / "cache"))
    state, said = REFUSED[name]
    path = write(dict(state), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(GARDEN_TEACHER, Additions(loras=(Lora(path),)))
    assert "\n" not in str(caught.value)
    assert not any(p.is_dir() for p in (tmp_path / "cache" / "checkpoints").glob("*"))


def test_weights_are_read_from_the_command_line(tmp_path: Path) -> None:
    path = write({"x": one}, tmp_path / "a:b.safetensors")
    assert Lora.parse(f"{path}") == Lora(path, 1.0)
    assert Lora.parse(f"{path}:-.5") == Lora(path, -0.5)
    (tmp_path / "folder").mkdir()
    write({"x": one}, tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    assert Lora.parse(f"{tmp_path / 'folder'}:2").path.name == "pytorch_lora_weights.safetensors"
    with pytest.raises(InputError, match="no finite number"):
        Lora.parse(f"{path}:nan")


def test_peft_alphas_have_patterns(tmp_path: Path, pairs: dict[str, tuple[Tensor, Tensor]], before: State) -> None:
    """The configuration that PEFT writes beside adapter_model.safetensors."""
    state: dict[str, Any] = {}
    for name in (LINEAR, OUT):
        up, down = pairs[name]
        state |= {f"base_model.model.{name}.lora_B.weight": up, f"base_model.model.{name}.lora_A.weight": down}
    write(state, tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": 4, "r": 2, "alpha_pattern": {"to_q": 8}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    after = weights(open_checkpoint(GARDEN_TEACHER, Additions(loras=(Lora.parse(str(tmp_path)),))))
    for name, scale in ((LINEAR, 4), (OUT, 2)):
        wanted = fused(before[f"{name}.weight"], *pairs[name], scale)
        torch.testing.assert_close(after[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-5)

"""LoRAs, fused into a checkpoint's weights: W + weight * alpha / rank * up @ down (Hu et al. 2021, arXiv 2106.09685).

    lora = Lora.parse("style.safetensors:0.8")
    lora.check()                                              # by its header: refuses other models and other methods
    fused = fuse(lora, {"unet": unet_weights, "text_encoder": text_weights})      # changes the dicts; counts layers

Formats: kohya's sd-scripts (lora_unet_..., lora_te_...), with convolutions (LoCon) and their middle matrix; PEFT's and
diffusers' (unet....lora_A.weight, older ...lora.down.weight and ..._lora.down.weight). A U-Net's layers are named as in
diffusers, or as in the original layout (input_blocks, middle_block, output_blocks).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kdc_edge.checkpoints.single_file import original_names, refuse_pickle
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.files import read_json
from kdc_edge.weight_files import read_header

PARTS = ("unet", "text_encoder")
IN_A_FOLDER = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and PEFT's names
PEFT_CONFIG = "adapter_config.json"

# A tensor's name ends in its role.
ROLES = {
    r"[._]lora[._](?:linear_layer\.)?(?:down|A)(?:\.default)?(?:\.weight)?$": "down",
    r"[._]lora[._](?:linear_layer\.)?(?:up|B)(?:\.default)?(?:\.weight)?$": "up",
    r"[._]lora_mid(?:\.weight)?$": "mid",
    r"\.alpha$": "alpha",
}
PREFIXES = (
    ("base_model.model.", ""),
    ("lora_unet_", "unet."),
    ("lora_te_", "text_encoder."),
    ("model.diffusion_model.", "unet."),
    ("diffusion_model.", "unet."),
)
OTHER_METHODS = {
    r"\.hada_w": "a LoHa", r"\.lokr_w": "a LoKr", r"\.on_input$": "an IA3", r"\.(oft_|boft_)": "an OFT",
    r"\.(dora_scale|lora_magnitude_vector)": "a DoRA", r"\.diff(_b)?$": "one with whole weights (diff)",
}  # fmt: skip
OTHER_MODELS = {
    r"^(lora_te[12]_|text_encoder_2\.)": "Stable Diffusion XL", r"^(lora_)?transformer[._]": "a diffusion transformer",
    r"^lora_unet_(double|single|joint)_blocks": "Flux or Stable Diffusion 3",
}  # fmt: skip

Weights = MutableMapping[str, Any]  # a network's tensors by name


@dataclass(frozen=True)
class Lora:
    """A LoRA's file, and how strongly it is applied."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """FILE or FILE:weight. Raises InputError for a weight that is no number, CheckpointError for no file."""
        name, colon, weight = text.rpartition(":")
        try:
            value = float(weight) if colon and name else 1.0
        except ValueError:
            name, value = text, 1.0  # the colon is the name's
        if not math.isfinite(value):
            raise InputError(f"--lora {text}: the weight is no finite number, such as 0.8")
        return cls(_file(Path(name if colon and name else text)), value)

    @property
    def files(self) -> list[Path]:
        """What the fused weights depend on: the file, and PEFT's configuration beside it."""
        config = self.path.parent / PEFT_CONFIG
        return [self.path, config] if self.path.name == IN_A_FOLDER[1] and config.is_file() else [self.path]

    def check(self) -> None:
        """Raise CheckpointError for a file that is no LoRA, or one of another model or method, by its header."""
        refuse_pickle(self.path)
        shapes, _ = read_header(self.path)
        for table, what in ((OTHER_MODELS, "of"), (OTHER_METHODS, "as")):
            for pattern, kind in table.items():
                if found := next((name for name in shapes if re.search(pattern, name)), None):
                    made = f"a LoRA of {kind}" if what == "of" else f"{kind}, no LoRA"
                    raise CheckpointError(f"{self.path} is {made} ({found:.80}), which cannot be fused here")
        if not any(split_name(name)[1] == "down" for name in shapes):
            raise CheckpointError(
                f"{self.path} is no LoRA: it has no pair of lora_down and lora_up, or lora_A and lora_B"
            )


@dataclass(frozen=True)
class Fused:
    """What a LoRA changed."""

    layers: int
    left_out: tuple[str, ...]  # its layers that the checkpoint does not have

    def line(self, lora: Lora) -> str:
        fused = f"{lora.path.name}: fused into {self.layers} layers, weight {lora.weight:g}"
        if not self.left_out:
            return fused
        return f"{fused}; left out are {len(self.left_out)} that it has no layer for, such as {self.left_out[0]}"


def split_name(name: str) -> tuple[str, str | None]:
    """A tensor's layer and its role: down, up, mid, alpha, or None.

    >>> split_name("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', 'down')
    """
    for pattern, role in ROLES.items():
        if found := re.search(pattern, name):
            return name[: found.start()], role
    return name, None


def fuse(lora: Lora, networks: Mapping[str, Weights]) -> Fused:
    """Add a LoRA to the weights of the networks, which become fp32 where they change.

    Raises CheckpointError where none of its layers is there, or one has another shape; the weights are then as before.
    """
    from safetensors.torch import load_file

    _, metadata = read_header(lora.path)
    layers: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(lora.path).items():
        layer, role = split_name(name)
        layers.setdefault(layer, {})[role or name] = tensor
    alphas = _alphas(lora, metadata)
    places = {part: _index(weights) for part, weights in networks.items()}
    changed: dict[tuple[str, str], Any] = {}
    left_out = []
    for layer, tensors in layers.items():
        if (place := _find(layer, places)) is None:
            left_out.append(layer)
            continue
        part, name = place
        before = (changed[place] if place in changed else networks[part][name]).float()
        alpha = tensors["alpha"].item() if "alpha" in tensors else alphas(part, name)
        changed[place] = before + lora.weight * _delta(lora.path, layer, tensors, before.shape, alpha)
    if not changed:
        raise CheckpointError(
            f"{lora.path} fits no layer of this checkpoint, such as {left_out[0]}: it is of another model"
        )
    for (part, name), weight in changed.items():
        networks[part][name] = weight
    return Fused(len(changed), tuple(left_out))


def _file(path: Path) -> Path:
    """The file itself, or the one of the usual name in a folder."""
    if path.is_dir():
        for name in IN_A_FOLDER:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path} holds no LoRA: name its .safetensors file")
    return path


@cache
def _flat(name: str) -> str:
    """A layer's name with underscores alone, as kohya writes it; transformers 5 leaves `text_model` out."""
    return name.replace(".processor", "").replace(".", "_").removeprefix("text_model_")


def _index(weights: Weights) -> dict[str, str]:
    """A layer's flat name, diffusers' and that of the original layout -> the name of its weight."""
    layers = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    found = {_flat(original): layers[layer] for layer, original in original_names(layers).items()}
    return found | {_flat(layer): name for layer, name in layers.items()}


def _find(layer: str, places: Mapping[str, Mapping[str, str]]) -> tuple[str, str] | None:
    """The network and the weight that a LoRA's layer belongs to; one without a network's name is the U-Net's."""
    for prefix, meant in PREFIXES:
        if layer.startswith(prefix):
            layer = meant + layer.removeprefix(prefix)
    part, dot, rest = layer.partition(".")
    if part not in PARTS or not dot:
        part, rest = "unet", layer
    known = places[part]
    for name in (_flat(rest), f"{_flat(rest)}_0"):  # the attention processors' to_out is a list's first
        if name in known:
            return part, known[name]
    return None


def _delta(path: Path, layer: str, tensors: Mapping[str, Any], shape: Any, alpha: float | None) -> Any:
    """alpha / rank * up @ down, in the shape of the weight: of matrices (out, in), or of kernels (out, in, h, w)."""
    import torch

    if not {"down", "up"} <= tensors.keys() or not tensors.keys() <= {"down", "up", "mid", "alpha"}:
        raise CheckpointError(
            f"{path} is damaged: {layer:.80} has {', '.join(sorted(tensors))}, not one down and one up"
        )
    up, down = tensors["up"].float(), tensors["down"].float()
    rank = down.shape[0]
    try:
        if "mid" in tensors:  # LoCon's convolution between 1x1 convolutions (r, in), (out, r)
            delta = torch.einsum("or,rshw,si->oihw", up.flatten(1), tensors["mid"].float(), down.flatten(1))
        else:
            delta = up.flatten(1) @ down.flatten(1)
        delta = delta.reshape(shape)
    except (RuntimeError, IndexError):
        raise CheckpointError(
            f"{path} does not fit this checkpoint: {layer:.80} has up {list(up.shape)} and down {list(down.shape)} and"
            f" the weight {list(shape)}; it is of another model"
        ) from None
    return delta if alpha is None else delta * (alpha / rank)


def _alphas(lora: Lora, metadata: Mapping[str, object]) -> Any:
    """Alpha of a layer in PEFT's way, from a file's metadata or the configuration beside it; None where not given."""
    config: Mapping[str, object] = {}
    path = lora.path
    if isinstance(text := metadata.get("lora_adapter_metadata"), str):
        try:
            config = json.loads(text)
        except ValueError:
            raise CheckpointError(f"{path} is damaged: its lora_adapter_metadata is no JSON") from None
    for peft in lora.files[1:]:
        config = {f"unet.{key}": value for key, value in read_json(peft, CheckpointError).items()}
    for part in PARTS:
        for switch in ("use_rslora", "use_dora"):
            if isinstance(config, dict) and config.get(f"{part}.{switch}"):
                raise CheckpointError(f"{path} was trained with {switch}, which cannot be fused here")

    def alpha(part: str, name: str) -> float | None:
        patterns = config.get(f"{part}.alpha_pattern")
        found = config.get(f"{part}.lora_alpha")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if re.fullmatch(rf"(.*\.)?{pattern}", name.removesuffix(".weight")):
                found = value
        return float(found) if isinstance(found, int | float) else None

    return alpha

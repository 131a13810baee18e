"""The networks of a checkpoint as tensors and configurations, under diffusers' and transformers' names.

parts = Parts(folder)                              # of a diffusers folder, read when they are asked for
parts = convert(read_single_file(path))            # of a file in the original layout
state = read_vae(path, read_vae_config(path))      # of --vae: a folder or a file, of either layout
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kdc_edge.checkpoints.parts import read_config
from kdc_edge.checkpoints.single_file import CLIP, GUIDANCE, OPEN_CLIP, UNET, VAE, Original, refuse_pickle, vae_config
from kdc_edge.diffusers_defaults import VAE as VAE_DEFAULTS
from kdc_edge.diffusers_defaults import Settings
from kdc_edge.diffusers_folder import refuse_links_out
from kdc_edge.errors import CheckpointError
from kdc_edge.quiet import quiet
from kdc_edge.weight_files import WEIGHTS, read_header, weights_of

State = dict[str, Any]  # a network's tensors by name


class Parts:
    """Networks of a checkpoint: tensors and configuration, read when they are asked for."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.states: dict[str, State] = {}
        self.configs: dict[str, Settings] = {}

    def state(self, part: str) -> State:
        if part not in self.states:
            assert self.folder is not None
            self.states[part] = load_tensors(weights_of(self.folder / part).files)
        return self.states[part]

    def config(self, part: str) -> Settings:
        if part not in self.configs:
            assert self.folder is not None
            self.configs[part] = read_config(self.folder / part)
        return self.configs[part]


def load_tensors(files: Sequence[Path]) -> State:
    from safetensors.torch import load_file

    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def convert(original: Original) -> Parts:
    """The networks of a single file under diffusers' and transformers' names, by diffusers' own conversion."""
    from diffusers.loaders import single_file_utils as diffusers

    whole = load_tensors([original.path])
    parts = Parts()
    parts.configs = {"unet": original.unet, "text_encoder": original.text_encoder}
    guidance = [whole.pop(UNET + name) for name in GUIDANCE if UNET + name in whole]
    parts.states["unet"] = diffusers.convert_ldm_unet_checkpoint(whole, original.unet)
    if guidance:
        parts.states["unet"][GUIDANCE[0]] = guidance[0]
    if original.vae is not None:
        parts.configs["vae"] = original.vae
        parts.states["vae"] = diffusers.convert_ldm_vae_checkpoint(_under(VAE, whole), original.vae)
    parts.states["text_encoder"] = _text_state(whole, original.text_encoder)
    for part, state in parts.states.items():
        _check_tensors(original.path, part, parts.configs[part], state)
    return parts


def _under(prefix: str, state: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _text_state(whole: State, config: Settings) -> State:
    """The text model of CLIP, or of OpenCLIP without the last layer, which Stable Diffusion 2.x does not read."""
    from diffusers.loaders import single_file_utils as diffusers

    if clip := _under(CLIP, whole):
        state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
    else:
        last = f"{OPEN_CLIP}transformer.resblocks.{config['num_hidden_layers']}."
        left = (last, f"{OPEN_CLIP}text_projection")
        kept = {name: tensor for name, tensor in whole.items() if not name.startswith(left)}
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
        state = diffusers.convert_open_clip_checkpoint(model, kept, OPEN_CLIP)
    return {name: tensor for name, tensor in state.items() if not name.endswith("position_ids")}


def _check_tensors(path: Path, part: str, config: Settings, state: State) -> None:
    """Raise CheckpointError unless the tensors are exactly a network's of this configuration, in number and shape."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = {key: value for key, value in config.items() if key not in ("_class_name", "architectures")}
    with torch.device("meta"):
        if part == "text_encoder":
            network = CLIPTextModel(CLIPTextConfig(**settings))
        else:
            network = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part](**settings)
    short = {name.removeprefix("text_model."): tensor for name, tensor in state.items() if tensor is not None}
    for name, wanted in network.state_dict().items():
        found = short.get(name.removeprefix("text_model."))
        if found is None or found.shape != wanted.shape:
            what = "no" if found is None else f"{list(found.shape)}, not {list(wanted.shape)}, for"
            raise CheckpointError(f"{path} cannot be used: it has {what} {part}.{name}; the file is not whole")


def read_vae_config(path: Path) -> Settings:
    """The configuration of a VAE's folder, of a checkpoint's folder, or of a single file. Raises CheckpointError."""
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        refuse_links_out(folder, (p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")))
        config = {**VAE_DEFAULTS, **read_config(folder)}
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise CheckpointError(
                f"--vae {path} is of the class {config['_class_name']!r:.80}: AutoencoderKL is needed"
            )
        return config
    refuse_pickle(path)
    shapes, _ = read_header(path)
    inside = {name.removeprefix(VAE): shape for name, shape in shapes.items() if name.startswith(VAE)}
    return vae_config(inside or shapes, path)


def read_vae(path: Path, config: Settings) -> State:
    from diffusers.loaders import single_file_utils as diffusers

    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        if not (files := weights_of(folder, "vae").files):
            raise CheckpointError(f"--vae {path} has no {WEIGHTS['vae']}: pickles are not read")
        return load_tensors(files)
    state = load_tensors([path])
    state = _under(VAE, state) or state
    if "encoder.down_blocks.0.resnets.0.conv1.weight" not in state:
        with quiet():
            state = diffusers.convert_ldm_vae_checkpoint(
                {
                    n: t
                    for n, t in state.items()
                    if n.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
                },
                config,
            )
    if not any(".query." in name for name in state):  # names of before diffusers 0.18, which it translates
        _check_tensors(path, "vae", config, state)
    return state


def scaling_factor(config: Mapping[str, object]) -> float:
    return float(str(config.get("scaling_factor", VAE_DEFAULTS["scaling_factor"])))

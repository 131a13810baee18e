"""A single file in the key layout of the original Stable Diffusion 1.x and 2.x, read by its header; no PyTorch.

    original = read_single_file(Path("v1-5-pruned-emaonly.safetensors"))     # raises CheckpointError for other models
    original.unet, original.vae, original.text_encoder                # config.json of each network, from tensor shapes

Shapes give channels, stages, layers and widths. Activations, norm groups and attention heads cannot be seen in a file:
they are those of the published Stable Diffusion 1.x and 2.x configurations, told apart by their projections.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdc_edge.diffusers_defaults import Settings
from kdc_edge.diffusers_folder import LCM_PIPELINE, PICKLES, PIPELINES, obstacles
from kdc_edge.errors import CheckpointError
from kdc_edge.presets import SCHEDULER
from kdc_edge.weight_files import read_header

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."  # of 1.x, of 2.x
EMA = "model_ema."
# The projection of the guidance scale's embedding, under UNET: diffusers' script to the original layout leaves its own
# name, which other programs translate.
GUIDANCE = ("time_embedding.cond_proj.weight", "time_embed.cond_proj.weight")
HEAD_WIDTH = 64  # channels a head: of the text encoders, and of the U-Net of Stable Diffusion 2.x
UNET_HEADS = 8  # of Stable Diffusion 1.x, whatever the channels
GROUPS = 32  # of every group norm
# Latents a side: 512 pixels, and 768 of Stable Diffusion 2.x with v-prediction and of LCM_Dreamshaper_v7.
BASE_SIZE, LARGE_SIZE = 64, 96

# The scheduler configurations of the published Stable Diffusion 1.5 and 2.1.
PNDM: Settings = {"_class_name": "PNDMScheduler", **SCHEDULER, "skip_prk_steps": True}
DDIM: Settings = {"_class_name": "DDIMScheduler", **SCHEDULER}
LCM: Settings = {"_class_name": "LCMScheduler"}  # LCM_Dreamshaper_v7's settings are the class's defaults
ZERO_SNR: Settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

Shapes = Mapping[str, Sequence[int]]

# Tensors that only another kind of file has: a part of their names, and what to do with it.
OTHER_KINDS = {
    r"^lora_(unet|te)|\.lora_|_lora\.|\.lora\.": "a LoRA: give it as --lora beside its base model",
    r"^emb_params$|^string_to_param": "a textual inversion: give it as --embedding beside its base model",
    r"^(conditioner\.embedders|model\.diffusion_model\.label_emb\.0)\.": "Stable Diffusion XL, which cannot be used",
    r"joint_blocks\.": "Stable Diffusion 3, which cannot be used",
    r"double_blocks\.|double_stream": "Flux, which cannot be used",
    r"^control_model\.|input_hint_block|controlnet_": "a ControlNet: take a text-to-image checkpoint",
    r"^(model\.)?diffusion_model\.(blocks|layers|transformer_blocks|cap_embedder|x_embedder)\.": "a diffusion"
    " transformer, which cannot be used: take a checkpoint of Stable Diffusion 1.x or 2.x",
    r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)": "a VAE: give it as --vae beside a checkpoint",
    r"^(down_blocks|mid_block|up_blocks)\.": "one network in diffusers' layout: name the checkpoint's folder, which"
    " holds model_index.json",
    r"^(text_model|transformer\.resblocks)\.": "a text encoder alone: name a whole checkpoint",
}  # fmt: skip


@dataclass(frozen=True)
class Original:
    """A single file: its networks' configurations, and how it is sampled."""

    path: Path
    version: int  # of Stable Diffusion: 1 or 2
    unet: Settings
    vae: Settings | None  # None where the file has none
    text_encoder: Settings
    scheduler: Settings
    pad_token: str
    notes: tuple[str, ...] = field(default=())  # a line for each thing that was decided

    @property
    def pipeline(self) -> str:
        """diffusers' class."""
        return PIPELINES[0] if self.unet["time_cond_proj_dim"] is None else LCM_PIPELINE


def read_single_file(path: Path, prediction_type: str | None = None) -> Original:
    """What a single file holds, by its header. `prediction_type` is the user's word, or None.

    Raises CheckpointError for pickles, other models and other kinds of files, each by name.
    """
    refuse_pickle(path)
    shapes, metadata = read_header(path)
    first = f"{UNET}input_blocks.0.0.weight"
    for pattern, kind in OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in shapes) and (first not in shapes or "cannot be used" in kind):
            raise CheckpointError(f"{path} is {kind}")
    if first not in shapes:
        raise CheckpointError(
            f"{path} is no checkpoint of Stable Diffusion 1.x or 2.x: it has no tensor {first}; take a file with the"
            " whole model, or a diffusers folder"
        )
    unet = _unet_config(path, _under(UNET, shapes))
    vae = vae_config(_under(VAE, shapes), path) if any(name.startswith(VAE) for name in shapes) else None
    text = _text_config(path, shapes)
    version = 2 if unet["use_linear_projection"] else 1
    prediction, source = _prediction_type(version, prediction_type, shapes, metadata)
    consistency = unet["time_cond_proj_dim"] is not None
    large = consistency or (version == 2 and prediction == "v_prediction")
    unet["sample_size"] = LARGE_SIZE if large else BASE_SIZE
    usual = LCM if consistency else PNDM if (version, prediction) == (1, "epsilon") else DDIM
    scheduler = {**usual, "prediction_type": prediction}
    if "ztsnr" in shapes:
        scheduler |= ZERO_SNR
    notes = [
        f"{path.name}: Stable Diffusion {version}.x in its original layout, {8 * int(str(unet['sample_size']))} pixels,"
        f" prediction {prediction} ({source})"
    ]
    if consistency:
        notes.append(f"{path.name} is a latent consistency model that reads the guidance scale: LCMScheduler is taken")
    if sum(name.startswith(EMA) for name in shapes) > 100:
        notes.append(f"{path.name} has EMA weights too: the others are taken, as diffusers does")
    return Original(path, version, unet, vae, text, scheduler, "!" if version == 2 else "<|endoftext|>", tuple(notes))


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for a file that is missing, or whose loading could run code."""
    if not path.is_file():
        raise CheckpointError(f"no file at {path}: name a .safetensors file")
    if any(path.match(pattern) for pattern in PICKLES):
        raise CheckpointError(
            f"{path} is a pickle, which can run code: take the .safetensors file that most are also published as, or"
            " convert it in a sandbox"
        )


def check_parts(original: Original, vae: Settings | None, *, as_teacher: bool) -> None:
    """Raise CheckpointError unless the networks fit each other; `vae` is the file's own, or --vae's.

    `as_teacher` refuses what can be exported but is no teacher.
    """
    if vae is None:
        raise CheckpointError(f"{original.path} has no VAE (first_stage_model): give one with --vae FILE")
    for problem in obstacles(original.unet, vae, original.text_encoder, as_teacher=as_teacher):
        raise CheckpointError(f"{original.path} cannot be used: {problem}")


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _indices(pattern: str, names: Iterable[str]) -> list[int]:
    """The numbers that stand in the pattern's group, each once, rising."""
    found = (re.match(pattern, name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def _unet_config(path: Path, shapes: Shapes) -> Settings:
    """UNet2DConditionModel's configuration; names without their prefix."""
    stages: list[list[tuple[int, bool]]] = [[]]  # of each layer: channels, has attention
    for i in _indices(r"input_blocks\.(\d+)\.", shapes)[1:]:
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in shapes:
            stages.append([])
        elif (found := shapes.get(f"{block}.0.out_layers.3.weight")) and len(found) == 4:
            stages[-1].append((found[0], f"{block}.1.norm.weight" in shapes))
    linear = [shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight")]
    text = [shape for name, shape in shapes.items() if name.endswith("transformer_blocks.0.attn2.to_k.weight")]
    regular = len({len(stage) for stage in stages}) == 1 and all(len(set(stage)) == 1 for stage in stages)
    if not regular or not linear or not text or "out.2.weight" not in shapes:
        raise CheckpointError(f"{path} cannot be used: the stages of its U-Net are not those of Stable Diffusion")
    channels = [stage[0][0] for stage in stages]
    crossed = [stage[0][1] for stage in stages]
    second = len(linear[0]) == 2
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in crossed]
    classes = shapes.get("label_emb.weight")
    guidance = next((shapes[name] for name in GUIDANCE if name in shapes), None)
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [c // HEAD_WIDTH for c in channels] if second else UNET_HEADS,
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": text[0][1],
        "down_block_types": down,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "layers_per_block": len(stages[0]),
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if "middle_block.0.in_layers.0.weight" in shapes else None,
        "norm_eps": 1e-05,
        "norm_num_groups": GROUPS,
        "num_class_embeds": classes[0] if classes else None,
        "out_channels": shapes["out.2.weight"][0],
        "time_cond_proj_dim": guidance[-1] if guidance else None,
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(crossed)],
        "use_linear_projection": second,
    }


# A layer of a U-Net by diffusers' name -> its name in the original layout: outside the blocks, and within a resnet.
_ENDS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LAYER = re.compile(r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def original_names(layers: Iterable[str]) -> dict[str, str]:
    """A U-Net's layers by diffusers' names -> their names in the original layout.

    >>> original_names(["down_blocks.0.resnets.0.conv1"])
    {'down_blocks.0.resnets.0.conv1': 'input_blocks.1.0.in_layers.2'}
    """
    layers = list(layers)
    step = 1 + len(_indices(r"down_blocks\.0\.resnets\.(\d+)\.", layers))  # blocks a stage, with what resizes
    crossed = _indices(r"up_blocks\.(\d+)\.attentions\.", layers)
    found = {layer: _ENDS[layer] for layer in layers if layer in _ENDS}
    for match in filter(None, map(_LAYER.fullmatch, layers)):
        part, stage, kind, number, rest = match.groups()
        i, j = int(stage or 0), int(number)
        second = 0 if kind == "resnets" else 1
        if kind == "resnets":
            rest = _RESNET.get(rest, rest)
        if part == "mid":
            block = f"middle_block.{2 * j + second}"
        elif kind == "downsamplers":
            block, rest = f"input_blocks.{(i + 1) * step}.0", "op"
        elif kind == "upsamplers":
            block = f"output_blocks.{(i + 1) * step - 1}.{2 if i in crossed else 1}"
        else:
            block = f"{'input' if part == 'down' else 'output'}_blocks.{i * step + j + (part == 'down')}.{second}"
        found[match[0]] = f"{block}.{rest}"
    return found


def vae_config(shapes: Shapes, path: Path) -> Settings:
    """AutoencoderKL's configuration from the original layout, or from diffusers' own; names without a prefix."""
    layouts = ("encoder.down.{}.block.{}.conv1.weight", "encoder.down_blocks.{}.resnets.{}.conv1.weight")
    for layout in layouts:
        stage_pattern = re.escape(layout).replace(r"\{\}", r"(\d+)", 1).replace(r"\{\}", r"\d+")
        stages = _indices(stage_pattern, shapes)
        layers = _indices(re.escape(layout).replace(r"\{\}", "0", 1).replace(r"\{\}", r"(\d+)"), shapes)
        wanted = [layout.format(i, 0) for i in stages] + ["encoder.conv_in.weight", "decoder.conv_in.weight"]
        if stages and all(len(shapes.get(name, ())) == 4 for name in wanted):
            break
    else:
        raise CheckpointError(f"{path} holds no VAE of Stable Diffusion: it lacks {layouts[0].format(0, 0)}")
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [shapes[layout.format(i, 0)][0] for i in stages],
        "down_block_types": ["DownEncoderBlock2D"] * len(stages),
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "layers_per_block": len(layers),
        "norm_num_groups": GROUPS,
        "out_channels": 3,
        "sample_size": 8 * BASE_SIZE,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * len(stages),
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }


def _text_config(path: Path, shapes: Shapes) -> Settings:
    """CLIPTextModel's configuration: OpenAI's text model, or OpenCLIP's without its last layer."""
    clip: Shapes = {name.removeprefix("text_model."): shape for name, shape in _under(CLIP, shapes).items()}
    other = _under(OPEN_CLIP, shapes)
    found: Shapes
    # Of each: the table of tokens, of positions, the layers, the first layer's wider half, layers that are used.
    if "embeddings.token_embedding.weight" in clip:
        found, act = clip, "quick_gelu"
        tables = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight")
        names = (*tables, "encoder.layers.0.mlp.fc1.weight")
        layers = len(_indices(r"encoder\.layers\.(\d+)\.", clip))
    elif "token_embedding.weight" in other:
        found, act = other, "gelu"
        names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
        layers = len(_indices(r"transformer\.resblocks\.(\d+)\.", other)) - 1
    else:
        raise CheckpointError(
            f"{path} has no text encoder (cond_stage_model): take the file with the whole model, or a diffusers folder"
        )
    if any(len(found.get(name, ())) != 2 for name in names) or layers < 1:
        raise CheckpointError(f"{path} cannot be used: its text encoder is not that of Stable Diffusion")
    tokens, positions, wide = (found[name] for name in names)
    width = tokens[1]
    return {
        "_class_name": "CLIPTextModel",
        "architectures": ["CLIPTextModel"],
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "hidden_act": act,
        "hidden_size": width,
        "intermediate_size": wide[0],
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": positions[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": tokens[0],
    }


def _prediction_type(
    version: int, wanted: str | None, shapes: Shapes, metadata: Mapping[str, object]
) -> tuple[str, str]:
    """What the U-Net predicts, and where that is known from."""
    if wanted is not None:
        return wanted, "--prediction-type"
    for name, source in _written(shapes, metadata):
        if name in ("v", "v_prediction", "true"):
            return "v_prediction", source
        if name in ("epsilon", "false"):
            return "epsilon", source
    if version == 1:
        return "epsilon", "as every Stable Diffusion 1.x but few; else give --prediction-type v_prediction"
    return "v_prediction", "as Stable Diffusion 2.1; the file does not say: give --prediction-type epsilon for 2.x-base"


def _written(shapes: Shapes, metadata: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What trainers write into a file: sd-scripts' metadata, and marks of an empty tensor."""
    for key in ("modelspec.prediction_type", "ss_v_parameterization"):
        if key in metadata:
            yield str(metadata[key]).lower(), f"the file's {key}"
    if "v_pred" in shapes:
        yield "v", "the file's mark v_pred"

"""Small Stable Diffusion 1.x and 2.x pipelines with random weights, and the original key layout of their weights.

The depth of 1.x is that of the published models, so that the key sets are theirs; widths are reduced.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kdc_edge.tokenizer import CLIP_FOLDER

State = dict[str, Tensor]
BETAS: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip


def make_pipeline(version: int, prediction: str = "epsilon") -> Any:
    """diffusers' pipeline of the published configuration of Stable Diffusion 1.5 or 2.1, its widths reduced."""
    torch.manual_seed(version)
    unet: dict[str, Any] = {"attention_head_dim": 8, "block_out_channels": (32, 64, 128, 128)}
    text: dict[str, Any] = {"hidden_act": "quick_gelu", "num_hidden_layers": 12}
    if version == 2:
        unet = {"attention_head_dim": [1, 1, 2, 2], "block_out_channels": (64, 64, 128, 128)}
        unet |= {"use_linear_projection": True, "layers_per_block": 1}
        text = {"hidden_act": "gelu", "num_hidden_layers": 3}
    size = 96 if version == 2 and prediction == "v_prediction" else 64
    betas = {k: v for k, v in BETAS.items() if k != "clip_sample"}
    scheduler = DDIMScheduler(**BETAS, prediction_type=prediction)
    if version == 1 and prediction == "epsilon":
        scheduler = PNDMScheduler(**betas, skip_prk_steps=True)
    tokenizer = CLIPTokenizer.from_pretrained(
        CLIP_FOLDER, pad_token="!" if version == 2 else "<|endoftext|>", model_max_length=77
    )
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=size, cross_attention_dim=64, **unet),
        vae=AutoencoderKL(
            block_out_channels=(32, 64, 128, 128), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=64, intermediate_size=96, num_attention_heads=1, projection_dim=64, **text
            )
        ),
        tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def small_networks(**settings: Any) -> dict[str, Any]:
    """A U-Net and a VAE of two stages, for the text encoder of `make_pipeline`; settings of the U-Net beside that."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64, **settings,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return {"unet": unet, "vae": vae}


def original_state(pipeline: Any, *, ema: bool = False) -> State:
    """The whole model under its original names."""
    state = {f"model.diffusion_model.{_unet(n, pipeline.unet)}": t for n, t in pipeline.unet.state_dict().items()}
    state |= {f"first_stage_model.{n}": t for n, t in original_vae(pipeline.vae).items()}
    state |= _text(pipeline.text_encoder)
    if ema:
        flat = {n: t for n, t in state.items() if n.startswith("model.diffusion_model.")}
        state |= {"model_ema." + n.removeprefix("model.").replace(".", ""): t + 1 for n, t in flat.items()}
    return state | {"betas": torch.zeros(1000), "model_ema.decay": torch.zeros(())}


def save(state: State, path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, metadata)
    return path


def _unet(name: str, unet: Any) -> str:
    layers, attends = unet.config.layers_per_block, ["Cross" in kind for kind in unet.config.up_block_types]
    for old, new in (
        ("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
        ("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
    ):  # fmt: skip
        if name.startswith(f"{old}."):
            name = new + name.removeprefix(old)
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(?:conv\.(?=\w+$))?", name):
        side, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
        rest = name[found.end() :]
        first = block * (layers + 1) + (side == "down")
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest}"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if attends[block] else 1}.conv.{rest}"
        place = f"{'input' if side == 'down' else 'output'}_blocks.{first + layer}.{0 if kind == 'resnets' else 1}"
        name = f"{place}.{rest}"
    if "transformer_blocks" in name or ".proj_" in name:
        return name
    for old, new in (
        ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
        ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"),
    ):  # fmt: skip
        name = name.replace(f".{old}.", f".{new}.")
    return name


def original_vae(vae: Any) -> State:
    """Names of the original autoencoder; its attention's weights are 1x1 convolutions."""
    last = len(vae.config.block_out_channels) - 1
    state = {}
    for key, weight in vae.state_dict().items():
        name, tensor = key, weight
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = name.replace("to_out.0", "proj_out").replace("to_", "")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        state[name] = tensor
    return state


def _text(encoder: Any) -> State:
    """OpenAI's names for Stable Diffusion 1.x; OpenCLIP's for 2.x, with a last layer that is not read."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    if encoder.config.hidden_act == "quick_gelu":
        state = {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in own.items()}
        return state | {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    state = {
        "token_embedding.weight": own["embeddings.token_embedding.weight"],
        "positional_embedding": own["embeddings.position_embedding.weight"],
        "text_projection": torch.zeros(64, 64), "logit_scale": torch.zeros(()),
        **{f"ln_final.{kind}": own[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")},
    }  # fmt: skip
    layers = encoder.config.num_hidden_layers
    for i in range(layers + 1):
        source, target = f"encoder.layers.{min(i, layers - 1)}", f"transformer.resblocks.{i}"
        for old, new in (
            ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):  # fmt: skip
            state |= {f"{target}.{new}.{kind}": own[f"{source}.{old}.{kind}"] for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            three = [own[f"{source}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            state[f"{target}.attn.in_proj_{kind}"] = torch.cat(three)
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in state.items()}

"""Configurations of published checkpoints, key by key, and small networks of them.

As in copies of their repositories; Stable Diffusion 2.1 has the keys of 2.1-base and upcast_attention, as
kohya-ss/sd-scripts cites it (library/original_unet.py). BK-SDM-Small's U-Net is that of its authors' code
(Nota-NetsPresso/BK-SDM), its other parts are what diffusers 0.15 and transformers 4.27 write. A value that gives the
size is reduced in `REDUCED`; all others, and which keys there are, are as published.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

Config = dict[str, Any]
PARTS = ("unet", "vae", "text_encoder")
SCHEDULER = "scheduler"

_DOWN, _UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
_UNET: Config = {  # of diffusers 0.2 to 0.6
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": _DOWN, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 64, "up_block_types": _UP,
}  # fmt: skip
_UNET_2: Config = {
    **_UNET, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "num_class_embeds": None, "only_cross_attention": False, "use_linear_projection": True,
}  # fmt: skip
_UNET_15: Config = {  # of diffusers 0.15
    **_UNET, "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_norm": None, "dual_cross_attention": False, "encoder_hid_dim": None,
    "mid_block_only_cross_attention": None, "mid_block_type": "UNetMidBlock2DCrossAttn", "num_class_embeds": None,
    "only_cross_attention": False, "projection_class_embeddings_input_dim": None, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_cond_proj_dim": None,
    "time_embedding_act_fn": None, "time_embedding_type": "positional", "timestep_post_act": None,
    "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
_UNET_16: Config = {
    **_UNET_15, "addition_embed_type": None, "addition_embed_type_num_heads": 64, "time_embedding_dim": None
}  # fmt: skip
_VAE: Config = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_TEXT: Config = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12,
    "pad_token_id": 1, "torch_dtype": "float32", "vocab_size": 49408,
}  # fmt: skip
_TEXT_2: Config = {
    **_TEXT, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512, "torch_dtype": "float16", "transformers_version": "4.26.0.dev0",
}  # fmt: skip
_BETAS: Config = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085}
_PNDM: Config = {
    "_class_name": "PNDMScheduler", **_BETAS, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip


def _of(version: str, **parts: Config) -> dict[str, Config]:
    """The configurations with the version of diffusers that wrote them."""
    return {
        name: config if name == "text_encoder" else {"_diffusers_version": version, **config}
        for name, config in parts.items()
    }


PUBLISHED: dict[str, dict[str, Config]] = {
    "Stable Diffusion 1.4": _of(
        "0.4.0.dev0", unet=_UNET, vae=_VAE, text_encoder={**_TEXT, "transformers_version": "4.22.0.dev0"},
        scheduler=_PNDM,
    ),
    "Stable Diffusion 1.5": _of(
        "0.6.0", unet=_UNET, vae=_VAE, text_encoder={**_TEXT, "transformers_version": "4.22.0.dev0"},
        scheduler={**_PNDM, "clip_sample": False},
    ),
    "Stable Diffusion 2.1": _of(
        "0.10.0.dev0", unet={**_UNET_2, "sample_size": 96, "upcast_attention": True}, vae={**_VAE, "sample_size": 768},
        text_encoder={**_TEXT_2, "torch_dtype": "float32", "transformers_version": "4.25.0.dev0"},
        scheduler={**_PNDM, "_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"},
    ),
    "Stable Diffusion 2.1-base": _of(
        "0.10.0.dev0", unet=_UNET_2, vae={**_VAE, "sample_size": 768}, text_encoder=_TEXT_2,
        scheduler={**_PNDM, "clip_sample": False, "prediction_type": "epsilon"},
    ),
    "Realistic Vision 5.1": _of(
        "0.16.1", unet=_UNET_16, vae={**_VAE, "scaling_factor": 0.18215},
        text_encoder={**_TEXT, "projection_dim": 768, "transformers_version": "4.30.2"},
        scheduler={
            "_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", **_BETAS, "clip_sample": False,
            "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "lower_order_final": True,
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
            "set_alpha_to_one": False, "solver_order": 2, "solver_type": "logrho", "steps_offset": 1,
            "thresholding": False, "trained_betas": None,
        },
    ),
    "BK-SDM-Small": _of(
        "0.15.0", unet={**_UNET_15, "layers_per_block": 1, "mid_block_type": None},
        vae={**_VAE, "scaling_factor": 0.18215},
        text_encoder={**_TEXT, "projection_dim": 768, "transformers_version": "4.27.4"},
        scheduler={**_PNDM, "clip_sample": False, "prediction_type": "epsilon"},
    ),
}  # fmt: skip
# Channels, heads, widths; the vocabulary is the garden's.
REDUCED: dict[str, Config] = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32},
    "vae": {"block_out_channels": [32, 32, 32, 32]},
    "text_encoder": {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 610,
    },
}  # fmt: skip


def make_published(name: str, teacher: Path, folder: Path) -> Path:
    """A checkpoint with these configurations and random weights; its tokenizer and index are the garden teacher's."""
    configs = PUBLISHED[name]
    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns(*PARTS))
    torch.manual_seed(0)
    for part in PARTS:
        config = configs[part] | REDUCED[part]
        if isinstance(config.get("attention_head_dim"), list):
            config["attention_head_dim"] = [1, 2, 4, 4]
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        if part == "text_encoder":
            network: Any = CLIPTextModel(CLIPTextConfig(**given))
        else:
            network = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part](**given)
        network.save_pretrained(folder / part)
        (folder / part / "config.json").write_text(json.dumps(config))
    (folder / SCHEDULER / "scheduler_config.json").write_text(json.dumps(configs[SCHEDULER]))
    path = folder / "model_index.json"
    index = json.loads(path.read_text("utf-8")) | {"_diffusers_version": configs["unet"]["_diffusers_version"]}
    path.write_text(json.dumps(index | {SCHEDULER: ["diffusers", configs[SCHEDULER]["_class_name"]]}))
    return folder

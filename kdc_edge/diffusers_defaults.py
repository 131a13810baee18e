"""What diffusers takes for a key that a configuration file lacks: the defaults of each class, as tables.

    scheduler_settings({"_class_name": "EulerDiscreteScheduler"})["timestep_spacing"]      # "linspace"
    {**UNET, **json_of_unet}["mid_block_type"]

Values are in JSON's types. A test compares every table with the signatures of the installed diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from kdc_edge.errors import InputError

Settings = dict[str, object]

UNET: Settings = {  # UNet2DConditionModel
    "sample_size": None, "in_channels": 4, "out_channels": 4, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "only_cross_attention": False, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0.0, "act_fn": "silu", "norm_num_groups": 32,
    "norm_eps": 1e-05, "cross_attention_dim": 1280, "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "attention_head_dim": 8, "num_attention_heads": None, "dual_cross_attention": False,
    "use_linear_projection": False, "class_embed_type": None, "addition_embed_type": None,
    "addition_time_embed_dim": None, "num_class_embeds": None, "upcast_attention": False,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None, "addition_embed_type_num_heads": 64,
}  # fmt: skip
VAE: Settings = {  # AutoencoderKL
    "in_channels": 3, "out_channels": 3, "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"], "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu",
    "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None,
    "latents_mean": None, "latents_std": None, "force_upcast": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
AUTOENCODER_TINY: Settings = {
    "in_channels": 3, "out_channels": 3, "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64], "act_fn": "relu", "upsample_fn": "nearest", "latent_channels": 4,
    "upsampling_scaling_factor": 2, "num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3, "latent_shift": 0.5, "force_upcast": False, "scaling_factor": 1.0, "shift_factor": 0.0,
}  # fmt: skip
TEXT_ENCODER: Settings = {  # transformers' CLIPTextConfig
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512,
    "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05, "attention_dropout": 0.0, "initializer_range": 0.02, "initializer_factor": 1.0,
    "pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip

_BETAS: Settings = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon",
}  # fmt: skip
_SD_BETAS: Settings = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_SPACED: Settings = {"timestep_spacing": "linspace", "steps_offset": 0}
_THRESHOLDING: Settings = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SIGMAS: Settings = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW: Settings = {
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential",
}  # fmt: skip
_DPM: Settings = {
    **_BETAS, **_THRESHOLDING, **_SIGMAS, **_FLOW, "solver_order": 2, "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint", "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None,
}  # fmt: skip
_DDIM: Settings = {
    **_BETAS, **_THRESHOLDING, "clip_sample": True, "clip_sample_range": 1.0, "timestep_spacing": "leading",
    "steps_offset": 0, "rescale_betas_zero_snr": False,
}  # fmt: skip
_LCM: Settings = {
    **_DDIM, **_SD_BETAS, "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": True,
    "original_inference_steps": 50, "timestep_scaling": 10.0,
}  # fmt: skip

# The schedulers of networks that were trained with a fixed sequence of betas, as Stable Diffusion 1.x and 2.x were.
SCHEDULERS: dict[str, Settings] = {
    "DDIMScheduler": {**_DDIM, "set_alpha_to_one": True},
    "DDPMScheduler": {**_DDIM, "variance_type": "fixed_small"},
    "DEISMultistepScheduler": {
        **_BETAS, **_SPACED, **_THRESHOLDING, **_SIGMAS, **_FLOW, "solver_order": 2, "algorithm_type": "deis",
        "solver_type": "logrho", "lower_order_final": True,
    },
    "DPMSolverMultistepScheduler": {
        **_DPM, **_SPACED, "lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False,
        "rescale_betas_zero_snr": False,
    },
    "DPMSolverSDEScheduler": {**_SD_BETAS, **_SPACED, **_SIGMAS, "noise_sampler_seed": None},
    "DPMSolverSinglestepScheduler": {**_DPM, "lower_order_final": False},
    "EulerAncestralDiscreteScheduler": {**_BETAS, **_SPACED, "rescale_betas_zero_snr": False},
    "EulerDiscreteScheduler": {
        **_BETAS, **_SPACED, **_SIGMAS, "interpolation_type": "linear", "sigma_min": None, "sigma_max": None,
        "timestep_type": "discrete", "rescale_betas_zero_snr": False, "final_sigmas_type": "zero",
    },
    "HeunDiscreteScheduler": {**_SD_BETAS, **_SPACED, **_SIGMAS, "clip_sample": False, "clip_sample_range": 1.0},
    "KDPM2AncestralDiscreteScheduler": {**_SD_BETAS, **_SPACED, **_SIGMAS},
    "KDPM2DiscreteScheduler": {**_SD_BETAS, **_SPACED, **_SIGMAS},
    "LCMScheduler": _LCM,
    "LMSDiscreteScheduler": {**_BETAS, **_SPACED, **_SIGMAS},
    "PNDMScheduler": {
        **_BETAS, "skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading",
        "steps_offset": 0,
    },
    "TCDScheduler": _LCM,
    "UniPCMultistepScheduler": {
        **_BETAS, **_SPACED, **_THRESHOLDING, **_SIGMAS, **_FLOW, "solver_order": 2, "predict_x0": True,
        "solver_type": "bh2", "lower_order_final": True, "disable_corrector": [], "solver_p": None,
        "final_sigmas_type": "zero", "rescale_betas_zero_snr": False, "sigma_min": None, "sigma_max": None,
        "shift_terminal": None,
    },
}  # fmt: skip

# Values that a class reads as another one, so that configurations of other classes fit it.
_READ_AS: dict[str, dict[str, dict[object, str]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    },
    "DEISMultistepScheduler": {
        "algorithm_type": {"dpmsolver": "deis", "dpmsolver++": "deis"},
        "solver_type": {"midpoint": "logrho", "heun": "logrho", "bh1": "logrho", "bh2": "logrho"},
    },
    "UniPCMultistepScheduler": {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
}
_READ_AS["DPMSolverSinglestepScheduler"] = _READ_AS["DPMSolverMultistepScheduler"]
# In the scheduler config of a LatentConsistencyModelPipeline, which corrects nothing in it, and takes no other class.
AS_WRITTEN = "_as_written"
# What a config without a class leaves to the defaults of `NoiseSchedule`, which are Stable Diffusion 1.x's.
_NOISE = {*_BETAS, *_SPACED, "set_alpha_to_one", "clip_sample"} - {"trained_betas"}


def scheduler_settings(config: Mapping[str, object], class_name: str | None = None) -> Settings:
    """A scheduler_config.json as a scheduler class reads it, by default the config's own: every key has a value.

    Keys that the class does not know are left out. As in diffusers' `from_config`, what the file lacks is the
    default of the class that reads it. As in diffusers' StableDiffusionPipeline, steps_offset is 1 and
    clip_sample is false in the checkpoint's own scheduler, whatever the file says, unless AS_WRITTEN says that it
    is read as it is.
    A config that names no class is explicit: its keys as they are. Raises InputError for a class that is not of
    `SCHEDULERS`.
    """
    own = config.get("_class_name")
    if own is None and class_name is None:
        return dict(config)
    for name in (own, class_name):
        if name is not None and (not isinstance(name, str) or name not in SCHEDULERS):
            raise InputError(
                f"the scheduler config has _class_name = {name!r:.80}: only schedulers of Stable Diffusion 1.x and"
                " 2.x can be used, such as DDIMScheduler; flow matching and EDM cannot"
            )
    name = str(class_name or own)
    defaults = SCHEDULERS[name]
    given = {key: config[key] for key in defaults if key in config}
    if own is not None:
        wanted = defaults if name == own else given
        corrected = {} if config.get(AS_WRITTEN) and name == own else {"steps_offset": 1, "clip_sample": False}
        given |= {key: value for key, value in corrected.items() if key in wanted}
    else:
        defaults = {key: value for key, value in defaults.items() if key not in _NOISE}
    settings = {**defaults, **given}
    for key, meant in _READ_AS.get(name, {}).items():
        value = settings.get(key)
        if isinstance(value, str):
            settings[key] = meant.get(value, value)
    return settings

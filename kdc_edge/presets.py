"""The architectures, as one table of diffusers and transformers configurations.

The U-Net parameter counts are exact and tested. Full-size shapes follow the public Stable Diffusion 1.x
configuration; the students follow BK-SDM (arXiv 2305.15798) and KDC-Diff (arXiv 2505.06995).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdc_edge.errors import InputError, unknown_choice

Config = Mapping[str, object]

_CROSS_DOWN, _DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
_CROSS_UP, _UP = "CrossAttnUpBlock2D", "UpBlock2D"


@dataclass(frozen=True)
class Preset:
    name: str
    description: str
    family: str  # "sd1" or "garden": shared text encoder, VAE and tokenizer
    unet: Config
    unet_parameters: int
    image_size: int  # pixels a side


def _unet(
    family: Config, channels: tuple[int, ...], layers: int, *, mid: bool, attention_everywhere: bool = False
) -> Config:
    """SD 1.x's arrangement: attention in every stage but the deepest."""
    plain = 0 if attention_everywhere else 1
    crossed = len(channels) - plain
    return {
        **family,
        "block_out_channels": channels,
        "down_block_types": (_CROSS_DOWN,) * crossed + (_DOWN,) * plain,
        "up_block_types": (_UP,) * plain + (_CROSS_UP,) * crossed,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid else None,
        "layers_per_block": layers,
    }


_SD1: Config = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_GARDEN: Config = {
    "sample_size": 16,
    "cross_attention_dim": 128,
    "attention_head_dim": 2,
    "norm_num_groups": 16,
}

_SD1_STAGES = (320, 640, 1280, 1280)
_GARDEN_STAGES = (32, 64, 80, 80)

PRESETS: tuple[Preset, ...] = (
    Preset("sd1-teacher", "Stable Diffusion 1.x", "sd1", _unet(_SD1, _SD1_STAGES, 2, mid=True), 859_520_964, 512),
    Preset("kdc-482m", "KDC-Diff student: one layer per block, no mid block", "sd1",
           _unet(_SD1, _SD1_STAGES, 1, mid=False), 482_346_884, 512),
    Preset("kdc-420m", "three stages, all with attention, and a mid block", "sd1",
           _unet(_SD1, (320, 640, 1280), 1, mid=True, attention_everywhere=True), 420_423_044, 512),
    Preset("bk-tiny", "three stages, all with attention, no mid block", "sd1",
           _unet(_SD1, (320, 640, 1280), 1, mid=False, attention_everywhere=True), 323_384_964, 512),
    Preset("garden-teacher", "small Stable Diffusion 1.x for 64x64 garden images", "garden",
           _unet(_GARDEN, _GARDEN_STAGES, 2, mid=True), 4_420_932, 64),
    Preset("garden-student", "small KDC-Diff student: one layer per block, no mid block", "garden",
           _unet(_GARDEN, _GARDEN_STAGES, 1, mid=False), 2_548_340, 64),
)  # fmt: skip

# The text encoder and VAE of each family, for `kdc-edge init` without a teacher.
TEXT_ENCODERS: dict[str, Config] = {
    "sd1": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
        "hidden_act": "quick_gelu", "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407,
    },
}  # fmt: skip
VAES: dict[str, Config] = {
    "sd1": {
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 32, "sample_size": 512, "scaling_factor": 0.18215,
    },
}  # fmt: skip
SCHEDULER: Config = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
    "timestep_spacing": "leading",
}  # fmt: skip


@dataclass(frozen=True)
class DecoderPreset:
    """A small decoder's shape, one entry a stage, the latents' stage first. Each but the last doubles the sides."""

    name: str
    description: str
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    parameters: int  # with 4 latent channels

    @property
    def vae_scale(self) -> int:
        """Pixels a latent, each way."""
        return int(2 ** (len(self.channels) - 1))


DECODERS: tuple[DecoderPreset, ...] = (
    DecoderPreset("taesd", "TAESD's shape", (64, 64, 64, 64), (3, 3, 3, 1), 1_222_531),
    DecoderPreset("thin", "TAESD's shape, thinner where the image is large", (64, 64, 48, 32), (3, 3, 2, 1), 898_723),
    DecoderPreset("garden-decoder", "TAESD's shape in small, for the garden", (32, 32, 32), (3, 2, 1), 186_947),
)


def find_decoder(name: str | None, vae_scale: int) -> DecoderPreset:
    """A decoder preset by name, or the first that fits; raises InputError where it does not fit the latents."""
    fitting = [preset for preset in DECODERS if preset.vae_scale == vae_scale]
    for preset in fitting:
        if name in (None, preset.name):
            return preset
    if not fitting:
        raise InputError(f"no decoder preset makes {vae_scale} pixels a latent each way, as this checkpoint's VAE does")
    words = f"--preset {name!r} does not fit this checkpoint" if name in {d.name for d in DECODERS} else None
    raise unknown_choice("--preset", name, [p.name for p in fitting], words)


def find_preset(name: str, option: str = "--preset") -> Preset:
    """A preset by name; raises UsageError naming the choices, and the option that the name came by."""
    for preset in PRESETS:
        if preset.name == name:
            return preset
    raise unknown_choice(option, name, [p.name for p in PRESETS])


def recognise(unet_config: Config) -> str | None:
    """The name of the preset whose U-Net this configuration describes; None for another architecture."""

    def plain(value: object) -> object:
        return list(value) if isinstance(value, tuple) else value

    for preset in PRESETS:
        if all(unet_config.get(key) == plain(value) for key, value in preset.unet.items()):
            return preset.name
    return None

"""Each setting of each network's config.json, flipped by itself: the image is diffusers', or the checkpoint is refused.

A setting whose flip leaves the image of diffusers as it was has no effect; ours is then the same one too. Schedulers:
`test_no_setting_of_a_scheduler_is_ignored`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kdc_edge.diffusers_defaults import TEXT_ENCODER, UNET, VAE
from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError
from kdc_edge.pipeline import Pipeline
from kdc_edge.quiet import quiet
from kdc_edge.request import Request
from kdc_edge.runtimes.torch import TorchComponent, load_network
from kdc_edge.tokenizer import Tokenizer
from tests.conftest import TOKENIZER

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
PARTS = {"unet": "unet", "vae": "vae_decoder", "text_encoder": "text_encoder"}
SHAPE = (1, 4, 8, 8)
EQUAL = 1e-4  # of latents in units of their noise, and of images in [0, 1]: float32's rounding

# The values that each setting is flipped to.
FLIPS: dict[str, dict[str, list[Any]]] = {
    "unet": {
        "sample_size": [16, [8, 8], [8, 16]], "in_channels": [8, 5], "out_channels": [8], "center_input_sample": [True],
        "flip_sin_to_cos": [False], "freq_shift": [1], "down_block_types": [["DownBlock2D", "DownBlock2D"]],
        "mid_block_type": [None], "up_block_types": [["UpBlock2D", "UpBlock2D"]], "only_cross_attention": [True],
        "block_out_channels": [[64, 64]], "layers_per_block": [2], "downsample_padding": [0],
        "mid_block_scale_factor": [2.0], "dropout": [0.5], "act_fn": ["gelu"], "norm_num_groups": [8],
        "norm_eps": [0.1], "cross_attention_dim": [64], "transformer_layers_per_block": [2],
        "reverse_transformer_layers_per_block": [[1, 1]], "encoder_hid_dim": [32],
        "encoder_hid_dim_type": ["text_proj"], "attention_head_dim": [8, [4, 4], [8, 4]], "num_attention_heads": [2],
        "dual_cross_attention": [True], "use_linear_projection": [True], "class_embed_type": ["timestep"],
        "addition_embed_type": ["text"], "addition_time_embed_dim": [8], "num_class_embeds": [3],
        "upcast_attention": [True], "resnet_time_scale_shift": ["scale_shift"], "resnet_skip_time_act": [True],
        "resnet_out_scale_factor": [2.0], "time_embedding_type": ["fourier"], "time_embedding_dim": [64],
        "time_embedding_act_fn": ["silu"], "timestep_post_act": ["silu"], "time_cond_proj_dim": [16],
        "conv_in_kernel": [5], "conv_out_kernel": [5], "projection_class_embeddings_input_dim": [8],
        "attention_type": ["gated"], "class_embeddings_concat": [True], "mid_block_only_cross_attention": [True],
        "cross_attention_norm": ["layer_norm"], "addition_embed_type_num_heads": [32],
    },
    "vae": {
        "in_channels": [4], "out_channels": [4], "down_block_types": [["DownEncoderBlock2D"]],
        "up_block_types": [["UpDecoderBlock2D"]], "block_out_channels": [[16, 32]], "layers_per_block": [2],
        "act_fn": ["gelu"], "latent_channels": [8], "norm_num_groups": [4], "sample_size": [64],
        "scaling_factor": [0.5], "shift_factor": [0.3], "latents_mean": [[0.1] * 4], "latents_std": [[2.0] * 4],
        "force_upcast": [False], "use_quant_conv": [False], "use_post_quant_conv": [False],
        "mid_block_add_attention": [False],
    },
    "text_encoder": {
        "vocab_size": [1000], "hidden_size": [64], "intermediate_size": [128], "projection_dim": [64],
        "num_hidden_layers": [1, 3], "num_attention_heads": [4], "max_position_embeddings": [32],
        "hidden_act": ["gelu"], "layer_norm_eps": [0.1], "attention_dropout": [0.5], "initializer_range": [0.5],
        "initializer_factor": [2.0], "pad_token_id": [0], "bos_token_id": [0], "eos_token_id": [2],
    },
}  # fmt: skip
# Flips that leave diffusers' image as it was, because nothing that a text-to-image pipeline computes reads them.
NO_EFFECT = {
    "unet": {
        "dropout", "upcast_attention", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
        "class_embeddings_concat", "addition_embed_type_num_heads", "reverse_transformer_layers_per_block",
    },
    "vae": {
        "in_channels", "sample_size", "shift_factor", "latents_mean", "latents_std", "force_upcast", "use_quant_conv",
    },
    "text_encoder": {
        "projection_dim", "attention_dropout", "initializer_range", "initializer_factor", "pad_token_id",
        "bos_token_id", "eos_token_id",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as has every kind of block; each weight shows in the image."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    shutil.copytree(TOKENIZER, folder / "tokenizer", dirs_exist_ok=True)
    return folder


Made = tuple[np.ndarray, np.ndarray]  # latents, image in [0, 1]


def by_diffusers(pipeline: Any, parts: dict[str, Any]) -> Made:
    kept: list[np.ndarray] = []

    def keep(_: Any, __: int, ___: Any, values: dict[str, Any]) -> dict[str, Any]:
        kept.append(values["latents"].numpy().copy())
        return values

    whole = StableDiffusionPipeline(
        **(pipeline.components | parts), requires_safety_checker=False
    )  # diffusers' own reading of the configs
    whole.set_progress_bar_config(disable=True)
    side = whole.unet.config.sample_size
    scale = whole.vae_scale_factor
    size = {} if isinstance(side, int) else {"height": side[0] * scale, "width": side[1] * scale}
    image = whole(
        "a red flower", num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(1),
        output_type="np", callback_on_step_end=keep, **size,
    ).images[0]  # fmt: skip
    return kept[-1], np.asarray(image)


def ours(folder: Path, parts: dict[str, Any]) -> Made:
    components = {PARTS[name]: TorchComponent(PARTS[name], network) for name, network in parts.items()}
    pipeline = Pipeline(read_model(folder), Tokenizer.from_folder(folder / "tokenizer"), components)
    *_, last, image = pipeline.run(Request("a red flower", steps=1, guidance=1.0, seed=1, sampler="ddim"))
    assert last.latents is not None
    assert image.pixels is not None
    return last.latents, image.pixels / 255


def differ(one: Made, other: Made, tolerance: tuple[float, float]) -> bool:
    return any(a.shape != b.shape or np.abs(a - b).max() > t for a, b, t in zip(one, other, tolerance, strict=True))


def flips(part: str) -> Iterator[tuple[str, Any]]:
    yield from ((key, value) for key, values in FLIPS[part].items() for value in values)


@pytest.mark.parametrize("part", FLIPS)
def test_no_setting_of_a_network_is_ignored(tiny: Path, tmp_path: Path, part: str) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "flipped"))
    path = folder / part / "config.json"
    before = path.read_text("utf-8")
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(tiny, local_files_only=True)
    networks = {name: load_network(tiny, component) for name, component in PARTS.items()}
    base = by_diffusers(pipeline, networks)
    refused: dict[str, str] = {}
    without_effect: set[str] = set()
    wrong: list[tuple[str, Any]] = []
    for key, value in flips(part):
        path.write_text(json.dumps(json.loads(before) | {key: value}))
        try:
            read_model(folder)
            changed = networks | {part: load_network(folder, PARTS[part])}
            found = ours(folder, changed)
        except CheckpointError as error:
            refused[key] = str(error)
            continue
        expected = by_diffusers(pipeline, changed)
        if differ(found, expected, (EQUAL, 0.5 / 255 + EQUAL)):
            wrong.append((key, value))
        if not differ(base, expected, (EQUAL, EQUAL)):
            without_effect.add(key)
    print(part, refused, "without effect", sorted(without_effect))
    assert not wrong
    assert not any("\n" in said for said in refused.values())
    assert without_effect - refused.keys() == NO_EFFECT[part]
    assert len(refused) < 0.6 * len(FLIPS[part])


def test_every_setting_of_every_network_is_flipped() -> None:
    tables = {"unet": UNET, "vae": VAE, "text_encoder": TEXT_ENCODER}
    assert {part: set(keys) for part, keys in FLIPS.items()} == {part: set(table) for part, table in tables.items()}

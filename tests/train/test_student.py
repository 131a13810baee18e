"""Architectures and inheritance: exact sizes, and which weight comes from where."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from kdc_edge.presets import PRESETS, Preset, find_preset
from kdc_edge.train.student import FAMILY_KEYS, SHAPE_KEYS, inherit, make_student, source_name


def on_meta(preset: Preset) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**preset.unet)


def test_every_preset_has_exactly_its_parameters() -> None:
    for preset in PRESETS:
        assert sum(p.numel() for p in on_meta(preset).parameters()) == preset.unet_parameters, preset.name


def test_the_482m_student_takes_the_published_layers() -> None:
    teacher, student = on_meta(find_preset("sd1-teacher")), on_meta(find_preset("kdc-482m"))
    moved, theirs = {}, teacher.state_dict()
    for name, weight in student.state_dict().items():
        source = source_name(name, teacher, student)
        assert theirs[source].shape == weight.shape
        if source != name:
            moved[".".join(name.split(".")[:4])] = ".".join(source.split(".")[:4])
    expected = {f"up_blocks.{b}.resnets.1": f"up_blocks.{b}.resnets.2" for b in range(4)}
    expected |= {f"up_blocks.{b}.attentions.1": f"up_blocks.{b}.attentions.2" for b in (1, 2, 3)}
    assert moved == expected


def test_inherited_weights_are_the_teachers() -> None:
    torch.manual_seed(0)
    teacher = UNet2DConditionModel(**find_preset("garden-teacher").unet)
    student, account = make_student(find_preset("garden-student"), teacher, seed=1)
    assert all(source is not None for source in account.values())
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, source in account.items():
        assert torch.equal(ours[name], theirs[str(source)])
    name = "up_blocks.2.attentions.1.proj_in.weight"
    assert account[name] == "up_blocks.2.attentions.2.proj_in.weight"


def test_random_weights_are_seeded_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (make_student(find_preset("garden-student"), None, seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [m.conv_in.weight for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_what_does_not_fit_stays_and_is_accounted_for() -> None:
    wide = dict(find_preset("garden-student").unet) | {"block_out_channels": (32, 64, 80, 96)}
    student = UNet2DConditionModel(**wide)
    before = student.conv_in.weight.clone()
    account = inherit(UNet2DConditionModel(**find_preset("garden-teacher").unet), student)
    assert account["down_blocks.3.resnets.0.conv1.weight"] is None
    assert account["conv_in.weight"] == "conv_in.weight"
    assert not torch.equal(student.conv_in.weight, before)


# Every setting that a student takes from its teacher, at a value that is not the default; one line where a value
# needs another beside it. The last line: settings for which a U-Net needs more inputs; no teacher may have them.
TAUGHT: list[dict[str, object]] = [
    {"sample_size": 32}, {"in_channels": 5}, {"out_channels": 5}, {"center_input_sample": True},
    {"flip_sin_to_cos": False}, {"freq_shift": 1}, {"only_cross_attention": True}, {"downsample_padding": 0},
    {"only_cross_attention": (True, False, True, False)}, {"mid_block_scale_factor": 2.0}, {"dropout": 0.1},
    {"act_fn": "gelu"}, {"norm_num_groups": 8}, {"norm_eps": 1e-6}, {"cross_attention_dim": 96},
    {"transformer_layers_per_block": 2}, {"attention_head_dim": 4}, {"attention_head_dim": (2, 4, 5, 5)},
    {"num_attention_heads": None}, {"dual_cross_attention": True}, {"use_linear_projection": True},
    {"upcast_attention": True}, {"resnet_time_scale_shift": "scale_shift"}, {"resnet_skip_time_act": True},
    {"resnet_out_scale_factor": 2.0}, {"time_embedding_type": "fourier"}, {"time_embedding_dim": 64},
    {"time_embedding_act_fn": "silu"}, {"timestep_post_act": "silu"}, {"time_cond_proj_dim": 16},
    {"conv_in_kernel": 1}, {"conv_out_kernel": 1}, {"attention_type": "gated"},
    {"mid_block_only_cross_attention": True}, {"cross_attention_norm": "layer_norm"},
    {"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"},
    {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24, "class_embeddings_concat": True},
    {"num_class_embeds": 7}, {"reverse_transformer_layers_per_block": None},
    {"addition_embed_type": "text", "addition_embed_type_num_heads": 8},
    {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
]  # fmt: skip


@pytest.mark.parametrize("change", TAUGHT, ids=lambda change: next(iter(change)))
def test_a_student_has_the_settings_that_its_inherited_weights_were_trained_with(change: dict[str, object]) -> None:
    teacher = UNet2DConditionModel(**{**find_preset("garden-teacher").unet, **change})
    student, account = make_student(find_preset("garden-student"), teacher, seed=1)
    assert {key: student.config[key] for key in change} == change
    assert all(account.values())


def test_every_setting_of_diffusers_unet_is_the_presets_or_the_teachers() -> None:
    keys = inspect.signature(UNet2DConditionModel.__init__).parameters.keys() - {"self"}
    assert keys == SHAPE_KEYS | set(FAMILY_KEYS)
    assert {key for change in TAUGHT for key in change} == set(FAMILY_KEYS)


def test_settings_by_stage_are_cut_to_the_students_stages() -> None:
    stages = {"only_cross_attention": (True, False, True, False), "attention_head_dim": (2, 4, 5, 5)}
    teacher = UNet2DConditionModel(**{**find_preset("garden-teacher").unet, **stages})
    three = replace(
        find_preset("garden-student"),
        unet={
            **find_preset("garden-student").unet, "block_out_channels": (32, 64, 80),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
    )  # fmt: skip
    student, _ = make_student(three, teacher, seed=1)
    assert student.config["only_cross_attention"] == (True, False, True)
    assert student.config["attention_head_dim"] == (2, 4, 5)

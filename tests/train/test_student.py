"""Architectures and inheritance: exact sizes, and which weight comes from where."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from kdc_edge.presets import PRESETS, Preset, find_preset
from kdc_edge.train.student import inherit, make_student, source_name


def on_meta(preset: Preset) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**preset.unet)


def test_every_preset_has_exactly_its_parameters() -> None:
    for preset in PRESETS:
        assert sum(p.numel() for p in on_meta(preset).parameters()) == preset.unet_parameters, preset.name


def test_the_482m_student_takes_the_published_layers() -> None:
    teacher, student = on_meta(find_preset("sd1-teacher")), on_meta(find_preset("kdc-482m"))
    moved = {}
    for name in student.state_dict():
        source = source_name(name, teacher, student)
        assert teacher.state_dict()[source].shape == student.state_dict()[name].shape
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

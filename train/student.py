"""A student from a teacher: which weight comes from where.

Each block's first and last layer survive (BK-SDM, arXiv 2305.15798; KDC-Diff, arXiv 2505.06995): the same names
are copied as they are, the student's second up layer comes from the teacher's third, the mid block is dropped
where the student has none. A student with fewer stages is matched to the teacher's shallow ones.

    kept = inherit(teacher_unet, student_unet)       # copies; {"up_blocks.1.resnets.1...": "up_blocks.1.resnets.2..."}
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch
from diffusers import UNet2DConditionModel

from kdc_edge.diffusers_defaults import UNET
from kdc_edge.errors import InputError
from kdc_edge.presets import Preset

Account = dict[str, str | None]  # a weight of the student -> the teacher's that it was copied from

_UP_LAYER = re.compile(r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")
# What a preset decides. Every other setting of diffusers' U-Net is the teacher's, for its weights were trained with it
# (Stable Diffusion 2.x has a text width of 1024, other attention heads and linear projections).
SHAPE_KEYS = frozenset(
    {"block_out_channels", "down_block_types", "up_block_types", "mid_block_type", "layers_per_block"}
)
FAMILY_KEYS = tuple(key for key in UNET if key not in SHAPE_KEYS)
# Of these, the ones that may have a value for each stage.
STAGE_KEYS = (
    "attention_head_dim", "num_attention_heads", "cross_attention_dim", "only_cross_attention",
    "transformer_layers_per_block",
)  # fmt: skip


def source_name(name: str, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> str:
    """The teacher's name for the weight that the student calls `name`.

    >>> # with SD 1.x and the 482M student: up_blocks.2.attentions.1.norm.weight -> up_blocks.2.attentions.2.norm.weight
    """
    found = _UP_LAYER.match(name)
    if not found:
        return re.sub(
            r"^up_blocks\.(\d+)\.",
            lambda m: f"up_blocks.{int(m[1]) + len(teacher.up_blocks) - len(student.up_blocks)}.",
            name,
        )
    block, kind, layer = int(found[1]), found[2], int(found[3])
    deeper = block + len(teacher.up_blocks) - len(student.up_blocks)
    if layer == len(student.up_blocks[block].resnets) - 1:  # the last survives as the last
        layer = len(teacher.up_blocks[deeper].resnets) - 1
    return f"up_blocks.{deeper}.{kind}.{layer}.{name[found.end() :]}"


def inherit(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> Account:
    """Copy the teacher's weights into the student: what each came from, None where the shapes leave it as it was."""
    have, account = teacher.state_dict(), {}
    for name, weight in student.state_dict().items():
        source = source_name(name, teacher, student)
        fits = source in have and have[source].shape == weight.shape
        account[name] = source if fits else None
        if fits:
            weight.copy_(have[source])
    return account


def student_config(preset: Preset, teacher: UNet2DConditionModel | None) -> dict[str, object]:
    """The U-Net configuration of a preset beside this teacher: the preset's shape, the teacher's family.

    Raises InputError where the preset's stages are not the teacher's.
    """
    if teacher is None:
        return dict(preset.unet)
    stages: tuple[int, ...] = tuple(preset.unet["block_out_channels"])  # type: ignore[arg-type]
    theirs: tuple[int, ...] = tuple(teacher.config["block_out_channels"])
    if stages != theirs[: len(stages)]:
        raise InputError(
            f"{preset.name} does not fit this teacher: its stages have {'/'.join(map(str, stages))} channels and the"
            f" teacher's {'/'.join(map(str, theirs))}; choose another preset"
        )
    family = {key: teacher.config[key] for key in FAMILY_KEYS if key in teacher.config}
    for key in STAGE_KEYS:
        if isinstance(family.get(key), list | tuple):
            family[key] = tuple(family[key][: len(stages)])
    return {**preset.unet, **family}


def make_student(
    preset: Preset, teacher: UNet2DConditionModel | None, *, seed: int, inherit_weights: bool = True
) -> tuple[UNet2DConditionModel, Account]:
    """The preset's U-Net, seeded random weights overwritten by the teacher's where they fit, and the account."""
    config = student_config(preset, teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student: UNet2DConditionModel = UNet2DConditionModel(**config)
    if teacher is None or not inherit_weights:
        return student, dict.fromkeys(student.state_dict())
    return student, inherit(teacher, student)


def describe_account(account: Mapping[str, str | None]) -> list[str]:
    """The account in lines for people: how much was inherited, each layer that moved, what stayed random.

    >>> describe_account({"up_blocks.0.resnets.1.conv1.weight": "up_blocks.0.resnets.2.conv1.weight"})[1]
    '  up_blocks.0.resnets.1 <- up_blocks.0.resnets.2 (1 tensor)'
    """
    kept = {name: source for name, source in account.items() if source}
    moved = Counter((_layer(name), _layer(source)) for name, source in kept.items() if source != name)
    fresh = Counter(_layer(name) for name in account if name not in kept)
    same = len(kept) - sum(moved.values())
    lines = [f"{len(kept)} of {len(account)} tensors inherited: {same} by the same name, {len(kept) - same} moved"]
    lines += [f"  {ours} <- {theirs} ({_tensors(n)})" for (ours, theirs), n in moved.items()]
    return lines + [f"  {layer}: random ({_tensors(n)})" for layer, n in fresh.items()]


def _layer(name: str) -> str:
    """`up_blocks.1.attentions.0` of a weight's name; the first part where there are no blocks."""
    found = re.match(r"(?:down|up)_blocks\.\d+\.\w+\.\d+|[^.]+", name)
    return found[0] if found else name


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"

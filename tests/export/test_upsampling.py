"""Split upsampling beside diffusers' own: the same answers, in every network that has such layers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from kdc_edge.export.components import load_component
from kdc_edge.export.rewrites.upsampling import SubpixelUpsample, split_upsampling
from kdc_edge.train.checkpoint import GARDEN_TEACHER


@pytest.mark.parametrize(("channels", "out", "height", "width"), [(4, 4, 1, 1), (3, 5, 2, 7), (8, 2, 6, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_answer_for_any_sides(channels: int, out: int, height: int, width: int, bias: bool) -> None:
    layer = Upsample2D(channels, use_conv=True, out_channels=out, bias=bias).double()
    holder = nn.Sequential(layer)
    x = torch.randn(2, channels, height, width, dtype=torch.float64)
    expected = layer(x)
    split_upsampling(holder)
    assert isinstance(holder[0], SubpixelUpsample)
    torch.testing.assert_close(holder[0](x), expected)


def test_other_layers_stay() -> None:
    others = nn.Sequential(
        Upsample2D(4, use_conv=False),
        Upsample2D(4, use_conv_transpose=True),
        Upsample2D(4, use_conv=True, kernel_size=5, padding=2),
    )
    before = list(others)
    split_upsampling(others)
    assert list(others) == before


def test_a_size_that_is_not_the_double_is_refused() -> None:
    layer = nn.Sequential(Upsample2D(4, use_conv=True))
    split_upsampling(layer)
    with pytest.raises(ValueError, match="9"):
        layer[0](torch.zeros(1, 4, 4, 4), output_size=(9, 9))


@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_the_gardens_networks(name: str) -> None:
    part = load_component(GARDEN_TEACHER, name)
    inputs = tuple(part.config.generate_dummy_inputs().values())
    with torch.no_grad():
        expected = part.module(*inputs)
        split_upsampling(part.module)
        found = part.module(*inputs)
    assert not any(isinstance(module, Upsample2D) for module in part.module.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

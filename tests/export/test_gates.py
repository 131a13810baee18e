"""Split gates beside diffusers' own: the same answers, on the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn

from kdc_edge.export.components import load_component
from kdc_edge.export.rewrites.gates import SplitGeglu, split_gates
from kdc_edge.train.checkpoint import GARDEN_TEACHER


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_answer(bias: bool) -> None:
    layer = GEGLU(6, 10, bias=bias).double()
    holder = nn.Sequential(layer)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = layer(x)
    split_gates(holder)
    assert isinstance(holder[0], SplitGeglu)
    torch.testing.assert_close(holder[0](x), expected)
    assert holder[0].gate.weight.data_ptr() == layer.proj.weight[10:].data_ptr(), "the weights are there twice"


def test_the_gardens_unet() -> None:
    part = load_component(GARDEN_TEACHER, "unet")
    inputs = tuple(part.config.generate_dummy_inputs().values())
    with torch.no_grad():
        expected = part.module(*inputs)
        split_gates(part.module)
        found = part.module(*inputs)
    assert not any(isinstance(module, GEGLU) for module in part.module.modules())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

"""Attention layouts for devices, as processors of diffusers' attention layers.

    set_attention(unet, "split-einsum")         # Core ML: the same numbers, arranged for the Neural Engine
    fuse_attention(module)                      # ONNX Runtime: one operation, for tracing only

`original`: all heads in one batched product, for the GPU. `split-einsum`: channels first, (B, C, 1, S), linear
layers as 1x1 convolutions, head by head, long queries in pieces (Apple, "Deploying Transformers on the Apple
Neural Engine", 2022). `sdpa`: one fused operation, which Core ML has since iOS 18 and macOS 15.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

QUERIES_AT_ONCE = 512  # of split-einsum: a head's scores (B, S, 1, 512) stay in the Neural Engine's memory


class SplitEinsumProcessor:
    """Self and cross attention of a U-Net, head by head."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """hidden_states (B, S, C), encoder_hidden_states (B, T, D) or None -> (B, S, C)."""
        x = hidden_states.transpose(1, 2).unsqueeze(2)  # (B, C, 1, S)
        text = x if encoder_hidden_states is None else encoder_hidden_states.transpose(1, 2).unsqueeze(2)
        query, key, value = attn.to_q(x), attn.to_k(text), attn.to_v(text)
        key = key.transpose(1, 3)  # (B, T, 1, C)
        width = query.shape[1] // attn.heads
        heads = zip(torch.split(query, width, 1), torch.split(key, width, 3), torch.split(value, width, 1), strict=True)
        found = torch.cat([_one_head(*head, attn.scale) for head in heads], dim=1)  # (B, C, 1, S)
        projected: Tensor = attn.to_out[0](found)
        return projected.squeeze(2).transpose(1, 2)


def _one_head(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query (B, d, 1, S), key (B, T, 1, d), value (B, d, 1, T) -> (B, d, 1, S)."""
    found = []
    for start in range(0, query.shape[3], QUERIES_AT_ONCE):  # coremltools cannot split where one piece is left over
        part = query[..., start : start + QUERIES_AT_ONCE]
        scores = torch.einsum("bchq,bkhc->bkhq", part, key) * scale  # (B, T, 1, 512)
        found.append(torch.einsum("bkhq,bchk->bchq", scores.softmax(dim=1), value))
    return torch.cat(found, dim=3)


def set_attention(unet: Any, kind: str) -> None:
    """Give every attention layer of a U-Net this layout; `split-einsum` makes its linear layers convolutions."""
    processors = {"original": AttnProcessor, "split-einsum": SplitEinsumProcessor, "sdpa": AttnProcessor2_0}
    for layer in [module for module in unet.modules() if isinstance(module, Attention)]:
        layer.set_processor(processors[kind]())
        if kind == "split-einsum":
            layer.to_q, layer.to_k, layer.to_v = map(_as_convolution, (layer.to_q, layer.to_k, layer.to_v))
            layer.to_out[0] = _as_convolution(layer.to_out[0])


def _as_convolution(layer: Any) -> Any:
    """The same weights as a 1x1 convolution; as a module, so that they keep their name in the package."""
    if not isinstance(layer, nn.Linear):
        return layer  # it has been done
    found = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    found.weight = nn.Parameter(layer.weight.detach()[:, :, None, None], requires_grad=False)
    if layer.bias is not None:
        found.bias = layer.bias
    return found


class FusedProcessor:
    """onnxruntime's MultiHeadAttention: no scores of all queries and keys at once in memory, no transposed heads."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,  # noqa: ARG002  # a VAE gives it, always None
        **_: object,
    ) -> Tensor:
        """hidden_states (B, S, C) or, in a VAE, (B, C, h, w) -> the same shape."""
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        text = x if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(x), attn.to_k(text), attn.to_v(text)
        found: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (query, key, value),
            {"num_heads": attn.heads, "scale": float(attn.scale)},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
        found = attn.to_out[0](found)
        if hidden_states.ndim == 4:
            found = found.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            found = found + hidden_states
        return found if attn.rescale_output_factor == 1 else found / float(attn.rescale_output_factor)


def fuse_attention(module: nn.Module) -> None:
    """Give every attention layer of diffusers' in the module the fused operation; text encoders have none."""
    for layer in module.modules():
        if isinstance(layer, Attention):
            layer.set_processor(FusedProcessor())

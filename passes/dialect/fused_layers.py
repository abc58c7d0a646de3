"""What the fused nn fast paths compute, written with the attention in sight.

In eval mode ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` call one operator for a whole layer. These
expansions follow ``torch/nn/modules/transformer.py`` and ``aten/src/ATen/native/transformers/attention.cpp``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _keep(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """A fast-path mask (nonzero: hidden) as a boolean SDPA mask (True: visible), broadcastable to [B, H, S, S]."""
    if mask is None:
        return None
    keep = mask.to(torch.bool).logical_not()
    if mask_type == 1:  # [B, S]: key padding
        return keep[:, None, None, :]
    return keep  # 0: [S, S], 2: [B, H, S, S]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return torch.unflatten(x, -1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd``: src [B, S, E] -> [B, S, E]."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = (_heads(part, num_heads) for part in F.linear(x, qkv_weight, qkv_bias).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_keep(mask, mask_type))
        return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = src + attend(norm(src, norm_weight_1, norm_bias_1))
        return x + feed_forward(norm(x, norm_weight_2, norm_bias_2))
    x = norm(src + attend(src), norm_weight_1, norm_bias_1)
    return norm(x + feed_forward(x), norm_weight_2, norm_bias_2)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``torch._native_multi_head_attention``: query, key, value [B, S, E] -> (out [B, S, E], weights)."""
    weights = qkv_weight.chunk(3)
    biases = qkv_bias.chunk(3)
    q, k, v = (
        _heads(F.linear(x, weight, bias), num_heads) for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    keep = _keep(mask, mask_type)
    if not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        probs = None
    else:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if keep is not None:
            scores = scores.masked_fill(keep.logical_not(), float("-inf"))
        probs = scores.softmax(-1)
        out = probs @ v
        probs = probs.mean(1) if average_attn_weights else probs
    return F.linear(out.transpose(1, 2).flatten(2), proj_weight, proj_bias), probs


EXPANSIONS: dict[Any, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch.ops.aten._transformer_encoder_layer_fwd.default: encoder_layer,
    torch._native_multi_head_attention: multi_head_attention,
    torch.ops.aten._native_multi_head_attention.default: multi_head_attention,
}

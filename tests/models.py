"""Small models that tests compile: as people write them, with random weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CausalAttention(nn.Module):
    """Written out, with a registered causal mask (minGPT's way)."""

    def __init__(self, dim: int = 32, heads: int = 4, longest: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads
        self.drop = nn.Dropout(dropout)
        self.register_buffer("mask", torch.tril(torch.ones(longest, longest))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        out = self.drop(F.softmax(scores, dim=-1)) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, dim))


class SdpaAttention(nn.Module):
    """One SDPA call; ``padding`` is a bool [B, S], True to keep."""

    def __init__(self, dim: int = 32, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.heads, self.causal = nn.Linear(dim, 3 * dim), heads, causal

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mask = None if padding is None else padding[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and padding is None)
        return out.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Two attentions with residuals; optionally under activation checkpoints or with a graph break between."""

    def __init__(
        self, kind: type[nn.Module] = CausalAttention, checkpointed: bool = False, broken: bool = False, **kw: Any
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(**kw) for _ in range(2))
        self.checkpointed, self.broken = checkpointed, broken

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
            if self.broken:
                torch._dynamo.graph_break()
        return x


class MaskedBlock(nn.Module):
    """The mask is built outside a checkpointed layer and handed in, as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SdpaAttention(causal=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        length = x.shape[1]
        positions = torch.arange(length)
        visible = (positions[None, :] <= positions[:, None])[None, None] & padding[:, None, None, :]

        def run(x: Tensor, visible: Tensor) -> Tensor:
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.attention.qkv(x).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)

        return checkpoint(run, x, visible, use_reentrant=False)


class NoAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


def llama(implementation: str, **config: Any) -> nn.Module:
    """A two-layer Llama with grouped heads."""
    from transformers import LlamaConfig, LlamaModel

    options = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaModel._from_config(LlamaConfig(**{**options, **config}), attn_implementation=implementation)

"""What the kernels are measured against: torch's dense attention by each of its backends, and compiled FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dilcompile.forms import Dilated

DENSE = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    """Attention over all keys by one backend."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def all_dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """Those of the backends that run here."""
    some = [x[:, :, :256] for x in (q, k, v)]
    able = {}
    for name, backend in DENSE.items():
        try:
            dense(backend, *some, causal)()
        except RuntimeError:
            continue
        able[name] = dense(backend, q, k, v, causal)
    return able


def flex(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Callable[[], Tensor]:
    """FlexAttention, compiled when it is first called."""
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, **options)


def dilated_mask(form: Dilated, heads: int, length: int, causal: bool) -> BlockMask:
    """The pairs of the branches, each once; made from all pairs."""
    branches = form.branches(length)

    def held(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = torch.zeros_like(row + key, dtype=torch.bool)
        for segment, rate in branches:
            seen = seen | ((row // segment == key // segment) & (row % rate == h % rate) & (key % rate == h % rate))
        return seen & (key <= row) if causal else seen

    return create_block_mask(held, None, heads, length, length, device="cuda", _compile=True)

"""Attention sites for policy tests, built directly."""

from __future__ import annotations

from typing import Any

import torch

from dilcompile.site import AttentionSite, MaskSpec

CAUSAL = MaskSpec(causal=True)


def site(**changes: Any) -> AttentionSite:
    """A causal self attention of 8 heads and 4096 tokens in layer 0, with some fields changed."""
    held: dict[str, Any] = {
        "index": 0,
        "module": "model.layers.0.self_attn",
        "source": "model.py:1",
        "spelling": "sdpa",
        "kind": "self",
        "batch": 1,
        "heads": 8,
        "kv_heads": 8,
        "q_len": 4096,
        "k_len": 4096,
        "head_dim": 64,
        "v_dim": 64,
        "dtype": torch.float32,
        "softmax_dtype": torch.float32,
        "device": torch.device("cpu"),
        "scale": 0.125,
        "mask": CAUSAL,
        "layer": 0,
    }
    return AttentionSite(**{**held, **changes})

"""Decode steps over a full cache: tokens a second, and the bytes of keys and values read against the rate of a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from clock import copy_bytes_per_second, in_turns
from rivals import flex
from torch import Tensor

from dilcompile.bench import geometric
from dilcompile.forms import Dense, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.relation import Problem


def measure(length: int, batch: int, repeats: int, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> dict[str, Any]:
    """One query row a batch row, 4 query heads a key head."""
    torch.manual_seed(0)
    q = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, length, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    forms: dict[str, Form] = {"dense": Dense(), "dilated": geometric(length), "window": SlidingWindow(4096, sinks=4)}
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda form=form: attention(q, k, v, form, is_causal=True, kernel="triton") for name, form in forms.items()
    }
    calls["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    by_flex = flex(q, k, v, enable_gqa=True)
    if _runs(by_flex):
        calls["flex"] = by_flex
    seconds, copied = in_turns(calls, repeats), copy_bytes_per_second()
    size = Problem(batch, heads, kv_heads, 1, length, head_dim, head_dim, length - 1, True)
    rates = {}
    for name, taken in seconds.items():
        keys = forms.get(name, Dense()).relation(size).pairs() // heads
        read = 2 * batch * kv_heads * keys * head_dim * k.element_size()
        rates[name] = {
            "ms": taken * 1e3, "tokens_per_s": batch / taken, "read_bytes": read, "of_copy_bandwidth": read / taken / copied,
        }  # fmt: skip
    difference = (calls["dense"]().float() - calls["sdpa"]().float()).abs().max().item()
    return {
        "length": length, "batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": "bfloat16",
        "copy_bytes_per_s": copied, "rates": rates, "dense_less_sdpa": difference,
    }  # fmt: skip


def _runs(call: Callable[[], Tensor]) -> bool:
    """FlexAttention has a kernel of its own for one query row, which not every head size has."""
    try:
        call()
    except Exception as error:
        warnings.warn(f"FlexAttention does not decode here: {error}", stacklevel=2)
        return False
    return True


def cells(row: dict[str, Any]) -> dict[str, object]:
    """A line of the table."""
    return {
        "keys": row["length"], "batch": row["batch"],
        **{
            f"{name}, tokens/s (share of the copy rate)": f"{rate['tokens_per_s']:.0f} ({rate['of_copy_bandwidth']:.2f})"
            for name, rate in row["rates"].items()
        },
    }  # fmt: skip

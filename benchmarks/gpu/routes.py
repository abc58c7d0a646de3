"""Every key, windows, documents and branches by every kernel that takes them, and by the one that the clock chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from clock import backward_in_turns, in_turns
from torch import Tensor

from dilcompile.bench import geometric
from dilcompile.errors import KernelError
from dilcompile.forms import Dense, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering.select import RIVALS

RELATIONS = ("dense", "window", "documents", "dilated")
HEADS = 8


def measure(relation: str, length: int, head_dim: int, repeats: int, kv_heads: int = 2) -> dict[str, Any]:
    """Causal, 4 query heads a key head; refused: what a kernel said that does not take it."""
    torch.manual_seed(0)
    forms: dict[str, Form] = {"window": SlidingWindow(1024), "dilated": geometric(length)}
    form = forms.get(relation, Dense())
    q, k, v = (
        torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (HEADS, kv_heads, kv_heads)
    )
    more = {"cu_seqlens": _documents(length).to(q.device)} if relation == "documents" else {}
    calls: dict[str, Callable[[], Tensor]] = {}
    outs: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for kernel in (*RIVALS["cuda"], None):
        name = kernel or "chosen"
        calls[name] = lambda kernel=kernel: attention(q, k, v, form, is_causal=True, kernel=kernel, **more)
        try:
            outs[name] = calls[name]()
        except KernelError as error:
            refused[name] = str(error)
            del calls[name]
    forward, backward = in_turns(calls, repeats), {}
    for name, out in outs.items():
        try:
            backward |= backward_in_turns({name: out}, (q, k, v), repeats)
        except KernelError as error:
            refused[f"{name}, backward"] = str(error)
    first = next(iter(outs.values())).detach().float()
    return {
        "relation": relation, "length": length, "head_dim": head_dim, "heads": HEADS, "kv_heads": kv_heads, "dtype": "bfloat16",
        "forward_ms": {name: seconds * 1e3 for name, seconds in forward.items()},
        "backward_ms": {name: seconds * 1e3 for name, seconds in backward.items()},
        "largest_difference": max((out.detach().float() - first).abs().max().item() for out in outs.values()),
        "refused": refused,
    }  # fmt: skip


def _documents(length: int) -> Tensor:
    """Where about 16 documents of different lengths begin, and the end."""
    begins = torch.rand(length - 1, generator=torch.Generator().manual_seed(0)).lt(16 / length).nonzero().flatten() + 1
    return torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), length)]).int()


def cells(row: dict[str, Any]) -> dict[str, object]:
    """A line of the table."""
    return {
        "relation": row["relation"], "S": row["length"], "D": row["head_dim"],
        **{
            f"{name}, ms": f"{ms:.3g}/{row['backward_ms'].get(name, float('nan')):.3g}" for name, ms in row["forward_ms"].items()
        },
    }  # fmt: skip

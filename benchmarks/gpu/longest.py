"""A million keys, forward and backward, on one card."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from dilcompile.bench import geometric
from dilcompile.functional import attention
from dilcompile.relation import Problem


def measure(length: int, heads: int = 32, head_dim: int = 128) -> dict[str, Any]:
    """The second of two runs; peak_bytes: of all that was on the device."""
    form = geometric(length)
    relation = form.relation(Problem(1, heads, heads, length, length, head_dim, head_dim, 0, True))
    shape = (1, length, heads, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    seconds, out = [], None
    for _ in range(2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        del out
        marks[0].record()
        out = attention(q, k, v, form, is_causal=True, kernel="triton")
        marks[1].record()
        grads = torch.autograd.grad(out, (q, k, v), out.detach())
        marks[2].record()
        torch.cuda.synchronize()
        del grads
        seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
    flops = 4 * head_dim * relation.pairs()
    return {
        "length": length, "heads": heads, "head_dim": head_dim, "causal": True, "dtype": "bfloat16",
        "density": relation.density(), "forward_s": seconds[0], "backward_s": seconds[1],
        "forward_tflops": flops / seconds[0] / 1e12, "backward_tflops": 2.5 * flops / seconds[1] / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated(), "operand_bytes": q.nbytes,
    }  # fmt: skip


def cells(row: dict[str, Any]) -> dict[str, object]:
    """A line of the table."""
    return {
        "S": row["length"], "heads": row["heads"], "D": row["head_dim"],
        **{f"{way} s": row[f"{way}_s"] for way in ("forward", "backward")},
        **{f"{way} TFLOP/s": row[f"{way}_tflops"] for way in ("forward", "backward")},
        "peak GiB": row["peak_bytes"] / 2**30, "GiB of q": row["operand_bytes"] / 2**30,
    }  # fmt: skip

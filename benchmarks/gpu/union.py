"""A dilated union in one launch, forward and backward, against the best dense flash and compiled FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from clock import backward_in_turns, extra_memory, in_turns
from rivals import DENSE, all_dense, dilated_mask, flex
from torch import Tensor

from dilcompile.bench import accuracy, geometric
from dilcompile.functional import attention
from dilcompile.relation import Problem

HEADS = 8
WAYS = ("forward", "backward")
# FlexAttention's block mask is made from all pairs.
FLEX_UP_TO = 16384


def measure(length: int, head_dim: int, causal: bool, repeats: int) -> dict[str, Any]:
    """TFLOP/s count 4 D a pair and head forward, 10 D backward; ``set``: each pair once, which is what FlexAttention computes."""
    torch.manual_seed(0)
    form = geometric(length)
    problem = Problem(1, HEADS, HEADS, length, length, head_dim, head_dim, 0, causal)
    relation, as_set = form.relation(problem), replace(form, union="set")
    shape = (1, length, HEADS, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    calls: dict[str, Callable[[], Tensor]] = {"union": lambda: attention(q, k, v, form, is_causal=causal, kernel="triton")}
    calls |= all_dense(q, k, v, causal)
    if length <= FLEX_UP_TO:
        calls["set"] = lambda: attention(q, k, v, as_set, is_causal=causal, kernel="triton")
        calls["flex"] = flex(q, k, v, block_mask=dilated_mask(as_set, HEADS, length, causal))
    dense_pairs = HEADS * (length * (length + 1) // 2 if causal else length * length)
    pairs = dict.fromkeys(calls, dense_pairs) | {"union": relation.pairs()}
    if "set" in calls:
        pairs["set"] = pairs["flex"] = as_set.relation(problem).pairs()
    outs = {name: call() for name, call in calls.items()}
    seconds = {"forward": in_turns(calls, repeats), "backward": backward_in_turns(outs, (q, k, v), repeats)}
    rates = {
        name: {f"{way}_ms": seconds[way][name] * 1e3 for way in WAYS}
        | {
            f"{way}_tflops": flops * head_dim * pairs[name] / seconds[way][name] / 1e12
            for way, flops in zip(WAYS, (4, 10), strict=True)
        }
        for name in calls
    }
    row: dict[str, Any] = {
        "length": length, "head_dim": head_dim, "causal": causal, "heads": HEADS, "dtype": "bfloat16",
        "density": relation.density(), "rates": rates,
    }  # fmt: skip
    for way in WAYS:
        best = max(rates[name][f"{way}_tflops"] for name in DENSE if name in rates)
        row[f"{way}_over_best_dense"] = rates["union"][f"{way}_tflops"] / best
        if "flex" in rates:
            row[f"{way}_flex_over_set"] = rates["flex"][f"{way}_ms"] / rates["set"][f"{way}_ms"]
    one_dense = next(outs[name] for name in DENSE if name in outs)
    on_cpu = (x.detach().cpu() for x in (q, k, v, outs["union"], one_dense))
    return row | extra_memory(calls["union"]) | accuracy(relation, *on_cpu, causal)


def cells(row: dict[str, Any]) -> dict[str, object]:
    """A line of the table."""
    return {
        "S": row["length"], "D": row["head_dim"], "causal": row["causal"],
        **{f"{way}, share of the best dense rate": row[f"{way}_over_best_dense"] for way in WAYS},
        **{f"{way}, times faster than FlexAttention": row.get(f"{way}_flex_over_set") for way in WAYS},
        "TFLOP/s forward/backward": ", ".join(
            f"{name} {rate['forward_tflops']:.0f}/{rate['backward_tflops']:.0f}" for name, rate in row["rates"].items()
        ),
        "extra MiB": row["extra_peak_bytes"] / 2**20, "correct": row["correct"],
    }  # fmt: skip

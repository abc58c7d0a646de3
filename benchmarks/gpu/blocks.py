"""The blocks of BigBird: the Triton kernel and compiled FlexAttention along the same lists, beside dense flash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from clock import backward_in_turns, in_turns
from rivals import DENSE, dense, flex
from torch import Tensor

from dilcompile.bench import accuracy
from dilcompile.forms import BlockSparse
from dilcompile.functional import attention
from dilcompile.relation import Problem

HEADS = 8


def measure(length: int, head_dim: int, causal: bool, repeats: int, block: int = 128) -> dict[str, Any]:
    """TFLOP/s of the pairs that the blocks hold; less_flex: the largest difference of the outputs."""
    torch.manual_seed(0)
    form = BlockSparse(block, {"bigbird": {}})
    problem = Problem(1, HEADS, HEADS, length, length, head_dim, head_dim, 0, causal)
    relation = form.relation(problem)
    shape = (1, length, HEADS, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    calls: dict[str, Callable[[], Tensor]] = {
        "blocks": lambda: attention(q, k, v, form, is_causal=causal, kernel="triton"),
        "flex": flex(q, k, v, block_mask=form.block_mask(problem, "cuda")),
        "flash": dense(DENSE["flash"], q, k, v, causal),
    }
    outs = {name: call() for name, call in calls.items()}
    forward, backward = in_turns(calls, repeats), backward_in_turns(outs, (q, k, v), repeats)
    on_cpu = (x.detach().cpu() for x in (q, k, v, outs["blocks"], outs["flash"]))
    row: dict[str, Any] = {
        "length": length, "head_dim": head_dim, "causal": causal, "heads": HEADS, "dtype": "bfloat16", "block": block,
        "density": relation.density(), "forward_ms": {name: taken * 1e3 for name, taken in forward.items()},
        "backward_ms": {name: taken * 1e3 for name, taken in backward.items()},
        "forward_tflops": 4 * head_dim * relation.pairs() / forward["blocks"] / 1e12,
        "backward_tflops": 10 * head_dim * relation.pairs() / backward["blocks"] / 1e12,
        "less_flex": (outs["blocks"].float() - outs["flex"].float()).abs().max().item(),
    }  # fmt: skip
    return row | accuracy(relation, *on_cpu, causal)


def cells(row: dict[str, Any]) -> dict[str, object]:
    """A line of the table."""
    return {
        "S": row["length"], "D": row["head_dim"], "causal": row["causal"], "density": row["density"],
        **{
            f"{name}, ms forward/backward": f"{row['forward_ms'][name]:.3g}/{row['backward_ms'][name]:.3g}"
            for name in row["forward_ms"]
        },
        "correct": row["correct"],
    }  # fmt: skip

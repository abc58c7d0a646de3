"""Workspaces of the Triton kernels in Triton's interpreter: nothing but results is allocated. Run by ``test_triton``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilcompile.forms import Dilated, SlidingWindow
from dilcompile.lowering import ops, out_forms
from dilcompile.lowering.workspaces import bytes_of
from dilcompile.memory.measure import measured

FORWARD, BACKWARD = torch.ops.dilcompile.attention, torch.ops.dilcompile.attention_backward
DILATED = str(Dilated(segments=(8, 24), rates=(1, 3), offset="own"))
out_forms.register()
# What a call may allocate besides results: scalars and strides of the interpreter's own launches.
FEW = 64


def within(op: Any, given: tuple[Any, ...]) -> None:
    """The bits of a call without a workspace, which allocates more than its results."""
    expected, plain = measured(lambda: op(*given))
    size = int(bytes_of(op.default, given, {}))
    memory = torch.full((size + 512,), 0xFF, dtype=torch.uint8)
    found, inside = measured(lambda: op.within(*given, workspace=memory[:size]))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert (memory[size:] == 0xFF).all()
    results = sorted(x.nbytes for x in found if x.nbytes > FEW)
    assert sorted(n for n in inside.allocations if n > FEW) == results
    assert sorted(n for n in plain.allocations if n > FEW) != results


def operands(q_len: int, k_len: int, form: str, **more: Tensor) -> tuple[Any, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, 16).transpose(1, 2) for n, heads in ((q_len, 2), (k_len, 1), (k_len, 1)))
    masks = (more.get("key_padding"), more.get("documents"), None, None)
    rest = (form, True, None, None, k_len - q_len, 0.3, None, 0.0, "triton", None, more.get("row_limits"))
    return (q, k, v, *masks, *rest)


def test_the_parts_of_a_decode() -> None:
    padding = torch.ones(1, 512, dtype=torch.bool)
    padding[:, :7] = False
    within(FORWARD, operands(1, 512, str(SlidingWindow(400)), key_padding=padding))


@pytest.mark.parametrize("mask", ["documents", "row_limits"])
def test_the_sums_of_a_backward_and_the_masks(mask: str) -> None:
    rows = torch.arange(24)
    masks = {"documents": rows.div(10, rounding_mode="floor")[None], "row_limits": torch.stack([rows * 0, rows + 1])[:, None]}
    given = operands(24, 24, DILATED, **{mask: masks[mask]})
    within(FORWARD, given)
    out, lse = ops.attention(*given)
    within(BACKWARD, (torch.randn_like(out), None, out, lse, *given))

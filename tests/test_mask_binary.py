"""Masks ``(1 - m) * c`` of integers: padding where m holds 0 and 1, an error where it does not, in every way to run a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dilcompile


class Attention(nn.Module):
    """Keys hidden by ``(1 - m) * -1e4``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        q = self.inner(x)
        scores = q @ x.mT * 8**-0.5 + (1.0 - m[:, None, :].to(x.dtype)) * -10000.0
        return scores.softmax(-1) @ x


def drawn() -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 14:] = 0
    return Attention().double(), torch.randn(2, 20, 8, dtype=torch.float64), mask


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("training", [False, True])
def test_zeros_and_ones_are_padding_and_more_is_an_error(training: bool, inner: str) -> None:
    model, x, mask = drawn()
    model.train(training)
    compiled: Any = torch.compile(model, backend="dilated", options={"policy": "exact", "inner": inner})
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(x, mask), model(x, mask), rtol=0, atol=1e-12)
        assert torch._dynamo.utils.counters["dilcompile"]["sites_rewritten"] > 0
        if training:
            compiled(x, mask).sum().backward()
        mask[0, 3] = 2
        with pytest.raises(RuntimeError, match=r"the padding mask .* holds other numbers than 0 and 1"):
            compiled(x, mask)


class Renormalised(nn.Module):
    """Probabilities times a mask of integers, divided by their own sum."""

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        weights = (x @ x.mT * 8**-0.5).softmax(-1) * m[:, None, :].to(x.dtype)
        return weights / weights.sum(-1, keepdim=True) @ x


def test_what_probabilities_are_multiplied_with_is_checked() -> None:
    _, x, mask = drawn()
    compiled: Any = torch.compile(Renormalised(), backend="dilated", options={"policy": "exact", "inner": "eager"})
    torch.testing.assert_close(compiled(x, mask), Renormalised()(x, mask), rtol=0, atol=1e-12)
    assert torch._dynamo.utils.counters["dilcompile"]["sites_rewritten"] > 0
    mask[0, 3] = 2
    with pytest.raises(RuntimeError, match=r"the padding mask .* holds other numbers than 0 and 1"):
        compiled(x, mask)


def test_one_check_a_tensor_in_an_exported_program() -> None:
    _, x, mask = drawn()
    program = torch.export.export(Twice(), (x, mask))
    rewritten = dilcompile.rewrite_exported(program, "exact")
    checks = [node for node in rewritten.graph.nodes if node.target is torch.ops.aten._assert_async.msg]
    assert len(checks) == 1
    torch.testing.assert_close(rewritten.module()(x, mask), Twice()(x, mask), rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="holds other numbers than 0 and 1"):
        rewritten.module()(x, mask + 1)


def test_masks_of_truth_values_need_no_check() -> None:
    _, x, mask = drawn()
    program = dilcompile.rewrite_exported(torch.export.export(Twice(), (x, mask.bool())), "exact")
    assert not [node for node in program.graph.nodes if node.target is torch.ops.aten._assert_async.msg]


class Twice(nn.Module):
    """Two attentions with one mask."""

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        for _ in range(2):
            scores = x @ x.mT * 8**-0.5 + (1.0 - m[:, None, :].to(x.dtype)) * -10000.0
            x = scores.softmax(-1) @ x + x
        return x

"""A model's own ``torch.autograd.Function`` keeps its backward when the attention around it is rewritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import CausalAttention
from spellings import compiled
from torch import Tensor, nn


class Doubled(torch.autograd.Function):
    """The identity, with a gradient that no derivation of its forward gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Pair(torch.autograd.Function):
    """Two results, a tensor kept for the backward, and an argument that is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * factor, x + 1

    @staticmethod
    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return first * ctx.factor * 3 + second * x.cos(), None


class Written(torch.autograd.Function):
    """A backward that writes in place by a method whose result nobody reads (PhiMoE's router)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found = grad * 3
        found.mul_(0.5)
        found[..., 0] = 0.0
        return found


class Model(nn.Module):
    def __init__(self, function: str) -> None:
        super().__init__()
        self.before, self.after, self.function = CausalAttention(), CausalAttention(), function

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.function == "pair":
            a, b = Pair.apply(x, 0.5)
            x = a * b
        elif self.function == "written":
            x = Written.apply(x)
        else:
            x = Doubled.apply(x)
        return self.after(x)


@pytest.mark.parametrize("function", ["doubled", "pair", "written"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_are_the_users_own(function: str, dynamic: bool, inner: str) -> None:
    model, x = Model(function).double(), torch.randn(2, 16, 32, dtype=torch.float64)
    run, found = compiled(model, dynamic=dynamic)
    if inner == "aot_eager":
        torch._dynamo.reset()
        run = torch.compile(model, backend="dilated", dynamic=dynamic, options={"policy": "exact", "inner": inner})
    wanted = _gradients(model, model, x)
    for got, expected in zip(_gradients(model, run, x), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if inner == "eager":
        assert (len(found.sites), found.rewritten, found.refusals) == (2, 2, [])


def _gradients(model: nn.Module, call: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    given = x.clone().requires_grad_()
    out = call(given)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), given.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item, union-attr]

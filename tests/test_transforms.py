"""The operators under torch's transforms: ``torch.func``, forward-mode AD, second derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from dilcompile.errors import DilcompileError
from dilcompile.functional import attention, dilated_attention
from dilcompile.lowering import ops

NO_FORWARD_MODE = "dilcompile's attention has no forward-mode derivative .*; use reverse mode"
NO_SECOND = "the gradient of dilcompile's attention has no gradient of its own"


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def loss(x: Tensor) -> Tensor:
    out, lse = dilated_attention(x, 2 * x, x + 1, [4, 8], [1, 2], is_causal=True, return_lse=True)
    return out.sin().sum() + lse.cos().sum()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), leaf)[0]


def close(found: Any, exact: Any) -> None:
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_grad_and_vjp() -> None:
    x = drawn(1, 2, 8, 4)
    close(torch.func.grad(loss)(x), gradient(loss, x))
    close(torch.func.vjp(loss, x)[1](torch.tensor(2.0, dtype=torch.float64))[0], 2 * gradient(loss, x))


def test_jacrev_is_a_gradient_an_output() -> None:
    def sums(x: Tensor) -> Tensor:
        return attention(x, x, x, "dense", is_causal=True).sin().sum((0, 1, 3))

    x = drawn(1, 2, 8, 4)
    close(torch.func.jacrev(sums)(x), torch.stack([gradient(lambda x, i=i: sums(x)[i], x) for i in range(8)]))


def test_gradients_by_sample() -> None:
    x = drawn(3, 2, 2, 8, 4)
    exact = torch.stack([gradient(loss, one) for one in x])
    close(torch.vmap(torch.func.grad(loss))(x), exact)
    close(torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(x), exact)


# What is mapped beside q, k and v: the shape of a sample's operand, and whether it is mapped.
BIASES = [(8, 8), (2, 1, 8), (1, 2, 8, 8), (2, 1, 8, 8)]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_mapped_operands(shape: tuple[int, ...], mapped: bool) -> None:
    q, k, v = drawn(3, 2, 2, 8, 4), drawn(2, 3, 1, 8, 4), drawn(2, 1, 8, 4)
    padding = torch.rand(3, 2, 8) > 0.3
    bias = drawn(3, *shape) if mapped else drawn(*shape)

    def one(q: Tensor, k: Tensor, padding: Tensor, bias: Tensor) -> Tensor:
        out, lse = attention(q, k, v, "dense", key_padding=padding, bias=bias, return_lse=True)
        return out.sin().sum() + torch.where(lse.isfinite(), lse, 0).cos().sum()

    by_bias = 0 if mapped else None
    gradients = torch.func.grad(one, argnums=(0, 1, 3))
    found = torch.vmap(gradients, in_dims=(0, 1, 0, by_bias))(q, k, padding, bias)
    for i in range(3):
        leaves = [x.detach().clone().requires_grad_() for x in (q[i], k[:, i], bias[i] if mapped else bias)]
        exact = torch.autograd.grad(one(leaves[0], leaves[1], padding[i], leaves[2]), leaves)
        for part, wanted in zip(found, exact, strict=True):
            close(part[i], wanted)


def test_mapped_documents_and_dropout() -> None:
    q = drawn(3, 2, 2, 8, 4)
    documents = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 1]], [[0] * 8], [[0, 1, 2, 3, 4, 5, 6, 7]]])

    def one(q: Tensor, documents: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
        return ops.attention(
            q, q, q, None, documents, None, seed, "dense()", True, None, None, 0, 0.5, None, dropout_p, None
        )[0]  # fmt: skip

    for dropout_p, seed in ((0.0, None), (0.4, torch.tensor([3]))):
        found = torch.vmap(lambda q, d, p=dropout_p, s=seed: one(q, d, p, s))(q, documents)
        close(found, torch.stack([one(q[i], documents[i], dropout_p, seed) for i in range(3)]))


def test_forward_mode_is_refused() -> None:
    x = drawn(1, 2, 8, 4)
    with pytest.raises(DilcompileError, match=NO_FORWARD_MODE):
        torch.func.jvp(loss, (x,), (x,))
    with pytest.raises(DilcompileError, match=NO_FORWARD_MODE):
        torch.func.jacfwd(loss)(x)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, forward_ad.dual_level(), pytest.raises(DilcompileError, match=NO_FORWARD_MODE):
            loss(forward_ad.make_dual(x, x))
    # Without tangents it is a plain call.
    with forward_ad.dual_level():
        close(loss(x), loss(x.clone()))


def test_second_derivatives_are_refused() -> None:
    x = drawn(1, 2, 8, 4).requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(DilcompileError, match=NO_SECOND):
        grad.sum().backward()
    with pytest.raises(DilcompileError, match=NO_SECOND):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x.detach())
    with pytest.raises(DilcompileError, match=NO_FORWARD_MODE):
        torch.func.hessian(loss)(x.detach())

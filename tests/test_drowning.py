"""Biases that hide whole rows, however their fills got into them: the rows stay what the model makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Call, double, said  # noqa: F401  (the fixture works by being here)
from spellings import agree
from torch import Tensor

from dilcompile.passes.finding import read_operands

B, H, S = 2, 3, 7
INF = float("inf")
DATA = "other(float masks that are data) + bias (others)"
ORDINARY = "none + bias (zero)"


def hidden() -> Tensor:
    """True where a key is hidden; the first batch row has no other."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[0] = True
    mask[1, 5:] = True
    return mask


def by_mask_write(m: Tensor) -> Tensor:
    bias = torch.zeros(B, S)
    bias[m] = -INF
    return bias


def by_slice_write(m: Tensor) -> Tensor:
    bias = torch.zeros(B, S)
    bias[:1] = -INF
    return bias


FILLS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("a write by mask", by_mask_write),
    ("a write to a slice", by_slice_write),
    ("scatter", lambda m: torch.zeros(B, S).scatter(1, torch.arange(S).expand(B, S) * m, -INF)),
    ("index_fill", lambda m: torch.zeros(B, S).index_fill(0, torch.tensor([0]), -INF)),
    ("padding", lambda m: F.pad(torch.zeros(1, S), (0, 0, 1, 0), value=-INF)),
    ("a table of the code", lambda m: torch.tensor([0.0, -INF])[m.long()]),
    ("a table of the code, by embedding", lambda m: F.embedding(m.long(), torch.tensor([[0.0], [-INF]]))[..., 0]),
    ("the logarithm of a sum", lambda m: (1 - m.double()).cumprod(-1).log()),
    ("the logarithm of numbers of the caller", lambda m: (1 - m.long()).roll(1, -1).double().log2()),
    ("parts", lambda m: torch.stack((torch.full((S,), -INF), torch.zeros(S)))),
]

# Beside what is hidden nowhere: these are no fills.
ORDINARIES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("a table of small numbers", lambda m: torch.tensor([0.0, -3.0])[m.long()]),
    ("a slice to the end", lambda m: -torch.arange(2 * S).double()[S:].expand(B, S)),
    ("the logarithm of distances", lambda m: -torch.log(1 + torch.arange(S).double()).expand(B, S)),
    ("the logarithm of what is clamped", lambda m: (1 - m.double()).cumsum(-1).clamp(min=1e-6).log()),
    ("a write of small numbers", lambda m: torch.zeros(B, S).masked_fill(m.roll(1, 0), -2.0) * 2),
    ("a decay", lambda m: torch.arange(S).double().neg().exp().expand(B, S)),
]


def _found(bias: Callable[[Tensor], Tensor], **more: Any) -> str:
    def call(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return (q @ k.mT + bias(m)[:, None, None]).softmax(-1) @ v

    return said(agree(Call(call), *(torch.randn(B, H, S, 4) for _ in range(3)), hidden(), **more))


@pytest.mark.parametrize("name", dict(FILLS))
def test_a_row_that_is_hidden_whole(name: str) -> None:
    with torch.no_grad():
        assert _found(dict(FILLS)[name], gradients=False) == DATA


@pytest.mark.parametrize("name", dict(ORDINARIES))
def test_what_holds_no_fills(name: str) -> None:
    assert _found(dict(ORDINARIES)[name]) == ORDINARY


@pytest.mark.parametrize("name", ["a write by mask", "scatter", "a table of the code", "the logarithm of a sum"])
def test_taking_it_for_an_ordinary_bias_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_operands, "may_drown", lambda *_, **__: False)
    with pytest.raises(AssertionError), torch.no_grad():
        _found(dict(FILLS)[name], gradients=False)


def test_a_buffer_of_fills() -> None:
    table = torch.zeros(S, S)
    table[2] = -INF
    table[4, 3] = -INF
    module = Call(lambda q, k, v: (q @ k.mT + module.table).softmax(-1) @ v, table=table)
    with torch.no_grad():
        found = agree(module, *(torch.randn(B, H, S, 4) for _ in range(3)), gradients=False)
    assert said(found) == DATA


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda a, b: a @ b.mT,
    "inner": torch.inner,
    "tensordot": lambda a, b: torch.tensordot(a, b, ([1], [1])),
    "vecdot": lambda a, b: torch.linalg.vecdot(a[:, None], b),
    "mv": lambda a, b: b.mv(a[0]),
    "addmv": lambda a, b: torch.addmv(torch.zeros(S), b, a[0]),
    "addbmm": lambda a, b: torch.addbmm(torch.zeros(S, S), a[None], b.mT[None]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_products_make_of_inputs_holds_no_fills(name: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (q @ k.mT + PRODUCTS[name](a, b)).softmax(-1) @ v

    with torch.no_grad():
        inputs = (*(torch.randn(B, H, S, 4) for _ in range(3)), torch.randn(S, 5), torch.randn(S, 5))
        assert said(agree(Call(call), *inputs, gradients=False)) == ORDINARY

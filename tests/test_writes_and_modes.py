"""An output that the model writes into later, and attention that is computed without gradients in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Call, Case, check, double, must_be_noticed  # noqa: F401  (the fixture works by being here)
from spellings import agree
from torch import Tensor

from dilcompile.passes.graph.grad_modes import GradModes
from dilcompile.passes.graph.mutations import Mutations
from dilcompile.passes.rewriting import rewrite

NONE = "none (zero)"


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, 7, 4) for _ in range(3))


def written(write: Callable[[Tensor, Tensor], Any]) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT).softmax(-1) @ v
        found = write(out, v)
        return out if found is None else found

    return call


def zeroed(out: Tensor, v: Tensor) -> None:
    out[:, :, 0] = 0


def halved(out: Tensor, v: Tensor) -> None:
    out.view(-1).mul_(0.5)


def transposed(out: Tensor, v: Tensor) -> None:
    out.transpose(1, 2)[:, 0] = 1


def chained(out: Tensor, v: Tensor) -> Tensor:
    seen = out.view(-1)
    again = (out @ v.mT).softmax(-1) @ v
    seen.mul_(0.5)
    return again + out


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The division is the site's output, and lies where the product lay."""
    weights = (q @ k.mT).exp()
    out = weights @ v
    out.div_(weights.sum(-1, keepdim=True))
    out.add_(1)
    return out


WRITES: list[Case] = [
    ("a row", written(zeroed), qkv, NONE),
    ("a view of all", written(halved), qkv, NONE),
    ("a transposed view", written(transposed), qkv, NONE),
    ("the output itself", written(lambda out, v: out.mul_(2)), qkv, NONE),
    ("added to", written(lambda out, v: out.add_(v)), qkv, NONE),
    ("memory that was there before", divided, qkv, "miss: its output is written in place through memory that it shares"),
]


@pytest.mark.parametrize("case", WRITES, ids=lambda case: case[0])
def test_writes_to_an_output_are_kept(case: Case) -> None:
    check(case)


def test_writes_to_an_output_that_another_site_reads() -> None:
    assert agree(Call(written(chained)), *qkv(), gradients=False).rewritten == 2


def test_rows_zeroed_behind_a_call() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        out[:, :, 0] = 0
        return out

    assert agree(Call(call), *qkv(), gradients=False).rewritten == 1


def probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        found = q @ k.mT
    return found.softmax(-1) @ v


def sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).exp()
    with torch.no_grad():
        total = weights.sum(-1, keepdim=True)
    return weights @ v / total


def keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = k * 0.5
    return (q @ k.mT).softmax(-1) @ v


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        found = (q @ k.mT).softmax(-1) @ v
    return found * v


PARTLY = "miss: a part of it is computed without gradients (torch.no_grad)"
MODES: list[Case] = [
    ("probabilities", probabilities, qkv, PARTLY),
    ("scores", scores, qkv, PARTLY),
    ("sums", sums, qkv, PARTLY),
    ("keys", keys, qkv, NONE),
    ("all of it", whole, qkv, NONE),
]


@pytest.mark.parametrize("case", MODES, ids=lambda case: case[0])
def test_no_gradient_goes_where_there_is_none(case: Case) -> None:
    check(case)


def test_without_gradients_the_modes_make_no_difference() -> None:
    assert agree(Call(probabilities), *qkv(), gradients=False).rewritten == 1


MUTATIONS = [
    ("any memory will do", Mutations, "is_first", lambda self, source: True, lambda: check(WRITES[5])),
    ("modes may change", GradModes, "change", lambda self, first, last: False, lambda: check(MODES[0])),
    ("operands are read from anywhere", GradModes, "cut", lambda self, node, reader: False, lambda: check(MODES[3])),
    ("no memory of its own", rewrite, "_own_memory", lambda emit, result, output: result, lambda: agree_without_gradients()),
]


def agree_without_gradients() -> None:
    agree(Call(written(zeroed)), *qkv(), gradients=False)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_every_rule_is_needed(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)

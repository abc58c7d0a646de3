"""A tensor whose dtype is asked for is not used; one that is cast is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from finding import Case, Mutation, check, double, must_be_noticed  # noqa: F401  (the fixture works by being here)
from torch import Tensor

from dilcompile.passes.graph import regions

S = 6


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, S, 4, requires_grad=True) for _ in range(3))


def cast_like_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ESM-2: the weights that are read are cast like the weights that nobody reads."""
    held = (q @ k.mT).softmax(-1, dtype=torch.float32)
    cast = held.type_as(q)
    return held.type_as(cast) @ v


def output_like_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.mT).softmax(-1)
    return (w @ v).type_as(w)


def narrow_like(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The dtype that is asked for counts: half of these digits are lost."""
    w = (q @ k.mT).softmax(-1)
    return w.type_as(torch.zeros(1, dtype=torch.float32)).type_as(w) @ v


def cast_and_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = (q @ k.mT).softmax(-1)
    return w @ v, w.type_as(q)


def cast_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = (q @ k.mT).softmax(-1)
    return w @ v + w.type_as(q).sum()


CASES: list[Case] = [
    ("cast like themselves", cast_like_the_weights, qkv, "none (zero)"),
    ("output cast like the weights", output_like_the_weights, qkv, "none (zero)"),
    ("cast to fewer digits", narrow_like, qkv, "kept: none (zero)"),
    ("cast and returned", cast_and_returned, qkv, "miss: the attention weights are returned"),
    ("cast and summed", cast_and_summed, qkv, "miss: the attention weights are used elsewhere too"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_who_is_read(case: Case) -> None:
    check(case)


def _first(name: str) -> Callable[[], None]:
    (case,) = [case for case in CASES if case[0] == name]

    def run() -> None:
        check(case)

    return run


MUTATIONS: list[Mutation] = [
    ("dtypes have no name", regions, "name_dtypes", lambda gm: None, _first("cast like themselves")),
    ("dtypes have no name", regions, "name_dtypes", lambda gm: None, _first("output cast like the weights")),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)

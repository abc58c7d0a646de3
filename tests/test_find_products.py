"""Scores and outputs as products under any name: broadcast and summed, vectors, inner products, tensors added to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from finding import Case, Mutation, check, double, must_be_noticed  # noqa: F401  (the fixture works by being here)
from torch import Tensor, nn

from dilcompile.passes.axes import atoms, labels, products
from dilcompile.passes.finding import value_path
from dilcompile.passes.graph import mutations

B, H, S, D = 2, 3, 7, 4
TALKING = "miss: heads are mixed by a learned product (talking heads)"
ADDED = "miss: something is added to the output of the value product"
FEATURES = "miss: the features of queries or keys are broadcast along the others'"
INTEGERS = "miss: integers are multiplied or summed"


def qkv() -> tuple[Tensor, ...]:
    return torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def one_head() -> tuple[Tensor, ...]:
    return torch.randn(S, D), torch.randn(S + 2, D), torch.randn(S + 2, D)


def by_broadcast(q: Tensor, k: Tensor) -> Tensor:
    return (q[..., :, None, :] * k[..., None, :, :]).sum(-1)


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    return (weights[..., None] * v[..., None, :, :]).sum(-2)


def causal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))


def _spread(x: Tensor) -> Tensor:
    return x.expand(B, H, S, S, D)


def _writing_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k * 1
    pairs = q[..., :, None, :] * k[..., None, :, :]
    k.view(-1).mul_(0.3)
    return pairs.sum(-1).softmax(-1) @ v + k


def _writing_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v * 1
    pairs = (q @ k.mT).softmax(-1)[..., None] * v[..., None, :, :]
    v.view(-1).mul_(0.3)
    return pairs.sum(-2) + v


def _multiplied_in_place(keys: bool) -> Callable[..., Tensor]:
    """One query, which is multiplied into the keys themselves, or its weights into the values."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v, q = k * 1, v * 1, q[:, :, :1]
        weights = (k.mul_(q) if keys else k * q).sum(-1).softmax(-1)[..., None]
        return (v * weights if keys else v.mul_(weights)).sum(-2)

    return call


def _added_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = v[..., :1] * k[..., None, :, 0]
    return bias.add_(q @ k.mT).softmax(-1) @ v


class Router(nn.Module):
    """Weighs what experts say by broadcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 5).double(), nn.Linear(D, 5 * D).double()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = (q @ k.mT).softmax(-2).mT @ v
        return (self.gate(x).softmax(-1)[..., None] * self.experts(x).unflatten(-1, (5, D))).sum(-2)


class Gate(nn.Module):
    """A router whose weights are multiplied with by operators that layers are not written with."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Parameter(torch.randn(5, D).double()), nn.Parameter(torch.randn(D, 5 * D).double())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = (q @ k.mT).softmax(-1) @ v
        return (torch.inner(x, self.gate).softmax(-2)[..., None] * torch.tensordot(x, self.experts, 1).unflatten(-1, (5, D))).sum(
            -2
        )


class Memory(nn.Module):
    """Keys and values are projected from learned tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.key, self.value = nn.Parameter(torch.randn(5, D).double()), *(nn.Linear(D, D).double() for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ self.key(self.slots).T).softmax(-1) @ self.value(self.slots)


class Talking(nn.Module):
    """Heads are mixed by weights that are broadcast, multiplied and summed."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.after, self.mix = after, nn.Parameter(torch.randn(H, H, 1, 1).double())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = lambda x: (x[:, :, None] * self.mix).sum(1)  # noqa: E731
        scores = q @ k.mT
        return (mixed(scores.softmax(-1)) if self.after else mixed(scores).softmax(-1)) @ v


class Mixer(nn.Module):
    """Self-attention over tokens that a projection along the token axis has made; with ``channels`` over the features instead."""

    def __init__(self, channels: bool) -> None:
        super().__init__()
        self.channels = channels
        self.tokens, self.qkv = nn.Linear(S, S + 1).double(), nn.Linear(D, 3 * 2 * D).double()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = self.qkv(self.tokens(q.sum(1).mT).mT)
        q, k, v = x.unflatten(-1, (3, 2, D)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.channels:
            return (q.mT @ k).softmax(-1) @ v.mT
        return (q @ k.mT).softmax(-1) @ v


def _without_numbers(value: Any, node: Any) -> Any:
    found = _factors(value, node)
    return None if found is None else replace(found, alpha=1.0)


_factors = products._factors

CASES: list[Case] = [
    ("scores", lambda q, k, v: causal(by_broadcast(q, k) * 0.4).softmax(-1) @ v, qkv, "causal (zero)"),
    ("values", lambda q, k, v: mixed(causal(q @ k.mT).softmax(-1), v), qkv, "causal (zero)"),
    ("both", lambda q, k, v: mixed(causal(by_broadcast(q, k)).softmax(-1), v), qkv, "causal (zero)"),
    ("heads last", lambda q, k, v: ((q[:, :, None] * k[:, None]).sum(-1).softmax(2)[..., None] * v[:, None]).sum(2), qkv, "none (zero)"),
    ("expanded before", lambda q, k, v: (_spread((_spread(q[:, :, :, None]) * _spread(k[:, :, None])).sum(-1).softmax(-1)[..., None]) * _spread(v[:, :, None])).sum(3), qkv, "none (zero)"),
    ("the summed dim is kept", lambda q, k, v: ((q[:, :, :, None] * k[:, :, None]).sum(-1, keepdim=True).softmax(3) * v[:, :, None]).sum(3), qkv, "none (zero)"),
    ("one query", lambda q, k, v: ((q[:, :, :1] * k).sum(-1).softmax(-1)[..., None] * v).sum(2), qkv, "none (zero)"),
    ("scaled inside", lambda q, k, v: (q[..., :, None, :] * k[..., None, :, :] * 0.3).sum(-1).softmax(-1) @ v, qkv, "none (zero)"),
    ("scaled in place", lambda q, k, v: (q[..., :, None, :] * k[..., None, :, :]).mul_(0.3).sum(-1).softmax(-1) @ v, qkv, "none (zero)"),
    ("heads summed too", lambda q, k, v: mixed((q[..., :, None, :] * k[..., None, :, :]).sum((-1, 1)).softmax(-1)[:, None], v), qkv, "none (zero)"),
    ("one key head", lambda q, k, v: mixed(by_broadcast(q, k[:, :1]).softmax(-1), v[:, :1]), qkv, "none (zero)"),
    ("means in place of sums", lambda q, k, v: ((q[:, :, :, None] * k[:, :, None]).mean(-1).softmax(-1)[..., None] * v[:, :, None]).mean(3), qkv, "none (zero)"),
    ("vecdot", lambda q, k, v: torch.linalg.vecdot(q[..., None, :], k[..., None, :, :]).softmax(-1) @ v, qkv, "none (zero)"),
    ("not: over the queries", lambda q, k, v: mixed(by_broadcast(q, k).softmax(-2), v), qkv, "miss: the value product does not sum over the key axis"),
    ("not: values by the rows", lambda q, k, v: (by_broadcast(q, k).softmax(-1)[..., None] * v[..., None, :]).sum(-3), qkv, "miss: the value product does not sum over the key axis"),
    ("not: features summed", lambda q, k, v: (by_broadcast(q, k).softmax(-1)[..., None] * v[..., None, :, :]).sum(-1).sum(-1), qkv, "nothing"),
    ("not: weights used twice", lambda q, k, v: (lambda p: mixed(p, v) + mixed(p, k))(by_broadcast(q, k).softmax(-1)), qkv, "miss: the attention weights are used elsewhere too"),
    ("not: the weighted values are used", lambda q, k, v: (lambda m: m.sum(-2) + m.amax(-2))(by_broadcast(q, k).softmax(-1)[..., None] * v[..., None, :, :]), qkv, "nothing"),
    ("a router behind one is none", Router(), qkv, "none (zero)"),
    ("tokens that were mixed before", Mixer(channels=False), qkv, "none (zero)"),
    ("not: channels of tokens that were mixed before", Mixer(channels=True), qkv, "miss: the softmax runs over a feature axis (channel attention)"),
    ("tokens that are weights", Memory(), qkv, "none (zero)"),
    ("not: heads mixed by broadcasting", Talking(after=False), qkv, TALKING),
    ("not: heads mixed by broadcasting after the softmax", Talking(after=True), qkv, TALKING),
    ("addmm", lambda q, k, v: torch.addmm(torch.zeros(S, S + 2), q, k.T, alpha=0.3).softmax(-1) @ v, one_head, "none (zero)"),
    ("addmm, a bias", lambda q, k, v: torch.addmm(q[:, :1] * k[:, 0], q, k.T, beta=0.5, alpha=0.3).softmax(-1) @ v, one_head, "none + bias (zero)"),
    ("addmm, nothing of what is added", lambda q, k, v: torch.addmm(torch.full((S, S + 2), float("nan")), q, k.T, beta=0).softmax(-1) @ v, one_head, "none (zero)"),
    ("addbmm", lambda q, k, v: torch.addbmm(torch.zeros(S, S), q[0], k[0].mT).softmax(-1) @ v[0, 0], qkv, "none (zero)"),
    ("values by baddbmm", lambda q, k, v: torch.baddbmm(torch.zeros(1, 1, 1), (q[0] @ k[0].mT).softmax(-1), v[0], alpha=0.5), qkv, "none (zero)"),
    ("inner", lambda q, k, v: torch.inner(torch.inner(q, k).softmax(-1), v.T), one_head, "none (zero)"),
    ("tensordot", lambda q, k, v: torch.tensordot(torch.tensordot(k, q, ([1], [1])).softmax(0), v, ([0], [0])), one_head, "none (zero)"),
    ("tensordot, one key head", lambda q, k, v: torch.tensordot(torch.tensordot(q[0], k[0, 0], ([2], [1])).softmax(-1), v[0, 0], 1), qkv, "none (zero)"),
    ("a bias that is an inner product", lambda q, k, v: (q @ k.T + torch.inner(q, v)).softmax(-1) @ v, one_head, "none + bias (zero)"),
    ("a router of other products behind one is none", Gate(), qkv, "none (zero)"),
    ("one feature", lambda q, k, v: torch.einsum("bhqd,bhkd->bhqk", q[..., :1], k[..., :1]).softmax(-1) @ v, qkv, "none (zero)"),
    ("not: the keys' one feature is broadcast", lambda q, k, v: torch.einsum("bhqd,bhkd->bhqk", q, k[..., :1]).softmax(-1) @ v, qkv, FEATURES),
    ("not: the queries' one feature is broadcast", lambda q, k, v: torch.tensordot(q[:, :1], k, ([1], [1])).softmax(-1) @ v, one_head, FEATURES),
    ("not: one value is broadcast", lambda q, k, v: torch.tensordot((q @ k.T).softmax(-1), v[:1], ([1], [0])), one_head, "miss: keys and values are cut into different parts"),
    ("not: values that are integers", lambda q, k, v: mixed((q @ k.mT).softmax(-1), (v * 9).long()), qkv, INTEGERS),
    ("not: scores of integers", lambda q, k, v: ((q * 2).long() @ (k * 2).long().mT).to(q.dtype).softmax(-1) @ v, qkv, INTEGERS),
    ("not: values summed in fewer digits", lambda q, k, v: ((q @ k.mT).softmax(-1)[..., None] * v[:, :, None]).sum(3, dtype=torch.float32), qkv, "miss: the weighted values are summed in fewer digits than they have"),
    ("kept: scores summed in more digits than they have", lambda q, k, v: (q.float()[:, :, :, None] * k.float()[:, :, None]).sum(-1, dtype=torch.float64).softmax(-1) @ v, qkv, "kept: none (zero)"),
    ("keys in fewer digits", lambda q, k, v: by_broadcast(q, k.float()).softmax(-1) @ v, qkv, "none (zero)"),
    ("vectors", lambda q, k, v: v.T.mv(k.mv(q[0]).softmax(-1)), one_head, "none (zero)"),
    ("vectors by matmul", lambda q, k, v: (q[0] @ k.T).softmax(-1) @ v, one_head, "none (zero)"),
    ("not: something is added to the values by baddbmm", lambda q, k, v: torch.baddbmm(q[0], (q[0] @ k[0].mT).softmax(-1), v[0]), qkv, ADDED),
    ("not: something is added to the values by addmm", lambda q, k, v: torch.addmm(q, (q @ k.T).softmax(-1), v, alpha=0.5), one_head, ADDED),
]  # fmt: skip
WRITTEN: list[Case] = [
    ("keys", _writing_keys, qkv, "miss: it is written in place before the attention ends"),
    ("values", _writing_values, qkv, "miss: it is written in place before the attention ends"),
    ("keys, by the product", _multiplied_in_place(keys=True), qkv, "miss: it is written in place before the attention ends"),
    ("values, by the product", _multiplied_in_place(keys=False), qkv, "miss: it is written in place before the attention ends"),
    ("a bias, by the scores", _added_in_place, qkv, "miss: it is written in place before the attention ends"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_products(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case[0])
def test_what_was_multiplied_may_not_be_written_before_it_is_summed(case: Case) -> None:
    with torch.no_grad():
        check(case, gradients=False)


def test_values_summed_in_integers_stay() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1)[..., None] * v[:, :, None] * 9).sum(3, dtype=torch.long)

    with torch.no_grad():
        check(("integers", call, qkv, INTEGERS), gradients=False)


def _case(name: str) -> Callable[[], None]:
    (found,) = [entry for entry in CASES if entry[0] == name]

    def run() -> None:
        check(found)

    return run


def _written(number: int) -> Callable[[], None]:
    return lambda: test_what_was_multiplied_may_not_be_written_before_it_is_summed(WRITTEN[number])


MUTATIONS: list[Mutation] = [
    ("keys may change before the sum", products.Product, "reader", property(lambda product: product.node), _written(0)),
    ("values may change before the sum", products.Product, "reader", property(lambda product: product.node), _written(1)),
    *((f"{what} may be written by what reads them", mutations.Mutations, "overwritten", mutations.Mutations.writes, _written(number)) for number, what in enumerate(("keys", "values", "biases"), 2)),
    ("digits may be lost", value_path, "narrows", lambda *_: False, _case("not: values summed in fewer digits")),
    ("projections are linear layers", labels, "PRODUCTS", frozenset(), _case("a router of other products behind one is none")),
    ("what is added is forgotten", value_path, "_unadded", lambda product, _: product, _case("not: something is added to the values by addmm")),
    ("everything counts", products, "_factors", _without_numbers, _case("scaled inside")),
    ("a projection tells nothing of the others", atoms.Atom, "as_places", lambda atom: atom, _case("tokens that were mixed before")),
    ("features are tokens", atoms.Atom, "is_channel", False, _case("not: channels of tokens that were mixed before")),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)

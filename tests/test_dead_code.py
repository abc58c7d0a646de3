"""What is written and never read is no use of attention weights; what somebody reads stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from finding import Call, Case, Mutation, check, double, must_be_noticed  # noqa: F401  (the fixture works by being here)
from spellings import compiled
from torch import Tensor

from dilcompile.passes.graph import dead_code

S = 6


def qkv(*more: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (*(torch.randn(2, 3, S, 4) for _ in range(3)), *(make() for make in more))


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1)


def gathered(w: Tensor, into: Tensor) -> Tensor:
    """The weights put together part by part, as block-sparse models do for their callers."""
    into[:, :, :2] = w[:, :, :2]
    view = into.view(2, 3, 2, S // 2, S)
    view[:, :, 1].copy_(w[:, :, 3:])
    view[:, :, 0, 2].scatter_(2, torch.arange(3).expand(2, 3, 3), w[:, :, 2, :3])
    return into


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    gathered(w, torch.zeros(2, 3, S, S))
    return w @ v


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = weights(q, k)
    return w @ v, gathered(w, torch.zeros(2, 3, S, S))


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    whole = torch.zeros(2, 3, S, S)
    view = whole.view(2, 3 * S, S)
    gathered(w, whole)
    return w @ v + view.sum()


def into_an_input(q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
    w = weights(q, k)
    gathered(w, held)
    return w @ v


ELSEWHERE = "miss: the attention weights are used elsewhere too"
CASES: list[Case] = [
    ("dropped", dropped, qkv(), "none (zero)"),
    ("returned", returned, qkv(), ELSEWHERE),
    ("read through a view", summed, qkv(), ELSEWHERE),
    ("in an input", into_an_input, qkv(lambda: torch.zeros(2, 3, S, S)), ELSEWHERE),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_weights_written_somewhere(case: Case) -> None:
    with torch.no_grad():
        check(case, gradients=False)


def test_an_input_is_written_to() -> None:
    held = torch.zeros(2, 3, S, S)
    run, _ = compiled(Call(into_an_input))
    q, k, v = qkv()()
    with torch.no_grad():
        run(q, k, v, held)
    torch.testing.assert_close(held, gathered(weights(q, k), torch.zeros(2, 3, S, S)))


@pytest.mark.parametrize("draw", [lambda: torch.zeros(5).bernoulli_(0.5), lambda: torch.zeros(5).copy_(torch.rand(5))])
def test_random_draws_stay_though_nobody_reads_them(draw: Callable[[], Tensor]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        draw()
        return weights(q, k) @ v + torch.rand(4)

    inputs = qkv()()
    torch.manual_seed(1)
    wanted = call(*inputs)
    run, found = compiled(Call(call))
    torch.manual_seed(1)
    torch.testing.assert_close(run(*inputs), wanted, rtol=1e-9, atol=1e-9)
    assert found.rewritten == 1


def _only(name: str) -> Callable[[], None]:
    (case,) = [case for case in CASES if case[0] == name]
    return lambda: _without_gradients(case)


def _without_gradients(case: Case) -> None:
    with torch.no_grad():
        check(case, gradients=False)


MUTATIONS: list[Mutation] = [
    ("writes are never read", dead_code, "storage", lambda node: id(node), _only("read through a view")),
    ("everything counts", dead_code, "_counts", lambda *_: True, _only("dropped")),
    ("inputs are not outside", dead_code, "storage", lambda node: id(node), _only("in an input")),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)

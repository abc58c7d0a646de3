"""Rows without keys repaired by the model: NaN cleared or keys set to 0 after the softmax, hidden scores lifted to the least number before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Case, Mutation, check, double, must_be_noticed  # noqa: F401  (the fixture works by being here)
from torch import Tensor

from dilcompile.passes.finding import find_sites, read_operands, score_steps, value_path
from dilcompile.passes.masks import emptiness

B, H, S, D = 2, 3, 7, 4
INF = float("inf")


def qkv() -> tuple[Tensor, ...]:
    return torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def with_padding(empty: bool = True, dtype: torch.dtype = torch.bool) -> Callable[[], tuple[Tensor, ...]]:
    """Queries, keys, values, and 1 where a key counts; with ``empty`` the first batch row has no keys."""

    def make() -> tuple[Tensor, ...]:
        keep = torch.ones(B, S, dtype=dtype)
        keep[1, -3:] = 0
        keep[0] = 0 if empty else 1
        return (*qkv(), keep[:, None, None])

    return make


def cleared(
    scores: Callable[[Tensor, Tensor], Tensor], clear: Callable[[Tensor], Tensor] = torch.nan_to_num
) -> Callable[..., Tensor]:
    return lambda q, k, v, keep: clear(scores(q @ k.mT * 0.4, keep).softmax(-1)) @ v


def filled(fill: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, keep: s.masked_fill(~keep, fill)


def added(fill: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, keep: s + torch.zeros(keep.shape).masked_fill(~keep, fill)


def _dropped(p: Tensor) -> Tensor:
    return torch.nan_to_num(F.dropout(p, 0.5, False), 0.0)


CLEARED: list[Case] = [
    ("cleared", cleared(filled(-INF)), with_padding(), "padding (zero)"),
    ("cleared in place", cleared(filled(-INF), lambda p: (p * 1).nan_to_num_(0.0)), with_padding(), "padding (zero)"),
    ("cleared after dropout", cleared(filled(-INF), _dropped), with_padding(), "padding (zero)"),
    ("cleared and weighed", cleared(filled(-INF), lambda p: p.nan_to_num() * torch.linspace(0.5, 1, H)[:, None, None]), with_padding(), "padding (zero)"),
    ("cleared where nothing is NaN", cleared(filled(-1e30)), with_padding(), "padding (uniform)"),
    ("cleared with no mask", lambda q, k, v: torch.nan_to_num((q @ k.mT).softmax(-1)) @ v, qkv, "none (zero)"),
    ("cleared under an added mask of full rows", lambda q, k, v: torch.nan_to_num((q @ k.mT + torch.full((S, S), -INF).triu(1)).softmax(-1)) @ v, qkv, "causal (zero)"),
    ("not: the gradient is NaN", cleared(added(-INF)), with_padding(False), "kept: padding (other)"),
    ("not: another number", cleared(filled(-INF), lambda p: p.nan_to_num(0.1)), with_padding(), "miss: NaN among the probabilities becomes another number than 0"),
    ("not: a softmax of one's own", lambda q, k, v, keep: torch.nan_to_num((lambda e: e / e.sum(-1, keepdim=True))((q @ k.mT).exp() * keep)) @ v, with_padding(False), "miss: NaN becomes 0 after a softmax that is written out"),
    ("not: less its logsumexp", lambda q, k, v, keep: torch.nan_to_num((lambda s: s - s.logsumexp(-1, keepdim=True))((q @ k.mT).masked_fill(~keep, -INF)).exp()) @ v, with_padding(False), "miss: NaN becomes 0 after a softmax that is written out"),
    ("not: weighed before", lambda q, k, v, keep: torch.nan_to_num((q @ k.mT).masked_fill(~keep, -INF).softmax(-1) * q.mean((2, 3), keepdim=True)) @ v, with_padding(), "miss: the probabilities are multiplied by a tensor before NaN becomes 0"),
]  # fmt: skip


@pytest.mark.parametrize("case", CLEARED, ids=lambda case: case[0])
def test_cleared_probabilities(case: Case) -> None:
    check(case)


def test_added_masks_are_cleared_where_no_gradient_is_asked_for() -> None:
    with torch.no_grad():
        check(("added", cleared(added(-INF)), with_padding(), "padding (zero)"), gradients=False)


LEAST = torch.finfo(torch.float64).min
LATER = torch.ones(S, S, dtype=torch.bool).triu(1)


def _to_zero(p: Tensor, keep: Tensor) -> Tensor:
    return p.masked_fill(~keep, 0.0)


def zeroed(fill: float, late: Callable[[Tensor, Tensor], Tensor] = _to_zero) -> Callable[..., Tensor]:
    """ESPnet's, WeNet's and SpeechBrain's: what is hidden before the softmax is set to 0 after it, too."""
    return lambda q, k, v, keep: late((q @ k.mT * 0.4).masked_fill(~keep, fill).softmax(-1), keep) @ v


def _zeroed_of_two(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Rows whose keys are hidden by both masks together are NaN where only the other one hides."""
    later = torch.arange(S)[:, None] < torch.arange(S)
    return _to_zero((q @ k.mT).masked_fill(later, -INF).masked_fill(~keep, -INF).softmax(-1), keep) @ v


def _zeroed_with_sinks(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    e = (q @ k.mT).masked_fill(~keep, -INF).exp()
    return _to_zero(e / (1 + e.sum(-1, keepdim=True)), keep) @ v


UNHIDDEN = "miss: probabilities become 0 that the mask of the scores does not hide"
ZEROED: list[Case] = [
    ("zeroed", zeroed(-INF), with_padding(), "padding (zero)"),
    ("zeroed: the least number", zeroed(LEAST), with_padding(), "padding (zero)"),
    ("zeroed: by where", zeroed(-1e30, lambda p, keep: torch.where(keep, p, 0.0)), with_padding(), "padding (zero)"),
    ("zeroed: in place", zeroed(LEAST, lambda p, keep: (p * 1).masked_fill_(keep == 0, 0.0)), with_padding(), "padding (zero)"),
    ("zeroed: after dropout", zeroed(LEAST, lambda p, keep: _to_zero(F.dropout(p, 0.5, False), keep)), with_padding(), "padding (zero)"),
    ("zeroed: and weighed", zeroed(LEAST, lambda p, keep: _to_zero(p, keep) * torch.linspace(0.5, 1, H)[:, None, None]), with_padding(), "padding (zero)"),
    ("not: more is zeroed", zeroed(-INF, lambda p, keep: p.masked_fill(LATER | ~keep, 0.0)), with_padding(), UNHIDDEN),
    ("not: others are zeroed", zeroed(-INF, lambda p, keep: p.masked_fill(LATER, 0.0)), with_padding(False), UNHIDDEN),
    ("not: zeroed where nothing is hidden", lambda q, k, v, keep: _to_zero((q @ k.mT).softmax(-1), keep) @ v, with_padding(False), UNHIDDEN),
    ("not: less is zeroed", _zeroed_of_two, with_padding(False), "kept: causal & padding (other)"),
    ("not: zeroed to another number", zeroed(-INF, lambda p, keep: p.masked_fill(~keep, 1e-3)), with_padding(False), "miss: aten.masked_fill stands between the softmax and the values"),
    ("not: zeroed by the scores", lambda q, k, v: (lambda s: s.softmax(-1).masked_fill(s < 0, 0.0) @ v)(q @ k.mT), qkv, "miss: a mask of the probabilities is computed from the scores themselves"),
    ("not: weighed before it is zeroed", zeroed(-INF, lambda p, keep: _to_zero(p * torch.linspace(0.5, 1, H)[:, None, None], keep)), with_padding(), "miss: the probabilities are multiplied by a tensor before some become 0"),
    ("not: zeroed under an added mask, with gradients", lambda q, k, v, keep: _to_zero(added(-INF)(q @ k.mT, keep).softmax(-1), keep) @ v, with_padding(False), "kept: padding (other)"),
    ("not: zeroed beside a sink", _zeroed_with_sinks, with_padding(False), "miss: some probabilities of a softmax that is written out become 0"),
]  # fmt: skip


@pytest.mark.parametrize("case", ZEROED, ids=lambda case: case[0])
def test_probabilities_set_to_zero(case: Case) -> None:
    check(case)


def test_zeroed_under_an_added_mask_where_no_gradient_is_asked_for() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return _to_zero(added(-INF)(q @ k.mT, keep).softmax(-1), keep) @ v

    with torch.no_grad():
        check(("added", call, with_padding(), "padding (zero)"), gradients=False)


def at_least(number: float, mask: Callable[[Tensor, Tensor], Tensor] = lambda s, keep: s) -> Callable[..., Tensor]:
    """xglm's: scores below a number are lifted to it, with ``torch.max``."""
    return lambda q, k, v, keep: torch.max(mask(q @ k.mT * 0.4, keep), torch.tensor(number)).softmax(-1) @ v


def clamped(mask: Callable[[Tensor, Tensor], Tensor], **how: float) -> Callable[..., Tensor]:
    return lambda q, k, v, keep: mask(q @ k.mT * 0.4, keep).clamp(**how).softmax(-1) @ v


def _twice(s: Tensor, keep: Tensor) -> Tensor:
    """What two masks hide is below the least number, and lifted back."""
    return added(LEAST)(s, keep) + torch.full((S, S), LEAST).triu(1)


LIFTED: list[Case] = [
    ("lifted: nothing is hidden", at_least(LEAST), with_padding(), "none (zero)"),
    ("lifted: to -inf", at_least(-INF, filled(-INF)), with_padding(False), "padding (nan)"),
    ("lifted: a filled mask", at_least(LEAST, filled(-INF)), with_padding(), "padding (uniform)"),
    ("lifted: a mask filled with the least number", at_least(LEAST, filled(LEAST)), with_padding(), "padding (uniform)"),
    ("lifted: clamped", clamped(filled(-INF), min=LEAST), with_padding(), "padding (uniform)"),
    ("lifted: clamped, the least number is added", clamped(added(LEAST), min=LEAST), with_padding(), "padding (shifted)"),
    ("lifted: rows that always see a key", at_least(LEAST, lambda s, keep: s + torch.full((S, S), -INF).triu(1)), with_padding(), "causal (zero)"),
    ("lifted: a smaller fill", at_least(LEAST, filled(-1e30)), with_padding(), "padding (uniform)"),
    ("not: half the gradient of rows without keys", at_least(LEAST, added(LEAST)), with_padding(), "kept: padding (other)"),
    ("not: a number that may cut off scores", at_least(-1e4, filled(-INF)), with_padding(), "miss: the scores are clamped at -10000, which may cut off what counts"),
    ("not: from above, too", clamped(filled(-INF), min=LEAST, max=3.0), with_padding(False), "miss: the scores are clamped from above"),
    ("not: masked after", lambda q, k, v, keep: torch.max(q @ k.mT, torch.tensor(LEAST)).masked_fill(~keep, -INF).softmax(-1) @ v, with_padding(False), "miss: the scores are changed after they are clamped"),
    ("not: scaled after", lambda q, k, v, keep: (torch.max((q @ k.mT).masked_fill(~keep, -INF), torch.tensor(LEAST)) * 0.5).softmax(-1) @ v, with_padding(), "miss: the scores are changed after they are clamped"),
    ("not: by data", lambda q, k, v, keep: torch.max(q @ k.mT, q.mean()).softmax(-1) @ v, with_padding(), "miss: the scores are clamped by a computed number"),
]  # fmt: skip


@pytest.mark.parametrize("case", LIFTED, ids=lambda case: case[0])
def test_lifted_scores(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("mask", [added(LEAST), added(-INF), _twice])
def test_lifted_scores_where_no_gradient_is_asked_for(mask: Callable[[Tensor, Tensor], Tensor]) -> None:
    with torch.no_grad():
        golden = ("causal & " if mask is _twice else "") + "padding (uniform)"
        check(("lifted", at_least(LEAST, mask), with_padding(), golden), gradients=False)


def _case(name: str) -> Callable[[], None]:
    (found,) = [case for case in (*CLEARED, *ZEROED, *LIFTED) if case[0] == name]
    return lambda: check(found)  # type: ignore[return-value]


_LIFTED = emptiness._lifted


def _with_all_of_it(level: Any, floor: Any) -> Any:
    return _LIFTED(level, replace(floor, halves=False))


MUTATIONS: list[Mutation] = [
    ("NaN stays", find_sites, "_rows_without_keys", lambda softmax, values: softmax.empty, _case("cleared")),
    ("any number will do", value_path, "_clears", lambda *_: None, _case("not: another number")),
    ("nothing is lifted", emptiness, "_lifted", lambda level, floor: level, _case("lifted: a filled mask")),
    ("all of the gradient is left", emptiness, "_lifted", _with_all_of_it, _case("not: half the gradient of rows without keys")),
    ("any number is the least", score_steps, "largest", lambda node: 0.0, _case("not: a number that may cut off scores")),
    ("gradients don't matter", find_sites, "_rows_without_keys", lambda *_: "zero", _case("not: the gradient is NaN")),
    ("any mask will do", read_operands, "_hides_no_more", lambda *_: True, _case("not: more is zeroed")),
    ("rows without keys don't matter", read_operands, "_hides_no_more", lambda *_: True, _case("not: less is zeroed")),
    ("zeros are not told", read_operands, "_hides_no_more", lambda *_: False, _case("zeroed: the least number")),
    ("weights are no hindrance", value_path, "_zeroes", lambda mask, *_: mask, _case("not: weighed before it is zeroed")),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)

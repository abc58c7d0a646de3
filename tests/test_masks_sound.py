"""Masks and scores spelled so that a careless reader goes wrong: each is exact under ``exact``, and read or left as the golden says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Call, Case, check, double, said  # noqa: F401  (the fixture works by being here)
from spellings import agree
from torch import Tensor

B, H, S, D = 2, 3, 7, 4
LEAST = torch.finfo(torch.float64).min
LEAST32 = torch.finfo(torch.float32).min
INF = float("inf")


def qkv(rows: int = S, columns: int = S) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, rows, D), torch.randn(B, H, columns, D), torch.randn(B, H, columns, D)


def padding(dtype: torch.dtype = torch.bool, left: bool = False, empty: bool = False) -> Tensor:
    """1 where a key counts; row 1 loses three keys; with ``empty`` row 0 loses all."""
    mask = torch.ones(B, S, dtype=dtype)
    mask[1, : 3 if left else S] = 0
    if not left:
        mask[1, : S - 3] = 1
    if empty:
        mask[0] = 0
    return mask


def later(rows: int = S, columns: int = S, diagonal: int = 1) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).triu(diagonal)


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def _with(*more: Callable[[], Tensor]) -> Callable[[], tuple[Any, ...]]:
    return lambda: (*qkv(), *(make() for make in more))


# ---- written in place -------------------------------------------------------------------------------------------------


def scores_setitem(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 2] = -INF
    return attend(scores, v)


def scores_through_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.view(B * H, S, S).masked_fill_(later(), -INF)
    return attend(scores, v)


def mask_setitem(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(S, S)
    mask[:, 2] = -1e30
    return attend(q @ k.mT + mask, v)


def mask_view_made_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(S, S)
    view = mask.view(1, 1, S, S)
    mask[:, 2] = -1e30
    return attend(q @ k.mT + view, v)


def sdpa_mask_setitem(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(S, S, dtype=torch.bool)
    mask[:, 2:4] = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_mask_view_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    mask[:, 2:4].fill_(False)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def padding_written_later(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    weights = (q @ k.mT).masked_fill(~keep[:, None, None], -1e30).softmax(-1)
    keep.fill_(True)
    return weights @ v


def query_scaled_through_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * 1
    q.view(B * H, S, D).mul_(0.3)
    return attend(q @ k.mT, v)


def scores_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.3
    scores += torch.zeros(S, S).masked_fill_(later(), -INF)
    return attend(scores, v)


def probabilities_setitem(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights = weights * 1.0 if weights.requires_grad else weights
    weights[..., 0] = 0
    return weights @ v


WRITTEN: list[Case] = [
    ("scores, by setitem", scores_setitem, qkv, "miss: the scores are written through another view"),
    ("scores, through a view", scores_through_view, qkv, "miss: the scores are written through another view"),
    ("an additive mask, by setitem", mask_setitem, qkv, "other(float masks that are data) + bias (others)"),
    ("an additive mask, seen through an older view", mask_view_made_before, qkv, "other(float masks that are data) + bias (others)"),
    ("a mask of SDPA, by setitem", sdpa_mask_setitem, qkv, "other(ones(q, k)) (zero)"),
    ("a mask of SDPA, through a view", sdpa_mask_view_filled, qkv, "other(tril(q, k)) (zero)"),
    ("padding, after it was used", padding_written_later, _with(padding), "padding (uniform)"),
    ("queries, through a view", query_scaled_through_view, qkv, "none (zero)"),
    ("scores, under their own name", scores_in_place, qkv, "causal (zero)"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case[0])
def test_what_is_written_in_place(case: Case) -> None:
    check(case)


# ---- the score path ---------------------------------------------------------------------------------------------------


def capped_after_shift(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return attend(torch.tanh((scores - scores.amax(-1, keepdim=True)) / 2) * 2, v)


def less_maximum(**how: Any) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return attend(scores - scores.amax(**how), v)

    return call


def of_scores(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: attend(change(q @ k.mT), v)


def of_weights(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: change((q @ k.mT).softmax(-1)) @ v


def heads_mixed(scores: Tensor) -> Tensor:
    return torch.einsum("bhqk,hg->bgqk", scores, torch.arange(9.0).view(3, 3))


def square() -> tuple[Tensor, ...]:
    return tuple(torch.randn(S, S, D) for _ in range(3))


SCORES: list[Case] = [
    ("rounded", of_scores(lambda s: torch.div(s, 0.5, rounding_mode="floor")), qkv, "miss: the scores are rounded"),
    ("cast to integers", of_scores(lambda s: s.to(torch.int32).to(s.dtype)), qkv, "miss: a cast to int32 cuts fractions off"),
    ("clamped", of_scores(lambda s: s.clamp(-1, 1)), qkv, "miss: the scores are clamped from above"),
    ("negated", of_scores(torch.neg), qkv, "none (zero)"),
    ("a fill made small again", of_scores(lambda s: s.masked_fill(later(), -1e4) / 1e4), qkv, "miss: hidden scores are filled with -1, which does not hide them"),
    ("a fill turned round", of_scores(lambda s: s.masked_fill(later(), -1e9) * -1), qkv, "miss: hidden scores are filled with 1e+09, which does not hide them"),
    ("an added fill made small again", of_scores(lambda s: (s + torch.zeros(S, S).masked_fill(later(), -1e4)) / 1e4), qkv, "none + bias (zero)"),
    ("shifted before the cap", capped_after_shift, qkv, "miss: a mask or bias is added before the soft cap"),
    ("masked before the cap", of_scores(lambda s: torch.tanh(s.masked_fill(later(), -1e30) / 2) * 2), qkv, "miss: a mask or bias is added before the soft cap"),
    ("capped", of_scores(lambda s: (torch.tanh(s / 2) * 2).masked_fill(later(), -1e30)), qkv, "causal (zero)"),
    ("less the row's maximum", less_maximum(dim=-1, keepdim=True), qkv, "none (zero)"),
    ("less the column's maximum", less_maximum(dim=-2, keepdim=True), qkv, "miss: a mask or bias is computed from the scores themselves"),
    ("less a maximum broadcast along the wrong axis", less_maximum(dim=-1), square, "miss: a mask or bias is computed from the scores themselves"),
    ("residual talking heads", of_scores(lambda s: s + s.mean(1, keepdim=True)), qkv, "miss: a mask or bias is computed from the scores themselves"),
    ("talking heads", of_scores(heads_mixed), qkv, "miss: the values have a batch axis that the scores lack"),
    ("the largest only", of_scores(lambda s: s.masked_fill(s < s.topk(3, -1)[0][..., -1:], LEAST)), qkv, "miss: a mask or bias is computed from the scores themselves"),
    ("softmax over the queries", lambda q, k, v: (q @ k.mT).softmax(-2) @ v, qkv, "miss: the value product does not sum over the key axis"),
    ("softmax over the queries, turned", lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v, qkv, "miss: the value product does not sum over the key axis"),
    ("softmax over the heads", lambda q, k, v: (q @ k.mT).softmax(1) @ v, qkv, "miss: the softmax does not run over the key axis of the product"),
    ("transposed scores", lambda q, k, v: (k @ q.mT).softmax(-2).mT @ v, qkv, "none (zero)"),
    ("doubled weights", of_weights(lambda w: w * 2), qkv, "none (zero)"),
    ("masked weights", of_weights(lambda w: w.masked_fill(later(), 0)), qkv, "miss: probabilities become 0 that the mask of the scores does not hide"),
    ("renormalised weights", of_weights(lambda w: w / w.sum(-2, keepdim=True)), qkv, "miss: the attention weights are used elsewhere too"),
    ("returned weights", lambda q, k, v: (lambda w: (w @ v, w))((q @ k.mT).softmax(-1)), qkv, "miss: the attention weights are returned"),
    ("weights used twice", lambda q, k, v: (lambda w: w @ v + w @ (2 * v))((q @ k.mT).softmax(-1)), qkv, "miss: the attention weights are used elsewhere too"),
    ("returned scores", lambda q, k, v: (lambda s: (attend(s, v), s))(q @ k.mT), qkv, "none (zero)"),
    ("rounded queries", lambda q, k, v: attend(torch.div(q, 0.5, rounding_mode="floor") @ k.mT, v), qkv, "none (zero)"),
    ("two products", lambda q, k, v: attend(q @ k.mT + q.flip(-1) @ k.mT, v), qkv, "none + bias (zero)"),
    ("a router", lambda q, k, v: (q @ torch.ones(D, D)).softmax(-1) * v, qkv, "nothing"),
]  # fmt: skip


@pytest.mark.parametrize("case", SCORES, ids=lambda case: case[0])
def test_scores_and_weights(case: Case) -> None:
    check(case)


# ---- masks ------------------------------------------------------------------------------------------------------------


def hide(mask: Callable[..., Tensor], fill: float = LEAST) -> Callable[..., Tensor]:
    return lambda q, k, v, *more: attend((q @ k.mT).masked_fill(mask(*more), fill), v)


def add(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, *more: attend(q @ k.mT + mask(*more), v)


def sizes(rows: int, columns: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: qkv(rows, columns)


def places(rows: int = S, columns: int = S) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None, :]


def _numbers() -> Tensor:
    return torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1]])


def _mixed() -> Tensor:
    return torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1]])


def _documents_of_shifted_queries(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
    document = (numbers == 0).cumsum(-1)
    other = document[:, None, 2:, None] != document[:, None, None]
    return attend((q[:, :, 2:] @ k.mT).masked_fill(other | later(S - 2, S, 3), LEAST), v)


def _documents_of_first_queries(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
    document = (numbers == 0).cumsum(-1)
    other = document[:, None, :-2, None] != document[:, None, None]
    return attend((q[:, :, 2:] @ k.mT).masked_fill(other | later(S - 2, S, 3), LEAST), v)


def _per_row(fn: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda keep: fn(keep[:, None, None])


MASKS: list[Case] = [
    ("top left", hide(lambda: later(S, S + 4)), sizes(S, S + 4), "causal (zero)"),
    ("bottom right", hide(lambda: later(S, S + 4, 5)), sizes(S, S + 4), "causal (zero)"),
    ("in between", hide(lambda: later(S, S + 4, 3)), sizes(S, S + 4), "window(inf, 2) (zero)"),
    ("bottom right of fewer keys", hide(lambda: later(S, S - 3, -2)), sizes(S, S - 3), "causal (uniform)"),
    ("a window past the last key", hide(lambda: (lambda q, k: ~((k <= q) & (k > q - 2)))(*places(S, S - 3))), sizes(S, S - 3), "causal & window(1, 0) (uniform)"),
    ("strictly earlier", hide(lambda: ~torch.ones(S, S, dtype=torch.bool).tril(-1)), qkv, "window(inf, -1) (uniform)"),
    ("not earlier", hide(lambda: ~torch.ones(S, S, dtype=torch.bool).triu()), qkv, "window(0, inf) (zero)"),
    ("two later", hide(lambda: ~torch.ones(S, S, dtype=torch.bool).triu(2)), qkv, "window(-2, inf) (uniform)"),
    ("turned round", hide(lambda: later().flip(-1)), qkv, "other(not (flip(q, k))) (uniform)"),
    ("a prefix", hide(lambda: (lambda q, k: ~((k <= q) | (k < 3)))(*places())), qkv, "prefix (zero)"),
    ("indexed from the back", hide(lambda: later()[torch.arange(S) - 1]), qkv, "rows (uniform)"),
    ("indexed in order", hide(lambda: later()[torch.arange(S)]), qkv, "causal (zero)"),
    ("padding", hide(_per_row(torch.logical_not)), _with(padding), "padding (uniform)"),
    ("padding that hides a batch row", hide(_per_row(torch.logical_not)), _with(lambda: padding(empty=True)), "padding (uniform)"),
    ("padding rolled on", hide(_per_row(lambda m: ~m.roll(1, -1))), _with(padding), "padding (uniform)"),
    ("padding of values 0 and 2", hide(_per_row(lambda m: m == 0)), _with(lambda: padding(torch.int64) * 2), "padding (uniform)"),
    ("padding below zero", hide(_per_row(lambda m: m < 0)), _with(lambda: padding(torch.int64) - 1), "padding (uniform)"),
    ("padding of the queries too", hide(lambda m: ~(m[:, None, None] & m[:, None, :, None])), _with(padding), "rows & padding (uniform)"),
    ("padding along the heads", hide(lambda m: ~m[None, :, None]), lambda: (*qkv(), torch.rand(H, S) > 0.2), "other(l_inputs_3_(h, k)) (uniform)"),
    ("an offset as a tensor", hide(lambda p: (lambda q, k: ~(k <= q + p))(*places())), lambda: (*qkv(), torch.tensor(1)), "causal (uniform)"),
    ("an offset a batch row", hide(lambda p: (lambda q, k: ~(k <= q + p[:, None, None, None]))(*places())), lambda: (*qkv(), torch.tensor([1, 2])), "rows (uniform)"),
    ("padding behind memory keys", hide(lambda m: ~torch.cat((torch.ones(B, 2, dtype=torch.bool), m), -1)[:, None, None]), lambda: (*qkv(S, S + 2), padding()), "padding (uniform)"),
    ("padding before memory keys", hide(lambda m: ~torch.cat((m, torch.ones(B, 2, dtype=torch.bool)), -1)[:, None, None]), lambda: (*qkv(S, S + 2), padding()), "padding (uniform)"),
    ("more dims than the scores", lambda q, k, v, m: attend((q[0] @ k[0].mT).masked_fill(~m[:, None, None], LEAST), v[0]), _with(padding), "miss: the softmax does not run over the key axis of the product"),
    ("a bias of more rows than the scores", lambda q, k, v, m: attend(q[:, :, :1] @ k.mT + m, v), lambda: (*qkv(), torch.randn(S, S)), "miss: an axis of the probabilities is neither query, head nor batch"),
]  # fmt: skip


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case[0])
def test_masks(case: Case) -> None:
    check(case)


FORWARD_ONLY: list[Case] = [
    ("strictly earlier, with infinity", hide(lambda: ~torch.ones(S, S, dtype=torch.bool).tril(-1), -INF), qkv, "window(inf, -1) (nan)"),
    ("padding that hides a batch row, with infinity", hide(_per_row(torch.logical_not), -INF), _with(lambda: padding(empty=True)), "padding (nan)"),
    ("a fill that float32 can't hold", lambda q, k, v, m: (q @ k.mT).masked_fill(~m[:, None, None], LEAST).softmax(-1, dtype=torch.float32).to(v.dtype) @ v, _with(lambda: padding(empty=True)), "padding (nan)"),
    ("an added number that float32 can't hold", add(lambda m: (1 - m[:, None, None].float()) * LEAST), _with(padding), "other(float masks that are data) + bias (others)"),
    ("a product that halves can't hold", add(lambda m: (1 - m[:, None, None].bfloat16()) * LEAST32), _with(lambda: padding(empty=True)), "padding (nan)"),
    ("numbers whose product halves can't hold", add(lambda m: (1 - m[:, None, None].bfloat16()) * LEAST32), _with(lambda: padding(torch.int64, empty=True)), "other(float masks that are data) + bias (others)"),
    ("a cast to halves that can't hold it", add(lambda m: ((1 - m[:, None, None].float()) * LEAST32).bfloat16()), _with(lambda: padding(empty=True)), "padding (nan)"),
    ("four times a fill, which float32 can't hold", lambda q, k, v, m: (q @ k.mT).float().masked_fill(~m[:, None, None], LEAST32).mul(4).double().softmax(-1) @ v, _with(lambda: padding(empty=True)), "kept: padding (nan)"),
    ("fractions and the least number", add(lambda m: (1 - m[:, None, None]) * LEAST), _with(lambda: padding(torch.float64) / 2 + 0.5), "padding (uniform)"),
]  # fmt: skip


@pytest.mark.parametrize("case", FORWARD_ONLY, ids=lambda case: case[0])
def test_masks_without_gradients(case: Case) -> None:
    """NaN rows are NaN; their gradients are not reproduced (they would poison every weight)."""
    with torch.no_grad():
        check(case, gradients=False, tolerance=1e-6 if "float32" in case[0] else 1e-9)


ADDED: list[Case] = [
    ("a small number", add(lambda m: (1 - m[:, None, None].to(torch.float64)) * -1e4), _with(padding), "padding (zero)"),
    ("a small number that hides a batch row", add(lambda m: (1 - m[:, None, None].to(torch.float64)) * -1e4), _with(lambda: padding(empty=True)), "padding (zero)"),
    ("a small number on integers", add(lambda m: (m[:, None, None] - 1) * 1e4), _with(lambda: padding(torch.int64, empty=True)), "padding (zero)"),
    ("the least number that hides a batch row", add(lambda m: (1 - m[:, None, None].to(torch.float64)) * LEAST), _with(lambda: padding(empty=True)), "padding (shifted)"),
    ("fractions", add(lambda m: (1 - m[:, None, None]) * -1e4), lambda: (*qkv(), 1 - torch.rand(B, S) * 1e-4), "none + bias (zero)"),
    ("learned fractions and the least number", add(lambda m: (1 - m[:, None, None]) * LEAST), _with(lambda: padding(torch.float64) / 2 + 0.5), "kept: other(float masks that are data) + bias (other)"),
    ("bytes", add(lambda m: (1 - m[:, None, None]) * -1e4), _with(lambda: padding(torch.uint8)), "none + bias (zero)"),
    ("bytes that wrap around", add(lambda m: (m[:, None, None] - 1) * 1e4), _with(lambda: padding(torch.uint8)), "none + bias (zero)"),
    ("positions beside data", add(lambda m: m[:, None, None] * -10000.0 + torch.arange(S) * 2000.0), _with(lambda: padding(torch.int64)), "padding + bias (zero)"),
    ("a constant", add(lambda: torch.where(later(), -1e30, 1.0)), qkv, "other(float masks that are data) + bias (others)"),
    ("turned round and filled", lambda q, k, v, m: attend(q @ k.mT + (lambda t: t.masked_fill(t.to(torch.bool), LEAST))(1.0 - m[:, None, None].expand(-1, 1, S, -1).double()), v), _with(lambda: padding(torch.int64, empty=True)), "padding (shifted)"),
    ("turned round, scaled and filled", lambda q, k, v, m: attend(q @ k.mT + (lambda t: (t * -3).masked_fill(t != 0, LEAST))(1.0 - m[:, None, None].double()), v), _with(lambda: padding(torch.int64)), "padding (shifted)"),
    ("a logarithm", lambda q, k, v: attend(q @ k.mT + (~later()).double().log(), v), qkv, "causal (zero)"),
    ("data that the softmax's float32 can't hold", lambda q, k, v, m, a: ((q @ k.mT + a.detach() * torch.where(m, 1.0, LEAST)[:, None, None]).softmax(-1, torch.float32).double() @ v), lambda: (*qkv(), padding(empty=True), torch.randn(B, H, S, S)), "kept: other(float masks that are data) + bias (other)"),
    ("learned numbers and fills in one", lambda q, k, v, m, a: attend(q @ k.mT + (a * 2).masked_fill(~m[:, None, None], LEAST), v), lambda: (*qkv(), padding(empty=True), torch.randn(B, H, S, S)), "padding + bias (others)"),
    ("causal and padding in one", lambda q, k, v, m: attend(torch.where(~later() & m[:, None, None], q @ k.mT, LEAST), v), _with(lambda: padding(left=True)), "causal & padding (uniform)"),
    ("causal and padding by one addition", add(lambda m: torch.where(~later() & m[:, None, None], 0.0, LEAST)), _with(lambda: padding(left=True)), "causal & padding (shifted)"),
    ("causal and padding by a small number", add(lambda m: (1 - (~later() & m[:, None, None]).to(torch.float64)) * -1e4), _with(lambda: padding(left=True)), "causal & padding (others)"),
    ("causal and padding by two fills", lambda q, k, v, m: attend((q @ k.mT).masked_fill(later(), -INF).masked_fill(~m[:, None, None], LEAST), v), _with(lambda: padding(left=True)), "causal & padding (others)"),
    ("causal and padding by the same fill", lambda q, k, v, m: attend((q @ k.mT).masked_fill(later(), -1e30).masked_fill(~m[:, None, None], -1e30), v), _with(lambda: padding(left=True)), "causal & padding (uniform)"),
    ("a bias after the fill", lambda q, k, v, m, a: attend((q @ k.mT).masked_fill(~m[:, None, None], -1e30) + a, v), lambda: (*qkv(), padding(empty=True), torch.randn(S, S)), "padding + bias (others)"),
    ("a bias before the fill", lambda q, k, v, m, a: attend((q @ k.mT + a).masked_fill(~m[:, None, None], -1e30), v), lambda: (*qkv(), padding(empty=True), torch.randn(S, S)), "padding + bias (uniform)"),
]  # fmt: skip


@pytest.mark.parametrize("case", ADDED, ids=lambda case: case[0])
def test_added_masks(case: Case) -> None:
    check(case)


DOCUMENTS: list[Case] = [
    ("counted", hide(lambda n: (lambda d: d[:, None, :, None] != d[:, None, None])((n == 0).cumsum(-1))), _with(_numbers), "document (zero)"),
    ("counted, causal", hide(lambda n: (lambda d: (d[:, None, :, None] != d[:, None, None]) | later())((n == 0).cumsum(-1))), _with(_numbers), "causal & document (zero)"),
    ("numbers that may come back", hide(lambda n: n[:, None, :, None] != n[:, None, None]), _with(_mixed), "label (zero)"),
    ("looked up", hide(lambda n, t: (lambda d: d[:, None, :, None] != d[:, None, None])(t[n])), lambda: (*qkv(), _mixed(), torch.tensor([3, 5])), "label (zero)"),
    ("a sum that falls", hide(lambda n: (lambda d: d[:, None, :, None] != d[:, None, None])((2 * n - 1).cumsum(-1))), _with(_mixed), "label (zero)"),
    ("of shifted queries", _documents_of_shifted_queries, _with(_numbers), "causal & pairs (zero)"),
    ("of the first queries", _documents_of_first_queries, _with(_numbers), "causal & label (zero)"),
]  # fmt: skip


@pytest.mark.parametrize("case", DOCUMENTS, ids=lambda case: case[0])
def test_documents(case: Case) -> None:
    check(case)


# ---- scaled_dot_product_attention ------------------------------------------------------------------------------------


def sdpa(**how: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **how)


def sdpa_masked(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, *more: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(*more))


SDPA: list[Case] = [
    ("causal of more keys", sdpa(is_causal=True), sizes(S, S + 4), "causal (zero)"),
    ("causal of fewer keys", sdpa(is_causal=True), sizes(S, S - 4), "causal (zero)"),
    ("a batch row hidden", sdpa_masked(lambda m: m[:, None, None]), _with(lambda: padding(empty=True)), "padding (zero)"),
    ("a batch row hidden with infinity", sdpa_masked(lambda m: torch.zeros(B, S).masked_fill(~m, -INF)[:, None, None]), _with(lambda: padding(empty=True)), "padding (zero)"),
    ("a two-dim mask", sdpa_masked(lambda: ~later()), qkv, "causal (zero)"),
    ("a two-dim bias", sdpa_masked(lambda a: a), lambda: (*qkv(), torch.randn(S, S)), "none + bias (zero)"),
    ("a row of bias", sdpa_masked(lambda a: a), lambda: (*qkv(), torch.randn(B, 1, 1, S)), "none + bias (zero)"),
    ("one query batch for all keys", lambda q, k, v: F.scaled_dot_product_attention(q[:1], k, v), qkv, "none (zero)"),
    ("one key batch for all queries", lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), qkv, "none (zero)"),
]  # fmt: skip


@pytest.mark.parametrize("case", SDPA, ids=lambda case: case[0])
def test_sdpa(case: Case) -> None:
    check(case)


def test_a_number_of_the_caller_may_be_negative() -> None:
    """Under symbolic shapes an int argument is no length: ``k <= q + n`` with n = -20 hides everything, not nothing."""

    def call(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        rows, columns = places()
        return attend((q @ k.mT).masked_fill(~(columns <= rows + n + S), LEAST), v)

    for n in (5, -3, -20):
        agree(Call(call), *qkv(), n, dynamic=True)


def test_a_checked_buffer_is_read_as_a_band_and_an_odd_one_is_not() -> None:
    band = torch.ones(S + 2, S + 2, dtype=torch.bool).tril()
    odd = band.clone()
    odd[4, 1] = False
    texts = []
    for table in (band, odd, band.double(), torch.zeros(S + 2, S + 2).masked_fill(~band, -INF)):
        module = Call(lambda q, k, v: None, table=table)

        def call(q: Tensor, k: Tensor, v: Tensor, module: Call = module) -> Tensor:
            cut = module.table[:S, :S]
            if cut.dtype is torch.bool:
                return attend((q @ k.mT).masked_fill(~cut, LEAST), v)
            return attend(q @ k.mT + cut, v) if cut.min() < 0 else attend((q @ k.mT).masked_fill(cut == 0, LEAST), v)

        module.function = call if table.dtype is torch.bool else _float_table(module, table)
        texts.append(said(agree(module, *qkv())))
    assert texts == ["causal (zero)", "other(l_self_buffers_table_(q, k)) (uniform)", "causal (zero)", "causal (zero)"]


def _float_table(module: Call, table: Tensor) -> Callable[..., Tensor]:
    if table.min() < 0:
        return lambda q, k, v: attend(q @ k.mT + module.table[:S, :S], v)
    return lambda q, k, v: attend((q @ k.mT).masked_fill(module.table[:S, :S] == 0, LEAST), v)

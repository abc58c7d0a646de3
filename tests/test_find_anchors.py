"""Every spelling rule: what it must find, exactly, and what it must not; each negative is named by its reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import test_find_flash
import test_find_flex
import torch
import torch.nn.functional as F
from finding import Call, Case, check, double  # noqa: F401  (the fixture works by being here)
from spellings import agree
from torch import Tensor, nn

from dilcompile.passes.finding.spellings import SPELLINGS

B, H, S, D = 2, 3, 7, 4
INF = float("inf")
aten = torch.ops.aten


def linear_over_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    x = F.linear((q @ k.mT).softmax(-1) @ v, torch.nn.Parameter(weight))
    return q.softmax(-1) @ (x.softmax(-2).mT @ v)


def qkv() -> tuple[Tensor, ...]:
    return torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def with_padding(empty: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    """Queries, keys, values, and true where a key counts; with ``empty`` the first batch row has no keys."""

    def make() -> tuple[Tensor, ...]:
        keep = torch.ones(B, S, dtype=torch.bool)
        keep[1, -3:] = False
        keep[0] = not empty
        return (*qkv(), keep[:, None, None])

    return make


def later() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def written(weights: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Causal attention with a softmax of one's own."""
    return lambda q, k, v: weights((q @ k.mT * 0.4).masked_fill(later(), -INF)) @ v


def padded(weights: Callable[..., Tensor], fill: float = -INF) -> Callable[..., Tensor]:
    return lambda q, k, v, keep: weights((q @ k.mT).masked_fill(~keep, fill)) @ v


def _assembled(k: Tensor) -> Tensor:
    """As DeepSeek puts its keys together."""
    whole = torch.empty_like(k)
    whole[..., :2] = k[..., :2]
    whole[..., 2:] = k[..., 2:] * 2
    return whole


def _in_chunks(scores: Tensor) -> Tensor:
    """As models of sliding chunks put their scores together."""
    whole = scores.new_zeros(scores.shape)
    whole[..., 3:] = scores[..., :-3]
    return whole


def _scaled_in_place(q: Tensor) -> Tensor:
    q = q * 1
    q.view(B * H, S, D).mul_(0.3)
    return q


def over_sum(e: Tensor, dim: int = -1) -> Tensor:
    return e / e.sum(dim, keepdim=True)


def divided_after(e: Tensor, v: Tensor, cut: Callable[[Tensor], Tensor] = lambda number: number) -> Tensor:
    return e @ v / cut(e.sum(-1, keepdim=True))


def cleared(number: Tensor) -> Tensor:
    number[:, :, 0] = 0
    return number


def shifted(s: Tensor, dim: int = -1) -> Tensor:
    return (s - s.amax(dim, keepdim=True)).exp()


def _twice(s: Tensor) -> Tensor:
    e = s.exp()
    return e / e.sum(-1, keepdim=True) * 2


CASES: dict[str, list[Case]] = {
    "sdpa": [
        ("found", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), qkv, "causal (zero)"),
        ("not found: ranks differ", lambda q, k, v: F.scaled_dot_product_attention(q, k[0], v[0]), qkv, "miss: query, key and value have different ranks"),
        ("found: scaled through a view", lambda q, k, v: F.scaled_dot_product_attention(_scaled_in_place(q), k, v), qkv, "none (zero)"),
        ("not found: inside vmap", lambda q, k, v: torch.vmap(F.scaled_dot_product_attention)(q, k, v), qkv, "miss: it runs inside vmap"),
        ("found: a mask that no rule reads", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=later().flip(-1).index_fill(1, torch.tensor([0]), True)), qkv, "other(index_fill(q, k)) (zero)"),
        ("not found: a product of activations in its place", lambda q, k, v: q @ k.mT @ v, qkv, "nothing"),
    ],
    "fused sdpa": [
        ("found", lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0], qkv, "causal (zero)"),
        ("found: math", lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, True, scale=0.3)[0], qkv, "causal (zero)"),
        ("found: a mask", lambda q, k, v, m: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=torch.zeros(B, 1, 1, S).masked_fill(~m, -INF))[0], with_padding(), "padding (zero)"),
        ("not found: the log-sum-exp is used", lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v), qkv, "miss: the log-sum-exp or another by-product of the call is used too"),
        ("not found: the dropout mask is given", lambda q, k, v: aten._scaled_dot_product_attention_math(q, k, v, None, 0.5, False, torch.ones(B, H, S, S))[0], qkv, "miss: the dropout mask is given"),
        ("not found: nothing is used", lambda q, k, v: (aten._scaled_dot_product_attention_math(q, k, v), q * v)[1], qkv, "nothing"),
    ],
    "softmax": [
        ("found", written(lambda s: s.softmax(-1)), qkv, "causal (zero)"),
        ("found: safe", padded(lambda s: aten._safe_softmax(s, -1)), with_padding(empty=True), "padding (zero)"),
        ("found: over the rows of transposed scores", lambda q, k, v: (k @ q.mT).softmax(-2).mT @ v, qkv, "none (zero)"),
        ("found: scores by F.linear", lambda q, k, v: F.softmax(F.linear(q[:, 0], k[0, 0]), -1) @ v[0, 0], qkv, "none (zero)"),
        ("found: both by F.linear", lambda q, k, v: F.linear(F.softmax(F.linear(q[0, 0], k[0, 0]), -1), v[0, 0].mT), qkv, "none (zero)"),
        ("found: one key", lambda q, k, v: (q @ k[:, :, :1].mT).softmax(-1) @ v[:, :, :1], qkv, "none (zero)"),
        ("found: one row and one key", lambda q, k, v: (q[:, :, :1] @ k[:, :, :1].mT).softmax(-1) @ v[:, :, :1], qkv, "none (zero)"),
        ("found: keys assembled in place", lambda q, k, v: (q @ _assembled(k).mT).softmax(-1) @ v, qkv, "none (zero)"),
        ("found: weights expanded to their own shape", lambda q, k, v: (q @ k.mT).softmax(-1).expand(-1, -1, S, S) @ v, qkv, "none (zero)"),
        ("not found: weights expanded to more heads", lambda q, k, v: (q[:, :1] @ k[:, :1].mT).softmax(-1).expand(B, H, S, S) @ v, qkv, "miss: aten.expand stands between the softmax and the values"),
        ("found: a second product beside", lambda q, k, v: (q @ k.mT + (v @ k.mT).masked_fill(later(), 0.5)).softmax(-1) @ v, qkv, "none + bias (zero)"),
        ("not found: over the heads", lambda q, k, v: (q @ k.mT).softmax(1) @ v, qkv, "miss: the softmax does not run over the key axis of the product"),
        ("not found: F.linear with a bias of data", lambda q, k, v: F.softmax(F.linear(q[0, 0], k[0, 0], v[0, 0, :, 0]), -1) @ v[0, 0], qkv, "none + bias (zero)"),
        ("not found: linear attention over an attention's projected result", linear_over_attention, lambda: (*qkv(), torch.randn(4, 4)), "none (zero)"),
        ("not found: a router", lambda q, k, v: q.flatten(2).softmax(-1) * v.flatten(2), qkv, "nothing"),
        ("not found: rolled scores", lambda q, k, v: (q @ k.mT).roll(1, -1).softmax(-1) @ v, qkv, "miss: aten.roll stands between the product and the softmax"),
        ("not found: scores copied part by part", lambda q, k, v: _in_chunks(q @ k.mT).softmax(-1) @ v, qkv, "miss: the scores are copied part by part into another tensor (blocks or sliding chunks)"),
        ("not found: sorted weights", lambda q, k, v: (q @ k.mT).softmax(-1).flip(-1) @ v, qkv, "miss: aten.flip stands between the softmax and the values"),
    ],
    "renormalised softmax": [
        ("found", lambda q, k, v, m: over_sum((q @ k.mT).softmax(-1) * m) @ v, with_padding(), "padding (nan)"),
        ("found: a mask of integers", lambda q, k, v, m: over_sum((q @ k.mT).softmax(-1) * m.long().to(q.dtype)) @ v, with_padding(), "padding (nan)"),
        ("found: a triangle", lambda q, k, v: over_sum((q @ k.mT).softmax(-1) * torch.ones(S, S).tril()) @ v, qkv, "causal (zero)"),
        ("found: filled", lambda q, k, v: over_sum((q @ k.mT).softmax(-1).masked_fill(later(), 0)) @ v, qkv, "causal (zero)"),
        ("found: chosen", lambda q, k, v: over_sum(torch.where(later(), 0.0, (q @ k.mT).softmax(-1))) @ v, qkv, "causal (zero)"),
        ("found: masked before, too", padded(lambda s: over_sum(s.softmax(-1) * ~later())), with_padding(), "causal & padding (nan)"),
        ("found: without a mask", written(lambda s: over_sum(s.softmax(-1))), qkv, "causal (zero)"),
        ("found: without a mask, rows that see nothing", padded(lambda s: over_sum(s.softmax(-1)), -1e30), with_padding(empty=True), "padding (uniform)"),
        ("found: without a mask, safe", padded(lambda s: over_sum(aten._safe_softmax(s, -1))), with_padding(), "padding (nan)"),
        ("found: dropout after", lambda q, k, v, m: F.dropout(over_sum((q @ k.mT).softmax(-1) * m), 0.5, False) @ v, with_padding(), "padding (nan)"),
        ("found: divided after the values", lambda q, k, v, m: divided_after((q @ k.mT).softmax(-1) * m, v), with_padding(), "padding (nan)"),
        ("kept: rows that a number keeps for the second mask", lambda q, k, v, m: over_sum((q @ k.mT).masked_fill(~m, -1e4).softmax(-1) * (torch.arange(S) > 2)) @ v, with_padding(), "kept: padding (other)"),
        ("not found: a number in the sum", lambda q, k, v, m: (lambda p: p / (p.sum(-1, keepdim=True) + 1e-6))((q @ k.mT).softmax(-1) * m) @ v, with_padding(), "miss: the sum that the probabilities are divided by is made larger: they don't sum up to one"),
        ("not found: a router's weights", lambda q, k, v: (lambda p: p / (p.sum(-1, keepdim=True) + 1e-6))(q.flatten(2).softmax(-1)) * v.flatten(2), qkv, "nothing"),
        ("not found: a clamped sum", lambda q, k, v, m: (lambda p: p / p.sum(-1, keepdim=True).clamp(min=1e-6))((q @ k.mT).softmax(-1) * m) @ v, with_padding(), "miss: the sum that the probabilities are divided by is made larger: they don't sum up to one"),
        ("not found: over the column's sum", lambda q, k, v, m: over_sum((q @ k.mT).softmax(-1) * m, -2) @ v, with_padding(), "miss: the attention weights are used elsewhere too"),
        ("not found: a mask of other numbers", lambda q, k, v: over_sum((q @ k.mT).softmax(-1) * (torch.ones(S, S).tril() + 1)) @ v, qkv, "miss: the attention weights are used elsewhere too"),
        ("not found: integers that may be others", lambda q, k, v, m: over_sum((q @ k.mT).softmax(-1) * (m.long() + m)) @ v, with_padding(), "miss: the attention weights are used elsewhere too"),
        ("not found: dropout before", lambda q, k, v, m: over_sum(F.dropout((q @ k.mT).softmax(-1), 0.5, False) * m) @ v, with_padding(), "miss: the attention weights are used elsewhere too"),
        ("not found: the sum of the unmasked", lambda q, k, v, m: (lambda p: (p * m) / (2 * p).sum(-1, keepdim=True))((q @ k.mT).softmax(-1)) @ v, with_padding(), "miss: the attention weights are used elsewhere too"),
        ("not found: a sink in the first sum", lambda q, k, v, m: over_sum(F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :S] * m) @ v, with_padding(), "miss: the attention weights are used elsewhere too"),
    ],
    "safe softmax": [
        ("found: as SDPA decomposes", padded(lambda s: torch.where((s != -INF).any(-1, keepdim=True).logical_not(), torch.full_like(s, 0), s.softmax(-1))), with_padding(empty=True), "padding (zero)"),
        ("found: all of a row", padded(lambda s: s.softmax(-1).masked_fill((s == -INF).all(-1, keepdim=True), 0.0)), with_padding(empty=True), "padding (zero)"),
        ("found: negated twice", padded(lambda s: torch.where(~(~(s == -INF)).any(-1, keepdim=True), 0.0, s.softmax(-1))), with_padding(), "padding (zero)"),
        ("found: rows that a number keeps", padded(lambda s: s.softmax(-1).masked_fill((s == -INF).all(-1, keepdim=True), 0.0), -1e30), with_padding(empty=True), "padding (uniform)"),
        ("kept: the gradient is NaN", lambda q, k, v, m: (lambda s: s.softmax(-1).masked_fill((s == -INF).all(-1, keepdim=True), 0.0))(q @ k.mT + torch.zeros(B, 1, 1, S).masked_fill(~m, -INF)) @ v, with_padding(), "kept: padding (other)"),
        ("not found: rows that see something", padded(lambda s: torch.where((s != -INF).any(-1, keepdim=True), 0.0, s.softmax(-1))), with_padding(), "miss: a mask of the probabilities is computed from the scores themselves"),
        ("not found: rows with one hidden score", padded(lambda s: s.softmax(-1).masked_fill((s == -INF).any(-1, keepdim=True), 0.0)), with_padding(), "miss: a mask of the probabilities is computed from the scores themselves"),
        ("not found: some hidden, twice negated", padded(lambda s: s.softmax(-1).masked_fill(~(s != -INF).all(-1, keepdim=True), 0.0)), with_padding(), "miss: a mask of the probabilities is computed from the scores themselves"),
        ("not found: over the columns", padded(lambda s: s.softmax(-1).masked_fill((s == -INF).all(-2, keepdim=True), 0.0)), with_padding(), "miss: a mask of the probabilities is computed from the scores themselves"),
        ("not found: of another's scores", lambda q, k, v, m: (lambda s: s.softmax(-1).masked_fill((s + 1 == -INF).all(-1, keepdim=True), 0.0))((q @ k.mT).masked_fill(~m, -INF)) @ v, with_padding(), "miss: a mask of the probabilities is computed from the scores themselves"),
        ("not found: another number", padded(lambda s: s.softmax(-1).masked_fill((s == -INF).all(-1, keepdim=True), 0.1)), with_padding(), "miss: aten.masked_fill stands between the softmax and the values"),
        ("not found: another infinity", padded(lambda s: s.softmax(-1).masked_fill((s == INF).all(-1, keepdim=True), 0.0)), with_padding(), "miss: a mask of the probabilities is computed from the scores themselves"),
        ("not found: a softmax that sees less", padded(lambda s: s.softmax(-1, dtype=torch.float32).masked_fill((s == -INF).all(-1, keepdim=True), 0.0).double()), with_padding(), "miss: a mask of the probabilities is computed from the scores themselves"),
        ("not found: the plain one is used, too", padded(lambda s: (lambda p: p.masked_fill((s == -INF).all(-1, keepdim=True), 0.0) + p)(s.softmax(-1))), with_padding(), "miss: the attention weights are used elsewhere too"),
    ],
    "exp of log_softmax": [
        ("found", written(lambda s: s.log_softmax(-1).exp()), qkv, "causal (zero)"),
        ("found: the least number", padded(lambda s: F.log_softmax(s, -1).exp(), -1e30), with_padding(empty=True), "padding (uniform)"),
        ("not found: logarithms halved", written(lambda s: (s.log_softmax(-1) / 2).exp()), qkv, "nothing"),
        ("not found: the logarithms themselves", lambda q, k, v: (q @ k.mT).log_softmax(-1) @ v, qkv, "nothing"),
        ("not found: over the queries", lambda q, k, v: (q @ k.mT).log_softmax(-2).exp() @ v, qkv, "miss: the value product does not sum over the key axis"),
    ],
    "exp less logsumexp": [
        ("found", written(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp()), qkv, "causal (zero)"),
        ("found: as a row", written(lambda s: (s - s.logsumexp(-1)[..., None]).exp()), qkv, "causal (zero)"),
        ("kept: rows that lose their number in rounding", padded(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(), -1e30), with_padding(empty=True), "kept: padding (other)"),
        ("not found: less the column's", lambda q, k, v: (lambda s: s - s.logsumexp(-2, keepdim=True))(q @ k.mT).exp() @ v, qkv, "miss: the value product does not sum over the key axis"),
        ("not found: less another's", lambda q, k, v: (lambda s: s - (2 * s).logsumexp(-1, keepdim=True))(q @ k.mT).exp() @ v, qkv, "nothing"),
        ("not found: less half of it", lambda q, k, v: (lambda s: torch.sub(s, s.logsumexp(-1, keepdim=True), alpha=0.5))(q @ k.mT).exp() @ v, qkv, "nothing"),
    ],
    "exp over sum": [
        ("found", written(lambda s: over_sum(s.exp())), qkv, "causal (zero)"),
        ("found: the maximum taken off", written(lambda s: over_sum(shifted(s))), qkv, "causal (zero)"),
        ("found: the maximum as a pair", written(lambda s: over_sum((s - s.max(-1, keepdim=True).values).exp())), qkv, "causal (zero)"),
        ("found: a detached maximum", written(lambda s: over_sum((s - s.detach().amax(-1, keepdim=True)).exp())), qkv, "causal (zero)"),
        ("found: by the reciprocal", written(lambda s: s.exp() * s.exp().sum(-1, keepdim=True).reciprocal()), qkv, "nothing"),
        ("found: by its own reciprocal", written(lambda s: (lambda e: e * e.sum(-1, keepdim=True).reciprocal())(s.exp())), qkv, "causal (zero)"),
        ("found: clamped without effect", written(lambda s: (lambda e: e / e.sum(-1, keepdim=True).clamp(min=1e-6))(shifted(s))), qkv, "causal (zero)"),
        ("found: a number in the sum", padded(lambda s: (lambda e: e / (e.sum(-1, keepdim=True) + 1e-3))(s.exp())), with_padding(empty=True), "padding (zero)"),
        ("found: softmax1", written(lambda s: (lambda e: e / (1 + e.sum(-1, keepdim=True)))(s.exp())), qkv, "causal (zero)"),
        ("found: base 2", written(lambda s: over_sum((s - s.amax(-1, keepdim=True)).exp2())), qkv, "causal (zero)"),
        ("found: base 2, filled with a number", padded(lambda s: over_sum((s * math.log2(math.e)).exp2()), -1e4), with_padding(), "padding (nan)"),
        ("found: base 2, softmax1", written(lambda s: (lambda e: e / (1 + e.sum(-1, keepdim=True)))(s.exp2())), qkv, "causal (zero)"),
        ("not found: base 2 over base e", written(lambda s: s.exp2() / s.exp().sum(-1, keepdim=True)), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("found: masked exponentials", lambda q, k, v, m: over_sum((q @ k.mT).exp() * m) @ v, with_padding(), "padding (nan)"),
        ("found: filled exponentials", lambda q, k, v, m: over_sum(shifted(q @ k.mT).masked_fill(~m, 0.0)) @ v, with_padding(), "padding (nan)"),
        ("found: rows that see nothing, the maximum taken off", padded(lambda s: over_sum(shifted(s)), -1e30), with_padding(empty=True), "padding (uniform)"),
        ("not found: a number in the shifted sum", written(lambda s: (lambda e: e / (e.sum(-1, keepdim=True) + 1))(shifted(s))), qkv, "miss: a number is added to the sum after the row's maximum was taken off: it weighs differently in every row"),
        ("not found: clamped", written(lambda s: (lambda e: e / e.sum(-1, keepdim=True).clamp(min=2.0))(s.exp())), qkv, "miss: the sum of exponentials is clamped"),
        ("not found: clamped where the maximum may be masked", lambda q, k, v, m: (lambda e: e / e.sum(-1, keepdim=True).clamp(min=0.5))(shifted(q @ k.mT) * m) @ v, with_padding(), "miss: the sum of exponentials is clamped"),
        ("not found: over the column's sum", lambda q, k, v: over_sum((q @ k.mT).exp(), -2) @ v, qkv, "miss: the value product does not sum over the key axis"),
        ("not found: over another's sum", lambda q, k, v: (lambda s: s.exp() / (2 * s).exp().sum(-1, keepdim=True))(q @ k.mT) @ v, qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("found: divided after the values", lambda q, k, v: divided_after((q @ k.mT).exp(), v), qkv, "none (zero)"),
        ("found: divided after the values, the maximum taken off", lambda q, k, v: divided_after(shifted((q @ k.mT).masked_fill(later(), -INF)), v), qkv, "causal (zero)"),
        ("found: divided after the values, as rows", lambda q, k, v: (lambda e: e @ v / e.sum(-1)[..., None])(shifted(q @ k.mT)), qkv, "none (zero)"),
        ("found: divided after the values, in another layout", lambda q, k, v: (lambda e: torch.einsum("bhqk,bhkd->bqhd", e, v) / e.sum(-1).transpose(1, 2)[..., None])(shifted(q @ k.mT)), qkv, "none (zero)"),
        ("found: divided after the values, moved", lambda q, k, v: (lambda e: torch.bmm(e, v.flatten(0, 1)).view(B, H, S, D) / e.sum(-1).view(B, H, S, 1))(shifted(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT))), qkv, "none (zero)"),
        ("found: divided after the values, inverted", lambda q, k, v: (lambda e: (e @ v) * (1 / e.sum(-1, keepdim=True)))(shifted(q @ k.mT)), qkv, "none (zero)"),
        ("found: divided after the values, in place", lambda q, k, v: (lambda e: (e @ v).div_(e.sum(-1, keepdim=True)))(shifted(q @ k.mT)), qkv, "none (zero)"),
        ("found: divided after the values, softmax1", lambda q, k, v: (lambda e: e @ v / (1 + e.sum(-1))[..., None])((q @ k.mT).exp()), qkv, "none (zero)"),
        ("found: divided after the values, clamped without effect", lambda q, k, v: (lambda e: e @ v / e.sum(-1, keepdim=True).clamp(min=1e-9))(shifted(q @ k.mT)), qkv, "none (zero)"),
        ("found: divided after the values, masked", lambda q, k, v, m: divided_after((q @ k.mT).exp() * m, v), with_padding(), "padding (nan)"),
        ("found: divided after the values, rows that see nothing", lambda q, k, v, m: divided_after(shifted((q @ k.mT).masked_fill(~m, -1e9)), v), with_padding(empty=True), "padding (uniform)"),
        ("found: divided after the values, one query", lambda q, k, v: divided_after(shifted(q[:, :, :1] @ k.mT), v), qkv, "none (zero)"),
        ("found: divided after the values, by broadcasting", lambda q, k, v: (lambda e: (e[..., None] * v[:, :, None]).sum(-2) / e.sum(-1, keepdim=True))(shifted(q @ k.mT)), qkv, "none (zero)"),
        ("not found: divided after the values, by the columns' sums", lambda q, k, v: (lambda e: (e.mT @ v) / e.sum(-1, keepdim=True))(shifted(q @ k.mT)), qkv, "miss: the rows are divided by the sums of others"),
        ("not found: divided after the values, features by the rows' sums", lambda q, k, v: (lambda e: e @ torch.cat((v, v), -1)[..., :S] / e.sum(-1)[:, :, None])(shifted(q @ k.mT)), qkv, "miss: the rows are divided by the sums of others"),
        ("not found: divided after the values, heads by others' sums", lambda q, k, v: (lambda e: e @ v / e.sum(-1, keepdim=True).transpose(0, 1))(shifted(q @ k.mT)), lambda: tuple(torch.randn(3, 3, S, D) for _ in range(3)), "miss: the rows are divided by the sums of others"),
        ("not found: divided after the values, used before", lambda q, k, v: (lambda e: (lambda o: o / e.sum(-1, keepdim=True) + o)(e @ v))(shifted(q @ k.mT)), qkv, "miss: the product of weights and values is used before it is divided by the sum of the weights"),
        ("not found: divided after the values, changed before", lambda q, k, v: (lambda e: (e @ v).relu() / e.sum(-1, keepdim=True))(shifted(q @ k.mT)), qkv, "miss: the product of weights and values is used before it is divided by the sum of the weights"),
        ("not found: divided after the values, the sum is used", lambda q, k, v: (lambda e: (lambda n: e @ v / n + n)(e.sum(-1, keepdim=True)))(shifted(q @ k.mT)), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: divided after the values, by twice the sum", lambda q, k, v: (lambda e: e @ v / (2 * e.sum(-1, keepdim=True)))(shifted(q @ k.mT)), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: divided after the values, multiplied", lambda q, k, v: (lambda e: (e @ v) * e.sum(-1, keepdim=True))(shifted(q @ k.mT)), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: divided after the values, a number in the shifted sum", lambda q, k, v: (lambda e: e @ v / (e.sum(-1, keepdim=True) + 1))(shifted(q @ k.mT)), qkv, "miss: a number is added to the sum after the row's maximum was taken off: it weighs differently in every row"),
        ("not found: divided after the values, NaN cleared before", lambda q, k, v: (lambda e: e.nan_to_num() @ v / e.sum(-1, keepdim=True))(shifted((q @ k.mT).masked_fill(later(), -INF))), qkv, "miss: NaN becomes 0 after a softmax that is written out"),
        ("not found: divided after the values, in two parts", lambda q, k, v: (lambda a, b: (a @ v[:, :, :3] + b @ v[:, :, 3:]) / (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True)))((q @ k[:, :, :3].mT).exp(), (q @ k[:, :, 3:].mT).exp()), qkv, "; ".join(["miss: something computed is added to the sum that weights are divided by"] * 2)),
        ("not found: by its own reciprocal, written", lambda q, k, v: (lambda e: e * cleared(1 / e.sum(-1, keepdim=True)))((q @ k.mT).exp()) @ v, qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: divided after the values, inverted, written", lambda q, k, v: (lambda e: (e @ v) * cleared(1 / e.sum(-1, keepdim=True)))((q @ k.mT).exp()), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: divided after the values, by whole numbers", lambda q, k, v: divided_after((q @ k.mT).exp(), v, lambda n: n.long() + 1 - 1), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: divided after the values, fractions cut off", lambda q, k, v: divided_after((q @ k.mT).exp(), v, lambda n: n.int().to(q.dtype)), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: divided after the values, cut off and clamped", lambda q, k, v: divided_after(shifted(q @ k.mT), v, lambda n: n.long().clamp(min=1)), qkv, "miss: the exponentials of the scores are not divided by their own sum"),
        ("not found: linear attention", lambda q, k, v: (lambda q, k: q @ (k.mT @ v) / (q @ k.sum(-2)[..., None]))(q.exp(), k.exp()), qkv, "nothing"),
        ("found: twice as much", lambda q, k, v: _twice(q @ k.mT) @ v, qkv, "none (zero)"),
        ("not found: the sum of masked ones under the others", lambda q, k, v, m: (lambda e: e / (e * m).sum(-1, keepdim=True))((q @ k.mT).exp()) @ v, with_padding(), "miss: the exponentials of the scores are not divided by their own sum"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=lambda case: case[0])
def test_spellings(case: Case) -> None:
    check(case)


# What each rule must find and must not, by goldens; rules with a file of their own included.
TABLES: dict[str, list[tuple[Any, ...]]] = {
    **CASES,
    "flex": [*test_find_flex.MASK_MODS, *test_find_flex.SCORE_MODS],
    "flash": [*test_find_flash.DENSE],
    "varlen": [*test_find_flash.PACKED],
}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_every_spelling_has_a_positive_and_three_negatives(spelling: Any) -> None:
    goldens = [case[-1] for case in TABLES[spelling.name]]
    negatives = [golden for golden in goldens if golden.startswith(("miss", "kept", "nothing"))]
    assert len(negatives) >= 3
    assert len(goldens) > len(negatives)


class Mixing(nn.Module):
    """Heads are mixed by weights, before or after the softmax, by a layer or a convolution."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.linear, self.conv = where, nn.Linear(H, H), nn.Conv2d(H, H, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        if self.where == "linear before":
            scores = self.linear(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.where in ("conv before", "conv beside"):
            scores = self.conv(scores) + (scores if self.where == "conv beside" else 0.0)
        weights = scores.softmax(-1)
        if self.where == "linear after":
            weights = self.linear(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (self.conv(weights) if self.where == "conv after" else weights) @ v


@pytest.mark.parametrize("where", ["linear before", "linear after", "conv before", "conv after", "conv beside"])
def test_talking_heads_are_listed(where: str) -> None:
    found = agree(Mixing(where), *qkv())
    assert found.sites == []
    (miss,) = found.misses
    assert "talking heads" in miss.reason or "computed from the scores themselves" in miss.reason


class Gated(nn.Module):
    """Attention, a projection, and a softmax over experts that weighs what they say."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.gate, self.experts = nn.Linear(D, D), nn.Linear(D, 5), nn.Linear(D, 5 * D)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = self.out((q @ k.mT).softmax(-1) @ v)
        return torch.einsum("bhse,bhsed->bhsd", self.gate(x).softmax(-1), self.experts(x).unflatten(-1, (5, D)))


def test_a_router_after_attention_is_not_listed() -> None:
    found = agree(Gated(), *qkv())
    assert (len(found.sites), found.misses) == (1, [])


def test_queries_written_between_scores_and_output_are_refused() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q * 1
        weights = (q @ k.mT).softmax(-1)
        q.view(-1).mul_(0.3)
        return weights @ v + q

    with torch.no_grad():
        check(("written", call, qkv, "miss: it is written in place before the attention ends"), gradients=False)


def test_what_is_divided_later_must_still_hold_what_it_held() -> None:
    def writes_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v, e = v * 1, (q @ k.mT).exp()
        out = e @ v
        v.view(-1).mul_(2)
        return out / e.sum(-1, keepdim=True) + v

    def writes_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        out = e @ v
        out.view(-1).mul_(2)
        return out / e.sum(-1, keepdim=True)

    used = "the product of weights and values is used before it is divided by the sum of the weights"
    for call, reason in ((writes_values, "it is written in place before the attention ends"), (writes_product, used)):
        with torch.no_grad():
            check(("written", call, qkv, f"miss: {reason}"), gradients=False)


def test_a_reciprocal_must_still_hold_what_it_held() -> None:
    def before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e * cleared(e.sum(-1, keepdim=True).reciprocal())) @ v

    def after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        e = (q @ k.mT).exp()
        return (e @ v) * cleared(e.sum(-1, keepdim=True).reciprocal())

    for call in (before, after):
        with torch.no_grad():
            check(
                ("written", call, qkv, "miss: the exponentials of the scores are not divided by their own sum"), gradients=False
            )


BESIDE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[..., Tensor]]] = {
    "bias": (lambda s, t: s + t, torch.randn),
    "mask": (lambda s, t: s.masked_fill(t, -1e9), lambda *shape: torch.rand(shape) > 0.7),
    "scale": (lambda s, t: s * t, torch.rand),
}


@pytest.mark.parametrize("shape", [(3, 1, 1, S), (3, 2, 1, S), (1, 1, 1, S), (1, 3, 1, 1, S), (2, 1, 1, 1, S)], ids=str)
@pytest.mark.parametrize("beside", BESIDE)
def test_what_stands_beside_scores_with_two_batch_axes(beside: str, shape: tuple[int, ...]) -> None:
    meet, make = BESIDE[beside]
    attend = lambda q, k, v, t: meet(q @ k.mT, t).softmax(-1) @ v  # noqa: E731
    found = agree(Call(attend), *(torch.randn(2, 3, 2, S, D) for _ in range(3)), make(*shape))
    assert (len(found.sites), found.rewritten) == (1, 1)


def test_rows_without_keys_under_infinity() -> None:
    """What exp / sum gives there is NaN whatever the fill, unless the maximum was taken off."""
    after = lambda q, k, v, m: divided_after((q @ k.mT).masked_fill(~m, -INF).exp(), v)  # noqa: E731
    with torch.no_grad():
        check(("divided after the values", after, with_padding(empty=True), "padding (nan)"), gradients=False)
    for weights, fill in ((lambda s: over_sum(s.exp()), -1e30), (lambda s: s.log_softmax(-1).exp(), -INF)):
        with torch.no_grad():
            check(("nan", padded(weights, fill), with_padding(empty=True), "padding (nan)"), gradients=False)

"""flash-attention's operators, by their names alone: the package is not needed, its stand-ins here follow its documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finding import double, said  # noqa: F401  (the fixture works by being here)
from spellings import Found, compiled
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

B, S, H, D = 2, 8, 4, 6


def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, softcap: float = 0.0) -> Tensor:
    """[B, S, H, D] in float64; rows that see nothing are zero."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = torch._safe_softmax(scores.masked_fill(~seen, -float("inf")), -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def band(rows: int, columns: int, causal: bool, left: int, right: int) -> Tensor:
    place = torch.arange(rows)[:, None] + columns - rows
    key = torch.arange(columns)[None]
    seen = torch.ones(rows, columns, dtype=torch.bool)
    if causal or right >= 0:
        seen &= key <= place + (0 if causal else right)
    return seen & (key >= place - left) if left >= 0 else seen


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    seen = band(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    out = explicit(q, k, v, softmax_scale, seen, softcap)
    return out, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), q.new_empty(0), q.new_empty(0)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1]), q.new_empty(0), q.new_empty(0)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, return_softmax: bool, block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    parts = []
    ends = zip(
        cu_seqlens_q.tolist()[:-1], cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist()[:-1], cu_seqlens_k.tolist()[1:], strict=True
    )
    for a, b, c, d in ends:
        seen = band(b - a, d - c, causal, window_size_left, window_size_right)
        parts.append(explicit(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, seen, softcap)[0])
    return torch.cat(parts), q.new_zeros(q.shape[1], q.shape[0])


@varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0])


def run(call: Callable[..., Any], *inputs: Any) -> Found:
    attend, found = compiled(call)
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), call(*inputs), rtol=1e-9, atol=1e-9)
    return found


def flash(
    causal: bool = False, left: int = -1, right: int = -1, softcap: float = 0.0, slopes: Tensor | None = None
) -> Callable[..., Any]:
    return lambda q, k, v: forward(q, k, v, 0.0, 0.4, causal, left, right, softcap, slopes, False)[0]


def qkv(rows: int = S, columns: int = S, heads: int = H) -> tuple[Tensor, ...]:
    return torch.randn(B, rows, H, D), torch.randn(B, columns, heads, D), torch.randn(B, columns, heads, D)


DENSE: list[tuple[str, Callable[..., Any], tuple[int, int, int], str]] = [
    ("plain", flash(), (S, S, H), "none (zero)"),
    ("causal", flash(causal=True), (S, S, H), "causal (zero)"),
    ("grouped heads", flash(causal=True), (S, S, 2), "causal (zero)"),
    ("bottom right", flash(causal=True), (S - 3, S, H), "causal (zero)"),
    ("window", flash(left=2, right=1), (S, S, H), "window(2, 1) (zero)"),
    ("causal window of fewer rows", flash(causal=True, left=2), (S - 3, S, H), "causal & window(2, 0) (zero)"),
    ("softcap", flash(softcap=3.0), (S, S, H), "none (zero)"),
    ("slopes", flash(slopes=torch.ones(H)), (S, S, H), "miss: it adds a bias by slopes"),
    ("the log-sum-exp is used", lambda q, k, v: forward(q, k, v, 0.0, 0.4, False, -1, -1, 0.0, None, False)[:2], (S, S, H), "miss: the log-sum-exp or another by-product of the call is used too"),
    ("nothing is used", lambda q, k, v: (forward(q, k, v, 0.0, 0.4, False, -1, -1, 0.0, None, False), q * 2)[1], (S, S, H), "nothing"),
]  # fmt: skip


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case[0])
def test_flash(case: tuple[str, Callable[..., Any], tuple[int, int, int], str]) -> None:
    _, call, sizes, golden = case
    found = run(call, *qkv(*sizes))
    assert said(found) == golden
    for site in found.sites:
        assert (site.batch, site.heads, site.kv_heads, site.q_len, site.k_len, site.head_dim) == (B, H, sizes[2], *sizes[:2], D)


STARTS = torch.tensor([0, 3, 11, 16], dtype=torch.int32)


def packed(
    causal: bool = True, left: int = -1, other: bool = False, slopes: bool = False, lse: bool = False
) -> Callable[..., Any]:
    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Any:
        key_starts = starts + 0 if other else starts
        added = torch.ones(H) if slopes else None
        found = varlen(q, k, v, starts, key_starts, 8, 8, 0.0, 0.4, causal, left, -1, 0.0, added, False, None)
        return found if lse else found[0]

    return call


PACKED: list[tuple[str, Callable[..., Any], str]] = [
    ("causal", packed(), "causal & document (zero)"),
    ("both sides", packed(causal=False), "document (zero)"),
    ("window", packed(left=2), "causal & window(2, 0) & document (zero)"),
    ("other starts for the keys", packed(other=True), "miss: queries and keys are cut into sequences differently"),
    ("slopes", packed(slopes=True), "miss: it adds a bias by slopes"),
    ("the log-sum-exp is used", packed(lse=True), "miss: the log-sum-exp or another by-product of the call is used too"),
]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case[0])
def test_varlen(case: tuple[str, Callable[..., Any], str]) -> None:
    _, call, golden = case
    q, k, v = (torch.randn(16, heads, D) for heads in (H, 2, 2))
    assert said(run(call, q, k, v, STARTS)) == golden


def test_torch_varlen_attn_is_found_and_runs_where_its_kernel_does_not() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
        return varlen_attn(q, k, v, starts, starts, 8, 8, scale=0.4, window_size=(-1, 0))

    q, k, v = (torch.randn(16, H, D) for _ in range(3))
    attend, found = compiled(call)
    with torch.no_grad():
        expected = packed()(q, k, v, STARTS)
        torch.testing.assert_close(attend(q, k, v, STARTS), expected, rtol=1e-9, atol=1e-9)
    assert said(found) == "causal & document (zero)"

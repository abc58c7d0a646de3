"""FlexAttention: its two functions are read, its result is exact, what they do beyond masks and caps is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finding import double, said  # noqa: F401  (the fixture works by being here)
from spellings import Found, compiled
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

B, H, S, D = 2, 4, 16, 8
DOCUMENT = torch.tensor([[0] * 6 + [1] * 10, [0] * 11 + [1] * 5])
KEEP = torch.tensor([[True] * S, [False] * 3 + [True] * (S - 3)])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def qkv(kv_heads: int = H) -> tuple[Tensor, ...]:
    return torch.randn(B, H, S, D), torch.randn(B, kv_heads, S, D), torch.randn(B, kv_heads, S, D)


def mask(fn: Callable[..., Any]) -> BlockMask:
    return create_block_mask(fn, B, H, S, S, device="cpu", BLOCK_SIZE=8)


def run(**how: Any) -> Found:
    """Compiled equals uncompiled; gradients equal the explicit softmax's (flex has none on CPU)."""
    inputs = qkv(how.pop("kv_heads", H))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, enable_gqa=k.shape[1] != H, **how)

    attend, found = compiled(call)
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), call(*inputs), rtol=1e-9, atol=1e-9)
    return found


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def capped(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return 5 * torch.tanh(s / 5)


MASK_MODS: list[tuple[str, Callable[..., Any], str]] = [
    ("causal", causal, "causal (zero)"),
    ("window", lambda b, h, q, k: (q >= k) & (q - k < 4), "causal & window(3, 0) (zero)"),
    ("documents, causal", lambda b, h, q, k: (DOCUMENT[b, q] == DOCUMENT[b, k]) & (q >= k), "?"),
    ("padding", lambda b, h, q, k: KEEP[b, k], "padding (zero)"),
    ("a prefix", lambda b, h, q, k: (q >= k) | (k < 3), "?"),
]


@pytest.mark.parametrize("case", MASK_MODS, ids=lambda case: case[0])
def test_mask_mods(case: tuple[str, Callable[..., Any], str]) -> None:
    _, fn, golden = case
    found = run(block_mask=mask(fn))
    (site,) = found.sites
    assert site.spelling == "flex"
    assert golden in ("?", said(found)), said(found)


SCORE_MODS: list[tuple[str, Callable[..., Any], str]] = [
    ("hides", lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), "causal (zero)"),
    ("scales", lambda s, b, h, q, k: s * 2 / 3, "none (zero)"),
    ("caps", capped, "none (zero)"),
    ("adds a bias", lambda s, b, h, q, k: s + SLOPES[h] * (k - q), "miss: score_mod adds a bias"),
    ("fills with a number", lambda s, b, h, q, k: torch.where(q >= k, s, -1e30), "miss: score_mod puts something else than -inf in place of scores"),
    ("caps after hiding", lambda s, b, h, q, k: 5 * torch.tanh(torch.where(q >= k, s, -float("inf")) / 5), "miss: score_mod computes where of the scores before its soft cap"),
    ("adds before the cap", lambda s, b, h, q, k: 5 * torch.tanh((s + torch.where(q >= k, 0.0, -float("inf"))) / 5), "miss: score_mod computes add of the scores before its soft cap"),
    ("hides by addition", lambda s, b, h, q, k: s + torch.where(q >= k, 0.0, -float("inf")), "causal (zero)"),
    ("squares", lambda s, b, h, q, k: s * s, "miss: score_mod scales the scores by something computed"),
    ("takes the sine", lambda s, b, h, q, k: torch.sin(s), "miss: score_mod computes sin of the scores"),
]  # fmt: skip


@pytest.mark.parametrize("case", SCORE_MODS, ids=lambda case: case[0])
def test_score_mods(case: tuple[str, Callable[..., Any], str]) -> None:
    _, fn, golden = case
    assert said(run(score_mod=fn)) == golden


def test_grouped_heads_cap_and_mask_together() -> None:
    found = run(block_mask=mask(causal), score_mod=capped, kv_heads=2, scale=0.3)
    (site,) = found.sites
    assert (said(found), site.kv_heads, site.softcap, site.scale) == ("causal (zero)", 2, 5.0, pytest.approx(0.3))


def test_a_block_mask_made_in_the_graph() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=create_block_mask(causal, None, None, S, S, device="cpu"))

    attend, found = compiled(call)
    inputs = qkv()
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), call(*inputs), rtol=1e-9, atol=1e-9)
    assert said(found) == "causal (zero)"


def test_tables_without_a_function_are_refused() -> None:
    tables = mask(causal)
    found = run(block_mask=BlockMask.from_kv_blocks(tables.kv_num_blocks, tables.kv_indices, BLOCK_SIZE=8))
    assert said(found) == "miss: the block mask's tables alone say what is hidden"


def test_the_log_sum_exp_is_not_dropped() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flex_attention(q, k, v, return_lse=True)

    attend, found = compiled(call)
    inputs = qkv()
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), call(*inputs), rtol=1e-9, atol=1e-9)
    assert said(found) == "miss: the log-sum-exp or another by-product of the call is used too"


def test_vmap_beside_and_around_attention() -> None:
    def beside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        doubled = torch.vmap(lambda x: x * 2)(q)
        return (doubled @ k.mT).softmax(-1) @ v

    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)

    for call, golden in ((beside, "none (zero)"), (around, "miss: it runs inside vmap")):
        attend, found = compiled(call)
        inputs = qkv()
        torch.testing.assert_close(attend(*inputs), call(*inputs), rtol=1e-9, atol=1e-9)
        assert said(found) == golden

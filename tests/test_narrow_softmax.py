"""Models in float64 that compute their softmax in float32: an exact rewrite repeats that rounding, digit by digit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from finding import Call, Case, check, double, must_be_noticed, said  # noqa: F401  (the fixture works by being here)
from spellings import agree, compiled
from torch import Tensor

from dilcompile.errors import KernelError
from dilcompile.forms import Dilated
from dilcompile.lowering import ops
from dilcompile.passes import rewrite
from dilcompile.policy import Policy

SINGLE = torch.float32


def qkv(kv_heads: int = 4) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, heads, 13, 8) for heads in (4, kv_heads, kv_heads))


def later(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-2], x.shape[-1], dtype=torch.bool).triu(1)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT / 3, dim=-1, dtype=SINGLE).to(v.dtype) @ v


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(later(q @ k.mT), float("-inf"))
    return scores.float().softmax(-1).type_as(v) @ v


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5 * torch.tanh(q @ k.mT / 5)
    return F.softmax(scores + torch.full((13, 13), torch.finfo(q.dtype).min).triu(1), dim=-1, dtype=SINGLE).to(v.dtype) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.softmax(q @ k.mT + bias, dim=-1, dtype=SINGLE).to(v.dtype) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))


def without_keys(fill: float) -> Callable[..., Tensor]:
    """Two rows see nothing."""

    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~keep[:, None, None], fill)
        return F.softmax(scores.masked_fill(later(scores), fill), dim=-1, dtype=SINGLE).to(v.dtype) @ v

    return call


def padded() -> Tensor:
    keep = torch.ones(2, 13, dtype=torch.bool)
    keep[1, :2] = False
    return keep


REPEATED: list[Case] = [
    ("the softmax's dtype", plain, qkv, "none (zero)"),
    ("a cast before it", upcast, qkv, "causal (zero)"),
    ("a cap and a fill that is infinite in float32", capped, qkv, "causal (zero)"),
    ("a bias", biased, lambda: (*qkv(), torch.randn(4, 13, 13)), "none + bias (zero)"),
    ("grouped heads", grouped, lambda: qkv(2), "none (zero)"),
]


def scaled_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).float() / 3).softmax(-1).to(v.dtype) @ v


def biased_after(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT).float() + bias.float()).softmax(-1).to(v.dtype) @ v


def single_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q.float() @ k.float().mT).softmax(-1).to(v.dtype) @ v


def halved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).half().softmax(-1).to(v.dtype) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).float().exp()
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v


LEFT: list[Case] = [
    ("scaled in float32", scaled_after, qkv, "kept: none (zero)"),
    ("a bias in float32", biased_after, lambda: (*qkv(), torch.randn(4, 13, 13)), "kept: none + bias (zero)"),
    ("products in float32", single_product, qkv, "kept: none (zero)"),
    ("float16", halved, qkv, "kept: none (zero)"),
    ("exponentials in float32", written_out, qkv, "kept: none (zero)"),
]


@pytest.mark.parametrize("case", REPEATED, ids=lambda case: case[0])
def test_the_rounding_is_repeated(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LEFT, ids=lambda case: case[0])
def test_rounding_that_no_kernel_repeats_is_left(case: Case) -> None:
    found = check(case)
    (verdict,) = found.outcomes[0].report.verdicts
    assert "computes its scores in fewer digits" in getattr(verdict, "reason", "")


def test_rows_of_nan() -> None:
    call = without_keys(torch.finfo(torch.float64).min)
    found = agree(Call(call), *qkv(), padded(), gradients=False)
    assert said(found) == "causal & padding (nan)"


def test_nothing_is_narrow_in_a_float32_model() -> None:
    call, found = compiled(Call(plain))
    with torch.no_grad():
        call(*(x.float() for x in qkv()))
    assert [(site.narrowed, site.softmax_dtype) for site in found.sites] == [("no", SINGLE)]


def test_what_is_approximate_keeps_all_digits() -> None:
    form = {"form": "dilated", "segments": [4, 8], "rates": [1, 2]}
    policy = Policy.load({"version": 1, "rules": [{"name": "all", "apply": form}]})
    call, found = compiled(Call(lambda x: scaled_after(x, x, x)), policy)
    x = qkv()[0]
    with torch.no_grad():
        out = call(x)
    (site,) = found.sites
    assert (site.narrowed, found.rewritten) == ("scores", 1)
    text = str(Dilated([4, 8], [1, 2]))
    exact, _ = ops.attention(x, x, x, None, None, None, None, text, False, None, None, 0, 1 / 3, None, 0.0, "reference")
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)


def test_other_kernels_refuse_it() -> None:
    q, k, v = qkv()
    arguments = (q, k, v, None, None, None, None, "dense()", False, None, None, 0, 1.0, None, 0.0)
    torch.library.opcheck(torch.ops.dilcompile.attention.default, (*arguments, None), {"narrow": True})
    with pytest.raises(
        KernelError, match="kernel 'cpu' can't compute this attention: a softmax in float32 over scores in float64"
    ):
        ops.attention(*arguments, "cpu", narrow=True)


def test_not_repeating_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = ("never", rewrite, "repeats_rounding", lambda decision: False, lambda: exactly(plain))
    must_be_noticed(mutation, monkeypatch)


def exactly(function: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    agree(Call(function), *qkv())

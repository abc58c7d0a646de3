"""Models in float64 that compute their softmax in float32: an exact rewrite repeats that rounding, digit by digit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from finding import Call, Case, Mutation, check, double, must_be_noticed, said  # noqa: F401  (the fixture works by being here)
from spellings import agree, compiled
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dilcompile.errors import KernelError
from dilcompile.forms import Dilated
from dilcompile.lowering import ops
from dilcompile.passes.finding import find_sites, match, operands
from dilcompile.passes.masks import emptiness
from dilcompile.passes.masks.emptiness import Hiding, emptiness_of
from dilcompile.passes.masks.symbols import K, Q
from dilcompile.passes.masks.terms import Less
from dilcompile.passes.rewriting import rewrite
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


def of_weights(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Weights of an exponential without a maximum, and the values."""
    return lambda q, k, v: function((q @ k.mT / 3).exp(), v)


def of_single(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Weights of a float32 softmax, and the values."""
    return lambda q, k, v: function((q @ k.mT / 3).softmax(-1, dtype=SINGLE), v)


def total(weights: Tensor) -> Tensor:
    return weights.sum(-1, keepdim=True)


def single_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / 3).float().exp()
    return weights.to(v.dtype) @ v / total(weights)


def there_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(later(q @ k.mT), float("-inf")).float().to(q.dtype).softmax(-1) @ v


def rounded_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).float().to(q.dtype) / 3).softmax(-1, dtype=SINGLE).to(v.dtype) @ v


def single_terms(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.float()[:, :, :, None] * k.float()[:, :, None]).sum(-1, dtype=torch.float64)
    return scores.softmax(-1) @ v


def renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1, dtype=SINGLE).to(v.dtype)
    return weights @ v / total(weights)


def less_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1, dtype=SINGLE).to(v.dtype) @ v


LEFT: list[Case] = [
    ("exponentials in float32, a quotient in float64", single_exponentials, qkv, "kept: none (zero)"),
    ("a divisor in float32", of_weights(lambda w, v: w @ v / total(w).float()), qkv, "kept: none (zero)"),
    ("a cast before the division", of_weights(lambda w, v: (w @ v).float().to(v.dtype) / total(w)), qkv, "kept: none (zero)"),
    ("scores cast there and back", there_and_back, qkv, "kept: causal (zero)"),
    ("scaled after a cast there and back", rounded_twice, qkv, "kept: none (zero)"),
    ("terms in float32, a sum in float64", single_terms, qkv, "kept: none (zero)"),
    ("a row's maximum taken off", less_maximum, qkv, "kept: none (zero)"),
    ("a number added to all", lambda q, k, v: (q @ k.mT + 5).softmax(-1, dtype=SINGLE).to(v.dtype) @ v, qkv, "kept: none (zero)"),
    ("weights cast there and back", lambda q, k, v: (q @ k.mT).softmax(-1).float().to(v.dtype) @ v, qkv, "kept: none (zero)"),
    (
        "the value product in float32",
        lambda q, k, v: ((q @ k.mT).softmax(-1).float() @ v.float()).to(q.dtype),
        qkv,
        "kept: none (zero)",
    ),
    ("weights scaled in float32", of_single(lambda p, v: (p * 0.3).to(v.dtype) @ v), qkv, "kept: none (zero)"),
    (
        "weights rounded once more",
        of_single(lambda p, v: (p.to(v.dtype) * 0.3).float().to(v.dtype) @ v),
        qkv,
        "kept: none (zero)",
    ),
    ("float16 on the way to the values", of_single(lambda p, v: p.half().to(v.dtype) @ v), qkv, "kept: none (zero)"),
    ("divided by their sum", renormalised, qkv, "kept: none (zero)"),
    ("divided in float32", of_single(lambda p, v: (p / total(p)).to(v.dtype) @ v), qkv, "kept: none (zero)"),
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


def beside(fill: float, *, narrow_first: bool = False) -> Callable[..., Tensor]:
    """One sequence sees no key; its scores are added to a fill."""

    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores, hidden = q @ k.mT, torch.where(keep[:, None, None], 0.0, fill)
        return (
            F.softmax(scores.float() + hidden.float() if narrow_first else scores + hidden, dim=-1, dtype=SINGLE).to(v.dtype) @ v
        )

    return call


def hidden_whole() -> Tensor:
    keep = padded()
    keep[0] = False
    return keep


SWALLOWED: list[Case] = [
    (f"{fill:g} added {place}", beside(fill, narrow_first=first), lambda: (*qkv(), hidden_whole()), f"{said} (others)")
    for fill, said in ((-1e9, "padding"), (-1e30, "padding"))
    for first, place in ((False, "in float64"), (True, "in float32"))
]
HALF_LOST: list[Case] = [
    (f"-1e4 added {place}", beside(-1e4, narrow_first=first), lambda: (*qkv(), hidden_whole()), "kept: padding (other)")
    for first, place in ((False, "in float64"), (True, "in float32"))
]


@pytest.mark.parametrize("case", [*SWALLOWED, *HALF_LOST], ids=lambda case: case[0])
def test_a_fill_leaves_the_digits_of_the_narrower_dtype(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(("fill", "digits", "rows"), [
    (-1e4, 0.0, "others"),
    (-1e9, 0.0, "others"),
    (-1e4, 2.0**-23, "other"),
    (-1e9, 2.0**-23, "shifted"),
    (-1e4, 2.0**-7, "shifted"),
])  # fmt: skip
def test_rows_without_keys_go_by_the_fewest_digits(fill: float, digits: float, rows: str) -> None:
    hiding = Hiding(Less(Q, K), frozenset((fill,)), False, torch.float64, digits=digits)
    assert emptiness_of([hiding], 0, zero=False, training=True, capped=False).rows == rows


def test_a_bfloat16_softmax_in_a_float32_model() -> None:
    """What is left of a score beside -1e4 is nothing in bfloat16, all in float32."""

    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT + torch.where(keep[:, None, None], 0.0, -1e4)
        return scores.softmax(-1, dtype=torch.bfloat16).to(v.dtype) @ v

    single = [x.float() for x in qkv()]
    model, found = compiled(Call(call))
    with torch.no_grad():
        got = model(*single, hidden_whole())
    assert [(site.narrowed, site.mask.empty_rows) for site in found.sites] == [("no", "uniform")]
    torch.testing.assert_close(got[0], single[2][0].mean(-2, keepdim=True).expand(-1, 13, -1))


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
    # Float64, summed in another order: float32 anywhere would be off by 1e-8.
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


def scaled_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention((q.float() * 0.3).to(q.dtype), k, v)


def test_queries_that_are_scaled_in_float32_are_read_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = ("queries scaled in float32", scaled_queries, qkv, "none (zero)")
    must_be_noticed(("in front", operands, "_rounds", lambda *_: False, lambda: check(case)), monkeypatch)


def of_pairs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: (score.float() * 2).to(q.dtype))  # type: ignore[return-value]


def test_a_function_of_pairs_in_float32_is_left() -> None:
    found = agree(Call(of_pairs), *qkv(), gradients=False)
    assert (said(found), [site.narrowed for site in found.sites]) == ("kept: none (zero)", ["scores"])


def test_missing_what_rounds_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    mutation = ("all is float64", find_sites, "narrowing", lambda *_: "no", lambda: check(LEFT[0]))
    must_be_noticed(mutation, monkeypatch)


LOST: list[Mutation] = [
    (
        "fills swallow by their own digits",
        emptiness.Hiding,
        "resolution",
        property(lambda _: 2.0**-52),
        lambda: check(SWALLOWED[0]),
    ),
    ("all digits are left", emptiness.Hiding, "rounds_later", property(lambda _: False), lambda: check(HALF_LOST[0])),
    ("float32 loses none", match, "_narrowed", lambda *_: "no", lambda: check(HALF_LOST[1])),
]


@pytest.mark.parametrize("mutation", LOST, ids=lambda mutation: mutation[0])
def test_missing_lost_digits_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)


def exactly(function: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    agree(Call(function), *qkv())

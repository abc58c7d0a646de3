"""FlexAttention: its two functions are read, its result is exact, what they do beyond masks and caps is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from finding import double, said  # noqa: F401  (the fixture works by being here)
from spellings import Found, compiled, square_tensors
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dilcompile.passes.finding.pair_function import PairFunction
from dilcompile.passes.finding.spellings import flex

B, H, S, D = 2, 4, 16, 8
DOCUMENT = torch.tensor([[0] * 6 + [1] * 10, [0] * 11 + [1] * 5])
KEEP = torch.tensor([[True] * S, [False] * 3 + [True] * (S - 3)])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
SEEN = torch.rand(B, S, S, generator=torch.Generator().manual_seed(5)) > 0.6
SEEN[:, 3] = False
PAIRS = torch.randn(H, S, S, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


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
    ("pairs of data", lambda b, h, q, k: SEEN[b, q, k], "other(g_seen_(b, q, k)) (zero)"),
    ("pairs of data beside a rule", lambda b, h, q, k: SEEN[b, q, k] & (q >= k), "causal & other(g_seen_(b, q, k)) (zero)"),
    ("pairs of data by head", lambda b, h, q, k: PAIRS[h, q, k] > 0, "other("),
]


@pytest.mark.parametrize("case", MASK_MODS, ids=lambda case: case[0])
def test_mask_mods(case: tuple[str, Callable[..., Any], str]) -> None:
    _, fn, golden = case
    found = run(block_mask=mask(fn))
    (site,) = found.sites
    assert site.spelling == "flex"
    assert golden == "?" or said(found).startswith(golden), said(found)


def test_a_mask_without_a_formula_is_a_miss() -> None:
    found = run(block_mask=mask(lambda b, h, q, k: torch.sin(q * 1.0) <= k))
    assert said(found) == "miss: mask_mod computes sin, which has no formula"


SCORE_MODS: list[tuple[str, Callable[..., Any], str]] = [
    ("hides", lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")), "causal (zero)"),
    ("scales", lambda s, b, h, q, k: s * 2 / 3, "none (zero)"),
    ("caps", capped, "none (zero)"),
    ("subtracts -inf", lambda s, b, h, q, k: s - torch.where(q >= k, 0.0, float("inf")), "causal (zero)"),
    ("adds the score again", lambda s, b, h, q, k: s + s, "miss: score_mod computes add of the scores twice"),
    ("adds the score scaled", lambda s, b, h, q, k: s + 0.5 * s, "miss: score_mod computes add of the scores twice"),
    ("adds twice the bias", lambda s, b, h, q, k: torch.add(s, SLOPES[h], alpha=2), "miss: score_mod computes add of the scores twice"),
    ("adds a row of a tensor", lambda s, b, h, q, k: s + PAIRS[h].sum(), "miss: score_mod adds a bias, and it computes sum, which has no rule"),
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


OFFSETS = torch.randn(2 * S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
FLOATS = torch.zeros(B, S, dtype=torch.float64).masked_fill(~KEEP, float("-inf"))
NARROW = SLOPES.to(torch.float32)
ONE = torch.tensor(0.3, dtype=torch.float64)
SHOWN = "alibi(0.5, 0.25, 0.125, 0.0625)"
TENSORS = {"slopes": SLOPES, "pairs": PAIRS, "offsets": OFFSETS, "floats": FLOATS, "narrow": NARROW, "one": ONE}
# Its name, the function of the module that holds TENSORS, what the bias is called, the mask.
Biased = tuple[str, Callable[..., Any], str, str]


class Holder(torch.nn.Module):
    """The tensors as buffers, beside a ``score_mod`` that reads them."""

    def __init__(self, fn: Callable[..., Any], **how: Any) -> None:
        super().__init__()
        for name, tensor in TENSORS.items():
            self.register_buffer(name, tensor)
        self.fn, self.how = fn, how

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return self.fn(self, s, b, h, q, k)

        return flex_attention(q, k, v, score_mod=score_mod, enable_gqa=True, **self.how)


def bucket(away: Tensor) -> Tensor:
    """T5's: near distances by themselves, far ones in ranges of a logarithm."""
    far = 4 + (torch.log(away.clamp(min=1) / 4.0) * 2).to(torch.int64)
    return torch.where(away < 4, away, far)


BIASES: list[Biased] = [
    ("alibi", lambda t, s, b, h, q, k: s + t.slopes[h] * (k - q), SHOWN, "none"),
    ("alibi, subtracted", lambda t, s, b, h, q, k: s - t.slopes[h] * (q - k).abs(), SHOWN, "none"),
    ("alibi, computed slopes", lambda t, s, b, h, q, k: s + torch.exp2(-((h + 1) * 8.0 / H)) * (k - q), "alibi(0.25, 0.0625, 0.015625, 0.00390625)", "none"),
    ("alibi and more", lambda t, s, b, h, q, k: s + 2 * (t.slopes[h] * (k - q) + torch.sin(k * 1.0)), "tensor", "none"),
    ("slopes of the key, too", lambda t, s, b, h, q, k: s + torch.exp2(-((h + k) * 1.0)) * (k - q), "tensor", "none"),
    ("alibi on the keys alone", lambda t, s, b, h, q, k: s + t.slopes[h] * k, SHOWN, "none"),
    ("alibi, hidden too", lambda t, s, b, h, q, k: torch.where(q >= k, s + t.slopes[h] * (k - q), -float("inf")), SHOWN, "causal"),
    ("scaled afterwards", lambda t, s, b, h, q, k: (s + t.slopes[h] * (k - q)) * 2, "alibi(1, 0.5, 0.25, 0.125)", "none"),
    ("beside -inf", lambda t, s, b, h, q, k: s + t.slopes[h] * (k - q) + torch.where(q >= k, 0.0, -float("inf")), SHOWN, "causal"),
    ("after the cap", lambda t, s, b, h, q, k: 5 * torch.tanh(s / 5) + t.slopes[h] * (k - q), SHOWN, "none"),
    ("a pair", lambda t, s, b, h, q, k: s + t.pairs[h, q, k], "tensor", "none"),
    ("a pair, index by index", lambda t, s, b, h, q, k: s + t.pairs[h][q][k], "tensor", "none"),
    ("an offset", lambda t, s, b, h, q, k: s + t.offsets[q - k + S, h], "tensor", "none"),
    ("an offset counted from the back", lambda t, s, b, h, q, k: s + t.offsets[q - k - S, h], "tensor", "none"),
    ("buckets", lambda t, s, b, h, q, k: s + t.offsets[bucket((q - k).abs()), h], "tensor", "none"),
    ("two", lambda t, s, b, h, q, k: s + t.offsets[q - k + S, h] + t.slopes[h] * (k - q), "alibi + tensor", "none"),
    ("a number of a tensor", lambda t, s, b, h, q, k: s + t.one * k, "tensor", "none"),
    ("float32 beside float64", lambda t, s, b, h, q, k: s + t.narrow[h] * t.one * (k - q) / 3, "alibi(0.05, 0.025, 0.0125, 0.00625)", "none"),
    ("integers", lambda t, s, b, h, q, k: s + (k - q) // 2, "tensor", "none"),
    ("fractions of -inf", lambda t, s, b, h, q, k: s + t.floats[b, k], "tensor", "other"),
    ("what hides has no formula", lambda t, s, b, h, q, k: s + torch.where(torch.sin(k * 1.0) > 0, 0.0, -1e9), "tensor", "other"),
    ("hides without a formula", lambda t, s, b, h, q, k: s + torch.where(torch.sin(k * 1.0) > 0, 0.0, -float("inf")), "tensor", "other"),
    ("distance without a formula", lambda t, s, b, h, q, k: s - torch.log1p((q - k).abs()), "tensor", "none"),
]  # fmt: skip


def modified(case: Biased, kv_heads: int = H, **how: Any) -> None:
    """It is exact, and called what the case says."""
    _, fn, shown, seen = case
    model, inputs = Holder(fn, **how), qkv(kv_heads)
    attend, found = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(attend(*inputs), model(*inputs), rtol=1e-9, atol=1e-9)
    assert found.rewritten == 1, (found.refusals, found.misses)
    (site,) = found.sites
    words = [str(bias) for bias in site.bias]
    assert sorted("alibi" if "+" in shown and word.startswith("alibi") else word for word in words) == shown.split(" + ")
    assert str(site.mask).split("(")[0] == seen


@pytest.mark.parametrize("case", BIASES, ids=lambda case: case[0])
def test_biases(case: Biased) -> None:
    modified(case)


def test_a_bias_beside_a_block_mask_and_grouped_heads() -> None:
    name, fn, shown, _ = BIASES[0]
    modified((name, fn, shown, "causal"), block_mask=mask(causal), kv_heads=2, scale=0.3)


def explicit(q: Tensor, k: Tensor, v: Tensor, fn: Callable[..., Any], seen: Tensor | None = None) -> Tensor:
    """The definition, with the function called on all pairs at once."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    pairs = [torch.arange(size).view([-1 if i == dim else 1 for i in range(4)]) for dim, size in enumerate((B, H, S, S))]
    scores = fn(q @ k.mT / D**0.5, *pairs)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch._safe_softmax(scores, -1) @ v


# The definition on whole tensors can't index step by step, and computes in float32 where numbers alone are float64.
GRADIENTS = [case for case in BIASES if case[0] not in ("a pair, index by index", "float32 beside float64")]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", [*GRADIENTS, ("caps", lambda t, *pair: capped(*pair), "", "none")], ids=lambda case: case[0])
def test_gradients_are_those_of_the_definition(case: Any, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses the backward of flex_attention on CPU before it is traced; the rewritten site has it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *operands: None)
    model = Holder(case[1], block_mask=mask(causal) if masked else None)
    attend, found = compiled(model)
    given = [[x.detach().clone().requires_grad_() for x in inputs] for inputs in [qkv(2)] * 2]
    seen = torch.ones(S, S, dtype=torch.bool).tril() if masked else None
    outs = [attend(*given[0]), explicit(*given[1], partial(case[1], model), seen)]
    assert found.rewritten == 1, (found.refusals, found.misses)
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(0.5, 1.5, outs[0].numel()).view(outs[0].shape)
    for out in outs:
        (out * weights).sum().backward()
    for mine, theirs in zip(*given, strict=True):
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


class Learned(torch.nn.Module):
    """A table of T5's kind, learned through flex_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(OFFSETS.clone())

    def bias(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + self.table[bucket((q - k).abs()), h]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        table = self.table
        return flex_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + table[bucket((q - k).abs()), h])


def test_a_learned_table_is_named_and_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *operands: None)
    model = Learned()
    attend, found = compiled(model)
    inputs = qkv()
    (grad,) = torch.autograd.grad(attend(*inputs).square().sum(), model.table)
    (wanted,) = torch.autograd.grad(explicit(*inputs, model.bias).square().sum(), model.table)
    assert [bias.word for bias in found.sites[0].bias] == ["t5 buckets"]
    assert found.rewritten == 1
    assert grad.abs().max() > 0
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-9)


def test_a_captured_variable_may_hold_a_mask() -> None:
    """A buffer's numbers belong to the model; a variable's may be anything when it runs: -inf, and fills that swallow scores."""
    found = run(score_mod=lambda s, b, h, q, k: s + SLOPES[h] * (k - q))
    (site,) = found.sites
    assert found.rewritten == 1
    assert [str(bias) for bias in site.bias] == [SHOWN]
    assert str(site.mask) == "other(float masks that are data)"
    masks = torch.zeros(B, S).masked_fill(~KEEP, -1e30)
    masks[0] = -1e9
    assert run(score_mod=lambda s, b, h, q, k: s + masks[b, k]).rewritten == 1


def test_lengths_that_are_symbols() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + SLOPES[h] * (k - q) + OFFSETS[(q - k).abs(), h])

    attend, found = compiled(call, dynamic=True)
    for length in (S, 11, 13):
        inputs = [x[:, :, :length].contiguous() for x in qkv()]
        with torch.no_grad():
            torch.testing.assert_close(attend(*inputs), call(*inputs), rtol=1e-9, atol=1e-9)
    assert found.rewritten == len(found.outcomes) <= 2


def test_a_bias_by_key_has_no_dim_of_rows() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + SLOPES[h] * k)

    attend, found = compiled(call)
    with torch.no_grad():
        attend(*qkv())
    (graph,) = found.graphs
    assert square_tensors(graph, S) == []


def test_bfloat16_scores_are_read_as_float32() -> None:
    """Flex computes its scores in float32: what is left of them beside -3e3 decides a row that has nothing else."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda s, b, h, q, k: s + torch.where((b > 0) & (q >= k), 0.0, -3e3))

    attend, found = compiled(call)
    inputs = [(3 * x).to(torch.bfloat16) for x in qkv()]
    with torch.no_grad():
        ours, eager = attend(*inputs), call(*inputs)
        # Float32 of the same numbers stands for the truth: in float64 the scores beside -3e3 would not be lost.
        truth = call(*(x.float() for x in inputs))
    assert (ours - truth).abs().max() <= 2 * (eager - truth).abs().max()
    assert len(found.sites) == 1


def _same_places(self: PairFunction, emit: Any, node: Any, device: Any) -> Any:
    q, k = self.indices[2], self.indices[3]
    return EMIT(PairFunction((*self.indices[:2], (k[0], k[1]), (q[0], q[1])), self.buffers, self.dtype), emit, node, device)


EMIT = PairFunction.emit


def test_swapping_rows_and_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairFunction, "emit", _same_places)
    with pytest.raises(AssertionError):
        modified(BIASES[0])


def test_forgetting_the_sign_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    added = flex._Body.added
    monkeypatch.setattr(flex._Body, "added", lambda self, node, factor, output: added(self, node, abs(factor), output))
    with pytest.raises(AssertionError):
        modified(BIASES[1])


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

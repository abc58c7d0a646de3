"""What is multiplied with data: scores and probabilities, brought to where that is the same, refused with the reason where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Call, Case, Mutation, check, double, must_be_noticed, said  # noqa: F401  (the fixture works by being here)
from spellings import WINDOW, WINDOWED, agree, compiled
from torch import Tensor, nn

from dilcompile.passes.finding import gates, multipliers, read_operands, score_path, score_steps, value_path
from dilcompile.passes.rewriting import rewrite
from dilcompile.policy import Policy

B, H, S, D = 2, 4, 7, 6
INF = float("inf")


def with_tensor(*shape: int, kv_heads: int = H) -> Callable[[], tuple[Tensor, ...]]:
    """Queries, keys, values, and a tensor of ordinary numbers away from zero."""

    def make() -> tuple[Tensor, ...]:
        q, k, v = torch.randn(B, H, S, D), torch.randn(B, kv_heads, S, D), torch.randn(B, kv_heads, S, D)
        return q, k, v, torch.rand(shape) + 0.5

    return make


def later() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def scaled(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention whose scores are changed by a tensor."""
    return lambda q, k, v, t: change(q @ k.mT * 0.4, t).softmax(-1) @ v


def shared(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Two query heads a key head."""
    return lambda q, k, v, t: change(q @ k.repeat_interleave(2, 1).mT, t).softmax(-1) @ v.repeat_interleave(2, 1)


def _capped_inside(s: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(s * t) * 3


def _cosine(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Swin v2's."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * t.clamp(max=1.2).exp()
    return (scores + torch.linspace(-1, 1, S)).softmax(-1) @ v


SCALES: list[Case] = [
    ("one number", scaled(lambda s, t: s * t), with_tensor(), "none (zero)"),
    ("one a head", scaled(lambda s, t: s * t), with_tensor(H, 1, 1), "none (zero)"),
    ("one a head, divided by", scaled(lambda s, t: s / t), with_tensor(1, H, 1, 1), "none (zero)"),
    ("one a head, on the left", scaled(lambda s, t: t * s), with_tensor(H, 1, 1), "none (zero)"),
    ("one a row", scaled(lambda s, t: s * t), with_tensor(B, H, S, 1), "none (zero)"),
    ("one a row of all heads", scaled(lambda s, t: s * t), with_tensor(S, 1), "none (zero)"),
    ("one a key", scaled(lambda s, t: s * t), with_tensor(B, H, 1, S), "none (zero)"),
    ("one a key of all heads", scaled(lambda s, t: s / t), with_tensor(S), "none (zero)"),
    ("rows and keys, one after the other", lambda q, k, v, t: (q @ k.mT * t * t.mT).softmax(-1) @ v, with_tensor(B, H, S, 1), "none (zero)"),
    ("in place", scaled(lambda s, t: (s * 1).mul_(t)), with_tensor(H, 1, 1), "none (zero)"),
    ("before a causal mask", scaled(lambda s, t: (s * t).masked_fill(later(), -INF)), with_tensor(H, 1, 1), "causal (zero)"),
    ("inside a soft cap", scaled(_capped_inside), with_tensor(H, 1, 1), "none (zero)"),
    ("the row's maximum taken off inside", scaled(lambda s, t: (s - s.amax(-1, keepdim=True)) * t), with_tensor(H, 1, 1), "none (zero)"),
    ("cosine", _cosine, with_tensor(H, 1, 1), "none + bias (zero)"),
    ("heads that share keys, one a head", shared(lambda s, t: s * t), with_tensor(H, 1, 1, kv_heads=2), "none (zero)"),
    ("heads that share keys, one a key", shared(lambda s, t: s * t), with_tensor(B, 1, 1, S, kv_heads=2), "none (zero)"),
    ("scores transposed", lambda q, k, v, t: (k @ q.mT * t).softmax(-2).mT @ v, with_tensor(H, 1, 1), "none (zero)"),
    ("scores transposed, one a row", lambda q, k, v, t: (k @ q.mT * t).softmax(-2).mT @ v, with_tensor(B, H, 1, S), "none (zero)"),
    ("scores transposed, one a key", lambda q, k, v, t: (k @ q.mT * t).softmax(-2).mT @ v, with_tensor(B, H, S, 1), "none (zero)"),
    ("not: one a pair", scaled(lambda s, t: s * t), with_tensor(S, S), "miss: the scores are multiplied by a tensor that varies over queries and keys"),
    ("not: one a key and head where heads share keys", shared(lambda s, t: s * t), with_tensor(B, H, 1, S, kv_heads=2), "miss: the scores are multiplied by a tensor that varies over heads and over the keys that they share"),
    ("not: after a mask", scaled(lambda s, t: s.masked_fill(later(), -INF) * t), with_tensor(H, 1, 1), "miss: the scores are changed otherwise before they are scaled by a tensor"),
    ("not: after a bias", scaled(lambda s, t: (s + torch.linspace(-1, 1, S)) * t), with_tensor(H, 1, 1), "miss: the scores are changed otherwise before they are scaled by a tensor"),
    ("not: after a soft cap", scaled(lambda s, t: s.tanh() * t), with_tensor(H, 1, 1), "miss: the scores are changed otherwise before they are scaled by a tensor"),
    ("not: keys, after a number for all of them", scaled(lambda s, t: (s + 1.0) * t), with_tensor(S), "miss: the scores are changed otherwise before they are scaled by a tensor"),
    ("not: keys, after the row's maximum", scaled(lambda s, t: (s - s.amax(-1, keepdim=True)) * t), with_tensor(S), "miss: the scores are changed otherwise before they are scaled by a tensor"),
    ("not: after a sink", lambda q, k, v, t: (F.pad(q @ k.mT, (0, 1)) * t).softmax(-1)[..., :S] @ v, with_tensor(H, 1, 1), "miss: the scores are changed otherwise before they are scaled by a tensor"),
    ("not: made of the scores", scaled(lambda s, t: s * (t * s.mean((2, 3), keepdim=True))), with_tensor(H, 1, 1), "miss: a scale is computed from the scores themselves"),
    ("not: more heads than the scores", lambda q, k, v, t: (q[:, :1] @ k[:, :1].mT * t).softmax(-1) @ v, with_tensor(H, 1, 1), "miss: they are multiplied by a tensor with dims that the scores lack"),
    ("not: the scores divide it", scaled(lambda s, t: t / s), with_tensor(H, 1, 1), "miss: the scores divide something"),
]  # fmt: skip


def with_padding(dtype: torch.dtype = torch.bool, left: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    """Queries, keys, values, and 1 where a key counts: row 1 loses three keys."""

    def make() -> tuple[Tensor, ...]:
        keep = torch.ones(B, S, dtype=dtype)
        keep[1, slice(3) if left else slice(S - 3, S)] = 0
        return (*with_tensor()()[:3], keep)

    return make


def lower(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.ones(S, S, dtype=dtype).tril()


class GPT1(nn.Module):
    """OpenAI's first: a registered triangle, larger than the scores, multiplied with and filled outside; then padding is added."""

    def __init__(self, fill: float = -1e4) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(S + 3, S + 3)).view(1, 1, S + 3, S + 3))
        self.fill = fill

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        w = q @ k.mT / 2.0
        b = self.bias[:, :, : w.size(-2), : w.size(-1)]
        w = w * b + self.fill * (1 - b)
        if keep is not None:
            w = w + torch.zeros(B, 1, 1, S).masked_fill(~keep[:, None, None], torch.finfo(w.dtype).min)
        return w.softmax(-1) @ v


def times(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: change(q @ k.mT * 0.4).softmax(-1) @ v


def _padded_and_causal(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    m = lower() * keep[:, None, None].to(q.dtype)
    return (q @ k.mT * m - 1e10 * (1 - m)).softmax(-1) @ v


def _keys_alone(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    m = keep[:, None, None].to(q.dtype)
    return (q @ k.mT * m - 1e10 * (1 - m)).softmax(-1) @ v


def no_tensor() -> tuple[Tensor, ...]:
    return with_tensor()()[:3]


GATES: list[Case] = [
    ("GPT-1", GPT1(), no_tensor, "causal (zero)"),
    ("GPT-2 by TensorFlow", times(lambda s: s * lower() - 1e10 * (1 - lower())), no_tensor, "causal (zero)"),
    ("the mask first", times(lambda s: -1e9 * (1 - lower()) + lower() * s), no_tensor, "causal (zero)"),
    ("scaled after", times(lambda s: (s * lower() + -1e9 * (1 - lower())) / 3), no_tensor, "causal (zero)"),
    ("by truth values", times(lambda s: s * lower(torch.bool) + torch.zeros(S, S).masked_fill(later(), -1e9)), no_tensor, "causal (zero)"),
    ("a bias in between", times(lambda s: s * lower() + torch.linspace(-1, 1, S) - 1e30 * (1 - lower())), no_tensor, "causal + bias (zero)"),
    ("padding in it", _padded_and_causal, with_padding(), "causal & padding (uniform)"),
    ("keys alone", _keys_alone, with_padding(torch.int64), "padding (zero)"),
    ("padding beside it in training", GPT1(), with_padding(left=False), "causal & padding (others)"),
    ("not: nothing is filled", times(lambda s: s * lower()), no_tensor, "miss: scores are set to zero by a mask, which does not hide them"),
    ("not: too small a fill", times(lambda s: s * lower() - 10 * (1 - lower())), no_tensor, "miss: scores are set to zero by a mask, which does not hide them"),
    ("not: filled inside", times(lambda s: s * lower() - 1e9 * lower()), no_tensor, "miss: scores are set to zero by a mask, which does not hide them"),
    ("not: filled elsewhere too", times(lambda s: s * lower() - 1e9 * (1 - lower().tril(-1))), no_tensor, "miss: scores are set to zero by a mask, which does not hide them"),
    ("not: another diagonal", times(lambda s: s * lower().tril(-1) - 1e9 * (1 - lower())), no_tensor, "miss: scores are set to zero by a mask, which does not hide them"),
    ("not: a triangle of twos", times(lambda s: s * (2 * lower()) - 1e9 * (1 - lower())), no_tensor, "miss: the scores are multiplied by a tensor that varies over queries and keys"),
    ("not: divided by it", times(lambda s: s / (lower() + 1) - 1e9 * (1 - lower())), no_tensor, "miss: the scores are multiplied by a tensor that varies over queries and keys"),
    ("not: zeros over an infinite mask", times(lambda s: s.masked_fill(lower() == 0, -1e9) * lower() - 1e9 * (1 - lower())), no_tensor, "miss: the scores are changed otherwise before they are scaled by a tensor"),
    ("not: fractions", lambda q, k, v, t: (q @ k.mT * t - 1e9 * (1 - t)).softmax(-1) @ v, with_tensor(S, S), "miss: the scores are multiplied by a tensor that varies over queries and keys"),
]  # fmt: skip


@pytest.mark.parametrize("case", GATES, ids=lambda case: case[0])
def test_masks_that_scores_are_multiplied_with(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("fill", [-1e4, -1e300])
def test_padding_beside_a_mask_that_scores_are_multiplied_with(left: bool, fill: float) -> None:
    """Rows of padding alone see what is to come: its scores are the fill, those of padding are far below."""
    with torch.no_grad():
        case = ("GPT-1", GPT1(fill), with_padding(left=left), "causal & padding (others)")
        check(case, gradients=False)


def weighed(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Causal attention whose probabilities are changed by a tensor."""
    return lambda q, k, v, t: change((q @ k.mT * 0.4).masked_fill(later(), -INF).softmax(-1), t) @ v


def shared_weights(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Two query heads a key head."""
    return lambda q, k, v, t: change((q @ k.repeat_interleave(2, 1).mT).softmax(-1), t) @ v.repeat_interleave(2, 1)


def _merged(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Heads are put into the batch between mask and values."""
    weights = ((q @ k.mT).softmax(-1) * t).reshape(B * H, S, S)
    return torch.bmm(weights, v.reshape(B * H, S, D)).view(B, H, S, D)


def _emptied(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Rows without keys: the mean of all values, each with its weight."""
    return ((q @ k.mT).masked_fill(torch.arange(S)[:, None] == 2, -1e30).softmax(-1) * t) @ v


WEIGHTS: list[Case] = [
    ("a head mask", weighed(lambda p, t: p * t), with_tensor(1, H, 1, 1), "causal (zero)"),
    ("a head mask on the left", weighed(lambda p, t: t * p), with_tensor(H, 1, 1), "causal (zero)"),
    ("weights divided by one a head", weighed(lambda p, t: p / t), with_tensor(H, 1, 1), "causal (zero)"),
    ("weights of rows", weighed(lambda p, t: p * t), with_tensor(B, H, S, 1), "causal (zero)"),
    ("weights of keys", weighed(lambda p, t: p * t), with_tensor(B, 1, 1, S), "causal (zero)"),
    ("weights of keys, one a head", weighed(lambda p, t: p * t), with_tensor(H, 1, S), "causal (zero)"),
    ("weights of rows and of keys", weighed(lambda p, t: p * t / t.mT), with_tensor(B, H, S, 1), "causal (zero)"),
    ("a number", weighed(lambda p, t: p * 2 / 3), with_tensor(), "causal (zero)"),
    ("one number of data", weighed(lambda p, t: p * t), with_tensor(), "causal (zero)"),
    ("a head mask and dropout", weighed(lambda p, t: F.dropout(F.dropout(p, 0.2, False) * t, 0.1, False)), with_tensor(H, 1, 1), "causal (zero)"),
    ("weights of rows without keys", _emptied, with_tensor(S), "rows (uniform)"),
    ("heads in the batch", _merged, with_tensor(H, 1, 1), "none (zero)"),
    ("a head mask where heads share keys", shared_weights(lambda p, t: p * t), with_tensor(H, 1, 1, kv_heads=2), "none (zero)"),
    ("weights of keys where heads share them", shared_weights(lambda p, t: p * t), with_tensor(B, 1, 1, S, kv_heads=2), "none (zero)"),
    ("weights of transposed scores", lambda q, k, v, t: ((k @ q.mT).softmax(-2) * t).mT @ v, with_tensor(H, 1, S), "none (zero)"),
    ("not: weights of pairs", weighed(lambda p, t: p * t), with_tensor(S, S), "miss: the probabilities are multiplied by a tensor that varies over queries and keys"),
    ("not: weights of keys, one a head, where heads share them", shared_weights(lambda p, t: p * t), with_tensor(H, 1, S, kv_heads=2), "miss: the probabilities are multiplied by a tensor that varies over heads and over the keys that they share"),
    ("not: squared", weighed(lambda p, t: p * p), with_tensor(), "miss: aten.mul stands between the softmax and the values"),
    ("not: a gate made of the weights", weighed(lambda p, t: p * (p.amax(-1, keepdim=True) * t)), with_tensor(H, 1, 1), "miss: the attention weights are used elsewhere too"),
    ("not: a gate made of the scores", lambda q, k, v, t: (lambda s: s.softmax(-1) * s.mean((2, 3), keepdim=True))(q @ k.mT) @ v, with_tensor(), "miss: a weight of the probabilities is computed from the scores themselves"),
    ("not: divided by the weights", weighed(lambda p, t: t / p), with_tensor(H, 1, 1), "miss: aten.div stands between the softmax and the values"),
    ("not: something added", weighed(lambda p, t: p + t), with_tensor(H, 1, 1), "miss: aten.add stands between the softmax and the values"),
    ("not: returned too", lambda q, k, v, t: (lambda p: (p @ v, p))((q @ k.mT).softmax(-1) * t), with_tensor(H, 1, 1), "miss: the attention weights are returned"),
]  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS, ids=lambda case: case[0])
def test_weights_that_are_data(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("first", [False, True])
def test_a_head_mask_around_dropout(first: bool) -> None:
    """What is dropped is dropped, what is kept is weighed: twice the weight is twice the output under the same seed."""

    def call(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return (F.dropout(weights * t, 0.5) if first else F.dropout(weights, 0.5) * t) @ v

    run, found = compiled(Call(call))
    q, k, v, t = with_tensor(H, 1, 1)()

    def drawn(weight: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run(q, k, v, weight)  # type: ignore[no-any-return]

    torch.testing.assert_close(drawn(2 * t), 2 * drawn(t), rtol=1e-12, atol=1e-12)
    mean = torch.stack([run(q, k, v, t) for _ in range(2000)]).mean(0)
    assert (mean - (q @ k.mT).softmax(-1) @ v * t).norm() < 0.1 * mean.norm()
    (site,) = found.sites
    assert (site.dropout_p, found.rewritten, found.misses) == (0.5, 1, [])


@pytest.mark.parametrize("case", SCALES, ids=lambda case: case[0])
def test_scales_that_are_data(case: Case) -> None:
    check(case)


class Cosine(nn.Module):
    """Swin v2's: cosines times a learned scale a head, two heads a key head."""

    def __init__(self, extra: Callable[[], Tensor] | None = None) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D)
        self.scale = nn.Parameter(torch.linspace(0.0, 1.0, H)[:, None, None])
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(B, -1, H, D).transpose(1, 2)
        k, v = (part.view(B, -1, H // 2, D).transpose(1, 2) for part in self.kv(x).chunk(2, -1))
        k, v = (part.repeat_interleave(2, 1) for part in (F.normalize(k, dim=-1), v))
        scores = F.normalize(q, dim=-1) @ k.mT * self.scale.clamp(max=4.0).exp()
        if self.extra is not None:
            scores = scores.masked_fill(self.extra(), -INF)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, -1, H * D)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_learned_scale(dynamic: bool | None) -> None:
    found = agree(Cosine(), torch.randn(B, S, H * D), dynamic=dynamic)
    (site,) = found.sites
    assert (said(found), site.kv_heads, site.scale) == ("none (zero)", H // 2, 1.0)
    assert site.multipliers is not None


def test_a_learned_scale_in_a_window() -> None:
    def far() -> Tensor:
        places = torch.arange(S)
        return (places[:, None] - places[None, :]).abs() >= WINDOW

    module, reference = Cosine(), Cosine(far)
    reference.load_state_dict(module.state_dict())
    found = agree(module, torch.randn(B, S, H * D), policy=WINDOWED, reference=reference, gradients=False)
    assert found.rewritten == 1


def test_a_scale_that_is_written_before_the_attention_ends_is_refused() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
        t = t * 1
        weights = (q @ k.mT * t).softmax(-1)
        t.mul_(3.0)
        return weights @ v + t

    with torch.no_grad():
        check(("written", call, with_tensor(H, 1, 1), "miss: it is written in place before the attention ends"), gradients=False)


def _case(name: str) -> Callable[[], None]:
    (found,) = [case for case in (*SCALES, *GATES, *WEIGHTS) if case[0] == name]
    return lambda: check(found)  # type: ignore[return-value]


CHECKED = Policy.load(
    {
        "version": 1,
        "defaults": {"numerics": {"check": "compile"}, "fallback": {"unsupported": "keep", "unmatched": "keep"}},
        "rules": [{"name": "all", "apply": {"form": "dense"}}],
    }
)


@pytest.mark.parametrize("name", ["one a head", "one a key", "a head mask", "weights of keys", "GPT-1", "a bias in between"])
def test_a_trial_agrees(name: str) -> None:
    """Site and rewriting give the same on random inputs, the multipliers among them."""
    (case,) = [case for case in (*SCALES, *GATES, *WEIGHTS) if case[0] == name]
    _, function, inputs, _ = case
    found = agree(function if isinstance(function, nn.Module) else Call(function), *inputs(), policy=CHECKED)
    (verdict,) = [verdict for outcome in found.outcomes for verdict in outcome.report.verdicts]
    assert found.rewritten == 1
    assert any(note.startswith("numerics.check: compared on") for note in verdict.notes)


def _without_gates(operands: Any, *_: Any) -> Any:
    return [one for one in operands if one.kind != "gate"]


MUTATIONS: list[Mutation] = [
    ("scales are forgotten", rewrite, "multiplied", lambda emit, operand, *_, **__: operand, _case("one a head")),
    ("keys are told apart by nobody", score_steps, "unweighed", lambda *_: None, _case("not: keys, after a number for all of them")),
    ("masks may stand inside", score_steps, "unscaled", lambda *_: None, _case("not: after a bias")),
    ("shared keys may differ", multipliers._Varies, "check", lambda *_: None, _case("not: one a key and head where heads share keys")),
    ("weights of keys may differ by row", multipliers._Varies, "check", lambda *_: None, _case("not: weights of pairs")),
    ("weights are forgotten", rewrite, "multiplied", lambda emit, operand, *_, **__: operand, _case("a head mask")),
    ("weights may be made of scores", value_path, "independent", lambda *_: None, _case("not: a gate made of the scores")),
    ("any number is one", gates, "where_one", lambda value: value.when, _case("not: a triangle of twos")),
    ("any fill is the gate's", gates, "_fill_outside", lambda *_: -1e9, _case("not: another diagonal")),
    ("scores are kept under their mask", read_operands, "gates_as_fills", _without_gates, _case("padding in it")),
    ("scales may be made of scores", score_path, "independent", lambda *_: None, _case("not: made of the scores")),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation[0])
def test_a_rule_taken_away_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    must_be_noticed(mutation, monkeypatch)

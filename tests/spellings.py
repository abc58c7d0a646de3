"""Attention written out as users write it: composable pieces of modules, and one way to compile and compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dilcompile.decision import Decision
from dilcompile.pipeline import Outcome, rewrite_dynamo
from dilcompile.policy import Policy
from dilcompile.site import AttentionSite, Miss

EXACT = Policy.load("exact")
WINDOW = 3
WINDOWED = Policy.load(
    {
        "version": 1,
        "rules": [{"name": "w", "match": {}, "apply": {"form": "sliding_window", "window": WINDOW}}],
        "defaults": {"fallback": {"unsupported": "keep", "unmatched": "keep"}},
    }
)


@dataclass
class Found:
    """What one compiled call found and made."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def sites(self) -> list[AttentionSite]:
        return [verdict.site for outcome in self.outcomes for verdict in outcome.report.verdicts]

    @property
    def misses(self) -> list[Miss]:
        return [miss for outcome in self.outcomes for miss in outcome.report.misses]

    @property
    def rewritten(self) -> int:
        return sum(isinstance(v, Decision) for outcome in self.outcomes for v in outcome.report.verdicts)

    @property
    def refusals(self) -> list[str]:
        return [v.reason for outcome in self.outcomes for v in outcome.report.verdicts if not isinstance(v, Decision)]

    @property
    def masks(self) -> list[str]:
        return [str(site.mask) for site in self.sites]

    @property
    def graphs(self) -> list[GraphModule]:
        return [outcome.gm for outcome in self.outcomes if outcome.gm is not None]


def compiled(module: Callable[..., Any], policy: Policy = EXACT, dynamic: bool | None = None) -> tuple[Any, Found]:
    """The module compiled with the inner compiler ``eager``, and a record of what is found at each compilation."""
    torch._dynamo.reset()
    found = Found()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = rewrite_dynamo(gm, example_inputs, policy, "test")
        found.outcomes.append(outcome)
        return (gm if outcome.gm is None else outcome.gm).forward

    return torch.compile(module, backend=backend, dynamic=dynamic), found


def agree(
    module: nn.Module,
    *inputs: Any,
    policy: Policy = EXACT,
    reference: Callable[..., Any] | None = None,
    dynamic: bool | None = None,
    tolerance: float = 1e-9,
    gradients: bool = True,
    **named: Any,
) -> Found:
    """Assert that compiled and plain run agree, forward and in every gradient; return what was found.

    Args:
        reference: what to compare with; None: the module itself, uncompiled.
    """
    run, found = compiled(module, policy, dynamic)
    wanted, wanted_grads = _run(module, reference or module, inputs, named, gradients)
    got, got_grads = _run(module, run, inputs, named, gradients)
    assert len(wanted) == len(got)
    for expected, actual in zip(wanted + wanted_grads, got + got_grads, strict=True):
        if expected is None or actual is None:
            assert expected is None
            assert actual is None or not actual.any()
            continue
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return found


def _run(
    module: nn.Module, call: Callable[..., Any], inputs: Sequence[Any], named: dict[str, Any], gradients: bool
) -> tuple[list[Any], list[Any]]:
    leaves = [_leaf(value, gradients) for value in inputs]
    kwargs = {name: _leaf(value, gradients) for name, value in named.items()}
    for parameter in module.parameters():
        parameter.grad = None
    results = [r for r in torch.utils._pytree.tree_leaves(call(*leaves, **kwargs)) if isinstance(r, Tensor)]
    if not gradients:
        return [r.detach() for r in results], []
    total = sum(_weighted(r) for r in results if r.requires_grad)
    total.backward()  # type: ignore[union-attr]
    tracked = [x for x in (*leaves, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    return [r.detach() for r in results], [x.grad for x in (*tracked, *module.parameters())]


def _weighted(result: Tensor) -> Tensor:
    """A scalar that depends on every element differently."""
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
    return (result * weights).sum()


def _leaf(value: Any, gradients: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    wants = gradients and value.is_floating_point()
    return value.detach().clone().requires_grad_(wants)


def square_tensors(gm: GraphModule, length: int) -> list[Node]:
    """Nodes that hold a tensor with two dims of the given length."""
    return [
        node
        for node in gm.graph.nodes
        if isinstance(node.meta.get("val"), Tensor) and sum(size == length for size in node.meta["val"].shape) >= 2
    ]


@dataclass(frozen=True)
class Spelling:
    """One way to write an attention; every field is a spelling rule that composes with the others.

    Args:
        layout: where heads and batch stand while scores are made.
        scale: how the factor 0.3 is applied.
        mask: what is hidden; ``causal``, ``window``, ``band``, ``padding``, ``causal+padding``, ``none``.
        maker: how the mask comes about (``arange``, ``tril``, ``triu``, ``buffer``, ``reverse``).
        hide: how it is applied to the scores.
        softmax: plain, in float32 style, or with the maximum taken off.
        share: how keys of fewer heads are spread over the query heads.
    """

    layout: str = "bhsd"
    scale: str = "mul"
    mask: str = "causal"
    maker: str = "arange"
    hide: str = "fill_inf"
    softmax: str = "plain"
    share: str = "none"
    dropout: bool = False
    sizes: tuple[int, int, int, int] = (2, 4, 7, 6)


LAYOUTS = ("bhsd", "b*h", "h*b", "einsum", "einsum_kq", "einsum_last", "baddbmm", "sdpa", "kernel", "five")
SCALES = ("mul", "div", "query", "key", "both", "tensor", "buffer", "inplace", "learned", "none")
MASKS = ("none", "causal", "window", "band", "padding", "causal+padding", "reach")
MAKERS = ("arange", "tril", "triu", "buffer", "reverse")
HIDES = ("fill_inf", "fill_min", "fill_", "where", "where_hide", "add", "add_", "one_minus", "add_where")
SOFTMAXES = (
    "plain",
    "cast",
    "method",
    "less_max",
    "safe",
    "log_exp",
    "logsumexp",
    "exp_sum",
    "exp_sum_less_max",
    "softmax1",
    "padded",
)
SHARES = ("none", "expand", "interleave", "tile", "one")
SCALE, REACH = 0.3, 3


def _over_sum(exponentials: Tensor, dim: int) -> Tensor:
    return exponentials / exponentials.sum(dim, keepdim=True)


def _softmax1(scores: Tensor, dim: int) -> Tensor:
    exponentials = scores.exp()
    return exponentials / (1 + exponentials.sum(dim, keepdim=True))


def _padded(scores: Tensor, dim: int) -> Tensor:
    """A column of zeros in front, dropped after."""
    shape = list(scores.shape)
    shape[dim] = 1
    return torch.cat((scores.new_zeros(shape), scores), dim).softmax(dim).narrow(dim, 1, scores.shape[dim])


OWN_SOFTMAXES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "safe": lambda scores, dim: torch.ops.aten._safe_softmax(scores, dim),
    "log_exp": lambda scores, dim: F.log_softmax(scores, dim).exp(),
    "logsumexp": lambda scores, dim: (scores - torch.logsumexp(scores, dim, keepdim=True)).exp(),
    "exp_sum": lambda scores, dim: _over_sum(scores.exp(), dim),
    "exp_sum_less_max": lambda scores, dim: _over_sum((scores - scores.max(dim, keepdim=True).values).exp(), dim),
    "softmax1": _softmax1,
    "padded": _padded,
}


class Written(nn.Module):
    """Self-attention in one spelling. ``extra`` hides more pairs, for the reference of an approximate form."""

    def __init__(self, spelling: Spelling, extra: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.spelling, self.extra = spelling, extra
        _, heads, length, features = spelling.sizes
        self.kv_heads = {"none": heads, "one": 1}.get(spelling.share, heads // 2 if heads % 2 == 0 else 1)
        self.q = nn.Linear(heads * features, heads * features)
        self.kv = nn.Linear(heads * features, 2 * self.kv_heads * features)
        self.register_buffer("table", torch.ones(length + 3, length + 3, dtype=torch.bool).tril()[None, None])
        self.register_buffer("factor", torch.tensor(SCALE))
        self.temperature = nn.Parameter(torch.tensor(SCALE))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        batch, length, _ = x.shape
        _, heads, _, features = self.spelling.sizes
        q = self.q(x).view(batch, length, heads, features).transpose(1, 2)
        k, v = (t.view(batch, length, self.kv_heads, features).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        k, v = self._shared(k, heads), self._shared(v, heads)
        if self.spelling.scale in ("query", "both"):
            q = q * (SCALE if self.spelling.scale == "query" else SCALE**0.5)
        if self.spelling.scale in ("key", "both"):
            k = k * (SCALE if self.spelling.scale == "key" else SCALE**0.5)
        mask = self._mask(length, keep)
        out = getattr(self, "_" + self.spelling.layout.replace("*", "_"))(q, k, v, mask)
        return out.transpose(1, 2).reshape(batch, length, heads * features)

    def _shared(self, x: Tensor, heads: int) -> Tensor:
        batch, own, length, features = x.shape
        if self.spelling.share == "expand":
            return x[:, :, None].expand(batch, own, heads // own, length, features).reshape(batch, heads, length, features)
        if self.spelling.share == "interleave":
            return x.repeat_interleave(heads // own, dim=1)
        if self.spelling.share == "tile":
            return x.repeat(1, heads // own, 1, 1)
        return x.expand(batch, heads, length, features) if self.spelling.share == "one" else x

    def _mask(self, length: int, keep: Tensor | None) -> Tensor | None:
        """A boolean [B or 1, 1, S, S], true where a pair is seen."""
        rows, columns = torch.arange(length)[:, None], torch.arange(length)[None, :]
        maker, wanted = self.spelling.maker, self.spelling.mask
        causal = {
            "arange": lambda: columns <= rows,
            "tril": lambda: torch.tril(torch.ones(length, length, dtype=torch.bool)),
            "triu": lambda: torch.triu(torch.ones(length, length), diagonal=1) == 0,
            "buffer": lambda: self.table[0, 0, :length, :length],
            "reverse": lambda: ~(rows < columns),
        }[maker]()
        found = None
        if wanted in ("causal", "causal+padding"):
            found = causal
        elif wanted == "window":
            found = causal & (rows - columns < REACH) if maker != "tril" else causal.triu(-(REACH - 1))
        elif wanted == "band":
            found = (rows - columns).abs() < REACH if maker != "reverse" else (rows < columns + REACH) * (columns < rows + REACH)
        elif wanted == "reach":
            found = columns - rows <= REACH
        if self.extra is not None:
            found = self.extra(rows, columns) if found is None else found & self.extra(rows, columns)
        found = None if found is None else found[None, None]
        if wanted in ("padding", "causal+padding"):
            assert keep is not None
            padding = keep[:, None, None, :].to(torch.bool)
            found = padding if found is None else found & padding
        return found

    def _weights(self, scores: Tensor, mask: Tensor | None, dim: int = -1) -> Tensor:
        scores = self._hidden(self._scaled(scores), mask)
        how = self.spelling.softmax
        if how == "less_max":
            scores = scores - scores.amax(dim, keepdim=True)
        if how == "method":
            weights = scores.softmax(dim)
        elif how == "cast":
            weights = F.softmax(scores, dim=dim, dtype=torch.float64).to(scores.dtype)
        elif how in OWN_SOFTMAXES:
            weights = OWN_SOFTMAXES[how](scores, dim)
        else:
            weights = torch.softmax(scores, dim=dim)
        return F.dropout(weights, 0.1, training=self.training) if self.spelling.dropout else weights

    def _scaled(self, scores: Tensor) -> Tensor:
        how = self.spelling.scale
        if how == "mul":
            return scores * SCALE
        if how == "div":
            return scores / (1 / SCALE)
        if how == "tensor":
            return scores * torch.tensor(SCALE, dtype=scores.dtype)
        if how == "buffer":
            return self.factor * scores
        if how == "learned":
            return scores * self.temperature
        return scores.mul_(SCALE) if how == "inplace" else scores

    def _hidden(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return scores
        how, least = self.spelling.hide, torch.finfo(scores.dtype).min
        if how == "fill_inf":
            return scores.masked_fill(~mask, float("-inf"))
        if how == "fill_min":
            return scores.masked_fill(mask.logical_not(), least)
        if how == "fill_":
            return scores.masked_fill_(mask == 0, -1e30)
        if how == "where":
            return torch.where(mask, scores, torch.tensor(least, dtype=scores.dtype))
        if how == "where_hide":
            return torch.where(~mask, least, scores)
        if how == "one_minus":
            return scores + (1.0 - mask.to(scores.dtype)) * least
        added = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, float("-inf"))
        if how == "add_where":
            added = torch.where(mask, 0.0, least)
        if how == "add_":
            scores += added
            return scores
        return added + scores

    def _bhsd(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self._weights(q @ k.transpose(-2, -1), mask) @ v

    def _b_h(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = q.shape
        if mask is not None:
            mask = mask.expand(batch, heads, length, length).reshape(batch * heads, length, length)
        q, k, v = (x.reshape(batch * heads, length, -1) for x in (q, k, v))
        return torch.bmm(self._weights(torch.bmm(q, k.mT), mask), v).view(batch, heads, length, -1)

    def _h_b(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = q.shape
        if mask is not None:
            mask = mask.transpose(0, 1).expand(heads, batch, length, length).reshape(batch * heads, length, length)
        q, k, v = (x.transpose(0, 1).reshape(heads * batch, length, -1) for x in (q, k, v))
        return torch.bmm(self._weights(torch.bmm(q, k.mT), mask), v).view(heads, batch, length, -1).transpose(0, 1)

    def _einsum(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = self._weights(torch.einsum("bhid,bhjd->bhij", q, k), mask)
        return torch.einsum("bhij,bhjd->bhid", weights, v)

    def _einsum_kq(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = self._weights(torch.einsum("bhid,bhjd->bhji", q, k), None if mask is None else mask.mT, dim=-2)
        return torch.einsum("bhji,bhjd->bhid", weights, v)

    def _einsum_last(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.permute(0, 2, 3, 1)
        weights = self._weights(torch.einsum("bhjd,bhid->bijh", k, q), mask, dim=2)
        return torch.einsum("bhjd,bijh->bhid", v, weights)

    def _baddbmm(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = q.shape
        if mask is not None:
            mask = mask.expand(batch, heads, length, length).reshape(batch * heads, length, length)
        q, k, v = (x.reshape(batch * heads, length, -1) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1, 1, 1, dtype=q.dtype).expand(batch * heads, length, length), q, k.mT, alpha=2.0)
        return torch.bmm(self._weights(scores, mask), v).view(batch, heads, length, -1)

    def _five(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, features = q.shape
        q, k, v = (x.reshape(batch, 2, heads // 2, length, features) for x in (q, k, v))
        mask = None if mask is None else mask[:, :, None]
        return (self._weights(q @ k.mT, mask) @ v).reshape(batch, heads, length, features)

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """SDPA's kernel on CPU, by its own name."""
        added = None if mask is None else self._hidden(torch.zeros(mask.shape, dtype=q.dtype), mask)
        scale = SCALE if self.spelling.scale not in ("query", "key", "both", "learned", "none") else 1.0
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=added, scale=scale)[0]

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale = SCALE if self.spelling.scale not in ("query", "key", "both", "learned", "none") else 1.0
        if mask is not None and self.spelling.hide not in ("fill_inf", "fill_", "where"):
            mask = self._hidden(torch.zeros(mask.shape, dtype=q.dtype), mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def keep_of(batch: int, length: int) -> Tensor:
    """Key padding [B, S]: row 0 keeps all, every other row loses another key (never key 0, so that every row keeps one)."""
    keep = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        keep[row, 1 + row % (length - 1)] = 0
    return keep


def inputs_of(spelling: Spelling) -> tuple[Tensor, ...]:
    batch, heads, length, features = spelling.sizes
    x = torch.randn(batch, length, heads * features, generator=torch.Generator().manual_seed(7))
    return (x, keep_of(batch, length)) if "padding" in spelling.mask else (x,)

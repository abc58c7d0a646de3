"""Decode loops over caches that grow and caches of fixed size, and graphs in parts: compiled at most twice, every step as eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spellings import EXACT, Found, compiled
from torch import Tensor, nn

from dilcompile.policy import Policy

transformers = pytest.importorskip("transformers")
# The prompt fills the window: while a window fills, the model's own branches make Dynamo compile more, with any backend.
PROMPT, STEPS, WINDOW = 20, 64, 16


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models compute their softmax in float32 whatever their dtype: here it stays in float64, so that steps can be compared."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=None, _stacklevel=3, dtype=None: softmax(x, dim=dim))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_default_dtype(torch.float32)


def _model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 128,
    }  # fmt: skip
    if name == "llama":
        config = transformers.LlamaConfig(**sizes, attn_implementation=attention)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.MistralConfig(**sizes, sliding_window=WINDOW, attn_implementation=attention)
        model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    return model.eval()


def _cache(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 7)


def _decode(call: Callable[..., Any], cache: Any, ids: Tensor, between: Callable[[], None] = lambda: None) -> Tensor:
    """The logits of the last prompt token and of every step."""
    with torch.no_grad():
        made = [call(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:]]
        between()
        for step in range(STEPS):
            token = (ids[:, :1] + step) % 97
            made.append(call(input_ids=token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(made, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa")])
def test_a_loop_compiles_twice_and_every_step_is_exact(name: str, attention: str, kind: str) -> None:
    model = _model(name, attention)
    ids = torch.randint(0, 97, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    wanted = _decode(model, _cache(kind, model), ids)
    run, found = compiled(model)
    compilations: list[int] = []
    got = _decode(run, _cache(kind, model), ids, lambda: compilations.append(len(found.outcomes)))
    assert compilations == [1]
    assert len(found.outcomes) - 1 <= 2
    assert (found.misses, found.refusals) == ([], [])
    assert found.rewritten == 2 * len(found.outcomes)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_window_that_fills_compiles_no_more_often_than_without_us(kind: str) -> None:
    """The cache's own branches are what Dynamo compiles anew for, whatever the backend."""
    model = _model("mistral", "sdpa")
    ids = torch.randint(0, 97, (2, 5), generator=torch.Generator().manual_seed(1))
    wanted = _decode(model, _cache(kind, model), ids)
    plain: list[int] = []

    def counting(gm: Any, example_inputs: Any) -> Any:
        plain.append(1)
        return gm.forward

    torch._dynamo.reset()
    _decode(torch.compile(model, backend=counting), _cache(kind, model), ids)
    run, found = compiled(model)
    got = _decode(run, _cache(kind, model), ids)
    assert len(found.outcomes) == len(plain)
    assert (found.misses, found.refusals, found.rewritten) == ([], [], 2 * len(found.outcomes))
    # What every exact site must keep to in float64.
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_cache_of_fixed_size_places_its_queries() -> None:
    """The step's position is data: no mask over the cache is built, and a form of distances counts from that position."""
    model = _model("llama", "sdpa")
    ids = torch.randint(0, 97, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    rule = {"name": "w", "match": {"phase": "decode"}, "apply": {"form": "sliding_window", "window": 5}}
    policy = Policy.load({"version": 1, "rules": [rule], "defaults": {"fallback": {"unmatched": "keep"}}})
    run, found = compiled(model, policy)
    got = _decode(run, _cache("static", model), ids)
    assert [site.mask.formula for site in found.sites[-2:]] == ["k <= q + start"] * 2
    assert [(v.form.name, v.fidelity) for v in found.outcomes[-1].report.verdicts] == [("sliding_window", "approximate")] * 2
    # The same window over a cache that grows, written out by hand: the last steps see five keys.
    wanted = _windowed(model, ids)
    torch.testing.assert_close(got[:, 1:], wanted[:, 1:], rtol=1e-9, atol=1e-9)


def _windowed(model: Any, ids: Tensor) -> Tensor:
    cache = _cache("dynamic", model)
    attend = F.scaled_dot_product_attention

    def windowed(q: Tensor, k: Tensor, v: Tensor, *args: Any, **how: Any) -> Tensor:
        if q.shape[2] > 1:
            return attend(q, k, v, *args, **how)
        how = {name: value for name, value in how.items() if name not in ("attn_mask", "is_causal")}
        return attend(q, k[:, :, -5:], v[:, :, -5:], **how)

    torch.nn.functional.scaled_dot_product_attention = windowed
    try:
        return _decode(model, cache, ids)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend


class InParts(nn.Module):
    """Three attentions with a graph break before, between and inside a mask and its use."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = self._attend(self.mix[0](x), mask)
        torch._dynamo.graph_break()
        x = self._attend(self.mix[1](x), torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(2))
        if x.sum() > 0:
            x = x * 2
        return self._attend(self.mix[2](x), None)

    @staticmethod
    def _attend(x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = x.view(*x.shape[:2], 3, 4).unbind(2)
        scores = q @ k.mT
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        return (scores.softmax(-1) @ v).repeat(1, 1, 3)


def test_every_part_of_a_broken_graph_is_treated() -> None:
    torch.manual_seed(0)
    model, x = InParts(), torch.randn(2, 7, 12)
    run, found = compiled(model, EXACT)
    torch.testing.assert_close(run(x), model(x), rtol=1e-9, atol=1e-9)
    assert len(found.outcomes) == 3
    assert _texts(found) == ["causal", "window(inf, 2)", "none"]
    assert (found.misses, found.refusals, found.rewritten) == ([], [], 3)


def _texts(found: Found) -> list[str]:
    return [str(site.mask) for site in found.sites]

"""`keep_structure`: the pairs of the model's own mask and no others, with the model's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import dilcompile
from dilcompile.decision import Decision
from dilcompile.forms import Dense, KeepStructure, parse_form
from dilcompile.functional import attention
from dilcompile.policy import Policy
from dilcompile.relation import Problem
from dilcompile.report.costs import costs_of

LENGTH, HEADS = 150, 4
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2,
}  # fmt: skip
TWO = ["sliding_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt-oss": ("GptOss", {"sliding_window": 16, "layer_types": TWO, "num_local_experts": 4}, "keeps causal, window 16"),
    "Llama 4": (
        "Llama4Text",
        {"attention_chunk_size": 40, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2},
        "keeps causal, chunks of 40",
    ),
}


def model(prefix: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SMALL, **options)
    built: nn.Module = getattr(transformers, f"{prefix.removesuffix('Text')}ForCausalLM")(config).eval().double()
    return built


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_structure(name: str) -> None:
    prefix, options, words = MODELS[name]
    net, ids = model(prefix, options), torch.randint(3, 64, (2, LENGTH))
    local, full = dilcompile.explain(net, input_ids=ids, use_cache=False, policy="exact").decisions
    assert local.fidelity == full.fidelity == "exact"
    assert local.notes[0] == f"{words}: exact, because these are the pairs of the model's own mask"
    assert full.notes[0].startswith("keeps causal:")
    if name != "Llama 4":  # the zoo compares the others, and an example Mistral
        return
    compiled = torch.compile(net, backend="dilated", options={"policy": "exact", "inner": "eager"}, dynamic=False)
    with torch.no_grad():
        expected, found = (run(input_ids=ids, use_cache=False).logits for run in (net, compiled))
    # The model rounds to float32 inside: a difference of 1e-16 may come out as the last digit of that.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


class Masked(nn.Module):
    """Attention under a boolean mask that a function of positions gives."""

    def __init__(self, rule: Callable[[Tensor, Tensor], Tensor], offset: int = 0) -> None:
        super().__init__()
        self.rule, self.offset = rule, offset

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, at = torch.arange(q.shape[2])[:, None] + self.offset, torch.arange(k.shape[2])
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.rule(t, at))


CHUNKED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, int | str]] = {
    "both ways": (lambda t, k: t // 16 == k // 16, 0, 16),
    "causal": (lambda t, k: (t // 16 == k // 16) & (k <= t), 0, 16),
    "causal, in a window": (lambda t, k: (t // 40 == k // 40) & (k <= t) & (k > t - 24), 0, 40),
    "causal, the last queries": (lambda t, k: (t // 16 == k // 16) & (k <= t), 60, 16),
    "chunks in chunks": (lambda t, k: (t // 24 == k // 24) & (t // 40 == k // 40) & (k <= t), 0, 24),
    # What is not counted from key 0 along the queries' own places stays a run of keys for each query.
    "begun elsewhere": (lambda t, k: ((t + 5) // 16 == (k + 5) // 16) & (k <= t), 0, "site"),
    "of other places": (lambda t, k: ((t + 3) // 16 == k // 16) & (k <= t), 0, "site"),
}


@pytest.mark.parametrize("train", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_become_segments(name: str, train: bool) -> None:
    rule, offset, chunk = CHUNKED[name]
    torch.manual_seed(0)
    q = torch.randn(2, HEADS, 100 - offset, 8, dtype=torch.float64, requires_grad=train)
    k, v = (torch.randn(2, HEADS, 100, 8, dtype=torch.float64, requires_grad=train) for _ in range(2))
    net = Masked(rule, offset)
    (decision,) = dilcompile.explain(net, q, k, v, policy="exact").decisions
    if name == "chunks in chunks":
        assert decision.form in (KeepStructure(24), KeepStructure(40))
    else:
        assert decision.form == KeepStructure(chunk)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="dilated", options={"policy": "exact", "inner": "eager"})
    expected, found = net(q, k, v), compiled(q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    if train:
        grad = torch.randn_like(expected)
        for mine, theirs in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (found, expected)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_a_chunk_mask_costs_its_pairs() -> None:
    """The pairs that are computed, as the report counts them, are those that the mask shows."""
    rule, _, _ = CHUNKED["causal"]
    q = torch.randn(1, HEADS, 100, 8)
    report = dilcompile.explain(Masked(rule), q, q, q, policy="exact")
    shown = int(rule(torch.arange(100)[:, None], torch.arange(100)).sum())
    costs = costs_of(report.decisions[0])
    assert costs is not None
    assert costs.pairs_form == costs.pairs_mask == HEADS * shown


def test_packed_documents_with_chunks_stay_counted_from_the_first_key() -> None:
    """Forms count from each document's start, this mask does not."""

    def rule(t: Tensor, k: Tensor) -> Tensor:
        document = (torch.arange(100) % 30 == 0).cumsum(0)
        return (document[t] == document[k]) & (t // 16 == k // 16) & (k <= t)

    q = torch.randn(1, HEADS, 100, 8, dtype=torch.float64)
    net = Masked(rule)
    compiled = torch.compile(net, backend="dilated", options={"policy": "exact", "inner": "eager"})
    torch.testing.assert_close(compiled(q, q, q), net(q, q, q), rtol=0, atol=1e-11)


def test_what_is_asked_pair_by_pair_is_said() -> None:
    def rule(t: Tensor, k: Tensor) -> Tensor:
        return (t % 3 == k % 3) & (k <= t)

    q = torch.randn(1, HEADS, 20, 8)
    (decision,) = dilcompile.explain(Masked(rule), q, q, q, policy="exact").decisions
    assert decision.notes[0].endswith("own mask; labels: asked pair by pair, which saves no work")
    (whole,) = dilcompile.explain(Masked(lambda t, k: t >= 0 * k), q, q, q, policy="exact").decisions
    assert whole.notes[0] == "keeps every key: exact, because these are the pairs of the model's own mask"


def test_direct_use_and_text() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 37, 8, dtype=torch.float64) for _ in range(3))
    form = parse_form("keep_structure(chunk=8)")
    t = torch.arange(37)
    mask = (t[:, None] // 8 == t // 8) & (t <= t[:, None])
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    for kernel in ("reference", "cpu", None):
        torch.testing.assert_close(attention(q, k, v, form, is_causal=True, kernel=kernel), expected, rtol=0, atol=1e-11)
    size = Problem(1, 2, 2, 37, 37, 8, 8, is_causal=True, window_left=5)
    assert KeepStructure().relation(size) == Dense().relation(size)


def test_chunk_is_no_key_of_a_policy() -> None:
    with pytest.raises(dilcompile.PolicyError, match=r"apply\.chunk: unknown key"):
        Policy.load({"version": 1, "rules": [{"apply": {"form": "keep_structure", "chunk": 8}}]})
    made = Policy.load({"version": 1, "rules": [{"apply": KeepStructure()}]})
    assert made.rules[0].apply.build() == KeepStructure()


def test_an_unread_mask_is_refused() -> None:
    class Data(nn.Module):
        def forward(self, q: Tensor, keep: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    q = torch.randn(1, 2, 16, 8)
    report = dilcompile.explain(Data(), q, torch.rand(16, 16) < 0.5, policy="exact")
    assert not any(isinstance(one, Decision) and one.fidelity != "exact" for one in report.verdicts)

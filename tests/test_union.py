"""`union`: which pairs, how often, what is refused and where, and what the policy says of it. The kernels' contract runs over one too."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Setting, counts

import dilcompile
from dilcompile.errors import FormError, PolicyError
from dilcompile.forms import BlockSparse, Dilated, Form, SlidingWindow, Union, parse_form
from dilcompile.functional import attention
from dilcompile.policy import Policy
from dilcompile.policy.check import check
from dilcompile.relation import Problem
from dilcompile.site import AttentionSite, MaskSpec

DILATED = {"form": "dilated", "segments": [8, 16], "rates": [1, 2]}
BLOCKS = {"form": "block_sparse", "block": 16, "pattern": {"global": {"columns": 1}}}
PARTS: list[dict[str, Any]] = [
    {"form": "sliding_window", "window": 3},
    {"form": "sliding_window", "window": 7, "sinks": 2},
    {"form": "sliding_window", "window": 9, "step": 3},
    {"form": "dilated", "segments": [8], "rates": [2]},
    {"form": "dilated", "segments": [6, 12], "rates": [1, 3], "union": "set", "offset": "own", "local": 2, "sinks": 1},
    BLOCKS,
    {"form": "block_sparse", "block": 16, "pattern": {"random": {"blocks": 1, "by_head": True}}},
    {"form": "block_sparse", "block": [32, 16], "pattern": {"groups": [{"local": {}}, {"fixed": {"stride": 2}}]}},
]


def site(**changes: Any) -> AttentionSite:
    given: dict[str, Any] = {
        "index": 0, "module": "m", "source": "", "spelling": "sdpa", "kind": "self", "batch": 1, "heads": 4, "kv_heads": 2,
        "q_len": 64, "k_len": 64, "head_dim": 8, "v_dim": 8, "dtype": torch.float32, "softmax_dtype": torch.float32,
        "device": torch.device("cpu"), "scale": 8**-0.5, "mask": MaskSpec(causal=True),
    }  # fmt: skip
    return AttentionSite(**{**given, **changes})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(23, 23, 0), (9, 40, 20)]),
    st.sampled_from([None, 11]),
)
def test_pairs_are_those_of_the_parts(parts: list[dict[str, Any]], again: bool, causal: bool, lengths: Any, left: Any) -> None:
    """Each once, but for what one part counts again; and as many as are counted without a table of all pairs."""
    parts = [*parts, DILATED if again else {"form": "sliding_window", "window": 2}]
    form, (q_len, k_len, offset) = Union(tuple(parts), coverage="zero"), lengths
    relation = form.relation(Problem(1, 4, 2, q_len, k_len, 8, 8, offset, causal, left))
    h, t, k = torch.meshgrid(torch.arange(4), torch.arange(q_len) + offset, torch.arange(k_len), indexing="ij")
    expected = torch.from_numpy(counts(form, Setting(4, 2, q_len, k_len, offset, causal, left)))
    assert torch.equal(relation.multiplicity(h, t, k), expected)
    assert relation.pairs() == int(expected.sum())
    assert expected.max() <= (2 if again else 1)
    assert parse_form(str(form)) == form


@pytest.mark.parametrize("order", [0, 1])
def test_the_order_of_parts_does_not_matter(order: int) -> None:
    parts = (DILATED, BLOCKS) if order else (BLOCKS, DILATED)
    assert Union(parts).relation(Problem(1, 4, 2, 40, 40, 8, 8)) == Union((DILATED, BLOCKS)).relation(Problem(1, 4, 2, 40, 40, 8, 8))


BAD = """version: 1
rules:
- apply:
    form: union
    coverage: often
    of:
    - {form: dilated, segments: [16, x], rates: [1, 0], coverage: zero}
    - form: block_sparse
      block: 8
      pattern:
        any:
        - {locl: {}}
    - {form: dense}
    - {form: sliding_window, windw: 3, kernel: cpu}
    - {form: dilated, segments: [8, 16], rates: [1, 2], output_scale: 0.5, merge_grad: detach}
    - {window: 5}
    - {form: slidng_window}
"""
SAID = [
    "5:15: rules[0].apply.coverage: expected 'require' or 'zero', got 'often'",
    "7:38: rules[0].apply.of[0].segments[1]: must be a whole number or 'seq', not 'x'",
    "7:53: rules[0].apply.of[0].rates[1]: must be a whole number of at least 1, not 0",
    "7:67: rules[0].apply.of[0].coverage: is said of the whole union: give it beside `of`",
    "9:14: rules[0].apply.of[1].block: must be a whole number of at least 16, not 8",
    "12:11: rules[0].apply.of[1].pattern.any[0]: pattern 'locl' is unknown (did you mean 'local'?)",
    "13:14: rules[0].apply.of[2].form: 'dense' holds every pair already, so that nothing can be added to it",
    "14:7: rules[0].apply.of[3]: sliding_window: the option 'window' is missing",
    "14:37: rules[0].apply.of[3].windw: unknown option 'windw' (did you mean 'window'?)",
    "14:48: rules[0].apply.of[3].kernel: is said of the whole union: give it beside `of`",
    "15:71: rules[0].apply.of[4].output_scale: scales the output of a whole form, which a part has not; leave it out",
    "15:88: rules[0].apply.of[4].merge_grad: needs each branch's own output, and the parts of a union share one softmax",
    "16:7: rules[0].apply.of[5]: key 'form' is missing: a part is one of sliding_window, dilated, block_sparse",
    "17:14: rules[0].apply.of[6].form: 'slidng_window' is no part of a union (did you mean 'sliding_window'?)",
]


def test_all_problems_are_told_at_once_with_their_places() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.from_yaml(BAD)
    found = caught.value.problems
    assert len(found) == len(SAID), found
    for line, said in zip(found, SAID, strict=True):
        assert f"<text>:{said}" in line


@pytest.mark.parametrize(
    ("of", "why"),
    [
        ([DILATED], "of must be two forms or more, not 1"),
        (7, "of must be a list of forms, not 7"),
        ([DILATED, 7], r"of\[1\] must be a form with its options"),
        ([DILATED, BLOCKS, Dilated((4, 8), (1, 2))], r"of\[2\] counts a key once a branch, as of\[0\] does"),
        ([Union((DILATED, BLOCKS)), BLOCKS], r"of\[0\].form 'union' is no part: put its parts beside the others"),
    ],
)
def test_bad_parts_say_why(of: Any, why: str) -> None:
    with pytest.raises(FormError, match=why):
        Union(of)


HOLES = {"form": "dilated", "segments": [8], "rates": [2]}
FIRST = {"form": "block_sparse", "block": 16, "pattern": {"explicit": {"starts": [0, 1, 2, 2], "columns": [0, 1]}}}
FROM_THERE = {"form": "block_sparse", "block": 16, "pattern": {"explicit": {"starts": [0, 0, 0, 1], "columns": [2]}}}


def test_coverage_is_asked_of_the_whole() -> None:
    """Each of these parts leaves queries without keys; together some do."""
    at = Problem(1, 4, 2, 48, 48, 8, 8, is_causal=True)
    message = r"its parts leave the query at position 33 \(head 0\) without any key, at 48 queries and 48 keys; add a part"
    with pytest.raises(FormError, match=message):
        Union((HOLES, FIRST)).relation(at)
    assert Union((HOLES, FIRST), coverage="zero").relation(at).pairs() > 0
    for third in (FROM_THERE, {"form": "sliding_window", "window": 1}):
        Union((HOLES, FIRST, third)).relation(at)


def test_what_the_policy_says() -> None:
    wide = Union((DILATED, {"form": "sliding_window", "window": 64}))
    once = Union(({**DILATED, "union": "set"}, {"form": "sliding_window", "window": 64}))
    assert (wide.fidelity(site()), once.fidelity(site())) == ("approximate", "exact")
    assert Union((Dilated(("seq",), (1,)), SlidingWindow(4))).fidelity(site()) == "exact"
    assert Union((DILATED, BLOCKS)).reject(site(kind="cross")) == f"of[0], dilated: {Dilated().reject(site(kind='cross'))}"
    several = BlockSparse(16, {"heads": [{"local": {}}] * 3})
    assert "of[1], block_sparse: pattern `heads` has 3 patterns" in str(Union((SlidingWindow(4), several)).reject(site()))
    # Alone a causal branch leaves the first token of a segment by itself; beside others it does not.
    assert Union((DILATED, BLOCKS)).notes(site()) == ()
    assert Union((Dilated(), BLOCKS)).notes(site())[0].startswith("of[0], dilated: the branches depend on the number of keys")
    rules = [{"apply": {"form": "union", "of": [DILATED, BLOCKS]}}]
    made = Policy.load({"version": 1, "rules": rules})
    assert Policy.from_yaml(made.to_yaml()) == made == Policy.load({"version": 1, "rules": [{"apply": Union((DILATED, BLOCKS))}]})
    assert check(made) == []


def test_a_model_under_a_union_is_the_model_under_its_mask() -> None:
    torch.manual_seed(0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    parts = [{**DILATED, "union": "set"}, BLOCKS, {"form": "sliding_window", "window": 3}]
    form = Union(tuple(parts))
    q, k, v = (torch.randn(2, 4, 50, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    policy = {"version": 1, "rules": [{"apply": {"form": "union", "of": parts}}]}
    torch._dynamo.reset()
    found = torch.compile(attend, backend="dilated", options={"policy": policy, "inner": "eager"})(q, k, v)
    mask = torch.from_numpy(counts(form, Setting(4, 4, 50, 50, 0, True)) > 0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (found, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    (decision,) = dilcompile.explain(attend, q, k, v, policy=policy).decisions
    assert decision.form == form


def test_patterns_per_head_are_checked_against_the_heads_of_a_rule() -> None:
    for heads, name in product((None, 3, 4), ("heads", "groups")):
        form: Form = BlockSparse(16, {name: [{"local": {}}] * 3})
        match = {} if heads is None else {"match": {"heads": heads}}
        found = check(Policy.load({"version": 1, "rules": [{**match, "apply": {"form": form.name, **form.plain()}}]}))
        assert bool(found) == (heads == 4), (heads, name, found)


def test_a_kernel_is_checked_and_trusted_for_patterns_per_head() -> None:
    """The check's own heads are two, whatever the pattern is made for."""
    q, k, v = (torch.randn(1, 1, 200, 8) for _ in range(3))
    form = BlockSparse(16, {"heads": [{"local": {"before": 2}}]})
    torch.testing.assert_close(attention(q, k, v, form), attention(q, k, v, form, kernel="reference"))

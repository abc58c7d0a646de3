"""Rules that read well and are wrong."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from policy_sites import site

from dilcompile.forms import BlockSparse
from dilcompile.policy import Policy
from dilcompile.policy.check import check
from dilcompile.policy.load import PRESETS
from dilcompile.site import MaskSpec

KEEP = {"form": "keep"}


def findings(*rules: dict[str, Any], mesh: dict[str, Any] | None = None, **options: Any) -> list[str]:
    named = [{"name": f"r{index}", "apply": KEEP, **rule} for index, rule in enumerate(rules)]
    content = {"rules": named, **({"mesh": mesh} if mesh else {})}
    return [
        str(found).replace(" (<dict> rules[0])", "").replace(" (<dict> rules[1])", "")
        for found in check(Policy.load(content), **options)
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_clean(name: str) -> None:
    assert check(Policy.load(name)) == []


IMPOSSIBLE = [
    ({"min_seq": 9, "max_seq": 8}, "can match no site: min_seq 9 is above max_seq 8"),
    ({"module": "a.b", "ignore": "a.*"}, "can match no site: ignore 'a.*' covers module 'a.b'"),
    ({"causal": True, "masked": "none"}, "can match no site: a causal site is never masked 'none'"),
    ({"causal": False, "masked": ["causal"]}, "can match no site: causal is false but masked is 'causal'"),
    (
        {"device": "cpu", "compute_capability": ">=8.0"},
        "can match no site: compute_capability is that of a CUDA device, and device is another",
    ),
]


@pytest.mark.parametrize(("match", "reason"), IMPOSSIBLE)
def test_impossible(match: dict[str, Any], reason: str) -> None:
    assert findings({"match": match}) == [f"error: rule r0 {reason}"]


@pytest.mark.parametrize(
    "match",
    [
        {"min_seq": 8, "max_seq": 8},
        {"module": "a.*", "ignore": "a.b"},
        {"causal": True, "masked": ["none", "causal"]},
        {"causal": False, "masked": ["causal", "padding"]},
        {"device": ["cpu", "cuda"], "compute_capability": ">=8.0"},
    ],
)
def test_possible(match: dict[str, Any]) -> None:
    assert findings({"match": match}) == []


def test_a_form_that_refuses_all_that_the_rule_matches() -> None:
    window = {"form": "sliding_window", "window": 8}
    (cross,) = findings({"match": {"kind": "cross"}, "apply": window})
    assert cross.startswith("error: rule r0 can act on no site: sliding_window can't be given to what it matches: it is cross")
    (unread,) = findings({"match": {"masked": "other"}, "apply": window})
    assert "its mask could not be read" in unread
    assert findings({"match": {"masked": ["other", "causal"]}, "apply": window}) == []


FIXED = {"fixed": {"stride": 4, "offset": 1}}
LISTED = {"explicit": {"starts": [0, 1, 2], "columns": [0, 0]}}
SEES_ITSELF = "without any key; add {local: {}} under `any`, so that each query sees itself, or accept zeros with coverage: zero"
EMPTY = "so that every output would be 0; name blocks that are there, such as {local: {}} under `any`"
CAUSAL = {"causal": True}
UNMET: list[tuple[dict[str, Any], Any, str, str | None, str]] = [
    (CAUSAL, FIXED, "require", "computed on", f"leaves the query at position 0 (block row 0) {SEES_ITSELF}"),
    ({"masked": "causal"}, {"vertical_slash": {"verticals": [3], "slashes": [2]}}, "require", "computed on", "leaves the query at position 0"),
    ({"min_seq": 33}, LISTED, "require", "computed on", f"leaves the query at position 32 (block row 2) {SEES_ITSELF}"),
    (CAUSAL, {"explicit": {"starts": [0, 1], "columns": [1]}}, "zero", "given to", f"holds no block that a causal query sees a key in, {EMPTY}"),
    ({}, {"all": [{"fixed": {"stride": 4, "offset": 1}}, {"fixed": {"stride": 6}}]}, "zero", "given to", f"holds no block at all, {EMPTY}"),
    ({}, {"random": {"blocks": 0}}, "require", "computed on", "holds no block at all"),
]  # fmt: skip


@pytest.mark.parametrize(("match", "pattern", "coverage", "verb", "reason"), UNMET)
def test_a_pattern_that_no_length_meets(match: dict[str, Any], pattern: Any, coverage: str, verb: str, reason: str) -> None:
    form = {"form": "block_sparse", "block": 16, "pattern": pattern, "coverage": coverage}
    (line,) = findings({"match": match, "apply": form})
    assert line.startswith(
        f"error: rule r0 can act on no site: block_sparse can't be {verb} what it matches: its pattern {pattern!r} "
    )
    assert reason in line


def test_a_pattern_that_long_sequences_do_not_meet_is_a_warning() -> None:
    form = {"form": "block_sparse", "block": 16, "pattern": LISTED}
    (line,) = findings({"apply": form})
    assert line.startswith(
        f"warning: rule r0 can act on no site of more than 32 positions: its pattern {LISTED!r} leaves the query"
    )
    assert findings({"match": {"max_seq": 32}, "apply": form}) == []


@pytest.mark.parametrize(
    ("match", "pattern", "coverage"),
    [
        ({}, FIXED, "require"),
        (CAUSAL, FIXED, "zero"),
        ({**CAUSAL, "phase": "decode"}, FIXED, "require"),
        (CAUSAL, {"any": [FIXED, {"local": {}}]}, "require"),
        (CAUSAL, {"any": [FIXED, {"random": {"blocks": 1}}]}, "require"),
        (CAUSAL, {"all": [{"strided": {"stride": 2}}, {"local": {"before": 5}}]}, "require"),
        ({}, {"all": [{"fixed": {"stride": 4, "offset": 1}}, {"fixed": {"stride": 6, "offset": 3}}]}, "zero"),
    ],
)
def test_patterns_that_some_length_meets(match: dict[str, Any], pattern: Any, coverage: str) -> None:
    assert (
        findings({"match": match, "apply": {"form": "block_sparse", "block": 16, "pattern": pattern, "coverage": coverage}}) == []
    )


def test_a_site_is_not_given_a_pattern_that_shows_it_nothing() -> None:
    future = BlockSparse(16, {"explicit": {"starts": [0, 1], "columns": [1]}}, "zero")
    assert "holds no block that a causal query sees a key in" in (future.reject(site()) or "")
    assert future.reject(site(mask=MaskSpec())) is None


def test_shadowed() -> None:
    line = "error: rule r1 is never reached: rule r0 takes all of its sites"
    assert findings({}, {"match": {"kind": "self"}}) == [line]
    assert findings({"match": {"module": "*", "kind": "any", "min_seq": 1}}, {}) == [line]
    assert findings({"match": {"min_seq": 8}}, {"match": {"min_seq": 16, "kind": "self"}}) == [line]
    assert findings({"match": {"module": "layers.*"}}, {"match": {"module": "model.layers.0.*"}}) == [line]
    assert findings({"match": {"min_seq": 16}}, {"match": {"min_seq": 8}}) == []
    assert findings({"match": {"kind": "self"}}, {}) == []
    assert findings({"match": {"ignore": "a"}}, {"match": {"module": "b"}}) == []


def test_a_hidden_rule_of_an_extended_file_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "rules:\n- {name: a, match: {kind: self}, apply: {form: dense}}\n- {name: b, match: {min_seq: 9, max_seq: 8}, apply: {form: keep}}\n"
    )
    own = tmp_path / "own.yaml"
    own.write_text("extends: [base.yaml]\nrules:\n- {name: all, apply: {form: keep}}\n")
    policy, base = Policy.load(own), tmp_path / "base.yaml"
    impossible = f"error: rule b ({base}:3) can match no site: min_seq 9 is above max_seq 8"
    hidden = [
        f"warning: rule {name} ({base}:{line}) is never reached: rule all ({own}:3) takes all of its sites"
        for name, line in (("a", 2), ("b", 3))
    ]
    for twin in (policy, pickle.loads(pickle.dumps(policy))):
        assert [str(found) for found in check(twin)] == [hidden[0], impossible, hidden[1]]
    # The same rules in the file itself are a mistake in it.
    own.write_text("rules:\n- {name: all, apply: {form: keep}}\n- {name: a, match: {kind: self}, apply: {form: dense}}\n")
    assert [found.level for found in check(Policy.load(own))] == ["error"]


def test_mesh_product() -> None:
    mesh = {"cp": {"size": 4}, "tp": {"size": 2}}
    rule = {"match": {"world_size": 4}, "shard": {"mesh": "cp"}}
    assert findings(rule, mesh=mesh) == ["error: rule r0 asks for world_size 4 but the mesh has 8 ranks (cp 4 x tp 2)"]
    assert findings({**rule, "match": {"world_size": "8-"}}, mesh=mesh) == []


@pytest.mark.parametrize("order", ["zigzag", "striped"])
def test_halo_needs_contiguous(order: str) -> None:
    line = f"error: rule r0 can't use method halo with order {order}: neighbours are on distant ranks; use contiguous"
    plain, cut = {"cp": {"size": 4}}, {"cp": {"size": 4, "layout": order}}
    halo = {"mesh": "cp", "method": "halo"}
    assert findings({"shard": {**halo, "order": order}}, mesh=plain) == [line]
    assert findings({"shard": halo}, mesh=cut) == [line]
    assert findings({"shard": {**halo, "order": "contiguous"}}, mesh=cut) == []
    assert findings({"shard": {**halo, "method": "ring"}}, mesh=cut) == []


def test_more_branches_than_heads() -> None:
    grouped = {"form": "dilated", "segments": [64] * 5, "rates": [1] * 5, "heads": "grouped"}
    for heads in (4, "1-4", [2, 4]):
        (few,) = findings({"match": {"heads": heads}, "apply": grouped})
        assert few.startswith(
            "error: rule r0 can act on no site: dilated can't be given to what it matches: heads='grouped' gives"
        )
    for heads in (5, "4-", [2, 8]):
        assert findings({"match": {"heads": heads}, "apply": grouped}) == []
    assert findings({"apply": grouped}) == []


def test_dropout_under_sharding() -> None:
    """Ranks drop the pairs that one rank does."""
    rule = {"apply": {"form": "dense"}, "shard": {"mesh": "cp"}}
    assert findings(rule, mesh={"cp": {"size": 2}}, sites=[site(), site(index=1, dropout_p=0.1)]) == []


def test_rules_of_one_axis_hold_the_tokens_in_one_order() -> None:
    ring = {"form": "ring"}
    first = {"match": {"layers": 0}, "apply": ring, "shard": {"mesh": "cp", "order": "zigzag"}}
    assert findings(first, {"apply": ring, "shard": {"mesh": "cp"}}, mesh={"cp": {"size": 2}}) == [
        "error: rule r1 holds the tokens of mesh axis 'cp' contiguous, but rule r0 holds them zigzag: one model's inputs are cut in "
        "one order; say it once, as `layout` of the mesh axis"
    ]
    assert findings(first, {"apply": ring, "shard": {"mesh": "cp"}}, mesh={"cp": {"size": 2, "layout": "zigzag"}}) == []


def test_rules_without_a_site_of_the_model() -> None:
    assert findings({"match": {"module": "model.layer.*"}}, {}, sites=[site()]) == [
        "warning: rule r0 matched no site: module 'model.layer.*' (nearest: 'model.layers.0.self_attn')"
    ]

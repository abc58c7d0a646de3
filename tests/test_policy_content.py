"""Presets, `extends`, and everything that must give the same policy back: YAML, pickle, dict, fingerprint."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import scripts
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_sites import site
from pydantic import ValidationError

from dilcompile.decision import Decision, Rejection
from dilcompile.errors import PolicyError
from dilcompile.forms import Dilated, KeepStructure, SlidingWindow
from dilcompile.policy import Policy, resolve
from dilcompile.policy.check import check
from dilcompile.policy.load import PRESETS
from dilcompile.policy.schema import num_bytes
from dilcompile.site import MaskSpec

KEEP = {"apply": {"form": "keep"}}

# The example of the design: every key that the policy language has.
WHOLE = """
version: 1
name: longnet-1m-train-8gpu
extends: [longnet]
mesh: {cp: {size: 8, layout: contiguous}}
defaults:
  numerics: {accumulate: fp32, merge_grad: exact, check: first_call, tolerance: {rel_l2: 1e-3}}
  fallback: {unsupported: warn, unmatched: keep, shape: keep, quality: warn}
rules:
  - name: decoder-self
    match: {module: "model.layers.*.self_attn", kind: self, causal: true, min_seq: 16384, phase: train}
    apply: {form: dilated, segments: [2048, 8192, 32768, seq], rates: [1, 4, 16, 64], offset: head_mod, sinks: 4}
    shard: {mesh: cp, dim: seq, method: gather_needed, overlap: off}
    memory: {pool: private, budget: 6GiB, reuse: across_layers}
  - name: local-layers
    match: {layer_type: sliding_attention}
    apply: {form: keep}
    shard: {mesh: cp, dim: seq, method: halo}
  - {name: everything-else, match: {module: "*"}, apply: {form: keep}}
"""


def test_the_whole_language_is_read() -> None:
    policy = Policy.from_yaml(WHOLE)
    assert [rule.name for rule in policy.rules] == [
        "decoder-self",
        "local-layers",
        "everything-else",
        "longnet-self",
        "longnet-rest",
    ]
    first = policy.rules[0]
    assert first.apply.build() == Dilated(segments=(2048, 8192, 32768, "seq"), rates=(1, 4, 16, 64), offset="head_mod", sinks=4)
    assert first.shard is not None
    # YAML 1.1 would read `off` as a bool and 1e-3 as text.
    assert first.shard.overlap == "off"
    assert policy.defaults.numerics.tolerance.rel_l2 == 1e-3
    assert (policy.mesh["cp"].size, policy.extends) == (8, None)
    assert [rule.label for rule in policy.rules[:2]] == ["decoder-self (<text>:10)", "local-layers (<text>:15)"]


def test_the_whole_language_passes_the_check() -> None:
    """The catch-all hides what the preset says; that is how presets are extended."""
    assert [(found.level, found.message.split(" (")[0]) for found in check(Policy.from_yaml(WHOLE))] == [
        ("warning", "rule longnet-self"),
        ("warning", "rule longnet-rest"),
    ]


def test_text_form() -> None:
    assert str(Policy.load("pretrained-safe")) == (
        "policy pretrained-safe\n"
        "  safe-local-layers (preset pretrained-safe:12): kind: 'self', masked: 'window' -> keep_structure\n"
        "  safe-long-causal (preset pretrained-safe:16): kind: 'self', causal: true, min_seq: 4096"
        " -> sliding_window(window: 2048, sinks: 4)\n"
        "  safe-rest (preset pretrained-safe:20): every site -> keep_structure"
    )


@pytest.mark.parametrize("name", PRESETS)
def test_presets_validate_against_the_json_schema(name: str) -> None:
    jsonschema.validate(yaml.safe_load(PRESETS[name].read_text()), Policy.json_schema())


WRONG_OPTIONS: list[dict[str, Any]] = [
    {"form": "dilated", "segments": [], "rates": []},
    {"form": "dilated", "segments": ["x"], "rates": [1]},
    {"form": "dilated", "segments": [0], "rates": [1]},
    {"form": "dilated", "segments": [4], "rates": [0]},
    {"form": "dilated", "segments": [4], "rates": ["seq"]},
    {"form": "dilated", "segments": "seq", "rates": [1]},
    {"form": "dilated", "segments": [4], "rates": "auto"},
    {"form": "dilated", "segments": [4]},
    {"form": "dilated", "rates": [1]},
    {"form": "dilated", "sinks": -1},
    {"form": "dilated", "local": -1},
    {"form": "dilated", "output_scale": 0},
    {"form": "dilated", "output_scale": "half"},
    {"form": "dilated", "offset": "foo"},
    {"form": "dilated", "sinks": None},
    {"form": "sliding_window", "window": 0},
    {"form": "sliding_window", "window": 4, "step": 0},
    {"form": "sliding_window", "window": 4, "sinks": -1},
    {"form": "dense", "kernel": "flesh"},
    {"form": "dense", "kernel": None},
    {"form": "keep", "segments": [4], "rates": [1]},
]
RIGHT_OPTIONS: list[dict[str, Any]] = [
    {"form": "dilated"},
    {"form": "dilated", "segments": "auto"},
    {"form": "dilated", "segments": [4, "seq"], "rates": [1, 2], "output_scale": "1/k"},
    {"form": "dilated", "segments": [4], "rates": [1], "output_scale": -0.5, "sinks": 0, "kernel": "native"},
    {"form": "sliding_window", "window": 1, "sinks": 0, "step": 1},
]
RIGHT_KEYS: list[dict[str, Any]] = [
    {"match": {"layers": " 0 - 3, 30-", "heads": [1, 2], "compute_capability": ">=8.0,< 9"}},
    {"match": {"compute_capability": 9, "module": "a", "ignore": ["re:b", "c"]}},
    {"memory": {"budget": " 1.5 GiB "}},
    {"memory": {"budget": 7}},
]


def test_json_schema_says_yes_where_the_loader_does() -> None:
    rules = [{"apply": options} for options in RIGHT_OPTIONS] + [{**KEEP, **keys} for keys in RIGHT_KEYS]
    for policy in ({"rules": rules}, {"extends": "exact"}, {"extends": ["exact", "longnet"]}):
        Policy.load(policy)
        jsonschema.validate(policy, Policy.json_schema())


def test_json_schema_is_valid_and_says_no() -> None:
    schema = Policy.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    core = yaml.safe_load(WHOLE.replace("overlap: off", "overlap: 'off'").replace("1e-3", "0.001"))
    jsonschema.validate(core, schema)
    wrong: list[dict[str, Any]] = [
        {"ruls": []},
        {"version": 2},
        {"rules": [{"match": {"min_seq": 0}, **KEEP}]},
        {"rules": [{"apply": {"form": "dilatd"}}]},
        {"rules": [{"match": {"casual": True}, **KEEP}]},
        {"rules": [{"match": {"min_seq": "long"}, **KEEP}]},
        {"rules": [{"apply": {"form": "sliding_window"}}]},
        {},
        {"rules": []},
        {"rules": None},
        {"extends": [], "rules": [KEEP]},
        {"extends": [""], "rules": [KEEP]},
        {"name": "", "rules": [KEEP]},
        {"name": None, "rules": [KEEP]},
        {"rules": [{"match": {"module": []}, **KEEP}]},
        {"rules": [{"match": {"masked": []}, **KEEP}]},
        {"rules": [{"match": {"layers": "0-3,x"}, **KEEP}]},
        {"rules": [{"match": {"compute_capability": "new"}, **KEEP}]},
        {"rules": [{"match": {"kind": None}, **KEEP}]},
        {"rules": [{"memory": {"budget": 0}, **KEEP}]},
        {"rules": [{"memory": {"budget": "6GB"}, **KEEP}]},
    ]
    wrong += [{"rules": [{"apply": options}]} for options in WRONG_OPTIONS]
    for bad in wrong:
        with pytest.raises(PolicyError):
            Policy.load(bad)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def decided(name: str, **changes: Any) -> object:
    (verdict,) = resolve(Policy.load(name), [site(**changes)])
    return verdict.form if isinstance(verdict, Decision) else verdict.asked


CROSS = {"kind": "cross", "mask": MaskSpec()}
SHORT = {"k_len": 1024, "q_len": 1024}
LOCAL = {"mask": MaskSpec(causal=True, left=511)}
ENCODER = {"mask": MaskSpec()}
UNREAD = {"mask": MaskSpec(causal=True, unread="a bias")}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("longnet", {}, Dilated()),
        ("longnet", ENCODER, Dilated()),
        ("longnet", SHORT, True),
        ("longnet", CROSS, True),
        ("pretrained-safe", {}, SlidingWindow(window=2048, sinks=4)),
        ("pretrained-safe", SHORT, KeepStructure()),
        ("pretrained-safe", LOCAL, KeepStructure()),
        ("pretrained-safe", ENCODER, KeepStructure()),
        ("pretrained-safe", CROSS, KeepStructure()),
        ("pretrained-safe", UNREAD, False),
        ("exact", {}, KeepStructure()),
        ("exact", LOCAL, KeepStructure()),
        ("exact", CROSS, KeepStructure()),
        ("exact", UNREAD, False),
    ],
)
def test_presets_decide(name: str, changes: dict[str, Any], expected: object) -> None:
    assert decided(name, **changes) == expected


@pytest.mark.parametrize("changes", [{}, SHORT, LOCAL, ENCODER, CROSS, {"dropout_p": 0.1}])
def test_exact_is_exact(changes: dict[str, Any]) -> None:
    (verdict,) = resolve(Policy.load("exact"), [site(**changes)])
    assert isinstance(verdict, Rejection) or verdict.fidelity == "exact"


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DILCOMPILE_POLICY", raising=False)
    path = tmp_path / "policy.yaml"
    path.write_text("\ufeffrules: [{apply: {form: keep}}]\n", encoding="utf-8")
    made = Policy.load({"rules": [KEEP]})
    assert Policy.load(path) == Policy.load(str(path)) == Policy.from_yaml(path) == made
    assert Policy.from_yaml("{rules: [{apply: {form: keep}}]}") == made
    assert Policy.load(made) is made
    assert Policy.load(None) == Policy.load() == Policy.load("longnet") == Policy.from_yaml("longnet")
    monkeypatch.setenv("DILCOMPILE_POLICY", "exact")
    assert Policy.load() == Policy.load("exact")
    monkeypatch.setenv("DILCOMPILE_POLICY", str(path))
    assert Policy.load() == made


def test_a_form_can_stand_for_its_options() -> None:
    policy = Policy.load({"rules": [{"apply": Dilated(segments=(64, "seq"), rates=(1, 4), sinks=2)}]})
    assert policy.rules[0].apply.build() == Dilated(segments=(64, "seq"), rates=(1, 4), sinks=2)
    assert Policy.from_yaml(policy.to_yaml()) == policy


def test_extends_joins(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        """
mesh: {cp: {size: 2}, tp: {size: 4}}
defaults: {fallback: {unsupported: error, unmatched: warn}, numerics: {merge_grad: detach}}
rules:
  - {name: a, apply: {form: dense}}
  - {name: b, match: {kind: self}, apply: {form: keep}}
"""
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yaml").write_text(
        """
name: own
extends: [../base.yaml, exact]
mesh: {cp: {size: 8}}
defaults: {fallback: {unsupported: keep}}
rules:
  - {name: b, match: {kind: cross}, apply: {form: keep}, shard: {mesh: tp}}
"""
    )
    policy = Policy.load(tmp_path / "sub" / "own.yaml")
    assert [(rule.name, rule.match.given()) for rule in policy.rules] == [
        ("b", {"kind": "cross"}),
        ("a", {}),
        ("exact-all", {}),
    ]
    assert {name: axis.size for name, axis in policy.mesh.items()} == {"cp": 8, "tp": 4}
    assert policy.defaults.plain() == {
        "fallback": {"unsupported": "keep", "unmatched": "warn"},
        "numerics": {"merge_grad": "detach"},
    }
    assert policy.name == "own"
    base = str(tmp_path / "sub" / ".." / "base.yaml")
    assert policy.rules[1].label == f"a ({base}:5)"


def test_a_policy_made_in_python() -> None:
    made = Policy(extends="exact", rules=({"match": {"kind": "cross"}, **KEEP},))  # type: ignore[arg-type]
    loaded = Policy.load(made)
    assert [rule.apply.form for rule in loaded.rules] == ["keep", "keep_structure"]
    assert made.fingerprint == loaded.fingerprint
    assert [rule.label for rule in made.rules] == ["unnamed rule (rules[0])"]
    assert [type(verdict) for verdict in resolve(made, [site()])] == [Decision]
    with pytest.raises(ValidationError):
        Policy(rules=({"apply": {"form": "keep", "window": 3}},))  # type: ignore[arg-type]


def test_anchors_and_merge_keys() -> None:
    policy = Policy.from_yaml(
        """
rules:
  - match: &long {kind: self, min_seq: 4096}
    apply: &form {form: sliding_window, window: 64}
  - match: {<<: *long, min_seq: 1024}
    apply: *form
"""
    )
    assert policy.rules[1].plain() == {
        "match": {"min_seq": 1024, "kind": "self"},
        "apply": {"form": "sliding_window", "window": 64},
    }


def test_fingerprint_is_the_content() -> None:
    one = Policy.load("longnet")
    assert one.fingerprint == Policy.load("longnet").fingerprint
    seen = {one.fingerprint, Policy.load("exact").fingerprint}
    for change in ({"sinks": 4}, {"offset": "own"}, {"merge_grad": "detach"}):
        seen.add(Policy.load({"rules": [{"apply": {"form": "dilated", **change}}]}).fingerprint)
    assert len(seen) == 5
    assert hash(one) == hash(Policy.load("longnet"))
    assert one != Policy.load("exact")
    assert one != "longnet"


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from dilcompile.policy import Policy; print(Policy.load('longnet').fingerprint)"
    done = scripts.run(code)
    assert done.stdout.strip() == Policy.load("longnet").fingerprint


def test_pickle_and_copies() -> None:
    policy = Policy.from_yaml(WHOLE)
    for twin in (pickle.loads(pickle.dumps(policy)), copy.copy(policy), copy.deepcopy(policy)):
        assert twin == policy
        assert [rule.label for rule in twin.rules] == [rule.label for rule in policy.rules]
        assert type(twin.rules[0].apply) is type(policy.rules[0].apply)


@pytest.mark.parametrize(("size", "expected"), [("6GiB", 6 * 2**30), ("1.5KiB", 1536), ("7 B", 7), (12, 12)])
def test_num_bytes(size: int | str, expected: int) -> None:
    assert num_bytes(size) == expected


# Words that YAML readers take for something else are the point of these names.
texts = st.sampled_from(["off", "1e3", "~", "null", "0x1", "yes", "a: b", "#x", "ünï", "1:30", "<<", "- a", "01", "'"]) | st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cf", "Co", "Cn")), min_size=1, max_size=8
)
counts = st.integers(1, 2**40)
matches = st.fixed_dictionaries(
    {},
    optional={
        "module": st.sampled_from(["*", "a.b", "re:.*", ("a", "b.*")]),
        "kind": st.sampled_from(["self", "cross", "any"]),
        "causal": st.booleans(),
        "masked": st.sampled_from(["none", ("causal", "padding")]),
        "layers": st.sampled_from([0, "0-3,30-", (1, 5)]),
        "layer_type": texts,
        "compute_capability": st.sampled_from([">=9.0", 9.0, 8]),
        "min_seq": counts | st.just("auto"),
    },
)
dilated = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4).map(
    lambda pairs: {
        "form": "dilated",
        "segments": [length * rate for length, rate in pairs],
        "rates": [rate for _, rate in pairs],
        "offset": "own",
    }
)
applies = (
    st.sampled_from([{"form": "keep"}, {"form": "dense", "kernel": "cpu"}, {"form": "dilated", "output_scale": 0.5}])
    | st.builds(lambda w, s: {"form": "sliding_window", "window": w, "sinks": s}, counts, st.integers(0, 8))
    | dilated
)
rules = st.fixed_dictionaries(
    {"apply": applies},
    optional={
        "match": matches,
        "fallback": st.fixed_dictionaries({}, optional={"unsupported": st.sampled_from(["warn", "keep", "error"])}),
        "numerics": st.fixed_dictionaries({"tolerance": st.fixed_dictionaries({"rel_l2": st.floats(1e-300, 1e300)})}),
        "memory": st.fixed_dictionaries({"budget": st.sampled_from(["6GiB", 7])}),
    },
)
policies = st.fixed_dictionaries(
    {"rules": st.lists(rules, min_size=1, max_size=4)},
    optional={"name": texts, "mesh": st.dictionaries(texts, st.fixed_dictionaries({"size": counts}), max_size=2)},
)


@settings(max_examples=150, deadline=None)
@given(policies)
def test_yaml_gives_any_policy_back(content: dict[str, Any]) -> None:
    policy = Policy.load(content)
    again = Policy.from_yaml(policy.to_yaml())
    assert again == policy
    assert again.plain() == policy.plain()
    assert again.to_yaml() == policy.to_yaml()
    assert [rule.apply.build() for rule in again.rules] == [rule.apply.build() for rule in policy.rules]


@settings(max_examples=60, deadline=None)
@given(policies)
def test_any_policy_satisfies_the_json_schema(content: dict[str, Any]) -> None:
    jsonschema.validate(Policy.load(content).plain(), Policy.json_schema())

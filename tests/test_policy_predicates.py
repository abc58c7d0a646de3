"""One row a predicate: values that hold and values that don't, and what one value says about another."""

from __future__ import annotations

import pytest
import torch
import yaml
from policy_sites import site

from dilcompile.policy import Policy, patterns
from dilcompile.policy.predicates import PREDICATES
from dilcompile.site import AttentionSite, MaskSpec

GQA = site(kv_heads=2, dtype=torch.bfloat16, layer=31, layer_type="sliding_attention", phase="train")
CROSS = site(kind="cross", mask=MaskSpec())
WINDOW = site(mask=MaskSpec(causal=True, left=127, key_padding=True))
GPU = site(device=torch.device("cuda", 1))
ANY = site()

# key: (site, value) pairs that hold, then pairs that don't.
ROWS: dict[str, tuple[list[tuple[AttentionSite, object]], list[tuple[AttentionSite, object]]]] = {
    "module": (
        [
            (ANY, "*"),
            (ANY, "model.layers.*.self_attn"),
            (ANY, "self_attn"),
            (ANY, "layers.0.*"),
            (ANY, r"re:model\.layers\.\d+\..*"),
            (ANY, ["nothing", "self_attn"]),
            (site(module=""), "*"),
        ],
        [(ANY, "attn"), (ANY, "model"), (ANY, r"re:model\.layers"), (ANY, "model.layers.?"), (ANY, "Self_attn")],
    ),
    "ignore": ([(ANY, "*.cross_attn")], [(ANY, "self_attn"), (ANY, ["x", "*"])]),
    "kind": ([(ANY, "self"), (ANY, "any"), (CROSS, "cross")], [(ANY, "cross"), (CROSS, "self")]),
    "causal": ([(ANY, True), (CROSS, False)], [(ANY, False), (CROSS, True)]),
    "masked": (
        [(ANY, "causal"), (CROSS, "none"), (WINDOW, "padding"), (WINDOW, ["document", "window"])],
        [(ANY, "none"), (CROSS, "causal"), (WINDOW, "other")],
    ),
    "layers": (
        [(ANY, 0), (ANY, "0-3,30-"), (GQA, "0-3,30-"), (GQA, [1, 31])],
        [(ANY, "1-"), (site(layer=29), "0-3,30-"), (site(layer=None), "0-")],
    ),
    "heads": ([(ANY, 8), (ANY, "4-8")], [(ANY, "9-"), (ANY, [4, 16])]),
    "layer_type": (
        [(GQA, "sliding_attention"), (GQA, ["a", "sliding_attention"])],
        [(ANY, "sliding_attention"), (GQA, "full_attention")],
    ),
    "head_dim": ([(ANY, "64,128")], [(ANY, "65-")]),
    "gqa": ([(GQA, True), (ANY, False)], [(GQA, False), (ANY, True)]),
    "dtype": ([(ANY, "fp32"), (GQA, ["fp16", "bf16"]), (GQA, "bfloat16")], [(ANY, "bf16")]),
    "device": ([(ANY, "cpu"), (GPU, "cuda"), (GPU, ["cpu", "cuda:1"])], [(ANY, "cuda"), (GPU, "cuda:0")]),
    "compute_capability": (
        [(GPU, ">=9.0"), (GPU, ">=8,<10"), (GPU, 9.0), (GPU, "<9.1")],
        [(ANY, ">=1.0"), (GPU, ">9.0"), (GPU, ">=10.0"), (GPU, "8.0")],
    ),
    "phase": ([(GQA, "train"), (ANY, "prefill"), (ANY, "any")], [(ANY, "train"), (ANY, "decode")]),
    "world_size": ([(ANY, 1), (ANY, "1-4")], [(ANY, "2-")]),
    "min_seq": ([(ANY, 4096), (site(q_len=1), 4096), (site(k_len=1), "auto")], [(ANY, 4097), (site(q_len=8192), 4097)]),
    "max_seq": ([(ANY, 4096)], [(ANY, 4095)]),
}


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def takes(key: str, value: object, where: AttentionSite) -> bool:
    policy = Policy.load({"rules": [{"match": {key: value}, "apply": {"form": "keep"}}]})
    return policy.rules[0].match.takes(where)


def test_every_predicate_has_a_row() -> None:
    assert list(ROWS) == list(PREDICATES)


@pytest.mark.parametrize("key", ROWS)
def test_predicate(key: str) -> None:
    holds, fails = ROWS[key]
    assert [(where.module, value) for where, value in holds if not takes(key, value, where)] == []
    assert [(where.module, value) for where, value in fails if takes(key, value, where)] == []


@pytest.mark.parametrize("key", ROWS)
def test_a_value_covers_itself_and_its_example_is_valid(key: str) -> None:
    example = yaml.safe_load(PREDICATES[key].example)
    match = Policy.load({"rules": [{"match": {key: example}, "apply": {"form": "keep"}}]}).rules[0].match
    assert PREDICATES[key].covers(match.given()[key], match.given()[key])
    assert PREDICATES[key].doc.endswith(".")


COVERS = [
    ("module", "*", "a.b"),
    ("module", "self_attn", "model.layers.*.self_attn"),
    ("module", "layers.*", "model.layers.0.*"),
    ("module", ("a.*", "b"), ("b", "a.c")),
    ("kind", "any", "self"),
    ("masked", ("none", "causal"), "none"),
    ("layers", "0-", "3,7-9"),
    ("layers", "0-3,4-9", "2-8"),
    ("dtype", ("bf16", "fp16"), "bfloat16"),
    ("min_seq", 1024, 4096),
    ("min_seq", "auto", 4096),
    ("min_seq", 1, "auto"),
    ("max_seq", 4096, 1024),
    ("ignore", "a", ("a", "b")),
]
COVERS_NOT = [
    ("module", "a.?", "a.*"),
    ("module", "a.b", "*"),
    ("module", "re:.*x", "x"),
    ("kind", "self", "any"),
    ("masked", "none", ("none", "causal")),
    ("layers", "0-3,5-9", "2-8"),
    ("min_seq", 4096, 1024),
    ("min_seq", 2, "auto"),
    ("max_seq", 1024, 4096),
    ("ignore", ("a", "b"), "a"),
    ("compute_capability", ">=8.0", ">=9.0"),
]


@pytest.mark.parametrize(("key", "wide", "narrow"), COVERS)
def test_covers(key: str, wide: object, narrow: object) -> None:
    assert PREDICATES[key].covers(wide, narrow)


@pytest.mark.parametrize(("key", "wide", "narrow"), COVERS_NOT)
def test_covers_not(key: str, wide: object, narrow: object) -> None:
    assert not PREDICATES[key].covers(wide, narrow)


def test_no_covering_pattern_misses_a_module() -> None:
    """Whatever `covers` claims about two globs must hold for every path."""
    globs = ["*", "a", "a.*", "*.b", "a.*.b", "b", "a.b", "*a*", "a*"]
    paths = ["a", "b", "a.b", "a.x.b", "x.a", "x.a.b", "ab", "a.a", "x.b", ""]
    for wide in globs:
        for narrow in globs:
            if patterns.covers(wide, narrow):
                missed = [p for p in paths if patterns.matches(p, narrow) and not patterns.matches(p, wide)]
                assert missed == [], (wide, narrow)


def test_what_may_add_a_guard_is_asked_last() -> None:
    """A rule for another module must not guard on the length of this one."""

    class Length(int):
        asked = 0

        def __ge__(self, other: object) -> bool:
            Length.asked += 1
            return int(self) >= int(other)  # type: ignore[call-overload, no-any-return]

    rule = {"match": {"min_seq": 16, "module": "elsewhere"}, "apply": {"form": "keep"}}
    match = Policy.load({"rules": [rule]}).rules[0].match
    assert not match.takes(site(k_len=Length(4096)))
    assert Length.asked == 0

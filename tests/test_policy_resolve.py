"""What each site becomes, what is said about it, and what is refused."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from policy_sites import site
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dilcompile.decision import Check, Decision, Rejection
from dilcompile.errors import DilcompileWarning, RewriteError
from dilcompile.forms import Dense, Dilated, SlidingWindow
from dilcompile.policy import Policy, resolve, tell_again, unused_rules
from dilcompile.report.kernels import able
from dilcompile.site import AttentionSite, MaskSpec

WINDOW = {"form": "sliding_window", "window": 128}


def policy(*rules: dict[str, Any], **rest: Any) -> Policy:
    return Policy.load({"rules": list(rules), **rest})


def decide(made: Policy, where: AttentionSite, enforce: bool = True) -> Decision:
    (verdict,) = resolve(made, [where], enforce=enforce)
    assert isinstance(verdict, Decision)
    return verdict


def reject(made: Policy, where: AttentionSite, enforce: bool = False) -> Rejection:
    (verdict,) = resolve(made, [where], enforce=enforce)
    assert isinstance(verdict, Rejection)
    return verdict


def symbolic(length: int) -> torch.SymInt:
    """A length as Dynamo gives it when it may change."""
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    sizes, _, _ = ShapeEnv().create_symbolic_sizes_strides_storage_offset(
        torch.empty(length), ConstantSource("x"), symbolic_context=context
    )
    assert isinstance(sizes[0], torch.SymInt)
    return sizes[0]


def test_the_first_match_wins() -> None:
    made = policy(
        {"name": "long", "match": {"min_seq": 8192}, "apply": {"form": "dilated"}},
        {"name": "local", "apply": {"form": "sliding_window", "window": 128, "sinks": 4, "step": 1}},
        {"name": "never", "apply": {"form": "dense"}},
    )
    short, long = resolve(made, [site(index=0), site(index=1, k_len=8192, q_len=8192)])
    assert isinstance(short, Decision)
    assert isinstance(long, Decision)
    assert short.form == SlidingWindow(window=128, sinks=4)
    assert short.rule == "local (<dict> rules[1])"
    assert long.form == Dilated()
    assert long.rule == "long (<dict> rules[0])"
    assert (short.site.index, long.site.index) == (0, 1)


def test_fidelity_kernel_fallback_and_notes_come_through() -> None:
    found = decide(
        policy({"apply": {**WINDOW, "kernel": "reference"}, "fallback": {"unsupported": "error"}}), site(k_len=128, q_len=128)
    )
    assert (found.fidelity, found.kernel, found.fallback, found.notes) == ("exact", "reference", "error", ())
    causal = decide(policy({"apply": {"form": "dilated", "segments": [64, 128], "rates": [1, 2]}}), site())
    assert causal.fidelity == "approximate"
    assert causal.notes == Dilated(segments=(64, 128), rates=(1, 2)).notes(causal.site)
    assert causal.fallback == "warn"


def test_keep_and_no_rule_are_asked_for() -> None:
    kept = reject(policy({"name": "k", "apply": {"form": "keep"}}), site())
    assert (kept.rule, kept.reason, kept.asked) == ("k (<dict> rules[0])", "the policy keeps it", True)
    missed = reject(policy({"match": {"kind": "cross"}, "apply": {"form": "keep"}}), site())
    assert (missed.rule, missed.reason, missed.asked) == (None, "no rule of the policy takes it", True)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        (site(kind="cross"), "it is cross attention"),
        (site(mask=MaskSpec(unread="a bias from the input")), "its mask could not be read (a bias from the input)"),
    ],
)
def test_a_form_that_refuses_the_site(where: AttentionSite, reason: str) -> None:
    rule = {"name": "w", "apply": WINDOW}
    found = reject(policy(rule), where)
    assert found.reason.startswith(f"sliding_window can't be given to it: {reason}")
    assert found.cure == "give it another form, or `form: keep`, by a rule before this one"
    assert not found.asked
    message = re.escape(f"rule w (<dict> rules[0]): model.layers.0.self_attn stays as it is: {found.reason}; {found.cure}")
    with pytest.warns(DilcompileWarning, match=message):
        resolve(policy(rule), [where])
    with pytest.raises(RewriteError, match=message):
        resolve(policy({**rule, "fallback": {"unsupported": "error"}}), [where])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(policy(rule, defaults={"fallback": {"unsupported": "keep"}}), [where]) == [found]


GROUPED = {"form": "dilated", "segments": [64] * 9, "rates": [1] * 9, "heads": "grouped"}


def test_more_branches_than_heads() -> None:
    rule = {"name": "g", "apply": GROUPED}
    found = reject(policy(rule), site())
    assert found.reason == (
        "dilated can't be given to it: heads='grouped' gives every branch a group of heads, but there are 9 branches and it has "
        "8 heads"
    )
    assert isinstance(decide(policy(rule), site(heads=9, kv_heads=9)), Decision)
    assert isinstance(decide(policy({"apply": {**GROUPED, "heads": "all"}}), site()), Decision)
    with pytest.warns(DilcompileWarning, match="stays as it is: dilated can't be given to it: heads='grouped'"):
        resolve(policy(rule), [site()])


@pytest.mark.parametrize(("k_len", "fits"), [(2048, True), (4096, True), (4097, False)])
def test_more_automatic_branches_than_heads(k_len: int, fits: bool) -> None:
    where = site(heads=2, kv_heads=2, q_len=k_len, k_len=k_len)
    form = Dilated(heads="grouped")
    assert (form.reject(where) is None) is fits
    assert (len(form.branches(k_len)) <= 2) is fits


def test_a_kernel_that_refuses_the_site() -> None:
    rule = {"name": "w", "apply": {**WINDOW, "kernel": "sdpa"}}
    (found,) = resolve(policy(rule), [site()], enforce=False, revise=able)
    assert isinstance(found, Rejection)
    assert (found.rule, found.asked) == ("w (<dict> rules[0])", False)
    assert found.reason.startswith("kernel sdpa can't compute sliding_window on it: the relation is window")
    assert found.cure == "name a kernel that can, or leave `kernel` out"
    message = re.escape(f"rule w (<dict> rules[0]): model.layers.0.self_attn stays as it is: {found.reason}; {found.cure}")
    with pytest.warns(DilcompileWarning, match=message):
        resolve(policy(rule), [site()], revise=able)
    with pytest.raises(RewriteError, match=message):
        resolve(policy({**rule, "fallback": {"unsupported": "error"}}), [site()], revise=able)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(policy({**rule, "fallback": {"unsupported": "keep"}}), [site()], revise=able) == [found]
    for apply in ({**WINDOW, "kernel": "cpu"}, WINDOW, {"form": "dense", "kernel": "sdpa"}):
        assert isinstance(resolve(policy({"apply": apply}), [site()], revise=able)[0], Decision)


def test_equal_refusals_are_told_once() -> None:
    sites = [site(index=i, module=f"layers.{i}.cross_attn", kind="cross") for i in range(3)]
    with pytest.warns(DilcompileWarning) as caught:
        resolve(policy({"name": "w", "apply": WINDOW}), sites)
    assert len(caught) == 1
    assert "layers.0.cross_attn and 2 more stay" in str(caught[0].message)


def test_a_policy_that_takes_no_site() -> None:
    far = {"name": "far", "match": {"module": "model.layer.*", "kind": "cross"}, "apply": WINDOW}
    rule = {"name": "x", "match": {"module": "model.layer.*"}, "apply": WINDOW}
    text = (
        "no rule of the policy p takes any of the 1 attention sites of this graph: they stay as they are; "
        "nearest is rule x (<dict> rules[1]): module 'model.layer.*' (nearest: 'model.layers.0.self_attn'); "
        "change its `match`, or end the policy with a rule without `match` (with `form: keep` it leaves them without this message)"
    )
    for unmatched in ("warn", "error", "keep", None):
        defaults = {"fallback": {"unmatched": unmatched}} if unmatched else {}
        made = policy(far, rule, name="p", defaults=defaults)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if unmatched == "keep":
                assert not any(isinstance(verdict, Decision) for verdict in resolve(made, [site()]))
            else:
                kind = RewriteError if unmatched == "error" else DilcompileWarning
                with pytest.raises(kind, match=re.escape(text)):
                    resolve(made, [site()])
            assert resolve(made, []) == []


def test_layers_that_are_a_graph_each_are_told_of_once() -> None:
    made = policy({"match": {"layers": 7}, "apply": WINDOW})
    layers = [site(index=i, module=f"layers.{i}", layer=i) for i in range(3)]
    other = site(heads=4, kv_heads=4)

    def told(*sites: AttentionSite) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resolve(made, sites)
        return len(caught)

    tell_again()
    assert [told(layer) for layer in layers] == [1, 0, 0]
    assert [told(other), told(other)] == [1, 0]
    assert told(site(k_len=64)) == 1
    tell_again()
    assert told(*layers) == 1
    strict = policy({"match": {"layers": 7}, "apply": WINDOW}, defaults={"fallback": {"unmatched": "error"}})
    for _ in range(2):
        with pytest.raises(RewriteError, match="no rule of the policy"):
            resolve(strict, layers)


def test_one_site_that_is_taken_is_enough() -> None:
    made = policy({"match": {"layers": 1}, "apply": {"form": "keep"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(made, [site(), site(index=1, layer=1)])


def test_telling_of_unmatched_sites_adds_no_guard() -> None:
    length = symbolic(4096)
    with pytest.warns(DilcompileWarning, match=r"rule far .*: min_seq 8192 \(longest: 4096\)"):
        resolve(policy({"name": "far", "match": {"min_seq": 8192}, "apply": WINDOW}), [site(k_len=length, q_len=length)])
    assert len(length.node.shape_env.guards) == 1, "that of the decision itself"


UNUSED = [
    ({"module": "model.layer.*"}, "module 'model.layer.*' (nearest: 'model.layers.0.self_attn')"),
    ({"min_seq": 16384}, "min_seq 16384 (longest: 4096)"),
    ({"max_seq": 16}, "max_seq 16 (shortest: 1024)"),
    ({"kind": "cross"}, "kind 'cross' (sites have: self)"),
    ({"causal": False}, "causal false (sites have: true)"),
    ({"masked": ["none", "window"]}, "masked ['none', 'window'] (sites have: causal)"),
    ({"dtype": "bf16"}, "dtype 'bf16' (sites have: float32)"),
    ({"layers": "7-"}, "layers '7-' (sites have: 0, 1)"),
    ({"world_size": "2-"}, "world_size '2-'"),
    ({"layers": 0, "max_seq": 1024}, "no site satisfies all of its keys at once"),
    ({"min_seq": 64}, "earlier rules take all of its sites"),
]


@pytest.mark.parametrize(("match", "why"), UNUSED)
def test_unused_rules(match: dict[str, Any], why: str) -> None:
    made = policy({"name": "all", "apply": {"form": "keep"}}, {"name": "x", "match": match, "apply": WINDOW})
    sites = [site(), site(module="model.layers.1.self_attn", layer=1, k_len=1024)]
    assert unused_rules(made, resolve(made, sites)) == [f"rule x (<dict> rules[1]) matched no site: {why}"]


def test_unused_rules_without_any_site() -> None:
    made = policy({"name": "all", "apply": {"form": "keep"}})
    assert unused_rules(made, []) == ["rule all (<dict> rules[0]) matched no site: there are no attention sites"]


def test_merge_grad_is_the_default_of_forms_that_have_it() -> None:
    defaults = {"numerics": {"merge_grad": "detach"}}
    assert decide(policy({"apply": {"form": "dilated"}}, defaults=defaults), site()).form == Dilated(merge_grad="detach")
    own = {"form": "dilated", "merge_grad": "exact"}
    assert decide(policy({"apply": own}, defaults=defaults), site()).form == Dilated(merge_grad="exact")
    rule = {"apply": {"form": "dilated"}, "numerics": {"merge_grad": "exact"}}
    assert decide(policy(rule, defaults=defaults), site()).form == Dilated(merge_grad="exact")
    assert decide(policy({"apply": {"form": "dense"}}, defaults=defaults), site()).form == Dense()


def test_what_has_no_effect_is_said() -> None:
    made = policy(
        {
            "apply": {"form": "dense"},
            "fallback": {"shape": "error"},
        },
        defaults={"numerics": {"tolerance": {"rel_l2": 1e-3}}, "fallback": {"quality": "warn"}},
    )
    assert decide(made, site()).notes == (
        "numerics.tolerance: has no effect while numerics.check is off",
        "fallback.quality: has no effect while numerics.check is off",
        "fallback.shape: error has no effect in this version",
    )
    tolerance = {"numerics": {"tolerance": {"rel_l2": 1e-3}}}
    assert decide(policy({"apply": {"form": "dense"}}, defaults=tolerance), site()).notes == (
        "numerics.tolerance: has no effect while numerics.check is off",
    )


def test_the_check_of_a_decision() -> None:
    numerics = {"check": "compile", "tolerance": {"rel_l2": 1e-6}}
    made = decide(policy({"apply": {"form": "dense"}, "numerics": numerics, "fallback": {"quality": "error"}}), site())
    assert (made.check, made.notes) == (Check("compile", 1e-6, "error"), ())
    assert decide(policy({"apply": {"form": "dense"}}), site()).check == Check("off", 1e-9, "warn")


def test_a_symbolic_length_is_guarded_only_where_a_rule_asks() -> None:
    length = symbolic(4096)
    env = length.node.shape_env
    where = site(k_len=length, q_len=length)
    made = policy(
        {"name": "other", "match": {"min_seq": 64, "module": "elsewhere"}, "apply": {"form": "keep"}},
        {"name": "w", "apply": WINDOW},
    )
    verdicts = resolve(made, [where])
    assert unused_rules(made, verdicts) == [
        "rule other (<dict> rules[0]) matched no site: module 'elsewhere' (nearest: 'model.layers.0.self_attn')"
    ]
    assert env.guards == []
    assert decide(policy({"match": {"min_seq": 2048}, "apply": WINDOW}), where).fidelity == "approximate"
    assert len(env.guards) == 1

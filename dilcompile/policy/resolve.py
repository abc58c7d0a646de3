"""Decide every site: the first rule that matches says what it becomes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dilcompile.decision import Check, Decision, MemoryUse, Rejection
from dilcompile.errors import DilcompileWarning, RewriteError, ShardingError
from dilcompile.policy.patterns import nearest
from dilcompile.policy.place import Unplaced, kept_form, method_asked, place, ranks_of, whole_site
from dilcompile.policy.predicates import PREDICATES
from dilcompile.policy.schema import Policy, Rule, num_bytes
from dilcompile.policy.values import written
from dilcompile.site import AttentionSite

Verdict = Decision | Rejection
# Policies and sites of which a warning said that no rule takes them.
_told: set[tuple[str, frozenset[str]]] = set()

# What a site has where a rule asks for something else.
HELD: dict[str, Callable[[AttentionSite], object]] = {
    "kind": lambda site: site.kind,
    "causal": lambda site: str(site.mask.causal).lower(),
    "masked": lambda site: " & ".join(site.mask.words) or "none",
    "layers": lambda site: site.layer,
    "heads": lambda site: site.heads,
    "layer_type": lambda site: site.layer_type,
    "head_dim": lambda site: site.head_dim,
    "gqa": lambda site: str(site.group > 1).lower(),
    "dtype": lambda site: site.dtype,
    "device": lambda site: site.device,
    "phase": lambda site: site.phase,
}


def resolve(
    policy: Policy,
    sites: Sequence[AttentionSite],
    *,
    enforce: bool = True,
    revise: Callable[[list[Verdict]], list[Verdict]] = list,
) -> list[Verdict]:
    """One verdict a site, in the order of the sites.

    Args:
        policy: as ``Policy.load`` returns it.
        sites: what the finder found. A rule's ``min_seq`` may add a guard on a symbolic length.
        enforce: act on ``fallback``: warn or raise. False: only say what would be decided (for reports).
        revise: may turn decisions into rejections, which ``fallback`` then speaks of too.

    Raises:
        RewriteError: where ``fallback`` says ``error``.
        ShardingError: if a rule shards a site that can't be sharded, whatever ``fallback`` says.

    Warns:
        DilcompileWarning: where ``fallback`` says ``warn``.
    """
    policy = Policy.load(policy)
    decided = [_decide(policy, site) for site in sites]
    verdicts = [_still_sharded(*pair) for pair in zip(decided, revise(decided), strict=True)]
    if enforce:
        _enforce(policy, verdicts)
    return verdicts


def _still_sharded(before: Verdict, after: Verdict) -> Verdict:
    """A rejection of a site that was to be sharded says so."""
    if isinstance(after, Rejection) and isinstance(before, Decision) and before.placement is not None:
        return replace(after, axis=before.placement.axis)
    return after


def rule_of(policy: Policy, site: AttentionSite) -> Rule | None:
    """The rule that decides a site: the first that takes it."""
    return next((rule for rule in policy.rules if rule.match.takes(_as_whole(policy, rule, site))), None)


def _as_whole(policy: Policy, rule: Rule, site: AttentionSite) -> AttentionSite:
    """The site as it is on one rank, for a rule that shards it."""
    if rule.shard is None:
        return site
    asked = method_asked(rule, rule.shard, site)
    return whole_site(site, ranks_of(policy, rule.shard), "" if asked is None else asked[0])


def _decide(policy: Policy, site: AttentionSite) -> Verdict:
    rule = rule_of(policy, site)
    if rule is None:
        return Rejection(site, None, "no rule of the policy takes it", asked=True)
    sharded = rule.shard is not None and ranks_of(policy, rule.shard) > 1
    axis = rule.shard.axes[0] if rule.shard is not None and sharded else None
    form = rule.apply.build(policy.numerics_of(rule).merge_grad)
    if form is None and not sharded:
        return Rejection(site, rule.label, "the policy keeps it", asked=True)
    form = kept_form(site) if form is None else form
    local, site = site, _as_whole(policy, rule, site)
    reason = form.reject(site)
    if reason is not None:
        cure = "give it another form, or `form: keep`, by a rule before this one"
        return Rejection(local, rule.label, f"{form.name} can't be given to it: {reason}", cure, axis=axis)
    form = form.settled(site)
    placement = place(policy, rule, site, form)
    if isinstance(placement, Unplaced):
        return Rejection(local, rule.label, f"it can't be sharded: {placement.reason}", placement.cure, axis=axis)
    return Decision(
        site=local,
        rule=rule.label,
        form=form,
        fidelity=form.fidelity(site),
        kernel=rule.apply.kernel,
        fallback="error" if placement is not None else policy.fallback_of(rule).unsupported,
        check=_check(policy, rule, placement is not None),
        memory=memory_use(policy, rule),
        # A shard's length says nothing about what is faster.
        if_faster=rule.match.given().get("min_seq") == "auto" and placement is None,
        notes=(*form.notes(site), *without_effect(policy, rule)),
        placement=placement,
    )


def _check(policy: Policy, rule: Rule, sharded: bool) -> Check:
    """A sharded site that differs is an error: the model's own graph knows one rank's rows alone."""
    numerics = policy.numerics_of(rule)
    return Check(numerics.check, numerics.tolerance.rel_l2, "error" if sharded else policy.fallback_of(rule).quality)


def memory_use(policy: Policy, rule: Rule | None = None) -> MemoryUse | None:
    """What the policy says of the buffers of a rule's sites; without a rule, of a graph that has none."""
    memory = policy.memory_of(rule)
    if memory is None:
        return None
    return MemoryUse(memory.pool, memory.reuse, None if memory.budget is None else num_bytes(memory.budget))


def without_effect(policy: Policy, rule: Rule) -> tuple[str, ...]:
    """One note for each thing that the rule asks for and this version only reads."""
    notes = []
    if rule.shard is not None and ranks_of(policy, rule.shard) == 1:
        notes.append(f"shard: mesh axis {' and '.join(map(repr, rule.shard.axes))} has one rank: nothing is moved")
    numerics, fallback = policy.numerics_of(rule), policy.fallback_of(rule)
    if numerics.check == "off" and "tolerance" in numerics.model_fields_set:
        notes.append("numerics.tolerance: has no effect while numerics.check is off")
    if numerics.check == "off" and "quality" in fallback.model_fields_set:
        notes.append("fallback.quality: has no effect while numerics.check is off")
    if "shape" in fallback.model_fields_set:
        notes.append(f"fallback.shape: {fallback.shape} has no effect in this version")
    return tuple(notes)


def _enforce(policy: Policy, verdicts: list[Verdict]) -> None:
    """Warn or raise as the policy's ``fallback`` says."""
    if verdicts and all(verdict.rule is None for verdict in verdicts):
        sites = [_with_hints(verdict.site) for verdict in verdicts]
        consequence = policy.defaults.fallback.unmatched
        if consequence != "warn" or _is_news(policy, sites):
            _act(consequence, _unmatched(policy, sites))
    _require_sharded(verdicts)
    by_label = {rule.label: rule for rule in policy.rules}
    refused: dict[tuple[str, str], list[Rejection]] = {}
    for verdict in verdicts:
        if isinstance(verdict, Rejection) and not verdict.asked and verdict.rule is not None:
            refused.setdefault((verdict.rule, verdict.reason), []).append(verdict)
    for (label, reason), found in refused.items():
        first = found[0]
        stays = f"and {len(found) - 1} more stay as they are" if len(found) > 1 else "stays as it is"
        message = f"rule {label}: {first.site.module or '<top>'} {stays}: {reason}; {first.cure}"
        _act(policy.fallback_of(by_label[label]).unsupported, message)


def _require_sharded(verdicts: list[Verdict]) -> None:
    lines = [
        f"rule {verdict.rule} shards {verdict.site.module or '<top>'} ({verdict.site.source}) over mesh axis {verdict.axis!r}: "
        f"{verdict.reason}; {verdict.cure}"
        for verdict in verdicts
        if isinstance(verdict, Rejection) and verdict.axis is not None
    ]
    if lines:
        raise ShardingError("\n".join(lines))


def _is_news(policy: Policy, sites: Sequence[AttentionSite]) -> bool:
    """Was it not yet said of such sites? The layers of one model may come as a graph each."""
    entry = (policy.fingerprint, frozenset(_without_place(site) for site in sites))
    news = entry not in _told
    _told.add(entry)
    return news


def _without_place(site: AttentionSite) -> str:
    """What the site computes, wherever it stands."""
    plain = replace(site, module="")
    return f"{plain} {site.device} {site.layer_type} {site.phase}"


def tell_again() -> None:
    """Forget which unmatched sites were warned of."""
    _told.clear()


def _unmatched(policy: Policy, sites: list[AttentionSite]) -> str:
    """That no rule takes any of the sites, the rule that comes nearest to it, and the cure."""
    rule = min(policy.rules, key=lambda rule: min(_num_failing(rule, site) for site in sites))
    return (
        f"no rule of the policy {policy.name or '(unnamed)'} takes any of the {len(sites)} attention sites of this graph: they "
        f"stay as they are; nearest is rule {rule.label}: {_why_unused(rule, sites)}; change its `match`, or end the policy with "
        "a rule without `match` (with `form: keep` it leaves them without this message)"
    )


def _num_failing(rule: Rule, site: AttentionSite) -> int:
    return sum(not PREDICATES[key].holds(site, value) for key, value in rule.match.given().items())


def _act(consequence: str, message: str) -> None:
    if consequence == "error":
        raise RewriteError(message)
    if consequence == "warn":
        warnings.warn(message, DilcompileWarning, stacklevel=4)


def unused_rules(policy: Policy, verdicts: Sequence[Verdict]) -> list[str]:
    """One line for each rule that decided no site: the key that no site satisfies, and what sites have."""
    used = {verdict.rule for verdict in verdicts}
    sites = [_with_hints(verdict.site) for verdict in verdicts]
    return [f"rule {rule.label} matched no site: {_why_unused(rule, sites)}" for rule in policy.rules if rule.label not in used]


def _why_unused(rule: Rule, sites: list[AttentionSite]) -> str:
    if not sites:
        return "there are no attention sites"
    for key, value in rule.match.given().items():
        if not any(PREDICATES[key].holds(site, value) for site in sites):
            return f"{key} {written(value)}{_instead(key, value, sites)}"
    if any(rule.match.takes(site) for site in sites):
        return "earlier rules take all of its sites"
    return "no site satisfies all of its keys at once"


def _instead(key: str, value: Any, sites: list[AttentionSite]) -> str:
    if key == "module":
        near = nearest(value, [site.module for site in sites])
        return f" (nearest: {near!r})" if near else ""
    if key == "min_seq":
        return f" (longest: {max(site.k_len for site in sites)})"
    if key == "max_seq":
        return f" (shortest: {min(site.k_len for site in sites)})"
    held = dict.fromkeys(str(HELD[key](site)).removeprefix("torch.") for site in sites if key in HELD)
    return f" (sites have: {', '.join(held)})" if held else ""


def _with_hints(site: AttentionSite) -> AttentionSite:
    """The site with plain lengths, so that explaining adds no guard."""
    return replace(site, k_len=_hint(site.k_len), q_len=_hint(site.q_len), batch=_hint(site.batch))


def _hint(length: int | torch.SymInt) -> int:
    if isinstance(length, int):
        return length
    hint = length.node.hint
    return hint if isinstance(hint, int) else 0

"""What is wrong with a policy that reads well: rules that never act, placements that don't fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dilcompile.decision import Rejection
from dilcompile.policy import patterns, ranges
from dilcompile.policy.place import order_of
from dilcompile.policy.predicates import PREDICATES
from dilcompile.policy.resolve import resolve, unused_rules
from dilcompile.policy.schema import Match, Policy, Rule
from dilcompile.site import AttentionSite, MaskSpec


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Args:
        level: ``error``: the rule can't do what it says; ``warning``: it may be meant so.
        message: names the rule and the place.
    """

    level: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


def check(policy: Policy, sites: Sequence[AttentionSite] | None = None) -> list[Finding]:
    """Every finding, in the order of the rules.

    Args:
        policy: as ``Policy.load`` returns it.
        sites: the attention of one model; None: only what the policy alone shows.
    """
    found: list[Finding] = []
    for index, rule in enumerate(policy.rules):
        found += [Finding("error", f"rule {rule.label} {reason}") for reason in (*_impossible(rule), *_misplaced(policy, rule))]
        found += _unmet(rule)
        shadow = next((earlier for earlier in policy.rules[:index] if shadows(earlier, rule)), None)
        if shadow is not None:
            # A file is extended for some of its rules; that others are hidden is how it is used.
            level: Literal["error", "warning"] = "warning" if rule.extended else "error"
            found.append(Finding(level, f"rule {rule.label} is never reached: rule {shadow.label} takes all of its sites"))
    if sites is not None:
        found += _on_model(policy, sites)
    return found


def shadows(earlier: Rule, later: Rule) -> bool:
    """Does ``earlier`` surely take every site that ``later`` matches? False when unsure."""
    narrow = later.match.given()
    return all(
        _open(key, value) or (key in narrow and PREDICATES[key].covers(value, narrow[key]))
        for key, value in earlier.match.given().items()
    )


def _open(key: str, value: object) -> bool:
    """A key that every site satisfies."""
    return value == "any" or (key == "module" and value == "*") or (key == "min_seq" and value in (1, "auto"))


def _impossible(rule: Rule) -> Iterator[str]:
    """Why no site can match, or why every site that matches is refused."""
    match = rule.match.given()
    least = match.get("min_seq", 1)
    if least == "auto":
        if rule.apply.build() is None and rule.shard is None:
            yield "has min_seq auto but keeps its sites as they are: nothing could be faster than that"
    elif least > match.get("max_seq", math.inf):
        yield f"can match no site: min_seq {match['min_seq']} is above max_seq {match['max_seq']}"
    if "module" in match and "ignore" in match and patterns.covers(match["ignore"], match["module"]):
        yield f"can match no site: ignore {match['ignore']!r} covers module {match['module']!r}"
    masks = match.get("masked", ())
    masks = (masks,) if isinstance(masks, str) else masks
    if match.get("causal") is True and set(masks) == {"none"}:
        yield "can match no site: a causal site is never masked 'none'"
    if match.get("causal") is False and set(masks) == {"causal"}:
        yield "can match no site: causal is false but masked is 'causal'"
    devices = match.get("device", ())
    devices = (devices,) if isinstance(devices, str) else devices
    if "compute_capability" in match and devices and not any(d.startswith("cuda") for d in devices):
        yield "can match no site: compute_capability is that of a CUDA device, and device is another"
    form = rule.apply.build()
    reason = form.reject(_typical(rule.match, form.made_for)) if form is not None else None
    if form is not None and reason is not None:
        yield f"can act on no site: {form.name} can't be given to what it matches: {reason}"


def _unmet(rule: Rule) -> Iterator[Finding]:
    """Lengths that the rule may meet and its form can't be had at."""
    form, match = rule.apply.build(), rule.match.given()
    unmet = form.unmet(_only_causal(match)) if form is not None else None
    # A query that is decoded alone is not the one that is left without keys.
    if form is None or unmet is None or match.get("phase") == "decode":
        return
    if form.reject(_typical(rule.match, form.made_for)) is not None:
        return
    shortest = match.get("min_seq", 1)
    shortest = 1 if shortest == "auto" else shortest
    if shortest > unmet.above:
        yield Finding(
            "error", f"rule {rule.label} can act on no site: {form.name} can't be computed on what it matches: {unmet.reason}"
        )
    elif match.get("max_seq", math.inf) > unmet.above:
        yield Finding("warning", f"rule {rule.label} can act on no site of more than {unmet.above} positions: {unmet.reason}")


def _only_causal(match: Mapping[str, Any]) -> bool:
    masks = match.get("masked", ())
    return match.get("causal") is True or set((masks,) if isinstance(masks, str) else masks) == {"causal"}


_MANY_HEADS = 1024


def _typical(match: Match, made_for: int | None) -> AttentionSite:
    """A harmless site of the kind and mask that the rule asks for: what a form refuses here, it always refuses.

    Args:
        made_for: heads that the form can be given to.
    """
    asked = match.given()
    masks = asked.get("masked")
    unread = "an unread mask" if masks in ("other", ("other",)) else None
    causal = asked.get("causal") is True or masks in ("causal", ("causal",))
    cpu, dtype = torch.device("cpu"), torch.float32
    # As many heads as the rule may meet; more than any model has where it doesn't say.
    heads = int(min(ranges.spans(asked["heads"])[-1][1], _MANY_HEADS)) if "heads" in asked else _MANY_HEADS
    if made_for is not None and ("heads" not in asked or ranges.within(made_for, asked["heads"])):
        heads = made_for
    mask = MaskSpec(causal=causal, unread=unread)
    site = AttentionSite(0, "", "", "", "self", 1, heads, heads, 4096, 4096, 64, 64, dtype, dtype, cpu, 0.125, mask)
    return replace(site, kind="cross") if asked.get("kind") == "cross" else site


def _misplaced(policy: Policy, rule: Rule) -> Iterator[str]:
    """What of the rule's placement doesn't fit together."""
    shard = rule.shard
    if shard is None:
        return
    order = order_of(policy, shard)
    yield from _in_another_order(policy, rule, order)
    if shard.method == "halo" and order in ("zigzag", "striped"):
        yield f"can't use method halo with order {order}: neighbours are on distant ranks; use contiguous"
    ranks = math.prod(axis.size for axis in policy.mesh.values())
    asked = rule.match.given().get("world_size")
    if asked is not None and not ranges.within(ranks, asked):
        sizes = " x ".join(f"{name} {axis.size}" for name, axis in policy.mesh.items())
        yield f"asks for world_size {asked!r} but the mesh has {ranks} ranks ({sizes})"


def _in_another_order(policy: Policy, rule: Rule, order: str | None) -> Iterator[str]:
    """The inputs are cut once, so all sites of an axis hold their tokens in one order."""
    assert rule.shard is not None
    for earlier in policy.rules:
        if earlier is rule:
            return
        if earlier.shard is not None and earlier.shard.axes[0] == rule.shard.axes[0]:
            other = order_of(policy, earlier.shard)
            if None not in (order, other) and other != order:
                yield (
                    f"holds the tokens of mesh axis {rule.shard.axes[0]!r} {order}, but rule {earlier.label} holds them {other}: "
                    "one model's inputs are cut in one order; say it once, as `layout` of the mesh axis"
                )
                return


def _on_model(policy: Policy, sites: Sequence[AttentionSite]) -> Iterator[Finding]:
    """What this model adds: rules without a site, and sites that can't be sharded."""
    verdicts = resolve(policy, sites, enforce=False)
    for verdict in verdicts:
        if isinstance(verdict, Rejection) and verdict.axis is not None:
            where = verdict.site.module or "<top>"
            yield Finding("error", f"rule {verdict.rule} shards {where}: {verdict.reason}; {verdict.cure}")
    for line in unused_rules(policy, verdicts):
        yield Finding("warning", line)

"""A model over several ranks, planned on one: which placement each site gets, what moves, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from dilcompile.decision import Decision, Rejection
from dilcompile.errors import DilcompileError, FormError
from dilcompile.forms import KeepStructure
from dilcompile.inspect import explain
from dilcompile.placements import PLACEMENTS
from dilcompile.placements.choose import Chosen, Site, choose, choose_order, seconds, size_text, time_text
from dilcompile.placements.cost import Device
from dilcompile.placements.shards import Order, Shards
from dilcompile.policy import Policy
from dilcompile.policy.resolve import resolve
from dilcompile.relation import Relation
from dilcompile.report.lengths import problem_of
from dilcompile.site import AttentionSite

METHODS = (*PLACEMENTS, "ulysses")
# (the rule and the form), and what is to be placed, or why that can't be.
Kind = tuple[tuple[str | None, str], Site | str]


@dataclass(frozen=True)
class Planned:
    """Sites that are alike.

    Args:
        modules: their module paths.
        form: what they compute, or why nothing is known of it.
        chosen: their placement; a text: why there is none.
    """

    modules: tuple[str, ...]
    form: str
    chosen: Chosen | str


@dataclass(frozen=True)
class Plan:
    """All sites of a model over one mesh axis.

    Args:
        order, why: the order of the tokens and why it is this one.
        train: backwards are counted.
    """

    axis: str
    ranks: int
    order: Order
    why: str
    device: Device
    train: bool
    sites: tuple[Planned, ...]

    def totals(self) -> dict[str, float]:
        """Bytes of the rank that moves most and seconds, over all sites."""
        found = [(len(one.modules), one.chosen.best) for one in self.sites if isinstance(one.chosen, Chosen)]
        return {
            "received": sum(number * best.received for number, best in found),
            "sent": sum(number * best.sent for number, best in found),
            "received_backward": sum(number * best.received_backward for number, best in found) if self.train else 0,
            "compute": sum(number * best.compute for number, best in found),
            "wire": sum(number * best.wire for number, best in found),
            "seconds": sum(number * seconds(best, self.train) for number, best in found),
        }

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values: bytes, rows and seconds."""
        sites: list[dict[str, object]] = []
        for one in self.sites:
            chosen = one.chosen
            told: dict[str, object] = {"modules": list(one.modules), "form": one.form}
            if isinstance(chosen, str):
                told["reason"] = chosen
            else:
                told.update(why=chosen.why, refused=chosen.refused, **asdict(chosen.best))
                told["others"] = [asdict(other) for other in chosen.others]
            sites.append(told)
        about = {"axis": self.axis, "ranks": self.ranks, "order": self.order, "why": self.why, "train": self.train}
        return {**about, "device": asdict(self.device), "sites": sites, "totals": self.totals()}

    def __str__(self) -> str:
        lines = [f"{self.axis}={self.ranks}, {self.order}: {self.why}", f"device: {self.device.source}", ""]
        lines += _table([_HEAD, *(_row(one) for one in self.sites)])
        lines += ["", *(f"{_name(one)}: {one.chosen if isinstance(one.chosen, str) else one.chosen.why}" for one in self.sites)]
        total = self.totals()
        backward = f", receives {size_text(total['received_backward'])} in the backward" if self.train else ""
        wait = "forward and backward" if self.train else "forward"
        moved = f"receives {size_text(total['received'])}, sends {size_text(total['sent'])} in the forward{backward}"
        lines += ["", f"all sites, of the rank that has most: {moved}"]
        spent = f"compute {time_text(total['compute'])}, moving {time_text(total['wire'])}"
        lines += [f"forward: {spent}; {wait}: {time_text(total['seconds'])}"]
        return "\n".join(lines)


def plan(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    policy: Policy,
    mesh: tuple[str, int],
    device: Device,
    length: int | None = None,
    budget: int | None = None,
    train: bool = True,
) -> Plan:
    """What sharding the model's sequence over one mesh axis moves and costs, by the example call; no other process is needed.

    Args:
        mesh: an axis and its ranks.
        length: tokens of the sequence, in place of the example's.
        budget: most bytes of others' keys and values that a site may hold at once.

    Raises:
        DilcompileError: if the model has no site.
    """
    axis, ranks = mesh
    # What each site computes does not depend on how it is held.
    alone = policy.model_copy(update={"rules": tuple(rule.model_copy(update={"shard": None}) for rule in policy.rules)})
    report = explain(model, *args, policy=alone, **kwargs)
    verdicts: list[Decision | Rejection] = [*report.decisions, *report.rejections]
    if not verdicts:
        raise DilcompileError("the model has no attention that was found: nothing is to be planned")
    if length is not None:
        # Rules may go by the length.
        verdicts = resolve(alone, [_longer(one.site, length) for one in verdicts], enforce=False)
    groups = _grouped(verdicts)
    known = [(site, len(modules)) for (_, site), modules in groups.items() if isinstance(site, Site)]
    sites = [replace(site, train=train) for site, _ in known]
    lengths = {site.relation.problem.k_len for site in sites}
    order, why = _order(policy, axis, sites, [number for _, number in known], lengths, ranks, device, budget)
    asked = _methods(policy)
    planned = [
        Planned(tuple(modules), form, _chosen(replace(site, train=train), ranks, order, device, budget, asked.get(rule)))
        if isinstance(site, Site)
        else Planned(tuple(modules), form, site)
        for ((rule, form), site), modules in ((key, held) for key, held in groups.items())
    ]
    return Plan(axis, ranks, order, why, device, train, tuple(planned))


def _longer(site: AttentionSite, length: int) -> AttentionSite:
    """A site over one sequence, at another length."""
    return replace(site, q_len=length, k_len=length) if site.kind == "self" else site


def _grouped(verdicts: list[Decision | Rejection]) -> dict[Kind, list[str]]:
    """Module paths by rule, form and what is to be placed, or why it can't be."""
    groups: dict[Kind, list[str]] = {}
    for verdict in sorted(verdicts, key=lambda one: one.site.index):
        site = verdict.site
        form = verdict.form if isinstance(verdict, Decision) else KeepStructure().settled(site)
        placed = _site(site, form) if isinstance(verdict, Decision) or verdict.asked else verdict.reason
        groups.setdefault(((verdict.rule, str(form)), placed), []).append(site.module or "<top>")
    return groups


def _site(site: AttentionSite, form: Any) -> Site | str:
    problem = problem_of(site)
    if problem is None:
        return "its lengths are not known before the model runs"
    if site.kind != "self" or problem.q_len != problem.k_len or problem.q_offset:
        return f"its {problem.q_len} queries and {problem.k_len} keys are not the positions of one sequence"
    if site.mask.unread is not None:
        return f"its mask could not be read: {site.mask.unread}"
    try:
        relation: Relation = form.relation(problem)
    except FormError as error:
        return str(error)
    return Site(relation, site.dtype.itemsize, site.mask.documents)


def _order(
    policy: Policy,
    axis: str,
    sites: list[Site],
    counts: list[int],
    lengths: set[int],
    ranks: int,
    device: Device,
    budget: int | None,
) -> tuple[Order, str]:
    asked = {rule.shard.order for rule in policy.rules if rule.shard is not None} - {"auto"}
    if len(asked) == 1:
        order: Order = asked.pop()  # type: ignore[assignment]
        return order, "the policy's rules ask for it"
    if len(lengths) != 1:
        return "contiguous", f"the sites have sequences of {len(lengths)} lengths"
    return choose_order(sites, lengths.pop(), ranks, device, budget, counts)


def _methods(policy: Policy) -> dict[str | None, str]:
    """The methods that rules name, by the rule's label."""
    found: dict[str | None, str] = {}
    for rule in policy.rules:
        method = "auto" if rule.shard is None else rule.shard.method
        if rule.apply.form == "ring" or method != "auto":
            found[rule.label] = "ring" if rule.apply.form == "ring" else method
    return found


def _chosen(site: Site, ranks: int, order: Order, device: Device, budget: int | None, method: str | None) -> Chosen | str:
    shards = Shards(site.relation.problem.k_len, ranks, order)
    if method is None:
        return choose(site, shards, device, budget)
    if method not in METHODS:
        return f"method {method} is not predicted; those that are: {', '.join(METHODS)}"
    return choose(site, shards, device, budget, (method,))


_HEAD = ["sites", "method", "steps", "rows in", "rows out", "bytes in", "bytes out", "held", "compute", "moving", "imbalance"]


def _name(one: Planned) -> str:
    more = f" and {len(one.modules) - 1} more" if len(one.modules) > 1 else ""
    return one.modules[0] + more


def _row(one: Planned) -> list[str]:
    if isinstance(one.chosen, str):
        return [_name(one), "none", *["."] * 9]
    best = one.chosen.best
    return [
        _name(one),
        best.method,
        str(best.steps),
        f"{best.rows_received:,}",
        f"{best.rows_sent:,}",
        size_text(best.received),
        size_text(best.sent),
        size_text(best.extra),
        time_text(best.compute),
        time_text(best.wire),
        f"{math.ceil(best.imbalance * 1000 - 1e-6) / 1000:.3f}",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

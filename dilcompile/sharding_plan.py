"""A model over several ranks, planned on one: which placement each site gets, what moves, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dilcompile.decision import Decision, Rejection
from dilcompile.errors import DilcompileError, FormError
from dilcompile.forms import KeepStructure
from dilcompile.inspect import explain
from dilcompile.placements.choose import Chosen, OrderChoice, Site, choose, choose_order, seconds, size_text, time_text
from dilcompile.placements.device import Device
from dilcompile.placements.shards import Order, Shards
from dilcompile.policy import Policy
from dilcompile.policy.place import is_decoded
from dilcompile.policy.resolve import resolve
from dilcompile.relation import Relation
from dilcompile.report.lengths import problem_of
from dilcompile.site import AttentionSite

# (the rule and the form), and what is to be placed, or why that can't be.
Kind = tuple[tuple[str | None, str], Site | str]


@dataclass(frozen=True)
class Planned:
    """Sites that are alike.

    Args:
        modules: their module paths.
        form: what they compute, or why nothing is known of it.
        chosen: their placement; a text: why there is none.
        alone: the order that would be fastest for one of them alone; None where there is none.
    """

    modules: tuple[str, ...]
    form: str
    chosen: Chosen | str
    alone: OrderChoice | None = None


@dataclass(frozen=True)
class Plan:
    """All sites of a model over the ranks that hold its sequence.

    Args:
        mesh: ranks by mesh axis: that over which keys move, and that over which heads are exchanged if there is one.
        order, why: the order of the tokens and why it is this one.
        orders: what is predicted of orders for all sites.
        train: backwards are counted.
    """

    mesh: dict[str, int]
    order: Order
    why: str
    orders: OrderChoice
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
            if one.alone is not None:
                told["orders_alone"] = one.alone.seconds
            if isinstance(chosen, str):
                told["reason"] = chosen
            else:
                told.update(why=chosen.why, refused=chosen.refused, **asdict(chosen.best))
                told["others"] = [asdict(other) for other in chosen.others]
            sites.append(told)
        about = {"mesh": self.mesh, "order": self.order, "why": self.why, "train": self.train, "orders": self.orders.seconds}
        return {**about, "device": asdict(self.device), "sites": sites, "totals": self.totals()}

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis}={ranks}" for axis, ranks in self.mesh.items())
        lines = [f"{mesh}, {self.order}: {self.why}", f"device: {self.device.source}", ""]
        lines += _table([_HEAD, *(_row(one) for one in self.sites)])
        lines += ["", *(f"{_name(one)}: {one.chosen if isinstance(one.chosen, str) else one.chosen.why}" for one in self.sites)]
        lines += [f"{_name(one)}: alone it would be held {one.alone}" for one in self.sites if one.alone is not None]
        better = self.orders.faster_than(self.order)
        if better is not None:
            lines += [f"all sites would be faster held {self.orders}"]
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
    mesh: Mapping[str, int],
    device: Device,
    length: int | None = None,
    budget: int | None = None,
    train: bool = True,
) -> Plan:
    """What sharding the model's sequence moves and costs, by the example call; no other process is needed.

    Args:
        mesh: ranks by axis: one, or for ``usp`` two, that over which keys move first.
        length: tokens of the sequence, in place of the example's.
        budget: most bytes of others' keys and values that a site may hold at once.

    Raises:
        DilcompileError: if the model has no site, or there are more axes.
    """
    if len(mesh) not in (1, 2):
        raise DilcompileError(f"a sequence is held over one mesh axis, or with usp over two; got {', '.join(mesh) or 'none'}")
    ranks, parts = (*mesh.values(), 1)[:2]
    # What each site computes does not depend on how it is held.
    alone = policy.model_copy(update={"rules": tuple(rule.model_copy(update={"shard": None}) for rule in policy.rules)})
    report = explain(model, *args, policy=alone, **kwargs)
    verdicts: list[Decision | Rejection] = [*report.decisions, *report.rejections]
    if not verdicts:
        raise DilcompileError("the model has no attention that was found: nothing is to be planned")
    if length is not None:
        # Rules may go by the length.
        verdicts = resolve(alone, [_longer(one.site, length) for one in verdicts], enforce=False)
    asked = _methods(policy)
    groups = _grouped(verdicts, asked, train)
    known = [(site, number, asked.get(rule)) for ((rule, _), site), number in _counted(groups) if isinstance(site, Site)]
    lengths = {site.relation.problem.k_len for site, *_ in known}
    shards = Shards(max(lengths, default=1), ranks, "contiguous", parts)
    best = OrderChoice("contiguous", {}, f"the sites have sequences of {len(lengths)} lengths")
    if len(lengths) == 1:
        sites, counts, methods = zip(*known, strict=True)
        best = choose_order(sites, shards, device, budget, counts, methods)
    named = _named_order(policy, next(iter(mesh)))
    order, why = (best.order, best.why) if named is None else named
    planned = []
    for ((rule, form), site), modules in groups.items():
        chosen: Chosen | str = site if isinstance(site, str) else ""
        by_itself = None
        if isinstance(site, Site):
            own = replace(shards, length=site.relation.problem.k_len, order=order)
            chosen = choose(site, own, device, budget, asked.get(rule))
            by_itself = choose_order([site], own, device, budget, methods=[asked.get(rule)])
        planned.append(
            Planned(tuple(modules), form, chosen, by_itself if by_itself is not None and len(by_itself.seconds) > 1 else None)
        )
    return Plan(dict(mesh), order, why, best, device, train, tuple(planned))


def _counted(groups: dict[Kind, list[str]]) -> Iterator[tuple[Kind, int]]:
    for kind, modules in groups.items():
        yield kind, len(modules)


def _longer(site: AttentionSite, length: int) -> AttentionSite:
    """A site over one sequence, at another length."""
    if is_decoded(site):
        return replace(site, k_len=length)
    return replace(site, q_len=length, k_len=length) if site.kind == "self" else site


def _grouped(
    verdicts: list[Decision | Rejection], asked: dict[str | None, tuple[str, ...]], train: bool
) -> dict[Kind, list[str]]:
    """Module paths by rule, form and what is to be placed, or why it can't be."""
    groups: dict[Kind, list[str]] = {}
    for verdict in sorted(verdicts, key=lambda one: one.site.index):
        site = verdict.site
        form = verdict.form if isinstance(verdict, Decision) else KeepStructure().settled(site)
        is_tree = asked.get(verdict.rule) == ("tree",)
        placeable = isinstance(verdict, Decision) or verdict.asked
        placed = _site(site, form, is_tree, train) if placeable else verdict.reason  # type: ignore[union-attr]
        groups.setdefault(((verdict.rule, str(form)), placed), []).append(site.module or "<top>")
    return groups


def _site(site: AttentionSite, form: Any, is_tree: bool, train: bool) -> Site | str:
    """A site to be placed. Queries that all ranks have stand behind the keys before them."""
    problem = problem_of(site)
    if problem is None:
        return "its lengths are not known before the model runs"
    if site.mask.unread is not None:
        return f"its mask could not be read: {site.mask.unread}"
    if is_tree or is_decoded(site):
        problem = replace(problem, q_offset=max(0, problem.k_len - problem.q_len))
    elif site.kind != "self" or problem.q_len != problem.k_len or problem.q_offset:
        return f"its {problem.q_len} queries and {problem.k_len} keys are not the positions of one sequence"
    try:
        relation: Relation = form.relation(problem)
    except FormError as error:
        return str(error)
    return Site(relation, site.dtype.itemsize, site.mask.documents, train and not is_decoded(site))


def _named_order(policy: Policy, axis: str) -> tuple[Order, str] | None:
    """The order that the policy names, and who does."""
    asked = {rule.shard.order for rule in policy.rules if rule.shard is not None} - {"auto"}
    if len(asked) == 1:
        return asked.pop(), "the policy's rules ask for it"  # type: ignore[return-value]
    held = policy.mesh.get(axis)
    if held is not None and "layout" in held.given() and held.layout != "auto":
        return held.layout, f"the layout of mesh axis {axis!r} in the policy"
    return None


def _methods(policy: Policy) -> dict[str | None, tuple[str, ...]]:
    """The methods that rules name, by the rule's label."""
    found: dict[str | None, tuple[str, ...]] = {}
    for rule in policy.rules:
        method = "auto" if rule.shard is None else rule.shard.method
        method = "ulysses" if rule.shard is not None and rule.shard.dim == "heads" else method
        if rule.apply.form == "ring" or method != "auto":
            found[rule.label] = ("ring" if rule.apply.form == "ring" else method,)
    return found


_HEAD = [
    *("sites", "method", "steps", "rows in", "rows out", "bytes in", "bytes out", "held", "compute", "moving", "packing"),
    "imbalance",
]


def _name(one: Planned) -> str:
    more = f" and {len(one.modules) - 1} more" if len(one.modules) > 1 else ""
    return one.modules[0] + more


def _row(one: Planned) -> list[str]:
    if isinstance(one.chosen, str):
        return [_name(one), "none", *["."] * 10]
    best = one.chosen.best
    return [
        _name(one),
        best.name,
        str(best.steps),
        f"{best.rows_received:,}",
        f"{best.rows_sent:,}",
        size_text(best.received),
        size_text(best.sent),
        size_text(best.extra),
        time_text(best.compute),
        time_text(best.wire),
        time_text(best.packing),
        f"{math.ceil(best.imbalance * 1000 - 1e-6) / 1000:.3f}",
    ]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

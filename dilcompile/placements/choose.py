"""Which placement is fastest, and why: the least predicted time among those that fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dilcompile.generators import Segment
from dilcompile.placements import PLACEMENTS
from dilcompile.placements.account import imbalance, pairs_by_rank
from dilcompile.placements.cost import Device, Estimate, estimate, estimate_ulysses, ulysses_refuses
from dilcompile.placements.shards import Order, Shards
from dilcompile.relation import Relation

_EVEN = 1.02
# Below it a difference of predictions means nothing.
_TIE = 1.02


@dataclass(frozen=True)
class Site:
    """One attention to be placed.

    Args:
        relation: over the whole sequence.
        itemsize: bytes of a number of q, k and v.
        documents: the sequence is packed with documents.
        train: the backward counts, too.
    """

    relation: Relation
    itemsize: int = 2
    documents: bool = False
    train: bool = True


@dataclass(frozen=True)
class Chosen:
    """The fastest method over an order.

    Args:
        best: what is predicted of it.
        others: of those that could be had too, fastest first.
        refused: the reason of each that could not.
        why: why this one, in words.
    """

    best: Estimate
    others: tuple[Estimate, ...]
    refused: dict[str, str]
    why: str


def seconds(one: Estimate, train: bool) -> float:
    """What a step of the model waits for."""
    return one.seconds + (one.backward if train else 0.0)


def choose(
    site: Site, shards: Shards, device: Device, budget: int | None = None, methods: Sequence[str] = (*PLACEMENTS, "ulysses")
) -> Chosen | str:
    """The fastest of ``methods`` over these shards, or the reason why there is none.

    Args:
        budget: most bytes of others' keys and values at once; None: no limit.
    """
    found: list[Estimate] = []
    refused: dict[str, str] = {}
    for method in methods:
        one = _estimated(method, site, shards, device)
        if isinstance(one, str):
            refused[method] = one
        elif budget is not None and one.extra > budget:
            refused[method] = f"it holds {size_text(one.extra)} of other ranks' rows, more than the budget of {size_text(budget)}"
        else:
            found.append(one)
    if not found:
        return "; ".join(f"{method}: {reason}" for method, reason in refused.items())
    fastest = min(seconds(one, site.train) for one in found)
    # Of equally fast ones that which moves least, then the first.
    best = min((one for one in found if seconds(one, site.train) <= _TIE * fastest), key=lambda one: one.received)
    others = tuple(sorted((one for one in found if one is not best), key=lambda one: seconds(one, site.train)))
    return Chosen(best, others, refused, _why(best, others, refused))


def _estimated(method: str, site: Site, shards: Shards, device: Device) -> Estimate | str:
    if method == "ulysses":
        refused = ulysses_refuses(site.relation, shards)
        return estimate_ulysses(site.relation, shards, device, site.itemsize) if refused is None else refused
    placement = PLACEMENTS[method]
    refused = placement.reject(site.relation, shards, site.documents)
    if refused is not None:
        return refused
    return estimate(method, placement, site.relation, shards, device, site.itemsize, site.documents)


def orders_of(sites: Iterable[Site], length: int, ranks: int) -> list[Order]:
    """Orders that may be worth it: contiguous; zigzag where that leaves ranks waiting; striped (residue sharding) where the rates
    of branches are multiples of the ranks, so that their keys are at hand."""
    found: list[Order] = ["contiguous"]
    known = [site.relation for site in sites if not site.relation.is_bound]
    if any(imbalance(pairs_by_rank(relation, Shards(length, ranks))) > _EVEN for relation in known):
        found.append("zigzag")
    branches = [term.generator for relation in known for term in relation.terms if isinstance(term.generator, Segment)]
    if branches and all(branch.rate % ranks == 0 for branch in branches):
        found.append("striped")
    return found


def choose_order(
    sites: Sequence[Site], length: int, ranks: int, device: Device, budget: int | None = None, counts: Sequence[int] | None = None
) -> tuple[Order, str]:
    """The order for all sites together, since tokens are held once; and why.

    Args:
        counts: how many sites each of ``sites`` stands for; None: one.
    """
    totals: dict[Order, float] = {}
    for order in orders_of(sites, length, ranks):
        chosen = [choose(site, Shards(length, ranks, order), device, budget) for site in sites]
        if not any(isinstance(one, str) for one in chosen):
            totals[order] = sum(
                number * seconds(one.best, site.train)
                for one, site, number in zip(chosen, sites, counts or [1] * len(sites), strict=True)
                if not isinstance(one, str)
            )
    if not totals:
        return "contiguous", "no order suits every site"
    best = min(totals, key=lambda order: totals[order] * (1 if order == "contiguous" else _TIE))
    others = [f"{order} {time_text(total)}" for order, total in totals.items() if order != best]
    return best, f"{time_text(totals[best])} for all sites" + (f" against {', '.join(others)}" if others else "")


def _why(best: Estimate, others: Sequence[Estimate], refused: dict[str, str]) -> str:
    if not best.received:
        text = f"{best.method} over {best.order}: nothing moves"
    else:
        behind = "hidden behind" if best.hidden else "beside"
        text = f"{best.method} over {best.order}: {size_text(best.received)} in {time_text(best.wire)}, {behind} "
        text += f"{time_text(best.compute)} of compute"
    if others:
        most = max(others, key=lambda one: one.received)
        text += f"; {most.method} would move {size_text(most.received)} in {time_text(most.wire)}"
    elif refused:
        text += "; no other can be had"
    return text


def size_text(count: float) -> str:
    """Bytes in words, powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def time_text(duration: float) -> str:
    """Seconds in words."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if duration >= scale:
            return f"{duration / scale:.3g} {unit}"
    return f"{duration * 1e6:.3g} us"

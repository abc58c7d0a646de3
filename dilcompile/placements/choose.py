"""Which placement is fastest, and why: the least predicted time among those that fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from dilcompile.generators import Segment
from dilcompile.placements import PLACEMENTS
from dilcompile.placements.account import imbalance, pairs_by_rank
from dilcompile.placements.cost import Estimate, estimate, estimate_tree, estimate_ulysses, heads_refused
from dilcompile.placements.device import Device
from dilcompile.placements.shards import Order, Shards
from dilcompile.placements.unfit import data_chosen
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
        prefetch: rows travel while a rank computes.
    """

    relation: Relation
    itemsize: int = 2
    documents: bool = False
    train: bool = True
    prefetch: bool = True


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


def methods_of(relation: Relation, shards: Shards) -> tuple[str, ...]:
    """The methods that these queries and mesh axes may take: queries that are no shard are on all ranks, and over two axes heads
    are exchanged, too."""
    size = relation.problem
    if (size.q_len, size.q_offset) != (size.k_len, 0):
        return ("tree",)
    return ("usp",) if shards.parts > 1 else (*PLACEMENTS, "ulysses")


def choose(
    site: Site, shards: Shards, device: Device, budget: int | None = None, methods: Sequence[str] | None = None
) -> Chosen | str:
    """The fastest of ``methods`` over these shards, or the reason why there is none.

    Args:
        budget: most bytes of others' keys and values at once; None: no limit.
        methods: None: all that may be had, see ``methods_of``.
    """
    found: list[Estimate] = []
    refused: dict[str, str] = {}
    for method in methods_of(site.relation, shards) if methods is None else methods:
        for moving in PLACEMENTS if method == "usp" else (None,):
            one = _estimated(method, moving, site, shards, device)
            name = method if moving is None else f"{method} with {moving}"
            if isinstance(one, str):
                refused[name] = one
            elif budget is not None and one.extra > budget:
                held = size_text(one.extra)
                refused[name] = f"it holds {held} of other ranks' rows, more than the budget of {size_text(budget)}"
            else:
                found.append(one)
    if not found:
        return "; ".join(f"{method}: {reason}" for method, reason in refused.items())
    fastest = min(seconds(one, site.train) for one in found)
    # Of equally fast ones that which moves least, then the first.
    best = min((one for one in found if seconds(one, site.train) <= _TIE * fastest), key=lambda one: one.received)
    others = tuple(sorted((one for one in found if one is not best), key=lambda one: seconds(one, site.train)))
    return Chosen(best, others, refused, _why(best, others, refused))


def _estimated(method: str, moving: str | None, site: Site, shards: Shards, device: Device) -> Estimate | str:
    relation = site.relation
    usual = methods_of(relation, shards)
    if method not in usual:
        return f"{method} is not for it: {_UNUSUAL[usual[0]] if usual[0] in _UNUSUAL else _UNUSUAL['']}"
    if method == "tree":
        return data_chosen(relation) or estimate_tree(relation, shards, device, site.itemsize)
    refused = heads_refused(relation, shards.ranks if method == "ulysses" else shards.parts)
    if method == "ulysses":
        return estimate_ulysses(relation, shards, device, site.itemsize) if refused is None else refused
    name = moving or method
    placement = PLACEMENTS[name]
    refused = refused or placement.reject(relation, shards, site.documents)
    if refused is not None:
        return refused
    return estimate(name, relation, shards, device, site.itemsize, site.documents, site.prefetch)


_UNUSUAL = {
    "tree": "its queries are on all ranks, and take method tree",
    "usp": "two mesh axes hold the sequence, which is method usp",
    "": "its queries are the positions of the sequence, held over one mesh axis",
}


def orders_of(sites: Iterable[Site], length: int, ranks: int) -> list[Order]:
    """Orders that may be worth it: contiguous; zigzag where that leaves ranks waiting; striped (residue sharding) where the rates
    of all branches are multiples of the ranks."""
    found: list[Order] = ["contiguous"]
    known = [site.relation for site in sites if not site.relation.is_bound and site.relation.problem.q_len == length]
    if any(imbalance(pairs_by_rank(relation, Shards(length, ranks))) > _EVEN for relation in known):
        found.append("zigzag")
    branches = [term.generator for relation in known for term in relation.terms if isinstance(term.generator, Segment)]
    if branches and all(branch.rate % ranks == 0 for branch in branches):
        found.append("striped")
    return found


@dataclass(frozen=True)
class OrderChoice:
    """The order of the tokens for all sites together, since they are held once.

    Args:
        order: the fastest; contiguous, unless another one is faster by more than 2 %.
        seconds: predicted for all sites, by order; those that some site can't have are left out.
        why: in words.
    """

    order: Order
    seconds: dict[Order, float]
    why: str

    def __str__(self) -> str:
        return f"{self.order}: {self.why}"

    def faster_than(self, order: Order) -> Order | None:
        """The chosen order, if it is predicted to be faster than this one by more than 2 %."""
        known = self.seconds.get(order)
        is_faster = known is not None and self.order in self.seconds and known > _TIE * self.seconds[self.order]
        return self.order if is_faster else None


def choose_order(
    sites: Sequence[Site],
    shards: Shards,
    device: Device,
    budget: int | None = None,
    counts: Sequence[int] | None = None,
    methods: Sequence[Sequence[str] | None] | None = None,
    orders: Sequence[Order] | None = None,
) -> OrderChoice:
    """The order for all sites together; and why.

    Args:
        shards: of any order.
        counts: how many sites each of ``sites`` stands for; None: one.
        methods: those that each site may have; None: all.
        orders: those to choose from; None: see ``orders_of``.
    """
    totals: dict[Order, float] = {}
    given = list(zip(sites, counts or [1] * len(sites), methods or [None] * len(sites), strict=True))
    for order in orders or orders_of(sites, shards.length, shards.ranks):
        held = replace(shards, order=order)
        chosen = [(choose(site, held, device, budget, only), site, number) for site, number, only in given]
        if not any(isinstance(one, str) for one, *_ in chosen):
            totals[order] = sum(number * seconds(one.best, site.train) for one, site, number in chosen if isinstance(one, Chosen))
    if not totals:
        return OrderChoice("contiguous", {}, "no order suits every site")
    best = min(totals, key=lambda order: totals[order] * (1 if order == "contiguous" else _TIE))
    others = [f"{order} {time_text(total)}" for order, total in totals.items() if order != best]
    why = f"{time_text(totals[best])} for all sites" + (f" against {', '.join(others)}" if others else "")
    return OrderChoice(best, totals, why)


def _why(best: Estimate, others: Sequence[Estimate], refused: dict[str, str]) -> str:
    if not best.received:
        text = f"{best.name} over {best.order}: nothing moves"
    else:
        behind = "hidden behind" if best.hidden else "beside"
        text = f"{best.name} over {best.order}: {size_text(best.received)} in {time_text(best.wire)}, {behind} "
        text += f"{time_text(best.compute)} of compute"
    if others:
        most = max(others, key=lambda one: one.received)
        text += f"; {most.name} would move {size_text(most.received)} in {time_text(most.wire)}"
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

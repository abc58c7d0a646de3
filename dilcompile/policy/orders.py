"""Whether another order of the tokens would be faster, where the policy leaves it to the batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from dilcompile.decision import Decision
from dilcompile.placements.choose import Site, choose_order, orders_of, time_text
from dilcompile.placements.device import device_of
from dilcompile.placements.shards import Order, Shards
from dilcompile.policy.place import planned_site, whole_site
from dilcompile.policy.schema import Policy


def faster_orders(policy: Policy, verdicts: Iterable[object]) -> tuple[str, ...]:
    """One line for each mesh axis with ``layout: auto`` whose sites are predicted to be faster, by more than 2 %, over tokens in
    another order than the batch has."""
    sharded = [verdict for verdict in verdicts if isinstance(verdict, Decision) and verdict.placement is not None]
    lines = []
    for axis, of_mesh in policy.mesh.items():
        own = [one for one in sharded if one.placement is not None and one.placement.axis == axis]
        line = _faster(axis, own) if of_mesh.layout == "auto" else None
        lines += [] if line is None else [line]
    return tuple(lines)


def _faster(axis: str, decisions: list[Decision]) -> str | None:
    counts: dict[tuple[Site, str], int] = defaultdict(int)
    held: set[tuple[Order, int, int]] = set()
    for one in decisions:
        placement = one.placement
        assert placement is not None
        whole = whole_site(one.site, placement.ranks * placement.heads_ranks, placement.method)
        site = planned_site(whole, one.form, placement.overlap == "prefetch")
        if site is None:
            return None
        counts[site, "" if placement.why.startswith("auto") else placement.method] += 1
        held.add((placement.order, placement.ranks, placement.heads_ranks))
    lengths = {site.relation.problem.k_len for site, _ in counts}
    if len(held) != 1 or len(lengths) != 1:
        return None
    ((order, ranks, parts),) = held
    sites = [site for site, _ in counts]
    shards = Shards(lengths.pop(), ranks, order, parts)
    orders = dict.fromkeys((order, *orders_of(sites, shards.length, ranks)))
    found = choose_order(
        sites,
        shards,
        device_of(decisions[0].site.device, axis),
        counts=list(counts.values()),
        methods=[(method,) if method else None for _, method in counts],
        orders=tuple(orders),
    )
    better = found.faster_than(order)
    if better is None:
        return None
    now, then = time_text(found.seconds[order]), time_text(found.seconds[better])
    return (
        f"mesh axis {axis!r}: the tokens of the batch are held {order}, for which {now} are predicted for these sites; {better} "
        f"would take {then}: cut it with shard_inputs(order={better!r})"
    )

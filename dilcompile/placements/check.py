"""The invariants of schedules, checked as sets of positions: at any length, for every placement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dilcompile.placements.needs import needed, shares
from dilcompile.placements.rows import Rows
from dilcompile.placements.schedule import Placement, RankSchedule
from dilcompile.placements.shards import Shards
from dilcompile.position_sets import Parts, disjoint
from dilcompile.relation import Relation


def check(placement: Placement, relation: Relation, shards: Shards) -> list[str]:
    """What is wrong with the schedules of a placement; nothing if all holds:

    every rank has equally many steps; what one sends is what the other expects, in the same step and order; nobody receives what it
    holds; each key that the queries of a rank read is attended to exactly once, no key more than once, and under ``ONLY_NEEDED``
    none is received that isn't read.
    """
    return wrong_with(
        [placement.schedule(relation, shards, rank) for rank in range(shards.ranks)], relation, shards, placement.ONLY_NEEDED
    )


def wrong_with(schedules: list[RankSchedule], relation: Relation, shards: Shards, only_needed: bool) -> list[str]:
    """``check`` of schedules that are at hand, one for each rank."""
    steps = [len(one.steps) for one in schedules]
    if len(set(steps)) != 1:
        return [f"the ranks have {steps} steps"]
    found = list(_unmatched(schedules))
    for rank, one in enumerate(schedules):
        attended = [rows for step in one.steps for rows in step.attended]
        received = [rows for step in one.steps for transfer in step.receives for rows in transfer.rows]
        local = [rows for step in one.steps for rows in step.local]
        held, read = shares(relation.problem.kv_heads, shards)[rank], needed(relation, shards)[rank]
        for head in range(relation.problem.kv_heads):
            found += [
                f"rank {rank}, key head {head}: {text}" for text in _wrong_keys(head, attended, received, local, held, read)
            ]
            if only_needed and _outside(_of(head, received), _of(head, read)):
                found.append(f"rank {rank}, key head {head}: receives keys that no query reads")
    return found


def _unmatched(schedules: list[RankSchedule]) -> Iterator[str]:
    for number in range(len(schedules[0].steps)):
        sent = {(rank, to.peer): to.rows for rank, one in enumerate(schedules) for to in one.steps[number].sends}
        expected = {(by.peer, rank): by.rows for rank, one in enumerate(schedules) for by in one.steps[number].receives}
        for pair in sorted({*sent, *expected}):
            if sent.get(pair) != expected.get(pair):
                yield f"step {number}: rank {pair[0]} sends {sent.get(pair)} and rank {pair[1]} expects {expected.get(pair)}"


def _wrong_keys(
    head: int,
    attended: list[Rows],
    received: list[Rows],
    local: list[Rows],
    held: Iterable[Rows],
    read: Iterable[Rows],
) -> Iterator[str]:
    keys, own = _of(head, attended), _of(head, held)
    if _size(keys) < sum(map(len, keys)):
        yield "attends to a key more than once"
    if _outside(_of(head, read), keys):
        yield "reads keys that it does not attend to"
    if _outside(_of(head, local), own):
        yield "attends to keys as its own that it does not hold"
    foreign = _of(head, received)
    if _size((*foreign, *own)) < _size(foreign) + _size(own):
        yield "receives keys that it holds"


def _of(head: int, rows: Iterable[Rows]) -> Parts:
    return tuple(part for each in rows if each.kv_heads[0] <= head < each.kv_heads[1] for part in each.positions)


def _size(parts: Parts) -> int:
    return sum(map(len, disjoint(parts)))


def _outside(parts: Parts, others: Parts) -> bool:
    """Is any position of ``parts`` not one of the others?"""
    return _size((*parts, *others)) > _size(others)

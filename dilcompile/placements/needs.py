"""Which keys the queries of each rank read, and who holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from dilcompile.placements.rows import Rows
from dilcompile.placements.schedule import RankSchedule, Step, Transfer
from dilcompile.placements.shards import Shards
from dilcompile.position_sets import Parts, disjoint, meet
from dilcompile.progression import Progression
from dilcompile.relation import Relation

# By a rank of the other side.
ByPeer = dict[int, tuple[Rows, ...]]


@lru_cache(maxsize=32)
def shares(kv_heads: int, shards: Shards) -> tuple[tuple[Rows, ...], ...]:
    """All that each rank holds, under all key heads; no rows where it holds none."""
    parts = [tuple(run.positions for run in shards.runs(rank)) for rank in range(shards.ranks)]
    return tuple((Rows((0, kv_heads), held),) if held else () for held in parts)


@lru_cache(maxsize=32)
def needed(relation: Relation, shards: Shards) -> tuple[tuple[Rows, ...], ...]:
    """For each rank the keys that its queries read, its own among them, each once. Neighbouring key heads with the same keys are
    together."""
    alike = relation.alike_kv_heads()
    return tuple(_needed(relation, shards, rank, alike) for rank in range(shards.ranks))


def _needed(relation: Relation, shards: Shards, rank: int, alike: Sequence[Sequence[int]]) -> tuple[Rows, ...]:
    keys, first = dict[int, Parts](), [heads[0] for heads in alike]
    by_run = [relation.keys_needed_by_heads(run.positions, first) for run in shards.runs(rank)]
    for heads, *of_runs in zip(alike, *by_run, strict=True):
        keys.update(dict.fromkeys(heads, disjoint(part for parts in of_runs for part in parts)))
    return by_heads((head, keys[head]) for head in range(relation.problem.kv_heads))


def by_heads(keys: Iterable[tuple[int, Parts]]) -> tuple[Rows, ...]:
    """Ascending key heads and their keys as rows: neighbours with the same keys together, those without any left out."""
    found: list[Rows] = []
    for head, parts in keys:
        if not parts:
            continue
        if found and found[-1].kv_heads[1] == head and found[-1].positions == parts:
            found[-1] = Rows((found[-1].kv_heads[0], head + 1), parts)
        else:
            found.append(Rows((head, head + 1), parts))
    return tuple(found)


def split(rows: Sequence[Rows], shards: Shards) -> ByPeer:
    """The rows by the rank that holds them."""
    found: ByPeer = {}
    cut = _by_class(rows, shards) if shards.order == "striped" else _by_piece(rows, shards)
    for rank, held in cut:
        if held:
            found[rank] = found.get(rank, ()) + held
    return found


def _by_class(rows: Sequence[Rows], shards: Shards) -> Iterator[tuple[int, tuple[Rows, ...]]]:
    for rank in range(shards.ranks):
        yield rank, _common(rows, Progression(rank, shards.length, shards.ranks))


def _by_piece(rows: Sequence[Rows], shards: Shards) -> Iterator[tuple[int, tuple[Rows, ...]]]:
    """Pieces in which progressions start or end are cut one by one. The others hold whole classes of positions, of which many
    ranks ask for the same: they are looked up."""
    edges = set[int]()
    for part in {part for each in rows for part in each.positions}:
        first, last = part.start // shards.piece, part.positions()[-1] // shards.piece
        edges.update((first, first + 1, last, last + 1))
    bounds = sorted(edges)
    for first, stop in pairwise(bounds):
        inside = _common(rows, Progression(first * shards.piece, stop * shards.piece))
        if stop - first == 1:
            yield shards.holder(first), inside
        elif inside:
            classes = tuple(Rows(each.kv_heads, tuple(_all_of(part, shards) for part in each.positions)) for each in inside)
            known = _whole_pieces(classes, shards)
            for number in range(first, stop):
                if number not in known:
                    known[number] = _common(classes, Progression(number * shards.piece, (number + 1) * shards.piece))
                yield shards.holder(number), known[number]


def _all_of(part: Progression, shards: Shards) -> Progression:
    """Its class over the whole sequence."""
    return Progression(part.start % part.step, shards.length, part.step)


@lru_cache(maxsize=1024)
def _whole_pieces(classes: tuple[Rows, ...], shards: Shards) -> dict[int, tuple[Rows, ...]]:
    """What is held of these classes by the pieces that were asked for, by their number."""
    return {}


def _common(rows: Sequence[Rows], held: Progression) -> tuple[Rows, ...]:
    """What of the rows is at the positions ``held``."""
    heads = []
    for each in rows:
        parts = tuple(part for part in (meet(part, held) for part in each.positions) if part.start < part.stop)
        heads += [(head, parts) for head in range(*each.kv_heads)]
    return by_heads(heads)


@dataclass(frozen=True, eq=False)
class Exchange:
    """One exchange between all ranks.

    Args:
        incoming, outgoing: for each rank what it gets and what it gives.
    """

    incoming: Sequence[ByPeer]
    outgoing: Sequence[ByPeer]

    @staticmethod
    def of(incoming: Sequence[ByPeer]) -> Exchange:
        """From what each rank wants; what it holds itself does not come."""
        incoming = [{peer: rows for peer, rows in wanted.items() if peer != rank} for rank, wanted in enumerate(incoming)]
        outgoing: list[ByPeer] = [{} for _ in incoming]
        for rank, given in enumerate(incoming):
            for peer, rows in given.items():
                outgoing[peer][rank] = rows
        return Exchange(incoming, outgoing)

    def __bool__(self) -> bool:
        return any(self.incoming)


def local_first(relation: Relation, shards: Shards, rank: int, exchange: Exchange) -> RankSchedule:
    """The rank's own keys, while all others come in one exchange; one step where nothing comes to any rank."""
    steps = [Step(local=local(relation, shards, rank))]
    if exchange:
        steps.append(Step(transfers(exchange.outgoing[rank]), transfers(exchange.incoming[rank])))
    return RankSchedule(rank, tuple(steps))


def local(relation: Relation, shards: Shards, rank: int) -> tuple[Rows, ...]:
    """What a rank attends to of its own: all that it holds, if its queries read any of it."""
    held = shares(relation.problem.kv_heads, shards)[rank]
    return held if any(_common(needed(relation, shards)[rank], part) for each in held for part in each.positions) else ()


def transfers(peers: ByPeer) -> tuple[Transfer, ...]:
    """As transfers, peers ascending."""
    return tuple(Transfer(peer, peers[peer]) for peer in sorted(peers))

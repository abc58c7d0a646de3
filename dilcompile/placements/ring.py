"""Ring: in each step a rank attends to the shard of another one, a place further on the ring each time (ring attention, arXiv
2310.01889).

A shard comes straight from its owner and not from the neighbour that had it last: the bytes are the same, and shards that no
query of a rank sees are left out.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dilcompile.placements.needs import local, needed, shares
from dilcompile.placements.schedule import RankSchedule, Step, Transfer
from dilcompile.placements.shards import Shards
from dilcompile.placements.spread import Spread
from dilcompile.placements.unfit import anywhere, data_chosen
from dilcompile.placements.volume import Volume, held, num_runs
from dilcompile.relation import Relation

RESENDS = True
ONLY_NEEDED = False


def reject(relation: Relation, shards: Shards, documents: bool = False) -> str | None:
    """Blocks that the data chooses."""
    return data_chosen(relation)


def schedule(relation: Relation, shards: Shards, rank: int, documents: bool = False) -> RankSchedule:
    """See ``Placement``: in step s of rank j the shard of rank ``(j - s) mod P``, if any of its keys is read.

    Distances at which no rank reads anything are no steps.
    """
    relation = anywhere(relation) if documents else relation
    seen, shards_of = _seen(relation, shards), shares(relation.problem.kv_heads, shards)
    steps = [Step(local=local(relation, shards, rank))]
    for distance in _distances(relation, shards):
        source, target = (rank - distance) % shards.ranks, (rank + distance) % shards.ranks
        receives = (Transfer(source, shards_of[source]),) if seen[rank, source] else ()
        sends = (Transfer(target, shards_of[rank]),) if seen[target, rank] else ()
        steps.append(Step(sends, receives))
    return RankSchedule(rank, tuple(steps))


def volume(relation: Relation, shards: Shards, documents: bool = False) -> Volume:
    """See ``Placement``."""
    relation = anywhere(relation) if documents else relation
    ranks, sizes, seen = np.arange(shards.ranks), held(relation.problem.kv_heads, shards), _seen(relation, shards)
    apart = np.array((0, *_distances(relation, shards)), dtype=np.int64)[:, None]
    source, target = (ranks - apart) % shards.ranks, (ranks + apart) % shards.ranks
    moved = apart > 0
    calls = num_runs(shards) ** 2 * (~moved | seen[ranks, source])
    return Volume(moved * seen[ranks, source] * sizes[source], moved * seen[target, ranks] * sizes, calls)


@lru_cache(maxsize=16)
def _seen(relation: Relation, shards: Shards) -> npt.NDArray[np.bool_]:
    """Whether a rank (row) reads keys of another (column)."""
    return np.stack(
        [Spread.of(part for each in rows for part in each.positions).holders(shards) for rows in needed(relation, shards)]
    )


@lru_cache(maxsize=16)
def _distances(relation: Relation, shards: Shards) -> tuple[int, ...]:
    seen, ranks = _seen(relation, shards), np.arange(shards.ranks)
    return tuple(distance for distance in range(1, shards.ranks) if seen[ranks, ranks - distance].any())

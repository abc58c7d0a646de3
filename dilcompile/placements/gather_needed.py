"""Gather needed: a rank receives exactly the rows that its queries read, and no row twice.

The keys of nested branches are united before they are sent, so that with contiguous shards a remote branch of LongNet costs less
than its shortest segment, however long the sequence.
"""

from __future__ import annotations

from functools import lru_cache

from dilcompile.placements.needs import Exchange, local_first, needed, split
from dilcompile.placements.schedule import RankSchedule
from dilcompile.placements.shards import Shards
from dilcompile.placements.unfit import data_chosen, restarting
from dilcompile.placements.volume import Volume, of_one_exchange
from dilcompile.relation import Relation

RESENDS = False
ONLY_NEEDED = True


def reject(relation: Relation, shards: Shards, documents: bool = False) -> str | None:
    """Blocks that the data chooses; segments, blocks and sinks that start anew in each document."""
    return data_chosen(relation) or (restarting(relation, "gather_needed") if documents else None)


def schedule(relation: Relation, shards: Shards, rank: int, documents: bool = False) -> RankSchedule:
    """See ``Placement``: all own keys, then the others that are needed."""
    return local_first(relation, shards, rank, _exchange(relation, shards))


@lru_cache(maxsize=32)
def volume(relation: Relation, shards: Shards, documents: bool = False) -> Volume:
    """See ``Placement``."""
    return of_one_exchange(needed(relation, shards), shards)


@lru_cache(maxsize=16)
def _exchange(relation: Relation, shards: Shards) -> Exchange:
    return Exchange.of([split(rows, shards) for rows in needed(relation, shards)])

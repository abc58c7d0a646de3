"""All-gather: every rank receives the whole sequence in one exchange."""

from __future__ import annotations

import numpy as np

from dilcompile.placements.needs import local, shares
from dilcompile.placements.schedule import RankSchedule, Step, Transfer
from dilcompile.placements.shards import Shards
from dilcompile.placements.unfit import anywhere, data_chosen
from dilcompile.placements.volume import Volume, held, num_runs
from dilcompile.relation import Relation

RESENDS = True
ONLY_NEEDED = False


def reject(relation: Relation, shards: Shards, documents: bool = False) -> str | None:
    """Blocks that the data chooses."""
    return data_chosen(relation)


def schedule(relation: Relation, shards: Shards, rank: int, documents: bool = False) -> RankSchedule:
    """See ``Placement``: all own keys, then those of all other ranks."""
    relation = anywhere(relation) if documents else relation
    first = Step(local=local(relation, shards, rank))
    if shards.ranks == 1:
        return RankSchedule(rank, (first,))
    rows_of = shares(relation.problem.kv_heads, shards)
    receives = tuple(Transfer(peer, rows) for peer, rows in enumerate(rows_of) if rows and peer != rank)
    sends = tuple(Transfer(peer, rows_of[rank]) for peer in range(shards.ranks) if rows_of[rank] and peer != rank)
    return RankSchedule(rank, (first, Step(sends, receives)))


def volume(relation: Relation, shards: Shards, documents: bool = False) -> Volume:
    """See ``Placement``."""
    sizes = held(relation.problem.kv_heads, shards)
    steps = [np.zeros_like(sizes)] if shards.ranks == 1 else [np.zeros_like(sizes), sizes.sum() - sizes]
    sent = np.stack([steps[0], *([sizes * (shards.ranks - 1)] if shards.ranks > 1 else [])])
    # Each shard is met by itself.
    calls = np.full_like(sent, num_runs(shards) ** 2)
    calls[1:] *= shards.ranks - 1
    return Volume(np.stack(steps), sent, calls)

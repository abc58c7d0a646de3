"""What a placement costs at given sizes: bytes on the wire, rows held besides, and how even the work is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dilcompile.placements.schedule import Placement
from dilcompile.placements.shards import Shards
from dilcompile.progression import Positions
from dilcompile.relation import Problem, Relation


@dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes of each rank, int64 [ranks], of one site; ``steps`` as in the schedules.

    Args:
        received, sent: in the forward.
        received_backward, sent_backward: in the backward: gradients of the rows that came, in float32 or wider, go back to their
            holders; where keys are not held meanwhile they come again.
        rows_received, rows_sent: in the forward, rows of one key head.
        extra: bytes of others' keys and values that are there at once, at most: those of all steps, or of two where no step's are
            held (the next ones travel meanwhile).
    """

    steps: int
    rows_received: Positions
    rows_sent: Positions
    received: Positions
    sent: Positions
    received_backward: Positions
    sent_backward: Positions
    extra: Positions


def row_bytes(size: Problem, itemsize: int) -> int:
    """Bytes of the key and value of one key head at one position, in all batch rows."""
    return size.batch * (size.head_dim + size.v_dim) * itemsize


@lru_cache(maxsize=256)
def traffic(placement: Placement, relation: Relation, shards: Shards, itemsize: int, documents: bool = False) -> Traffic:
    """What moves; ``itemsize``: bytes of a number of k and v."""
    volume = placement.volume(relation, shards, documents)
    row, gradient = row_bytes(relation.problem, itemsize), row_bytes(relation.problem, max(4, itemsize))
    received, sent = volume.received.sum(0), volume.sent.sum(0)
    again = row if placement.RESENDS else 0
    pairs = volume.received[:-1] + volume.received[1:] if len(volume.received) > 1 else volume.received
    return Traffic(
        steps=len(volume.received),
        rows_received=received,
        rows_sent=sent,
        received=received * row,
        sent=sent * row,
        received_backward=sent * gradient + received * again,
        sent_backward=received * gradient + sent * again,
        extra=row * (pairs.max(0) if placement.RESENDS else received),
    )


@lru_cache(maxsize=256)
def pairs_by_rank(relation: Relation, shards: Shards) -> Positions:
    """The pairs of the queries that each rank holds, int64 [ranks]; they add up to ``relation.pairs()``.

    Not where blocks depend on the data.
    """
    found = np.zeros(shards.ranks, dtype=np.int64)
    for t, counts in relation.pairs_of_rows():
        # Exact: far below 2**53.
        found += np.bincount(shards.holders(t), weights=counts, minlength=shards.ranks).astype(np.int64)
    return found


def imbalance(work: Positions) -> float:
    """The most work of a rank over the mean: how much longer all wait for the last one; 1 where there is none."""
    return float(work.max() / work.mean()) if work.any() else 1.0

"""What a placement costs at given sizes: bytes on the wire, rows held besides, and how even the work is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dilcompile.placements.parts import share_of
from dilcompile.placements.schedule import Placement
from dilcompile.placements.shards import ORDERS, Order, Shards
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


@dataclass(frozen=True)
class HeadsTraffic:
    """Bytes that a rank sends and receives where heads are exchanged for positions, the same for all ranks.

    Args:
        forward: q, k and v before, the output behind; backward: its gradient before, those of q, k and v, in float32 or wider,
            behind.
        packed, packed_backward: bytes that are copied into messages and out of them.
        rows: of one key head, in the forward.
    """

    forward: int = 0
    backward: int = 0
    packed: int = 0
    packed_backward: int = 0
    rows: int = 0


def heads_traffic(size: Problem, rows: int, parts: int, itemsize: int, lse: bool = False) -> HeadsTraffic:
    """What an exchange of heads moves, without masks.

    Args:
        rows: places of a rank.
        parts: ranks that heads are dealt to.
        lse: the LSE is asked for, and has a gradient.
    """
    if parts == 1:
        return HeadsTraffic()
    kv_heads, wide = size.kv_heads * share_of(size.heads, size.kv_heads, parts), max(4, itemsize)
    inputs = size.batch * rows * (size.heads * size.head_dim + kv_heads * (size.head_dim + size.v_dim))
    outputs, of_lse = size.batch * rows * size.heads * size.v_dim, size.batch * rows * size.heads * wide if lse else 0
    forward, backward = (inputs + outputs) * itemsize + of_lse, outputs * itemsize + inputs * wide + of_lse
    # A rank keeps what is its own.
    moved, moved_back = (total * (parts - 1) // parts for total in (forward, backward))
    return HeadsTraffic(moved, moved_back, 2 * forward, 2 * backward, rows * kv_heads * (parts - 1) // parts)


def tree_traffic(size: Problem, ranks: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a rank sends and receives in the forward and in the backward of queries that all ranks have: partial outputs and
    LSE, and gradients of the queries, in float32 or wider."""
    results = size.batch * size.heads * size.q_len * max(4, itemsize)
    return (ranks - 1) * results * (size.v_dim + 1), (ranks - 1) * results * size.head_dim


def pairs_by_rank(relation: Relation, shards: Shards) -> Positions:
    """The pairs of the queries that each rank holds, int64 [ranks]; they add up to ``relation.pairs()``.

    Not where blocks depend on the data.
    """
    return _pairs_by_order(relation, replace(shards, order="contiguous"))[shards.order]


@lru_cache(maxsize=256)
def _pairs_by_order(relation: Relation, shards: Shards) -> dict[Order, Positions]:
    """``pairs_by_rank`` by order: what is counted are rows, whoever holds them."""
    of_rows = np.zeros(shards.length, dtype=np.int64)
    for t, counts in relation.pairs_of_rows():
        low = int(t.min(initial=shards.length))
        # Exact: far below 2**53.
        summed = np.bincount(t - low, weights=counts).astype(np.int64)
        of_rows[low : low + len(summed)] += summed
    rows = np.arange(shards.length, dtype=np.int64)
    by_rank = ((order, replace(shards, order=order).holders(rows)) for order in ORDERS)
    return {order: np.bincount(held, of_rows, shards.ranks).astype(np.int64) for order, held in by_rank}


def imbalance(work: Positions) -> float:
    """The most work of a rank over the mean: how much longer all wait for the last one; 1 where there is none."""
    return float(work.max() / work.mean()) if work.any() else 1.0

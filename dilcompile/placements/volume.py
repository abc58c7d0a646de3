"""How many rows each rank sends and receives, counted without listing what goes to whom: for a thousand ranks and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from dilcompile.placements.rows import Rows
from dilcompile.placements.shards import Shards
from dilcompile.progression import Positions, Progression


@dataclass(frozen=True, eq=False)
class Volume:
    """Rows of one key head each.

    Args:
        received, sent: int64 [steps, ranks]; as many steps as the schedules have.
    """

    received: Positions
    sent: Positions


def of_one_exchange(wanted: Sequence[Sequence[Rows]], shards: Shards) -> Volume:
    """Where each rank receives in step 1 what it wants, but for what it holds itself; step 0 moves nothing."""
    received, sent = np.zeros((2, 2, shards.ranks), dtype=np.int64)
    for rank, rows in enumerate(wanted):
        for each in rows:
            heads = each.kv_heads[1] - each.kv_heads[0]
            for part in each.positions:
                holders, counts = _by_holder(part, shards)
                there = holders != rank
                received[1, rank] += heads * counts[there].sum()
                np.add.at(sent[1], holders[there], heads * counts[there])
    steps = 2 if received.any() else 1
    return Volume(received[:steps], sent[:steps])


def _by_holder(part: Progression, shards: Shards) -> tuple[Positions, Positions]:
    """Ranks, and how many of the positions they hold; a rank may come twice."""
    size = len(part)
    if shards.order == "striped":
        cycle = shards.ranks // gcd(part.step, shards.ranks)
        first = np.arange(min(cycle, size), dtype=np.int64)
        return (part.start + first * part.step) % shards.ranks, (size - first + cycle - 1) // cycle
    numbers = np.arange(part.start // shards.piece, part.positions()[-1] // shards.piece + 1, dtype=np.int64)
    ends = np.append(numbers, numbers[-1] + 1) * shards.piece
    before = np.clip(-((part.start - ends) // part.step), 0, size)
    return shards.holders(numbers * shards.piece), np.diff(before)


def held(kv_heads: int, shards: Shards) -> Positions:
    """The rows of each rank, int64 [ranks]."""
    sizes = [sum(len(run.positions) for run in shards.runs(rank)) for rank in range(shards.ranks)]
    return kv_heads * np.array(sizes, dtype=np.int64)

"""How many rows each rank sends and receives, counted without listing what goes to whom: for a thousand ranks and more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dilcompile.placements.rows import Rows
from dilcompile.placements.shards import Shards
from dilcompile.placements.spread import Spread
from dilcompile.progression import Positions, Progression


@dataclass(frozen=True, eq=False)
class Volume:
    """Rows of one key head each.

    Args:
        received, sent: int64 [steps, ranks]; as many steps as the schedules have.
        calls: int64 [steps, ranks]: about how often a step calls the kernel. That a mask leaves some out is not looked at.
    """

    received: Positions
    sent: Positions
    calls: Positions


def of_one_exchange(wanted: Sequence[Sequence[Rows]], shards: Shards) -> Volume:
    """Where each rank receives in step 1 what it wants, but for what it holds itself; step 0 moves nothing."""
    received, sent, calls = np.zeros((3, 2, shards.ranks), dtype=np.int64)
    runs = num_runs(shards)
    calls[0] = runs * runs
    # Many ranks ask for the same.
    asked = dict[Progression, int]()
    for rank, rows in enumerate(wanted):
        parts, heads = [], []
        for each in rows:
            number = each.kv_heads[1] - each.kv_heads[0]
            for part in each.positions:
                asked[part] = asked.get(part, 0) + number
                parts.append(part)
                heads.append(number)
        spread, weights = Spread.of(parts), np.array(heads, dtype=np.int64)
        own = weights @ spread.held_by(rank, shards)
        received[1, rank] = weights @ spread.size - own
        sent[1, rank] = -own
        calls[1, rank] = runs * spread.stretches(rank, shards)
    sent[1] += Spread.of(asked).by_rank(np.fromiter(asked.values(), np.int64, len(asked)), shards)
    steps = 2 if received.any() else 1
    return Volume(received[:steps], sent[:steps], calls[:steps])


def num_runs(shards: Shards) -> int:
    """Runs of positions that a rank holds: each meets each stretch of keys in a call of its own."""
    return 2 if shards.order == "zigzag" else 1


def held(kv_heads: int, shards: Shards) -> Positions:
    """The rows of each rank, int64 [ranks]."""
    sizes = [sum(len(run.positions) for run in shards.runs(rank)) for rank in range(shards.ranks)]
    return kv_heads * np.array(sizes, dtype=np.int64)

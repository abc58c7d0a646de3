"""Placements: how keys come to queries where a sequence is held by several ranks. Never a change of the numbers."""

from __future__ import annotations

from dilcompile.placements import all_gather, gather_needed, halo, ring
from dilcompile.placements.rows import Rows
from dilcompile.placements.schedule import Placement, RankSchedule, Step, Transfer
from dilcompile.placements.shards import ORDERS, Order, Run, Shards

# Those that move keys to queries, by schedules.
PLACEMENTS: dict[str, Placement] = {
    "gather_needed": gather_needed,
    "halo": halo,
    "ring": ring,
    "all_gather": all_gather,
}

__all__ = ["ORDERS", "PLACEMENTS", "Order", "Placement", "RankSchedule", "Rows", "Run", "Shards", "Step", "Transfer"]

"""Schedules as text: who attends to whose keys in which step, and what moves."""

from __future__ import annotations

import torch

from dilcompile.placements.rows import Rows
from dilcompile.placements.schedule import Placement, RankSchedule, Step
from dilcompile.placements.shards import Shards
from dilcompile.relation import Relation


def describe(placement: Placement, relation: Relation, shards: Shards) -> str:
    """The schedules of all ranks as two tables: the ranks whose keys each rank attends to, step by step; and each step's rows.

    For small sequences: ``mask`` says how many of the pairs of own queries with those keys count, asked pair by pair.
    """
    schedules = [placement.schedule(relation, shards, rank) for rank in range(shards.ranks)]
    name = placement.__name__.rpartition(".")[2]
    lines = [f"{name}, {shards.ranks} ranks, {shards.order}, {shards.length} positions: {relation}", ""]
    steps = range(len(schedules[0].steps))
    whose = [[f"rank {one.rank}", *(_peers(step, one.rank) for step in one.steps)] for one in schedules]
    lines += _table([["", *(f"step {number}" for number in steps)], *whose])
    rows = [["step", "rank", "from", "to", "rows in", "rows out", "attends to", "mask"]]
    for number in steps:
        rows += [_row(number, one, relation, shards) for one in schedules]
    return "\n".join([*lines, "", *_table(rows)])


def _peers(step: Step, rank: int) -> str:
    ranks = ([rank] if step.local else []) + [transfer.peer for transfer in step.receives]
    return " ".join(map(str, ranks)) or "."


def _row(number: int, one: RankSchedule, relation: Relation, shards: Shards) -> list[str]:
    step = one.steps[number]
    return [
        str(number),
        str(one.rank),
        " ".join(str(transfer.peer) for transfer in step.receives) or ".",
        " ".join(str(transfer.peer) for transfer in step.sends) or ".",
        str(step.rows_received),
        str(step.rows_sent),
        _keys(step.attended, relation.problem.kv_heads),
        _mask(step.attended, one.rank, relation, shards),
    ]


def _keys(attended: tuple[Rows, ...], kv_heads: int) -> str:
    found = []
    for rows in attended:
        first, stop = rows.kv_heads
        heads = "" if (first, stop) == (0, kv_heads) else f"h{first}: " if stop == first + 1 else f"h{first}-{stop - 1}: "
        found.append(heads + " ".join(str(part).removesuffix(":1") for part in rows.positions))
    return ", ".join(found) or "."


def _mask(attended: tuple[Rows, ...], rank: int, relation: Relation, shards: Shards) -> str:
    """How many pairs count, over all query heads."""
    t = torch.tensor([position for run in shards.runs(rank) for position in run.positions.positions()], dtype=torch.int64)
    group, some, every = relation.problem.group, 0, 0
    for rows in attended:
        k = torch.tensor([position for part in rows.positions for position in part.positions()], dtype=torch.int64)
        h = torch.arange(rows.kv_heads[0] * group, rows.kv_heads[1] * group)
        counted = relation.multiplicity(h[:, None, None], t[:, None], k)
        some, every = some + int((counted > 0).sum()), every + counted.numel()
    return "." if not every else "all pairs" if some == every else f"{some} of {every} pairs"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

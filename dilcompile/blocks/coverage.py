"""Queries that the blocks leave without any key."""

from __future__ import annotations

import numpy as np

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists
from dilcompile.progression import Positions


def first_without_keys(lists: BlockLists, grid: Grid) -> int | None:
    """The first query position that sees keys within the limits of the grid, but none in the blocks; None: there is none."""
    found, _ = gaps(lists, grid)
    return int(found.min()) if len(found) else None


def gaps(lists: BlockLists, grid: Grid) -> tuple[Positions, Positions]:
    """The runs of query positions, first and stop of each, that see keys within the limits of the grid, but none in the blocks.

    In time and memory of the listed blocks: each shows keys to one run of its row's queries, and these runs begin and end later
    for blocks further right, so that a row has a gap only between neighbours or at its ends.
    """
    left, right = (grid.k_len + grid.q_stop if limit is None else limit for limit in (grid.left, grid.right))
    rows = lists.lines
    begin = np.maximum(np.maximum(rows * grid.q_block, grid.q_start), -right)
    end = np.minimum(np.minimum((rows + 1) * grid.q_block, grid.q_stop), grid.k_len + left)
    if grid.k_len == 0 or left + right < 0:
        return (none := np.arange(0, dtype=np.int64)), none
    number = np.repeat(np.arange(len(rows)), np.diff(lists.starts))
    first = lists.blocks * grid.k_block
    last = np.minimum(first + grid.k_block, grid.k_len) - 1
    shown, until = np.maximum(begin[number], first - right), np.minimum(end[number], last + left + 1)
    some = shown < until
    number, shown, until = number[some], shown[some], until[some]
    # What is shown up to each block, and after the last one of a row.
    before = np.append(0, until[:-1])
    opens = np.append(True, number[1:] != number[:-1])[: len(number)]
    before = np.where(opens, begin[number], before[: len(number)])
    covered = begin.copy()
    covered[number] = until
    between, behind = shown > before, covered < end
    return np.concatenate([before[between], covered[behind]]), np.concatenate([shown[between], end[behind]])

"""Listed blocks of one size as blocks of another: what a kernel walks whose tiles are not those of the pattern."""

from __future__ import annotations

import numpy as np

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.patterns import spread
from dilcompile.progression import Positions


def counted_from_first_query(grid: Grid, q_block: int, k_block: int) -> Grid:
    """The same queries and keys in blocks of other sizes, query 0 being the first.

    Queries 5 to 9 by 4: row 1 holds 5 to 7, row 2 holds 8 and 9. Counted from the first: row 0 holds 5 to 8, row 1 holds 9.
    """
    left = None if grid.left is None else grid.left - grid.q_start
    right = None if grid.right is None else grid.right + grid.q_start
    return Grid(q_block, k_block, 0, grid.q_stop - grid.q_start, grid.k_len, left, right)


def within_reach(grid: Grid) -> BlockLists:
    """All blocks in which the limits let a pair through."""
    rows = grid.rows
    return lists_of(spread(rows, *grid.reach(rows), 1, grid), grid)


def recut(lists: BlockLists, grid: Grid, into: Grid) -> BlockLists:
    """The blocks of another grid that meet listed ones; full where listed blocks fill them and the limits hide nothing.

    In time and memory of the blocks on both sides.

    Args:
        lists: of ``grid``.
        into: the same queries and keys, counted from the first query (``counted_from_first_query``).
    """
    rows, columns = lists.owners(), lists.blocks
    queries = np.maximum(rows * grid.q_block, grid.q_start), np.minimum((rows + 1) * grid.q_block, grid.q_stop)
    q_first, q_stop = (at - grid.q_start for at in queries)
    k_first, k_stop = columns * grid.k_block, np.minimum((columns + 1) * grid.k_block, grid.k_len)
    row, column = q_first // into.q_block, k_first // into.k_block
    high, wide = (q_stop - 1) // into.q_block - row + 1, (k_stop - 1) // into.k_block - column + 1
    # Each listed block in each of those that it meets.
    owner = np.repeat(np.arange(len(rows)), high * wide)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(high * wide) - high * wide, high * wide)
    row, column = row[owner] + number // wide[owner], column[owner] + number % wide[owner]
    shared = _overlap(q_first[owner], q_stop[owner], row, into.q_block)
    shared = shared * _overlap(k_first[owner], k_stop[owner], column, into.k_block)
    codes, place = np.unique(row * into.columns + column, return_inverse=True)
    filled = np.zeros(len(codes), dtype=np.int64)
    np.add.at(filled, place, shared)
    found = lists_of(codes, into)
    kept = np.isin(codes, found.owners() * into.columns + found.blocks)
    return BlockLists(found.lines, found.starts, found.blocks, found.full & (filled[kept] == _size(found, into)))


def _overlap(first: Positions, stop: Positions, number: Positions, block: int) -> Positions:
    found: Positions = np.minimum(stop, (number + 1) * block) - np.maximum(first, number * block)
    return found


def _size(lists: BlockLists, grid: Grid) -> Positions:
    """How many pairs each listed block has, hidden ones among them; the grid counts from query 0."""
    rows, columns = lists.owners(), lists.blocks
    high: Positions = np.minimum((rows + 1) * grid.q_block, grid.q_stop) - rows * grid.q_block
    wide: Positions = np.minimum((columns + 1) * grid.k_block, grid.k_len) - columns * grid.k_block
    return high * wide

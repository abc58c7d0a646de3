"""The pairs of blocks that stand beside other terms, gathered into the cells of a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dilcompile.generators import Blocks, ByRow
from dilcompile.progression import Positions, RowKeys, union_count
from dilcompile.relation import Relation, grid_of

_PIECES_AT_ONCE = 1 << 20


def pairs_in_blocks(
    relation: Relation,
    head: int,
    blocks: Blocks,
    beside: Sequence[Blocks],
    before: Sequence[ByRow],
    q_edges: Positions,
    k_edges: Positions,
    within: ByRow | None = None,
) -> Positions:
    """How many pairs of the listed blocks each cell has within the problem's limits, int64 [rows of cells, columns of cells].

    In time of the listed blocks times their queries.

    Args:
        beside, before: pairs of these are left out.
        within: only pairs of this one.
    """
    size, shape = relation.problem, (len(q_edges) - 1, len(k_edges) - 1)
    found = np.zeros(shape, dtype=np.int64)
    for t, first, stop in _pieces(relation, head, blocks, beside, k_edges):
        low = first if size.left is None else np.maximum(first, t - size.left)
        high = stop if size.right is None else np.minimum(stop, t + size.right + 1)
        keys = RowKeys(low, high, 1)
        if within is not None:
            keys = within.rows(head, t, size.k_len).meet(keys)
        count = keys.count
        if before:
            count = count - union_count([each.rows(head, t, size.k_len).meet(keys) for each in before])
        row, column = (np.searchsorted(edges, at, side="right") - 1 for edges, at in ((q_edges, t), (k_edges, first)))
        cell = row * shape[1] + column
        found += np.bincount(cell, weights=count, minlength=found.size).astype(np.int64).reshape(shape)
    return found


def _pieces(
    relation: Relation, head: int, blocks: Blocks, beside: Sequence[Blocks], k_edges: Positions
) -> Iterator[tuple[Positions, ...]]:
    """For each query of each listed block its keys, cut where cells and blocks end: (query, first key, the one behind).

    So a piece lies in one cell, and in one block of each of those beside; pieces that are in a listed one of these are left out.
    """
    size = relation.problem
    grid = grid_of(size, blocks.grid.q_block, blocks.grid.k_block)
    lists = blocks.lists(head, grid)
    of_blocks = [np.arange(0, size.k_len, each.grid.k_block) for each in (blocks, *beside)]
    cuts = np.unique(np.concatenate([k_edges, *of_blocks]))
    # Which pieces each column of blocks has.
    begin = np.searchsorted(cuts, np.minimum(np.arange(grid.columns + 1) * grid.k_block, size.k_len))
    of_row = grid.q_block * max(1, int(np.diff(begin).max(initial=1)))
    step = max(1, _PIECES_AT_ONCE // of_row)
    rows, columns = lists.owners(), lists.blocks
    for start in range(0, len(rows), step):
        row, column = rows[start : start + step], columns[start : start + step]
        number = begin[column + 1] - begin[column]
        piece = np.repeat(begin[column] - np.cumsum(number) + number, number) + np.arange(number.sum())
        t = (np.repeat(row, number)[:, None] * grid.q_block + np.arange(grid.q_block)).ravel()
        first, stop = np.repeat(cuts[piece], grid.q_block), np.repeat(cuts[piece + 1], grid.q_block)
        kept = (t >= grid.q_start) & (t < grid.q_stop)
        for other in beside:
            kept &= ~other.contains(torch.tensor(head), torch.from_numpy(t), torch.from_numpy(first)).numpy()
        yield t[kept], first[kept], stop[kept]

"""A relation of several terms, or of rows that are progressions of keys, gathered into the cells of a picture."""

from __future__ import annotations

import numpy as np

from dilcompile.blocks.cells import Cells
from dilcompile.generators import Blocks, ByRow
from dilcompile.progression import Positions, RowKeys, union_count
from dilcompile.relation import Relation
from dilcompile.report.block_cells import pairs_in_blocks

MOST_CELLS = 64
_ROWS_AT_ONCE = 1 << 14


def pair_cells(relation: Relation, head: int, most: int = MOST_CELLS) -> Cells | None:
    """Which share of the pairs counts under one head, in at most ``most`` x ``most`` cells; None where the data chooses blocks.

    A pair that several branches count is there once for each; no cell is more than all there.
    """
    size = relation.problem
    if relation.is_bound or not size.q_len or not size.k_len:
        return None
    # A power of two: segments, which mostly are powers of two, end where cells do.
    side = 1 << max(0, (-(-max(size.q_len, size.k_len) // most) - 1).bit_length())
    q_edges, k_edges = _edges(size.q_offset, size.q_offset + size.q_len, side), _edges(0, size.k_len, side)
    found = np.zeros((len(q_edges) - 1, len(k_edges) - 1), dtype=np.int64)
    for index, term in enumerate(relation.terms):
        earlier = [each.generator for each in relation.terms[:index]] if term.dedupe else []
        blocks = [each for each in earlier if isinstance(each, Blocks)]
        before = [each for each in earlier if not isinstance(each, Blocks)]
        if isinstance(term.generator, Blocks):
            found += pairs_in_blocks(relation, head, term.generator, blocks, before, q_edges, k_edges)
            continue
        found += _counted(relation, term.generator, before, head, q_edges, k_edges)
        for number, each in enumerate(blocks):
            beside = blocks[:number]
            found -= pairs_in_blocks(relation, head, each, beside, before, q_edges, k_edges, within=term.generator)
    share = np.minimum(1.0, found / np.multiply.outer(np.diff(q_edges), np.diff(k_edges)))
    full = np.where(share == 1, share, 0.0)
    return Cells(q_edges, k_edges, full, share - full, "pair", (side, side))


def _edges(start: int, stop: int, side: int) -> Positions:
    return np.append(np.arange(start, stop, side, dtype=np.int64), stop)


def _counted(
    relation: Relation, generator: ByRow, before: list[ByRow], head: int, q_edges: Positions, k_edges: Positions
) -> Positions:
    """How many pairs a term adds to each cell, int64 [rows of cells, columns of cells]; some rows at a time."""
    at_once = max(1, _ROWS_AT_ONCE // int(np.diff(q_edges).max()))
    starts = range(0, len(q_edges) - 1, at_once)
    parts = [_of_rows(relation, generator, before, head, q_edges[start : start + at_once + 1], k_edges) for start in starts]
    found: Positions = np.concatenate(parts)
    return found


def _of_rows(
    relation: Relation, generator: ByRow, before: list[ByRow], head: int, q_edges: Positions, k_edges: Positions
) -> Positions:
    """``_counted`` for these rows."""
    size, shape = relation.problem, (len(q_edges) - 1, len(k_edges) - 1)
    t = generator.active(head, int(q_edges[0]), int(q_edges[-1]))
    if not len(t):
        return np.zeros(shape, dtype=np.int64)
    low = np.zeros_like(t) if size.left is None else t - size.left
    high = np.full_like(t, size.k_len) if size.right is None else t + size.right + 1
    keys = generator.rows(head, t, size.k_len).limited(low, high)
    earlier = [each.rows(head, t, size.k_len) for each in before]
    of_cell = np.searchsorted(q_edges, t, side="right") - 1
    # What lies before each edge: nothing before the first that a row reaches, all from the last on.
    below = np.zeros((shape[0], shape[1] + 1), dtype=np.int64)
    reached = np.searchsorted(k_edges, (keys.first.min(), keys.stop.max()))
    for edge in range(int(reached[0]), len(k_edges)):
        if edge > reached[1]:
            below[:, edge] = below[:, edge - 1]
            continue
        count = _added(RowKeys(keys.first, np.minimum(keys.stop, k_edges[edge]), keys.step), earlier)
        below[:, edge] = np.bincount(of_cell, weights=count, minlength=shape[0]).astype(np.int64)
    found: Positions = np.diff(below, axis=1)
    return found


def _added(keys: RowKeys, earlier: list[RowKeys]) -> Positions:
    """Of each row the keys that no earlier term holds."""
    shared = [each.meet(keys) for each in earlier]
    return keys.count - union_count(shared) if shared else keys.count

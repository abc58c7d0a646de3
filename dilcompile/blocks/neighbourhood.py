"""Which blocks of tokens along a curve lie near one another in the grid, without a look at each pair of tokens or of blocks.

Note [sampled windows]: the tokens near a block lie in its extents, made larger by the radius. Where all blocks are boxes of
the grid, as Hilbert's and Morton's are on powers of two, all tokens there are near. Which blocks these are of is asked at some
cells of that window only: no further apart along an axis than the shortest box is long, and at both ends, so that no block is
missed. These are about as many cells as there are blocks to be found. Blocks of tokens in row order: Note [runs of near tokens].
Other blocks: Note [sets of blocks in bits].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from dilcompile.blocks.block_sets import near_by_sets
from dilcompile.blocks.curve import Curve
from dilcompile.blocks.row_order import near_in_rows
from dilcompile.progression import Positions, distinct

_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Boxes:
    """The smallest boxes of the grid around blocks.

    Args:
        low, high: int64 [boxes, axes], the first and the last cell along each axis.
        block: int64 [boxes], the block that the box is of, ascending.
        filled: whether each block fills its box.
    """

    low: Positions
    high: Positions
    block: Positions
    filled: bool


def extents(curve: Curve, size: int) -> Boxes:
    """The smallest box around each block of ``size`` positions that holds tokens of the grid."""
    stop = curve.first + prod(curve.grid)
    blocks = np.arange(curve.first // size, -(-stop // size), dtype=np.int64)
    starts = np.maximum(blocks * size - curve.first, 0)
    low, high = np.minimum.reduceat(curve.places, starts, axis=0), np.maximum.reduceat(curve.places, starts, axis=0)
    tokens = np.diff(np.append(starts, len(curve.places)))
    return Boxes(low, high, blocks, bool(((high - low + 1).prod(1) == tokens).all()))


@lru_cache(maxsize=16)
def near(curve: Curve, radius: tuple[int, ...], q_block: int, k_block: int) -> Positions:
    """The blocks in which some query and some key are at most ``radius`` apart along every axis, tokens in front near to all.

    Returns:
        int64, ``row * columns + column``, ascending; not to be written.
    """
    columns = -(-len(curve) // k_block)
    around, others = extents(curve, q_block), extents(curve, k_block)
    owner = curve.positions[curve.lead :] // k_block
    if curve.order in ("none", "row"):
        parts = _by_rows(curve, around, q_block, radius, k_block, columns)
    elif around.filled and others.filled:
        parts = _by_windows(curve, around, radius, others, owner, columns)
    else:
        parts = _by_sets(curve, around, q_block, radius, owner, columns)
    # Each part ascends, and its blocks are behind those of the part before.
    codes = np.concatenate([*parts])
    if curve.lead:
        codes = distinct(np.append(codes, _with_lead(curve, q_block, k_block, columns)))
    codes.flags.writeable = False
    return codes


def _by_windows(
    curve: Curve, around: Boxes, radius: tuple[int, ...], others: Boxes, owner: Positions, columns: int
) -> Iterator[Positions]:
    """See Note [sampled windows]."""
    return (distinct(around.block[n] * columns + owner[cells]) for n, cells in _windows(curve, around, radius, others))


def _windows(curve: Curve, around: Boxes, radius: tuple[int, ...], others: Boxes) -> Iterator[tuple[Positions, Positions]]:
    """Cells of the window of each block, part by part: (number of the block, cell in row order)."""
    apart = (others.high - others.low + 1).min(0)
    low = np.maximum(around.low - np.array(radius), 0)
    high = np.minimum(around.high + np.array(radius), np.array(curve.grid) - 1)
    counts = -(-(high - low) // apart) + 1
    ends = np.cumsum(counts.prod(1))
    start = 0
    while start < len(low):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] + _AT_ONCE)))
        sizes = counts[start:stop].prod(1)
        block = np.repeat(np.arange(start, start + len(sizes)), sizes)
        number, cells = _runs(np.zeros_like(sizes), sizes), np.zeros_like(block)
        for axis in reversed(range(len(radius))):
            number, place = np.divmod(number, counts[block, axis])
            place = np.minimum(low[block, axis] + place * apart[axis], high[block, axis])
            cells += place * prod(curve.grid[axis + 1 :])
        yield block, cells
        start = stop


def _by_rows(curve: Curve, around: Boxes, size: int, radius: tuple[int, ...], k_block: int, columns: int) -> Iterator[Positions]:
    """See Note [runs of near tokens]."""
    found = near_in_rows(curve.grid, _starts(curve, around, size), np.array(radius), curve.first, k_block)
    return (around.block[row] * columns + column for row, column in found)


def _by_sets(
    curve: Curve, around: Boxes, size: int, radius: tuple[int, ...], owner: Positions, columns: int
) -> Iterator[Positions]:
    """See Note [sets of blocks in bits]."""
    reach = np.minimum(np.array(radius), np.array(curve.grid) - 1)
    starts = _starts(curve, around, size)
    found = near_by_sets(owner.reshape(curve.grid), curve.places, starts, around.low, around.high, reach)
    return (around.block[row] * columns + column for row, column in found)


def _starts(curve: Curve, around: Boxes, size: int) -> Positions:
    """The first token of the grid in each block, counted from the grid's first one, and the end."""
    return np.append(np.maximum(around.block * size - curve.first, 0), len(curve.places))


def _with_lead(curve: Curve, q_block: int, k_block: int, columns: int) -> Positions:
    """The blocks of the rows and of the columns that hold a token in front of the grid."""
    at = curve.positions[: curve.lead]
    rows, lines = np.unique(at // q_block), np.arange(-(-len(curve) // q_block), dtype=np.int64)
    across = rows[:, None] * columns + np.arange(columns)
    return np.append(across, lines[:, None] * columns + np.unique(at // k_block))


def _runs(begin: Positions, lengths: Positions) -> Positions:
    """``begin, begin + 1, ...``, so many of each, one run after the other."""
    starts = np.cumsum(lengths) - lengths
    return np.repeat(begin - starts, lengths) + np.arange(lengths.sum(), dtype=np.int64)

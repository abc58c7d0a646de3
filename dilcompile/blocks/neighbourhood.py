"""Which blocks of tokens along a curve lie near one another in the grid, without a look at each pair of tokens or of blocks.

Note [sampled windows]: the tokens near a block lie in its extents, made larger by the radius. Which blocks these tokens are of is
asked at some cells of that window only: no further apart along an axis than the shortest box that any block holds, and at both
ends, so that no block is missed. Where blocks fill boxes, as Hilbert's and Morton's do on powers of two, these are about as
many cells as there are blocks to be found. Elsewhere the boxes of the two blocks are compared afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from dilcompile.blocks.curve import Curve
from dilcompile.blocks.grid import Flags
from dilcompile.progression import Positions

_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Boxes:
    """Blocks cut into boxes of the grid that they fill; a block that is a box has one.

    Args:
        low, high: int64 [boxes, axes], the first and the last cell along each axis.
        block: int64 [boxes], the block that the box is of, ascending; the largest box of a block is its first.
    """

    low: Positions
    high: Positions
    block: Positions

    def starts(self, blocks: Positions) -> Positions:
        """The first box of each block."""
        return np.searchsorted(self.block, blocks).astype(np.int64)


def extents(curve: Curve, size: int) -> Boxes:
    """The smallest box around each block of ``size`` positions that holds tokens of the grid."""
    stop = curve.first + prod(curve.grid)
    blocks = np.arange(curve.first // size, -(-stop // size), dtype=np.int64)
    starts = np.maximum(blocks * size - curve.first, 0)
    low, high = np.minimum.reduceat(curve.places, starts, axis=0), np.maximum.reduceat(curve.places, starts, axis=0)
    return Boxes(low, high, blocks)


@lru_cache(maxsize=16)
def near(curve: Curve, radius: tuple[int, ...], q_block: int, k_block: int) -> Positions:
    """The blocks in which some query and some key are at most ``radius`` apart along every axis, tokens in front near to all.

    Returns:
        int64, ``row * columns + column``, ascending; not to be written.
    """
    columns = -(-len(curve) // k_block)
    around, filled = extents(curve, q_block), _filled(curve, k_block)
    owner = curve.positions[curve.lead :] // k_block
    maybe = _distinct_in_parts(around.block[n] * columns + owner[cells] for n, cells in _windows(curve, around, radius, filled))
    filling = _filled(curve, q_block)
    if max(len(filling.block) - len(around.block), len(filled.block) - len(extents(curve, k_block).block)) > 0:
        maybe = maybe[_touching(maybe // columns, maybe % columns, filling, filled, radius)]
    codes = _distinct(np.append(maybe, _with_lead(curve, q_block, k_block, columns)))
    codes.flags.writeable = False
    return codes


def _filled(curve: Curve, size: int) -> Boxes:
    """The boxes that the blocks fill. A block that is none is halved until its parts are, in O(tokens x log size)."""
    stop = curve.first + prod(curve.grid)
    cuts = np.unique(np.clip(np.arange(0, stop + size, size), curve.first, stop)) - curve.first
    begin, end = cuts[:-1], cuts[1:]
    found: list[tuple[Positions, ...]] = []
    while len(begin):
        low, high = _around(curve.places, begin, end)
        box = (high - low + 1).prod(1) == end - begin
        found.append(((begin[box] + curve.first) // size, begin[box] - end[box], low[box], high[box]))
        begin, end = begin[~box], end[~box]
        middle = (begin + end) // 2
        begin, end = np.append(begin, middle), np.append(middle, end)
    block, less, lows, highs = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((less, block))
    return Boxes(lows[order], highs[order], block[order])


def _around(places: Positions, begin: Positions, end: Positions) -> tuple[Positions, Positions]:
    """The first and last cell along each axis of each part of the curve."""
    cells = places[_runs(begin, end - begin)]
    starts = np.cumsum(end - begin) - (end - begin)
    return np.minimum.reduceat(cells, starts, axis=0), np.maximum.reduceat(cells, starts, axis=0)


def _windows(curve: Curve, around: Boxes, radius: tuple[int, ...], filled: Boxes) -> Iterator[tuple[Positions, Positions]]:
    """Cells of the window of each block, see Note [sampled windows], part by part: (number of the block, cell in row order)."""
    apart = (filled.high - filled.low + 1).min(0)
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


def _touching(rows: Positions, columns: Positions, filling: Boxes, filled: Boxes, radius: tuple[int, ...]) -> Flags:
    """Whether some box of the row and some box of the column are at most ``radius`` apart along every axis.

    One box of each row after the other, the largest first, so that most blocks are found by the first ones.
    """
    found = np.zeros(len(rows), dtype=np.bool_)
    first, last = filling.starts(rows), filling.starts(rows + 1)
    begin, count = filled.starts(columns), filled.starts(columns + 1) - filled.starts(columns)
    for number in range(int((last - first).max(initial=0))):
        left = np.flatnonzero(~found & (first + number < last))
        for part in np.array_split(left, 1 + int(count[left].sum()) // _AT_ONCE):
            if len(part):
                box, other = np.repeat(first[part] + number, count[part]), _runs(begin[part], count[part])
                apart = np.maximum(filled.low[other] - filling.high[box], filling.low[box] - filled.high[other])
                close = (apart <= np.array(radius)).all(1)
                found[part] = np.logical_or.reduceat(close, np.cumsum(count[part]) - count[part])
    return found


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


def _distinct_in_parts(parts: Iterator[Positions]) -> Positions:
    return _distinct(np.concatenate([_distinct(part) for part in parts]))


def _distinct(codes: Positions) -> Positions:
    """Each number once, ascending. (``numpy.unique`` hashes, which takes many times as long on such numbers.)"""
    codes = np.sort(codes[_changes(codes)])
    found: Positions = codes[_changes(codes)]
    return found


def _changes(codes: Positions) -> Flags:
    return np.append(True, codes[1:] != codes[:-1])[: len(codes)]

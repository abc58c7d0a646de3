"""Which blocks of tokens in row order lie near one another in the grid.

Note [runs of near tokens]: a run of tokens in row order is a few boxes of the grid: the end of a line, whole lines, the
beginning of a line; in three axes whole planes between those. What is near a box is a larger box, and that is one run of tokens
in each line, or in each plane whose lines are whole. So the blocks near a block are a few ranges for each line around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from dilcompile.blocks.grid import Flags
from dilcompile.progression import Positions, distinct

# Ranges that are held at once.
_AT_ONCE = 1 << 20


def near_in_rows(
    grid: tuple[int, ...], starts: Positions, reach: Positions, first: int, k_block: int
) -> Iterator[tuple[Positions, Positions]]:
    """The blocks near each run of tokens, part by part: (number of the run, ascending; number of the block near it), each once.

    Args:
        grid: the sizes of the grid, whose tokens stand in row order.
        starts: int64 [runs + 1], the first token of each run.
        reach: how far apart tokens may be along each axis.
        first: the position of the grid's first token; k_block: positions in a block.
    """
    columns, sizes = -(-(first + prod(grid)) // k_block), np.array(grid)
    runs, low, high = _boxes(starts[:-1], starts[1:] - 1, grid)
    order = np.argsort(runs, kind="stable")
    runs, low, high = runs[order], np.maximum(low[order] - reach, 0), np.minimum(high[order] + reach, sizes - 1)
    steps = np.append(np.cumprod(sizes[:0:-1])[::-1], 1)
    counts = _lines(low, high, sizes)
    ends, start = np.cumsum(counts.prod(1)), 0
    while start < len(runs):
        stop = int(np.searchsorted(ends, (ends[start - 1] if start else 0) + _AT_ONCE, side="right"))
        # Boxes of one run stay together.
        stop = int(np.searchsorted(runs, runs[min(max(stop, start + 1), len(runs)) - 1], side="right"))
        box = np.repeat(np.arange(start, stop), counts[start:stop].prod(1))
        number = _count_up(counts[start:stop].prod(1))
        begin, end = first + low[box] @ steps, first + high[box] @ steps
        for axis in reversed(range(len(grid))):
            number, line = np.divmod(number, counts[box, axis])
            begin += line * steps[axis]
            end -= (counts[box, axis] - 1 - line) * steps[axis]
        begin, widths = begin // k_block, end // k_block - begin // k_block + 1
        codes = np.repeat(runs[box] * columns + begin, widths) + _count_up(widths)
        run, column = np.divmod(distinct(codes), columns)
        yield run, column
        start = stop


def _boxes(first: Positions, last: Positions, grid: tuple[int, ...]) -> tuple[Positions, Positions, Positions]:
    """Runs of tokens, the first and the last of each, as boxes: (number of the run, low and high [boxes, axes])."""
    runs = np.arange(len(first))
    if len(grid) == 1:
        return runs, first[:, None], last[:, None]
    (line, begin), (last_line, end) = np.divmod(first, grid[-1]), np.divmod(last, grid[-1])
    # A run that begins or ends with a whole line has it among the whole ones.
    whole_from, whole_to = line + (begin > 0), last_line - (end < grid[-1] - 1)
    one, some = (line == last_line) & (whole_from > whole_to), whole_from <= whole_to
    found = [
        _in_line(runs, line, begin, np.where(one, end, grid[-1] - 1), grid, (begin > 0) | one),
        _in_line(runs, last_line, np.zeros_like(end), end, grid, (end < grid[-1] - 1) & ~one),
    ]
    inner, low, high = _boxes(whole_from[some], whole_to[some], grid[:-1])
    column = np.zeros((len(inner), 1), dtype=np.int64)
    found.append((runs[some][inner], np.hstack([low, column]), np.hstack([high, column + grid[-1] - 1])))
    runs, low, high = (np.concatenate(each) for each in zip(*found, strict=True))
    return runs, low, high


def _in_line(
    runs: Positions, line: Positions, begin: Positions, end: Positions, grid: tuple[int, ...], kept: Flags
) -> tuple[Positions, Positions, Positions]:
    places = np.stack(np.unravel_index(line[kept], grid[:-1]), axis=1).astype(np.int64)
    return runs[kept], np.column_stack([places, begin[kept]]), np.column_stack([places, end[kept]])


def _lines(low: Positions, high: Positions, sizes: Positions) -> Positions:
    """In how many parts along each axis a box is cut to be runs of tokens: along one only if all behind it are not whole."""
    counts, whole = np.ones_like(low), np.ones(len(low), dtype=np.bool_)
    for axis in reversed(range(1, len(sizes))):
        whole &= (low[:, axis] == 0) & (high[:, axis] == sizes[axis] - 1)
        counts[:, axis - 1] = np.where(whole, 1, (high - low + 1)[:, axis - 1])
    return counts


def _count_up(lengths: Positions) -> Positions:
    """``0, 1, ...``, so many numbers of each, one run after the other."""
    found: Positions = np.arange(lengths.sum(), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return found

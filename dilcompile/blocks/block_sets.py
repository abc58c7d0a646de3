"""Which blocks are near blocks that are no boxes of the grid.

Note [sets of blocks in bits]: each cell of the grid holds the set of the blocks that its token is of, one bit a block. The sets
of all cells within the radius, joined along one axis after the other, are those of the blocks near a token; those of a block's
tokens joined are the blocks near it. A run of blocks is found at once, which needs the bits of the blocks around it only: long
runs share what is around them, but a run that a curve's jump tears apart has much around it, so runs are cut where that is less
work.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dilcompile.blocks.grid import Flags
from dilcompile.progression import Positions, distinct

Sets = npt.NDArray[np.uint64]

_WORD = 64
# Tokens of a run of blocks, and bytes of sets that are held at once.
_TOKENS_AT_ONCE = 1 << 13
_BYTES_AT_ONCE = 1 << 25
# Of cells times cells: what a run takes beside its sets.
_OF_A_RUN = 1 << 26


def near_by_sets(
    owner: Positions, places: Positions, starts: Positions, low: Positions, high: Positions, reach: Positions
) -> Iterator[tuple[Positions, Positions]]:
    """The blocks near each block, run by run: (number of the block, ascending; number of the one near it).

    Args:
        owner: the block near which others are, of the token in each cell of the grid.
        places: int64 [tokens, axes], where tokens are in the grid, one block after the other.
        starts: int64 [blocks + 1], the first token of each block.
        low, high: int64 [blocks, axes], the extents of each block.
        reach: how far apart tokens may be along each axis.
    """
    local = np.zeros(int(owner.max(initial=0)) + 1, dtype=np.int64)
    for start, stop in _runs(low, high, reach, starts, 0, len(low)):
        first, last = low[start:stop].min(0), high[start:stop].max(0)
        begin = np.maximum(first - reach, 0)
        held = owner[tuple(slice(*ends) for ends in zip(begin, last + reach + 1, strict=True))]
        there = distinct(held.ravel())
        local[there] = np.arange(len(there))
        tokens = places[starts[start] : starts[stop]] - first
        at = np.ravel_multi_index(tuple(tokens.T), tuple(last - first + 1))
        shape, place = last - first + 1 + 2 * reach, begin - first + reach
        near = _joined_sets(local[held], place, shape, reach, len(there), at, starts[start:stop] - starts[start])
        row, column = np.nonzero(near)
        yield start + row, there[column]


def _runs(
    low: Positions, high: Positions, reach: Positions, starts: Positions, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Blocks from ``start`` to ``stop`` in runs: a run is cut in 2, or in 8, where less work is left so."""
    if stop - start > 1:
        long = starts[stop] - starts[start] > _TOKENS_AT_ONCE
        for parts in (2, 8):
            cuts = np.unique(np.linspace(start, stop, parts + 1).astype(np.int64))
            if long or _work(low, high, reach, cuts).sum() < _work(low, high, reach, np.array([start, stop])).sum():
                for ends in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                    yield from _runs(low, high, reach, starts, *ends)
                return
    if stop > start:
        yield start, stop


def _work(low: Positions, high: Positions, reach: Positions, cuts: Positions) -> Positions:
    """Cells around each run times the sets in them, which are as many again."""
    first, last = np.minimum.reduceat(low[: cuts[-1]], cuts[:-1]), np.maximum.reduceat(high[: cuts[-1]], cuts[:-1])
    found: Positions = (last - first + 1 + 2 * reach).prod(1) ** 2 + _OF_A_RUN
    return found


def _joined_sets(
    held: Positions, place: Positions, shape: Positions, reach: Positions, count: int, at: Positions, begin: Positions
) -> Flags:
    """Which blocks are near each block of a run, bool [run, count].

    Args:
        held: the block of each cell of a window, numbers below ``count``.
        place: where in ``shape``, a box around the run that is larger by ``reach`` on each side, the window stands.
        at, begin: the cell of each token of the run in the box without what it is larger by; each block's first token.
    """
    words = -(-count // _WORD)
    step = max(1, _BYTES_AT_ONCE // (8 * int(shape.prod())))
    found = np.empty((len(begin), words), dtype="<u8")
    for first in range(0, words, step):
        word, bit = held // _WORD - first, held % _WORD
        sets = np.zeros((*shape, min(step, words - first)), dtype="<u8")
        mine = (word >= 0) & (word < sets.shape[-1])
        cells = tuple(along + begins for along, begins in zip(np.nonzero(mine), place, strict=True))
        flat = np.ravel_multi_index((*cells, word[mine]), sets.shape)
        sets.reshape(-1)[flat] = np.uint64(1) << bit[mine].astype(np.uint64)
        for axis, far in enumerate(reach):
            sets = _joined_along(sets, axis, 2 * int(far) + 1)
        of_tokens = sets.reshape(-1, sets.shape[-1])[at]
        found[:, first : first + step] = np.bitwise_or.reduceat(of_tokens, begin, axis=0)
    return np.unpackbits(found.view(np.uint8), axis=1, count=count, bitorder="little").view(np.bool_)


def _joined_along(sets: Sets, axis: int, width: int) -> Sets:
    """Each set joined with the ``width - 1`` behind it along an axis, which gets so much shorter."""
    sets = np.moveaxis(sets, axis, 0)
    left = len(sets) - width + 1
    if left * width <= len(sets) * width.bit_length():
        found = sets[:left].copy()
        for number in range(1, width):
            found |= sets[number : number + left]
        return np.moveaxis(found, 0, axis)
    joined = 1
    while joined < width:
        more = min(joined, width - joined)
        sets = sets[:-more] | sets[more:]
        joined += more
    return np.moveaxis(sets, 0, axis)

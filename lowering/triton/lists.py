"""The lists of blocks as the Triton kernels read them: what each block row, or block column, walks. Nothing here imports Triton.

As many numbers as there are blocks, on the device that walks them. Blocks in which every pair counts come first in their line,
so that they are walked without a mask, as one run of positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists
from dilcompile.generators import Blocks
from dilcompile.progression import Positions
from dilcompile.relation import Relation, grid_of

_MOST_ENTRIES = 1 << 31


@dataclass(frozen=True)
class Lists:
    """What the tiles of one side walk.

    Args:
        lines: int32 [heads or 1, 1 + lines, 3]: where a line's blocks begin in ``entries``, how many of them need no mask, how
            many there are. Line 0 is that of positions that are in no block.
        entries: int32, the first position of each block of the other side.
        first_line: line n of the tiles is row ``n - first_line`` of ``lines``.
        line_head: from one query head's lines to the next one's, in numbers; 0: all have the same.
        tiles: int32 [tiles, 2], first position and line, those with the most blocks first.
        most_positions: in the blocks of the longest line.
    """

    lines: Tensor
    entries: Tensor
    first_line: int
    line_head: int
    tiles: Tensor
    most_positions: int


def blocks_of(relation: Relation) -> Blocks | None:
    """The blocks that the relation is made of, or None if it is made of something else."""
    generator = relation.terms[0].generator if len(relation.terms) == 1 else None
    return generator if isinstance(generator, Blocks) else None


def lists_on(relation: Relation, count: int, transposed: bool, by_document: bool, device: torch.device) -> Lists:
    """The lists of a relation of blocks, and one side's positions in tiles of ``count``, each in one line.

    Args:
        transposed: keys walk queries.
        by_document: positions count from the start of each document, which only the device knows: tiles are runs of positions
            of any lines, and the blocks of a line are in ascending order.
    """
    held, size = _blocks(relation), relation.problem
    found, number, totals = _lines_on(relation, transposed, by_document, device)
    own = held.grid.k_block if transposed else held.grid.q_block
    first, end = (0, size.k_len) if transposed else (size.q_offset, size.q_offset + size.q_len)
    tiles = _runs(first, end, count, own) if by_document else _tiles(first, end, count, own, number, totals)
    return replace(found, tiles=torch.from_numpy(tiles.astype(np.int32)).to(device))


@lru_cache(maxsize=16)
def _lines_on(
    relation: Relation, transposed: bool, by_document: bool, device: torch.device
) -> tuple[Lists, Positions, Positions]:
    """(the lists without tiles, which any tiles share; numbers of their lines; blocks of each line under all heads)."""
    held, heads = _blocks(relation), _by_head(relation, transposed, by_document)
    other, number = held.grid.q_block if transposed else held.grid.k_block, heads[0].lines
    begins = np.cumsum([0, *(len(one) for one in heads)])
    assert begins[-1] < _MOST_ENTRIES, f"{begins[-1]} blocks"
    lines = np.zeros((len(heads), 1 + len(number), 3), dtype=np.int32)
    for rows, one, begin in zip(lines, heads, begins, strict=False):
        rows[1:, 0], rows[1:, 2] = begin + one.starts[:-1], np.diff(one.starts)
        rows[1:, 1] = np.bincount(one.owners()[one.full] - (number[0] if len(number) else 0), minlength=len(number))
    made = Lists(
        lines=torch.from_numpy(lines).to(device),
        entries=torch.from_numpy((np.concatenate([one.blocks for one in heads]) * other).astype(np.int32)).to(device),
        first_line=int(number[0]) - 1 if len(number) else -1,
        line_head=3 * (1 + len(number)) if len(heads) > 1 else 0,
        tiles=torch.empty((0, 2), dtype=torch.int32, device=device),
        most_positions=int(lines[:, :, 2].max()) * other,
    )
    return made, number, lines[:, 1:, 2].sum(0)


def map_on(relation: Relation, by_document: bool, device: torch.device) -> tuple[Tensor, int]:
    """(uint8 [heads or 1, block rows, block columns], number of the first block row): which blocks there are. For the gradient
    of a bias by pair, which is larger than this."""
    heads = _rows(relation, by_document)
    lines, columns = heads[0].lines, _grid(relation, by_document).columns
    held = np.zeros((len(heads), len(lines), columns), dtype=np.uint8)
    for one, there in zip(heads, held, strict=True):
        there[one.owners() - (lines[0] if len(lines) else 0), one.blocks] = 1
    return torch.from_numpy(held).to(device), int(lines[0]) if len(lines) else 0


def _blocks(relation: Relation) -> Blocks:
    held = blocks_of(relation)
    assert held is not None, f"{relation} is not made of blocks"
    return held


def _grid(relation: Relation, by_document: bool) -> Grid:
    held, size = _blocks(relation), relation.problem
    if by_document:
        # A document may be as long as the keys.
        size = replace(size, q_offset=0, q_len=size.k_len)
    return grid_of(size, held.grid.q_block, held.grid.k_block)


@lru_cache(maxsize=8)
def _rows(relation: Relation, by_document: bool) -> list[BlockLists]:
    """The lists of each query head, or of all."""
    held, grid = _blocks(relation), _grid(relation, by_document)
    return [held.lists(head, grid) for head in range(relation.problem.heads if held.pattern.by_head else 1)]


def _by_head(relation: Relation, transposed: bool, by_document: bool) -> list[BlockLists]:
    """The lists that one side walks: blocks that need no mask come first, and are whole."""
    grid, found = _grid(relation, by_document), []
    for one in _rows(relation, by_document):
        owners = one.owners()
        whole = (one.blocks + 1) * grid.k_block <= grid.k_len
        if transposed:
            whole = (owners * grid.q_block >= grid.q_start) & ((owners + 1) * grid.q_block <= grid.q_stop)
        ready = replace(one, full=one.full & whole & (not by_document))
        if transposed:
            ready = ready.transposed(np.arange(grid.columns, dtype=np.int64))
        order = np.lexsort((~ready.full, ready.owners()))
        found.append(replace(ready, blocks=ready.blocks[order], full=ready.full[order]))
    return found


def _tiles(first: int, end: int, count: int, own: int, lines: Positions, totals: Positions) -> Positions:
    """Tiles of the positions from first to before end, the longest walks first; those before 0 are in line -1."""
    begin, stop = np.maximum(lines * own, first), np.minimum((lines + 1) * own, end)
    order = np.argsort(-totals, kind="stable")
    begin, stop, lines = begin[order], stop[order], lines[order]
    if first < 0:
        begin, stop, lines = np.append(begin, first), np.append(stop, min(end, 0)), np.append(lines, -1)
    counts = -(-(stop - begin) // count)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    found: Positions = np.stack([np.repeat(begin, counts) + number * count, np.repeat(lines, counts)], 1)
    return found


def _runs(first: int, end: int, count: int, own: int) -> Positions:
    """Tiles that no line ends: theirs lies behind all positions."""
    begin = np.arange(first, end, count)
    return np.stack([begin, np.full_like(begin, (1 << 30) // own - 1)], 1)

"""Blocks counted, and gathered into the cells of a picture: in time and memory of the blocks that are there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists
from dilcompile.progression import Positions

Shares = npt.NDArray[np.float64]
MOST_CELLS = 128


@dataclass(frozen=True)
class BlockCount:
    """How many blocks of a grid are computed.

    Args:
        q_block, k_block: positions in a block.
        rows, columns: of the grid.
        heads: how many heads are counted: 1 where all have the same blocks.
        full: blocks in which every pair counts.
        partial: blocks in which some pairs count, and need a mask.
    """

    q_block: int
    k_block: int
    rows: int
    columns: int
    heads: int
    full: int
    partial: int

    @property
    def all(self) -> int:
        """Every block of the grid, in each head that is counted."""
        return self.heads * self.rows * self.columns

    @property
    def empty(self) -> int:
        """Blocks that are not computed."""
        return self.all - self.full - self.partial

    def __str__(self) -> str:
        heads = "" if self.heads == 1 else f" in {self.heads} heads"
        counts = f"{self.full:,} full, {self.partial:,} partial and {self.empty:,} empty"
        return f"{counts} of {self.rows:,} x {self.columns:,} blocks{heads}"


@dataclass(frozen=True, eq=False)
class Cells:
    """A picture of pairs: rows of cells are queries, columns are keys.

    Args:
        q_edges: int64 [rows + 1]; row n of the cells holds the queries from ``q_edges[n]`` to before ``q_edges[n + 1]``.
        k_edges: int64 [columns + 1], the same of the keys.
        full, partial: float64 [rows, columns]; the share of a cell that is there without and with a mask inside; at most 1.
        unit: what the shares count, ``block``s or ``pair``s.
        held: how many of them there are in a cell, down and across.
    """

    q_edges: Positions
    k_edges: Positions
    full: Shares
    partial: Shares
    unit: str
    held: tuple[int, int]


def with_pairs(lists: BlockLists, grid: Grid) -> BlockLists:
    """The lists without the blocks in which the limits leave no pair: limits that cross each other list some."""
    some = grid.pairs(lists.owners(), lists.blocks) > 0
    starts = np.append(0, np.cumsum(some))[lists.starts]
    return BlockLists(lists.lines, starts, lists.blocks[some], lists.full[some])


def cells_of(lists: BlockLists, grid: Grid, most: int = MOST_CELLS) -> Cells:
    """The blocks of one head in at most ``most`` x ``most`` cells of equally many blocks (the last of a line: fewer)."""
    lines, columns = grid.rows, grid.columns
    down, across = (max(1, -(-number // most)) for number in (len(lines), columns))
    shape = (-(-len(lines) // down), -(-columns // across))
    first = int(lines[0]) if len(lines) else 0
    cell = (lists.owners() - first) // down * shape[1] + lists.blocks // across
    full, partial = (np.bincount(cell[kept], minlength=shape[0] * shape[1]).reshape(shape) for kept in (lists.full, ~lists.full))
    inside = np.multiply.outer(_sizes(len(lines), down), _sizes(columns, across)).reshape(shape)
    return Cells(
        q_edges=np.clip((first + np.append(np.arange(shape[0]) * down, len(lines))) * grid.q_block, grid.q_start, grid.q_stop),
        k_edges=np.minimum(np.append(np.arange(shape[1]) * across, columns) * grid.k_block, grid.k_len),
        full=full / inside,
        partial=partial / inside,
        unit="block",
        held=(down, across),
    )


def _sizes(number: int, size: int) -> Positions:
    """How many of ``number`` things each group of ``size`` has."""
    found: Positions = np.diff(np.append(np.arange(0, number, size, dtype=np.int64), number))
    return found

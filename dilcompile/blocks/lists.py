"""Lists of the blocks that are computed, by block row and by block column: as many numbers as there are such blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dilcompile.blocks.grid import Flags, Grid
from dilcompile.progression import Positions


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Compressed sparse rows over blocks, for one head.

    Args:
        lines: numbers of the lines (block rows, or columns in the transposed lists), ascending.
        starts: int64 [lines + 1]; line n holds the entries from ``starts[n]`` to before ``starts[n + 1]``.
        blocks: int64 [entries], numbers on the other side, ascending in a line.
        full: bool [entries]; in a full block each pair counts, so that it needs no mask.
    """

    lines: Positions
    starts: Positions
    blocks: Positions
    full: Flags

    def __len__(self) -> int:
        return len(self.blocks)

    def of_line(self, number: int) -> Positions:
        """The blocks of the ``number``-th line."""
        found: Positions = self.blocks[self.starts[number] : self.starts[number + 1]]
        return found

    def owners(self) -> Positions:
        """The line of each entry."""
        found: Positions = np.repeat(self.lines, np.diff(self.starts))
        return found

    def transposed(self, lines: Positions) -> BlockLists:
        """The same blocks by their other side: the lists that gradients of keys walk."""
        owners = self.owners()
        order = np.argsort(self.blocks, kind="stable")
        counts = np.searchsorted(self.blocks[order], np.append(lines, lines[-1] + 1 if len(lines) else 0))
        return BlockLists(lines, counts.astype(np.int64), owners[order], self.full[order])


def lists_of(codes: Positions, grid: Grid) -> BlockLists:
    """The lists of blocks given as ``row * columns + column``, ascending; blocks without any pair are left out."""
    rows, columns = np.divmod(codes, max(1, grid.columns))
    low, high = grid.reach(rows)
    seen = (columns >= low) & (columns < high)
    rows, columns = rows[seen], columns[seen]
    lines = grid.rows
    starts = np.searchsorted(rows, np.append(lines, lines[-1] + 1 if len(lines) else 0)).astype(np.int64)
    return BlockLists(lines, starts, columns, grid.full(rows, columns))

"""The grid of blocks at given sizes: numbers of rows and columns, and what the site's own limits leave of a block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dilcompile.progression import Positions

Flags = npt.NDArray[np.bool_]
# Positions in a block of a form.
LEAST_BLOCK, MOST_BLOCK = 16, 256


@dataclass(frozen=True)
class Grid:
    """Positions cut into blocks: row i holds the queries from ``i * q_block`` on, column j the keys from ``j * k_block`` on.

    Args:
        q_block, k_block: positions in a block.
        q_start, q_stop: the query positions, from ``q_start`` to before ``q_stop``; not negative.
        k_len: number of keys.
        left, right: limits on t - k and on k - t; None: no limit.
    """

    q_block: int
    k_block: int
    q_start: int
    q_stop: int
    k_len: int
    left: int | None = None
    right: int | None = None

    @property
    def rows(self) -> Positions:
        """The numbers of the block rows that hold queries, ascending."""
        if self.q_stop <= self.q_start:
            return np.arange(0, dtype=np.int64)
        return np.arange(self.q_start // self.q_block, -(-self.q_stop // self.q_block), dtype=np.int64)

    @property
    def columns(self) -> int:
        """How many block columns there are; the last one may be cut short by the end of the keys."""
        return -(-self.k_len // self.k_block)

    def beside(self, rows: Positions) -> tuple[Positions, Positions]:
        """The first and the last block column that hold a position of each block row."""
        return rows * self.q_block // self.k_block, ((rows + 1) * self.q_block - 1) // self.k_block

    def reach(self, rows: Positions) -> tuple[Positions, Positions]:
        """The half-open range of block columns in which each block row may see a key at all."""
        first, last = self._queries(rows)
        low = np.zeros_like(rows) if self.left is None else np.maximum(0, first - self.left) // self.k_block
        high = np.full_like(rows, self.k_len) if self.right is None else np.clip(last + self.right + 1, 0, self.k_len)
        return low, -(-high // self.k_block)

    def drawn_from(self, rows: Positions) -> tuple[Positions, Positions]:
        """The half-open range of block columns that random blocks of each row are drawn from. It doesn't depend on how many
        queries there are, so that a query decoded alone has the blocks that it has among others."""
        low = np.zeros_like(rows) if self.left is None else np.maximum(0, rows * self.q_block - self.left) // self.k_block
        if self.right is None:
            return low, np.full_like(rows, self.columns)
        high = (rows * self.q_block + self.right) // self.k_block + 1
        return low, np.clip(high, 0, self.columns)

    def full(self, rows: Positions, columns: Positions) -> Flags:
        """Whether each pair of a query and a key in the block (row, column) is within the limits; what lies behind the ends of
        the sequences counts for nothing."""
        (first, last), k_first = self._queries(rows), columns * self.k_block
        k_last = np.minimum(k_first + self.k_block, self.k_len) - 1
        found = np.ones(rows.shape, dtype=np.bool_)
        if self.left is not None:
            found &= last - k_first <= self.left
        if self.right is not None:
            found &= k_last - first <= self.right
        return found

    def pairs(self, rows: Positions, columns: Positions) -> Positions:
        """How many pairs of each block (row, column) the limits let through, int64."""
        (first, last), k_first = self._queries(rows), columns * self.k_block
        k_last = np.minimum(k_first + self.k_block, self.k_len) - 1
        width, height = k_last - k_first + 1, last - first + 1
        # Keys at most `right` behind the query, less those more than `left` before it.
        high = _below(first - k_first, height, width, self.right)
        low = np.zeros_like(high) if self.left is None else _below(first - k_first, height, width, -self.left - 1)
        found: Positions = np.maximum(0, high - low)
        return found

    def _queries(self, rows: Positions) -> tuple[Positions, Positions]:
        first = np.maximum(rows * self.q_block, self.q_start)
        return first, np.minimum((rows + 1) * self.q_block, self.q_stop) - 1


def _below(ahead: Positions, height: Positions, width: Positions, most: int | None) -> Positions:
    """How many of height x width pairs have k - t <= most, where the first query stands ``ahead`` of the first key.

    Query n of the block sees the keys 0 to ``ahead + n + most``: the sum of min(width, max(0, ahead + most + 1 + n)) over n.
    """
    if most is None:
        return height * width
    start = ahead + most + 1
    empty = np.clip(-start, 0, height)
    rising = np.clip(width - start, 0, height) - empty
    begin = np.maximum(0, start)
    found: Positions = rising * begin + rising * (rising - 1) // 2 + (height - empty - np.maximum(0, rising)) * width
    return found

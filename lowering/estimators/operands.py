"""What estimators look at: queries and keys, cut into blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilcompile.blocks.grid import Grid

# The scores [B, H, rows, columns] of the block rows from `first` to before `stop`, counted from the grid's first row.
Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Operands:
    """Queries and keys of one attention.

    Args:
        q: [B, H, Sq, D], the queries at the grid's positions ``q_start`` to before ``q_stop``; k: [B, Hkv, Sk, D].
        keep: bool [B, Sk], True keeps the key; None: all are kept.
        scale, softcap: of the scores, as in ``Call``.
        grid: the blocks, with the site's own limits.
    """

    q: Tensor
    k: Tensor
    keep: Tensor | None
    scale: float
    softcap: float | None
    grid: Grid

    @property
    def dtype(self) -> torch.dtype:
        """What scores are computed in."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def first_row(self) -> int:
        """The number of the block row of the first query."""
        return self.grid.q_start // self.grid.q_block

    @property
    def num_rows(self) -> int:
        """How many block rows there are."""
        return -(-self.grid.q_stop // self.grid.q_block) - self.first_row if self.grid.q_stop > self.grid.q_start else 0

    def rows(self, first: int, stop: int) -> Tensor:
        """The numbers of these block rows, int64 [rows]."""
        return torch.arange(self.first_row + first, self.first_row + stop, device=self.q.device)

    def queries(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """The queries of these block rows [B, H, rows, q_block, D], 0 where there is none; which there are [rows, q_block]."""
        size, grid = self.grid.q_block, self.grid
        begin, end = ((self.first_row + row) * size for row in (first, stop))
        before, behind = max(0, grid.q_start - begin), max(0, end - grid.q_stop)
        inside = self.q[:, :, max(begin, grid.q_start) - grid.q_start : min(end, grid.q_stop) - grid.q_start].to(self.dtype)
        t = torch.arange(begin, end, device=self.q.device)
        there = (t >= grid.q_start) & (t < grid.q_stop)
        return cut(pad(inside, (0, 0, before, behind)), 2, size), cut(there, 0, size)

    def keys(self) -> tuple[Tensor, Tensor]:
        """The keys [B, Hkv, columns, k_block, D], 0 where there is none; which are there and kept [B or 1, columns, k_block]."""
        size, behind = self.grid.k_block, self.grid.columns * self.grid.k_block - self.grid.k_len
        there = self.keep if self.keep is not None else torch.ones(1, self.grid.k_len, dtype=torch.bool, device=self.k.device)
        kept = self.k.to(self.dtype) * there[:, None, :, None]
        return cut(pad(kept, (0, 0, 0, behind)), 2, size), cut(pad(there, (0, behind)), 1, size)

    def products(self, q: Tensor, k: Tensor) -> Tensor:
        """q [B, H, n, D] times k [B, Hkv, m, D] as [B, H, n, m], each query head with its key head."""
        group = q.shape[1] // k.shape[1]
        found = cut(q, 1, group).flatten(2, 3) @ k.mT
        return cut(found, 2, q.shape[2]).flatten(1, 2)

    def scores(self, products: Tensor) -> Tensor:
        """Products of queries and keys, scaled and capped."""
        scaled = products * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap


def cut(x: Tensor, dim: int, size: int) -> Tensor:
    """A dim as two, parts of so many and the places in a part."""
    return torch.unflatten(x, dim, (-1, size))


def reached(grid: Grid, rows: Tensor) -> Tensor:
    """Which blocks of these rows (numbers, int64) hold a pair within the limits: bool [rows, columns]."""
    rows = rows[:, None]
    begin, last = (rows * grid.q_block).clamp(min=grid.q_start), ((rows + 1) * grid.q_block).clamp(max=grid.q_stop) - 1
    k_first = torch.arange(grid.columns, device=rows.device) * grid.k_block
    found = torch.ones(rows.shape[0], grid.columns, dtype=torch.bool, device=rows.device)
    if grid.left is not None:
        found &= (k_first + grid.k_block).clamp(max=grid.k_len) - 1 >= begin - grid.left
    if grid.right is not None:
        found &= k_first <= last + grid.right
    return found


def beside(grid: Grid, rows: Tensor) -> Tensor:
    """Which columns hold a position of each of these rows: bool [rows, columns]. As ``Grid.beside``."""
    rows, columns = rows[:, None], torch.arange(grid.columns, device=rows.device)
    first, last = rows * grid.q_block // grid.k_block, ((rows + 1) * grid.q_block - 1) // grid.k_block
    return (columns >= first) & (columns <= last)

"""Patterns: which blocks of pairs are computed, as arithmetic on block numbers. Nothing of rows x columns numbers is built.

Each pattern says the same thing twice: ``contains`` of single blocks (what the oracle asks), and ``codes`` of whole rows (what
the lists are made of), in time and memory of the blocks that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.curve import Curve
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.neighbourhood import near
from dilcompile.blocks.shuffle import mixed, shuffled, unshuffled
from dilcompile.progression import Positions, distinct


class Pattern(Protocol):
    """A set of blocks.

    ``by_head``: heads differ.
    """

    @property
    def by_head(self) -> bool:
        """Whether heads differ."""

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """Bool over the broadcast of the int64 tensors ``h`` (query head), ``i`` (block row) and ``j`` (block column)."""

    def __hash__(self) -> int:
        """Patterns are values."""

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """The blocks of these rows (ascending) as ``row * columns + column``, ascending, each once."""


def spread(rows: Positions, first: Positions, stop: Positions, step: int, grid: Grid) -> Positions:
    """Codes of the columns ``first, first + step, ...`` below ``stop`` of each row, those outside of the grid left out."""
    missing = np.maximum(0, -first)
    first = first + -(-missing // step) * step
    counts = np.maximum(0, -((first - np.minimum(stop, grid.columns)) // step))
    ends = np.cumsum(counts)
    number = np.arange(ends[-1] if len(ends) else 0, dtype=np.int64) - np.repeat(ends - counts, counts)
    found: Positions = np.repeat(rows * grid.columns + first, counts) + number * step
    return found


def everywhere(found: Tensor, *others: Tensor) -> Tensor:
    """A bool tensor as it is over the broadcast with others, on which it does not depend."""
    return found & torch.ones_like(sum(others, torch.zeros_like(others[0])), dtype=torch.bool)


def joined(parts: list[Positions]) -> Positions:
    """The codes of all of these, ascending, each once."""
    return distinct(np.concatenate(parts)) if parts else np.arange(0, dtype=np.int64)


def _beside(i: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    floor: Callable[[Tensor], Tensor] = lambda x: torch.div(x, grid.k_block, rounding_mode="floor")  # noqa: E731
    return floor(i * grid.q_block), floor((i + 1) * grid.q_block - 1)


@dataclass(frozen=True)
class Local:
    """The columns beside the row, ``before`` more on the left and ``behind`` more on the right."""

    before: int
    behind: int
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        first, last = _beside(i, grid)
        return everywhere((j >= first - self.before) & (j <= last + self.behind), h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        first, last = grid.beside(rows)
        return spread(rows, first - self.before, last + self.behind + 1, 1, grid)


@dataclass(frozen=True)
class Global:
    """The first ``columns`` columns for every row, and every column for the first ``rows`` rows."""

    columns: int
    rows: int = 0
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        return everywhere((j < self.columns) | (i < self.rows), h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        return spread(rows, np.zeros_like(rows), np.where(rows < self.rows, grid.columns, self.columns), 1, grid)


@dataclass(frozen=True)
class Strided:
    """Every ``stride``-th column, counted from the row's own; ``most`` of them on each side, None: all.

    With ``most`` this is a dilated sliding window (Longformer, arXiv 2004.05150, section 3.1), without it the strided pattern of
    Sparse Transformers (arXiv 1904.10509, section 4.2).
    """

    stride: int
    most: int | None = None
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        _, own = _beside(i, grid)
        found = torch.remainder(own - j, self.stride) == 0
        if self.most is not None:
            found = found & ((own - j).abs() <= self.most * self.stride)
        return everywhere(found, h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        _, own = grid.beside(rows)
        if self.most is None:
            return spread(rows, own % self.stride, np.full_like(rows, grid.columns), self.stride, grid)
        reach = self.most * self.stride
        return spread(rows, own - reach, own + reach + 1, self.stride, grid)


@dataclass(frozen=True)
class Fixed:
    """The columns whose number is ``offset`` modulo ``stride`` (Sparse Transformers, arXiv 1904.10509, section 4.3)."""

    stride: int
    offset: int = 0
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        return everywhere(torch.remainder(j, self.stride) == self.offset, h, i)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        return spread(rows, np.full_like(rows, self.offset), np.full_like(rows, grid.columns), self.stride, grid)


@dataclass(frozen=True)
class VerticalSlash:
    """Some columns for every row, and some distances from the row's own column to the left (MInference, arXiv 2407.02490)."""

    verticals: tuple[int, ...]
    slashes: tuple[int, ...]
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        _, own = _beside(i, grid)
        found = torch.isin(j, torch.tensor(self.verticals, dtype=j.dtype, device=j.device)) | torch.zeros_like(
            own, dtype=torch.bool
        )
        return everywhere(found | torch.isin(own - j, torch.tensor(self.slashes, dtype=j.dtype, device=j.device)), h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        _, own = grid.beside(rows)
        columns = [np.full_like(rows, column) for column in self.verticals] + [own - distance for distance in self.slashes]
        return joined([spread(rows, column, column + 1, 1, grid) for column in columns])


@dataclass(frozen=True)
class Hierarchical:
    """Groups of groups of columns: every column of the row's own group, and of wider groups the first ones of each part.

    Args:
        spans: columns in a group of each level, each a multiple of the one before.
        heads: the first columns of each group of the level before that the whole group sees; one for each level but the first.
            One more than that: of each group of the last level, seen by every row.
    """

    spans: tuple[int, ...]
    heads: tuple[int, ...]
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        _, own = _beside(i, grid)
        found = torch.div(own, self.spans[0], rounding_mode="floor") == torch.div(j, self.spans[0], rounding_mode="floor")
        for level, most in enumerate(self.heads):
            seen = torch.remainder(j, self.spans[level]) < most
            if level + 1 < len(self.spans):
                span = self.spans[level + 1]
                seen = seen & (torch.div(own, span, rounding_mode="floor") == torch.div(j, span, rounding_mode="floor"))
            found = found | seen
        return everywhere(found, h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        _, own = grid.beside(rows)
        first = own // self.spans[0] * self.spans[0]
        parts = [spread(rows, first, first + self.spans[0], 1, grid)]
        for level, most in enumerate(self.heads):
            first, stop = np.zeros_like(rows), np.full_like(rows, grid.columns)
            if level + 1 < len(self.spans):
                first = own // self.spans[level + 1] * self.spans[level + 1]
                stop = first + self.spans[level + 1]
            parts += [spread(rows, first + n, stop, self.spans[level], grid) for n in range(most)]
        return joined(parts)


@dataclass(frozen=True)
class Random:
    """``count`` different columns for each row, drawn from those that its first query may see (all of them, if they are fewer).

    The draw is a permutation computed from the seed, the row and the head, so every rank and every device has the same one.
    """

    count: int
    seed: int = 0
    by_head: bool = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        heads, rows, columns = np.broadcast_arrays(*(x.cpu().numpy() for x in (h, i, j)))
        low, high = grid.drawn_from(rows)
        inside = (columns >= low) & (columns < high)
        place = unshuffled(np.where(inside, columns - low, 0), np.maximum(1, high - low), self._keys(heads, rows))
        return torch.from_numpy(np.asarray(inside & (place < self.count))).to(i.device)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        low, high = grid.drawn_from(rows)
        counts = np.clip(high - low, 0, self.count)
        owners = np.repeat(np.arange(len(rows)), counts)
        number = np.arange(len(owners), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        row = rows[owners]
        column = low[owners] + shuffled(number, np.maximum(1, high - low)[owners], self._keys(np.full_like(row, h), row))
        return np.sort(row * grid.columns + column)

    def _keys(self, h: Positions, i: Positions) -> Positions:
        return mixed(mixed(np.asarray(i + self.seed * 0x9E3779B1)) + (h if self.by_head else 0) * 0x85EBCA6B)


@dataclass(frozen=True)
class Explicit:
    """Listed blocks, for all heads alike: row i has ``columns[starts[i]:starts[i + 1]]``, rows behind the last have none."""

    starts: tuple[int, ...]
    columns: tuple[int, ...]
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        held = torch.from_numpy(self._held(grid)).to(i.device)
        wanted = i * grid.columns + j
        return everywhere(torch.isin(wanted, held) & (j < grid.columns), h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        held = self._held(grid)
        found: Positions = held[np.isin(held // max(1, grid.columns), rows)]
        return found

    def _held(self, grid: Grid) -> Positions:
        starts, columns = np.asarray(self.starts, dtype=np.int64), np.asarray(self.columns, dtype=np.int64)
        rows = np.repeat(np.arange(len(starts) - 1, dtype=np.int64), np.diff(starts))
        inside = columns < grid.columns
        return distinct(rows[inside] * grid.columns + columns[inside])


@dataclass(frozen=True)
class Document:
    """The blocks in which a query and a key position share a document, one document after the other from position 0.

    Args:
        lengths: positions in each document; what lies behind the last is one more document.
    """

    lengths: tuple[int, ...] = ()
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        ends = torch.tensor(self.lengths, dtype=torch.int64, device=i.device).cumsum(0)
        of: Callable[[Tensor], Tensor] = lambda position: torch.bucketize(position, ends, right=True)  # noqa: E731
        first, last = of(i * grid.q_block), of((i + 1) * grid.q_block - 1)
        return everywhere((of(j * grid.k_block) <= last) & (of((j + 1) * grid.k_block - 1) >= first), h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        bounds = np.append(0, np.cumsum(np.asarray(self.lengths, dtype=np.int64)))
        first, last = (np.searchsorted(bounds, at, side="right") for at in (rows * grid.q_block, (rows + 1) * grid.q_block - 1))
        ends = np.append(bounds[1:], max(bounds[-1], grid.columns * grid.k_block))
        return spread(rows, bounds[first - 1] // grid.k_block, -(-ends[last - 1] // grid.k_block), 1, grid)


@dataclass(frozen=True)
class Near:
    """The blocks in which some query token and some key token are near one another in the grid of tokens.

    Args:
        radius: how far apart they may be along each axis.
        curve: the grid, and the order in which blocks count its tokens. Those in front of it are near to all.
    """

    radius: tuple[int, ...]
    curve: Curve
    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        held = torch.from_numpy(self.codes(0, grid.rows, grid)).to(i.device)
        return everywhere(torch.isin(i * grid.columns + j, held) & (j < grid.columns), h)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        found = near(self.curve, self.radius, grid.q_block, grid.k_block)
        row, column = np.divmod(found, -(-len(self.curve) // grid.k_block))
        kept = np.isin(row, rows) & (column < grid.columns)
        return row[kept] * grid.columns + column[kept]

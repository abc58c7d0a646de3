"""Patterns whose blocks depend on the data: what is known of them from sizes alone.

As patterns they stand for every block that they may choose, so a relation of them is a bound. Which blocks it is in a call says a
selection (``dilcompile.lowering.selection``), made from the queries and keys, or given by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.composed import AllOf, AnyOf
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import lists_of
from dilcompile.blocks.patterns import Explicit, Local, Pattern, spread
from dilcompile.progression import Positions

# Which ``dilcompile.lowering.estimators`` has.
ESTIMATORS = ("pooled", "antidiagonal", "vertical_slash")


@dataclass(frozen=True)
class _Every:
    """Every block: what a choice is made from."""

    by_head = False

    def contains(self, h: Tensor, i: Tensor, j: Tensor, grid: Grid) -> Tensor:
        """See ``Pattern``."""
        return torch.ones_like(h + i + j, dtype=torch.bool)

    def codes(self, h: int, rows: Positions, grid: Grid) -> Positions:
        """See ``Pattern``."""
        return spread(rows, np.zeros_like(rows), np.full_like(rows, grid.columns), 1, grid)


@dataclass(frozen=True)
class Scored(_Every):
    """The blocks of each row that hold the most weight by an estimate, for each batch row and query head; the row's own always.

    Args:
        estimator: one of ``ESTIMATORS``.
        most: blocks of a row at most, its own among them; but all of its own ones in any case.
        mass: as few of the best as hold this share of the estimated weight; None: all ``most``.
    """

    estimator: str
    most: int
    mass: float | None = None


@dataclass(frozen=True)
class Given(_Every):
    """The blocks that come with the call, at most so many a row."""

    most: int


def leaves(pattern: Pattern) -> list[Pattern]:
    """The patterns that a pattern is composed of."""
    return [leaf for part in pattern.parts for leaf in leaves(part)] if isinstance(pattern, AnyOf | AllOf) else [pattern]


def is_adaptive(pattern: Pattern) -> bool:
    """Do its blocks depend on the data?"""
    return any(isinstance(leaf, Scored | Given) for leaf in leaves(pattern))


def is_given(pattern: Pattern) -> bool:
    """Do blocks come with the call?"""
    return any(isinstance(leaf, Given) for leaf in leaves(pattern))


def certain(pattern: Pattern) -> Pattern:
    """Blocks that the pattern holds whatever the data."""
    if isinstance(pattern, Scored):
        return Local(0, 0)
    if isinstance(pattern, Given):
        return Explicit((0,), ())
    return replace(pattern, parts=tuple(map(certain, pattern.parts))) if isinstance(pattern, AnyOf | AllOf) else pattern


def widest_own(grid: Grid) -> int:
    """The most columns that stand beside a row."""
    return -(-(grid.q_block - 1) // grid.k_block) + 1


@lru_cache(maxsize=256)
def capacity(pattern: Pattern, grid: Grid, heads: int) -> int:
    """A bound on the blocks of a row, from sizes alone."""
    if isinstance(pattern, AnyOf | AllOf) and is_adaptive(pattern):
        parts = [capacity(part, grid, heads) for part in pattern.parts]
        found = sum(parts) if isinstance(pattern, AnyOf) else min(parts)
    elif isinstance(pattern, Scored):
        found = max(pattern.most, widest_own(grid))
    elif isinstance(pattern, Given):
        found = pattern.most
    else:
        lists = [lists_of(pattern.codes(head, grid.rows, grid), grid) for head in range(heads if pattern.by_head else 1)]
        found = max((int(np.diff(one.starts).max(initial=0)) for one in lists), default=0)
    return min(found, grid.columns)


def most_pairs(pattern: Pattern, grid: Grid, heads: int) -> int:
    """A bound on the pairs of one query head, from sizes alone: every row's own columns, and whole blocks up to the capacity.

    It is what is computed where the first ``capacity`` blocks are all there and whole, as under a causal mask.
    """
    rows = grid.rows
    low, high = grid.reach(rows)
    own, num_own = np.zeros_like(rows), np.zeros_like(rows)
    if _holds_own(pattern):
        first, last = grid.beside(rows)
        for column in (first + n for n in range(widest_own(grid))):
            there = (column <= last) & (column >= low) & (column < high)
            own[there] += grid.pairs(rows[there], column[there])
            num_own += there
    others = np.maximum(0, np.minimum(capacity(pattern, grid, heads), high - low) - num_own)
    queries = np.minimum((rows + 1) * grid.q_block, grid.q_stop) - np.maximum(rows * grid.q_block, grid.q_start)
    all_keys = replace(grid, k_block=max(1, grid.k_len)).pairs(rows, np.zeros_like(rows))
    return int(np.minimum(own + others * queries * grid.k_block, all_keys).sum())


def _holds_own(pattern: Pattern) -> bool:
    """Are the columns beside each row among the blocks for certain?"""
    return isinstance(pattern, Scored | Local) or (isinstance(pattern, AnyOf) and any(map(_holds_own, pattern.parts)))

"""Arithmetic progressions of positions: one, and one per query row held as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


def distinct(positions: Positions) -> Positions:
    """Each number once, ascending. (``numpy.unique`` hashes, which takes many times as long on numbers that come in runs.)"""
    positions = np.sort(positions[_changes(positions)])
    found: Positions = positions[_changes(positions)]
    return found


def _changes(positions: Positions) -> npt.NDArray[np.bool_]:
    return np.append(True, positions[1:] != positions[:-1])[: len(positions)]


@dataclass(frozen=True)
class Progression:
    """Positions ``start, start + step, ...`` below ``stop``, as in ``range``."""

    start: int
    stop: int
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}:{self.step}"

    def positions(self) -> range:
        """The same positions as a ``range``."""
        return range(self.start, self.stop, self.step)


@dataclass(frozen=True)
class RowKeys:
    """For each of R query rows the keys ``first, first + step, ...`` below ``stop``; ``first``, ``stop`` are int64 [R]."""

    first: Positions
    stop: Positions
    step: int

    @property
    def count(self) -> Positions:
        """Keys per row, int64 [R]."""
        found: Positions = np.maximum(0, -((self.first - self.stop) // self.step))
        return found

    def limited(self, low: Positions | int, high: Positions | int) -> RowKeys:
        """The keys in ``[low, high)``; the bounds broadcast over the rows."""
        missing = np.maximum(0, low - self.first)
        return RowKeys(self.first + -(-missing // self.step) * self.step, np.minimum(self.stop, high), self.step)

    def rows(self, chosen: npt.NDArray[np.bool_] | Positions) -> RowKeys:
        """The same keys for some of the rows; ``chosen`` is bool [R], or their numbers."""
        return RowKeys(self.first[chosen], self.stop[chosen], self.step)

    def meet(self, other: RowKeys) -> RowKeys:
        """The keys common to both, row by row (Chinese remainder theorem)."""
        divisor = gcd(self.step, other.step)
        step = self.step * other.step // divisor
        gap = other.first - self.first
        inverse = pow(self.step // divisor, -1, other.step // divisor) if other.step > divisor else 0
        common = self.first + self.step * ((gap // divisor * inverse) % (other.step // divisor))
        low = np.maximum(self.first, other.first)
        common = common + -(-(low - common) // step) * step
        stop = np.where(gap % divisor == 0, np.minimum(self.stop, other.stop), common)
        return RowKeys(common, stop, step)


def union_count(parts: Sequence[RowKeys]) -> Positions:
    """How many keys the union of ``parts`` has in each row, int64 [R].

    Inclusion and exclusion on the last part; rows in which it is empty have none of it, and rows in which it swallows all the
    others stop at once, so nested parts (geometric branches) cost linear time instead of 2**n.
    """
    last, rest = parts[-1], parts[:-1]
    total: Positions = last.count.copy()
    if not rest:
        return total
    some = np.flatnonzero(total)
    shared, own = [part.rows(some) for part in rest], last.rows(some)
    overlaps = [part.meet(own) for part in shared]
    swallowed = np.ones(len(some), dtype=np.bool_)
    for part, overlap in zip(shared, overlaps, strict=True):
        swallowed &= part.count == overlap.count
    open_rows = np.ones(len(total), dtype=np.bool_)
    open_rows[some[swallowed]] = False
    if open_rows.any():
        total[open_rows] += union_count([part.rows(open_rows) for part in rest])
    if not swallowed.all():
        total[some[~swallowed]] -= union_count([overlap.rows(~swallowed) for overlap in overlaps])
    return total


@dataclass(frozen=True)
class SomeRows:
    """Keys of some query rows, which are numbered by ``rows``, int64 [R], ascending; all others have none."""

    rows: Positions
    keys: RowKeys

    def at(self, rows: Positions) -> RowKeys:
        """The keys of these rows, ascending; those of a row without any are empty."""
        if not len(self.rows):
            return RowKeys(np.zeros_like(rows), np.zeros_like(rows), self.keys.step)
        found = np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)
        there = self.rows[found] == rows
        return RowKeys(np.where(there, self.keys.first[found], 0), np.where(there, self.keys.stop[found], 0), self.keys.step)


def union_count_of_rows(parts: Sequence[SomeRows], number: int) -> Positions:
    """``union_count`` of parts that few of ``number`` rows have, as the coarse branches do: int64 [number]."""
    total = np.zeros(number, dtype=np.int64)
    for index, part in enumerate(parts):
        # What was counted without this part is counted anew in the rows that have it.
        has = part.keys.count > 0
        rows = part.rows[has]
        if len(rows):
            total[rows] = union_count([*(each.at(rows) for each in parts[:index]), part.keys.rows(has)])
    return total

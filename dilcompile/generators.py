"""Generators: sets of (head, query position, key position) pairs, of which relations are made.

Each says the same thing in several ways: ``contains`` of single pairs (what the oracle asks), and the keys of whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.adaptive import is_adaptive
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.heads import from_head
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.patterns import Pattern
from dilcompile.position_sets import between, joined, meet, reached
from dilcompile.progression import Positions, Progression, RowKeys, distinct

Limit = int | None


def least(one: Limit, other: Limit) -> Limit:
    """The narrower of two limits; None is no limit."""
    return other if one is None else one if other is None else min(one, other)


@dataclass(frozen=True)
class Everything:
    """Every key."""

    def contains(self, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """Bool over the broadcast of the int64 tensors ``h`` (query head), ``t`` and ``k`` (positions)."""
        return torch.ones_like(h + t + k, dtype=torch.bool)

    def rows(self, h: int, t: Positions, k_len: int) -> RowKeys:
        """The keys of head ``h`` at the query positions ``t``."""
        return RowKeys(np.zeros_like(t), np.full_like(t, k_len), 1)

    def active(self, h: int, start: int, stop: int) -> Positions:
        """The query positions in ``[start, stop)`` that have keys here."""
        return np.arange(start, stop, dtype=np.int64)

    def needed(self, kv_head: int, rows: Progression, k_len: int, left: Limit, right: Limit) -> list[Progression]:
        """The keys that query positions ``rows`` read; see ``Generator``."""
        return reached(rows, 1, left, right, 0, k_len)

    def __str__(self) -> str:
        return "everything"


@dataclass(frozen=True)
class Segment:
    """One dilated branch: segments of ``length`` keys, in each the keys of one residue class modulo ``rate``.

    Args:
        length: keys per segment; segments start at position 0.
        rate: distance of neighbouring keys.
        residues: the residue class of each key head; None: each query attends its own class.
        group: query heads per key head.
        heads: half-open range of the query heads that have this branch; None for all.
    """

    length: int
    rate: int
    residues: tuple[int, ...] | None = None
    group: int = 1
    heads: tuple[int, int] | None = None

    def contains(self, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """Bool over the broadcast of the int64 tensors ``h`` (query head), ``t`` and ``k`` (positions)."""
        segment = torch.div(t, self.length, rounding_mode="floor")
        found = segment == torch.div(k, self.length, rounding_mode="floor")
        row, key = torch.remainder(t, self.length) % self.rate, torch.remainder(k, self.length) % self.rate
        if self.residues is None:
            found = found & (row == key)
        else:
            residue = torch.tensor(self.residues, device=h.device)[torch.div(h, self.group, rounding_mode="floor")]
            found = found & (row == residue) & (key == residue)
        if self.heads is not None:
            found = found & (h >= self.heads[0]) & (h < self.heads[1])
        return found & torch.ones_like(h, dtype=torch.bool)

    def rows(self, h: int, t: Positions, k_len: int) -> RowKeys:
        """The keys of head ``h`` at the query positions ``t``, which must be active."""
        start = t - t % self.length
        stop = np.minimum(start + self.length, k_len)
        residue = t % self.length % self.rate if self.residues is None else self.residues[h // self.group]
        stop = np.where(self.has(h, t), stop, start)
        return RowKeys(start + residue, stop, self.rate).limited(0, k_len)

    def active(self, h: int, start: int, stop: int) -> Positions:
        """The query positions in ``[start, stop)`` that have keys here."""
        if self.residues is not None and self.heads is None and self.length % self.rate == 0:
            return np.arange(start + (self.residues[h // self.group] - start) % self.rate, stop, self.rate, dtype=np.int64)
        t = np.arange(start, stop, dtype=np.int64)
        return t[self.has(h, t)]

    def of_heads(self, kv_start: int, kv_stop: int) -> Segment:
        """The branch as some key heads and their query heads have it, which are counted from 0 then."""
        residues = None if self.residues is None else self.residues[kv_start:kv_stop]
        if self.heads is None:
            return replace(self, residues=residues)
        first, heads = kv_start * self.group, (kv_stop - kv_start) * self.group
        low, high = (min(max(0, bound - first), heads) for bound in self.heads)
        return replace(self, residues=residues, heads=None if (low, high) == (0, heads) else (low, high))

    def has(self, h: int, t: Positions) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which of the query positions ``t`` have keys here."""
        if self.heads is not None and not self.heads[0] <= h < self.heads[1]:
            return np.zeros(t.shape, dtype=np.bool_)
        if self.residues is None:
            return np.ones(t.shape, dtype=np.bool_)
        inside = t if self.length % self.rate == 0 else t % self.length
        return np.asarray(inside % self.rate == self.residues[h // self.group], dtype=np.bool_)

    def needed(self, kv_head: int, rows: Progression, k_len: int, left: Limit, right: Limit) -> list[Progression]:
        """The keys that query positions ``rows`` read; see ``Generator``."""
        if self.heads is not None:
            first, last = kv_head * self.group, (kv_head + 1) * self.group
            if last <= self.heads[0] or first >= self.heads[1]:
                return []
        rows = between(rows, 0, -(-k_len // self.length) * self.length)
        if not len(rows):
            return []
        whole = self._whole(rows, k_len, left, right)
        begin, end = rows.start // self.length * self.length, rows.positions()[-1] + 1
        found = []
        for start in (*range(begin, whole.start, self.length), *range(whole.stop, end, self.length)):
            stop = start + self.length
            found += self._reached(kv_head, between(rows, start, stop), start, min(stop, k_len), left, right)
        if len(whole):
            # All of them as one, of which every key is read that is in the class of a row.
            found += self._reached(kv_head, between(rows, whole.start, whole.stop), whole.start, whole.stop, None, None)
        return found

    def _whole(self, rows: Progression, k_len: int, left: Limit, right: Limit) -> Progression:
        """The neighbouring whole segments whose rows read every key of their class, so that one can't tell segments apart."""
        begin = -(-rows.start // self.length) * self.length
        end = min(rows.positions()[-1] + rows.step, k_len) // self.length * self.length
        alike = self.length % self.rate == 0 and self.length % rows.step == 0
        # In a run of rows each key is a row too, which sees itself.
        unmasked = (left is None and right is None) or (rows.step == 1 and min(left or 0, right or 0) >= 0)
        return Progression(begin, end if alike and unmasked and end > begin else begin)

    def _reached(self, kv_head: int, rows: Progression, start: int, stop: int, left: Limit, right: Limit) -> list[Progression]:
        """The keys in ``[start, stop)`` that ``rows`` read, where that is all of a segment and they are in it."""
        if self.residues is not None:
            rows = meet(rows, Progression(start + self.residues[kv_head], rows.stop, self.rate))
        return reached(rows, self.rate, left, right, start, stop)

    def __str__(self) -> str:
        if self.residues is None:
            residue = "own"
        elif len(set(self.residues)) == 1:
            residue = str(self.residues[0])
        else:
            residue = "/".join(map(str, self.residues))
        heads = "" if self.heads is None else f", heads {self.heads[0]}:{self.heads[1]}"
        return f"segment({self.length}, rate {self.rate}, residue {residue}{heads})"


@dataclass(frozen=True)
class Window:
    """Keys with ``-right <= t - k <= left`` and ``(t - k) % step == 0``; None for no limit."""

    left: int | None
    right: int | None
    step: int = 1

    def contains(self, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """Bool over the broadcast of the int64 tensors ``h`` (query head), ``t`` and ``k`` (positions)."""
        distance = t - k + torch.zeros_like(h)
        found = torch.remainder(distance, self.step) == 0
        if self.left is not None:
            found = found & (distance <= self.left)
        if self.right is not None:
            found = found & (distance >= -self.right)
        return found

    def rows(self, h: int, t: Positions, k_len: int) -> RowKeys:
        """The keys of head ``h`` at the query positions ``t``."""
        low = np.zeros_like(t) if self.left is None else np.maximum(0, t - self.left)
        high = np.full_like(t, k_len) if self.right is None else np.minimum(k_len, t + self.right + 1)
        return RowKeys(low + (t - low) % self.step, high, self.step)

    def active(self, h: int, start: int, stop: int) -> Positions:
        """The query positions in ``[start, stop)`` that have keys here."""
        return np.arange(start, stop, dtype=np.int64)

    def needed(self, kv_head: int, rows: Progression, k_len: int, left: Limit, right: Limit) -> list[Progression]:
        """The keys that query positions ``rows`` read; see ``Generator``."""
        return reached(rows, self.step, least(left, self.left), least(right, self.right), 0, k_len)

    def __str__(self) -> str:
        left = "inf" if self.left is None else str(self.left)
        right = "inf" if self.right is None else str(self.right)
        return f"window({left}, {right}" + (f", step {self.step})" if self.step > 1 else ")")


@dataclass(frozen=True)
class Sinks:
    """The first ``count`` keys."""

    count: int

    def contains(self, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """Bool over the broadcast of the int64 tensors ``h`` (query head), ``t`` and ``k`` (positions)."""
        return (k < self.count) & torch.ones_like(h + t, dtype=torch.bool)

    def rows(self, h: int, t: Positions, k_len: int) -> RowKeys:
        """The keys of head ``h`` at the query positions ``t``."""
        return RowKeys(np.zeros_like(t), np.full_like(t, min(self.count, k_len)), 1)

    def active(self, h: int, start: int, stop: int) -> Positions:
        """The query positions in ``[start, stop)`` that have keys here."""
        return np.arange(start, stop, dtype=np.int64)

    def needed(self, kv_head: int, rows: Progression, k_len: int, left: Limit, right: Limit) -> list[Progression]:
        """The keys that query positions ``rows`` read; see ``Generator``."""
        return reached(rows, 1, left, right, 0, min(self.count, k_len))

    def __str__(self) -> str:
        return f"sinks({self.count})"


@dataclass(frozen=True)
class Blocks:
    """The pairs in the blocks of a pattern.

    Args:
        grid: the blocks of the whole problem; it stays as it is for a part of the queries or keys.
        group: query heads per key head.
    """

    grid: Grid
    pattern: Pattern
    group: int = 1

    def contains(self, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """Bool over the broadcast of the int64 tensors ``h`` (query head), ``t`` and ``k`` (positions)."""
        row = torch.div(t, self.grid.q_block, rounding_mode="floor").clamp(min=0)
        column = torch.div(k, self.grid.k_block, rounding_mode="floor")
        return self.pattern.contains(h, row, column, self.grid) & (t >= 0)

    def of_heads(self, kv_start: int, kv_stop: int) -> Blocks:
        """The blocks as some key heads and their query heads have them, which are counted from 0 then."""
        return replace(self, pattern=from_head(self.pattern, kv_start * self.group))

    @property
    def adaptive(self) -> bool:
        """Do the blocks depend on the data? These here are then all that there may be."""
        return is_adaptive(self.pattern)

    def lists(self, head: int, grid: Grid) -> BlockLists:
        """The blocks in which the queries and keys of ``grid`` meet under this query head."""
        rows, columns = np.divmod(self.pattern.codes(head, grid.rows, self.grid), max(1, self.grid.columns))
        there = columns < grid.columns
        return lists_of(rows[there] * grid.columns + columns[there], grid)

    def needed(self, kv_head: int, rows: Progression, k_len: int, left: Limit, right: Limit) -> list[Progression]:
        """The keys that query positions ``rows`` read; see ``Generator``."""
        if not len(rows):
            return []
        size = self.grid
        last = rows.positions()[-1]
        lines = np.arange(max(0, rows.start) // size.q_block, max(0, last) // size.q_block + 1, dtype=np.int64)
        heads = range(kv_head * self.group, (kv_head + 1) * self.group) if self.pattern.by_head else range(1)
        codes = distinct(np.concatenate([self.pattern.codes(h, lines, size) for h in heads]))
        line, column = np.divmod(codes, max(1, size.columns))
        # The own rows in each block row: the first and the last of them.
        low = rows.start + -(-np.maximum(0, line * size.q_block - rows.start) // rows.step) * rows.step
        high = np.minimum(last, rows.start + ((line + 1) * size.q_block - 1 - rows.start) // rows.step * rows.step)
        first, stop = column * size.k_block, np.minimum((column + 1) * size.k_block, k_len)
        if left is not None and right is not None and left + right + 1 < rows.step:
            found = []
            for block in range(len(line)):
                inside = Progression(int(low[block]), int(high[block]) + 1, rows.step)
                found += reached(inside, 1, left, right, int(first[block]), int(stop[block]))
            return found
        first = first if left is None else np.maximum(first, low - left)
        stop = stop if right is None else np.minimum(stop, high + right + 1)
        there = (low <= high) & (first < stop)
        return joined(first[there], stop[there])

    def __str__(self) -> str:
        return f"blocks({self.grid.q_block} x {self.grid.k_block}, {self.pattern})"


# Each has ``needed(kv_head, rows, k_len, left, right)``: exactly the keys that some query position of ``rows`` reads under a key
# head with ``-right <= t - k <= left``, as progressions that may meet one another.
#
# Whose rows hold one progression of keys each.
ByRow = Everything | Segment | Window | Sinks
Generator = ByRow | Blocks

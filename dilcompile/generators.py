"""Generators: sets of (head, query position, key position) pairs, of which relations are made.

Each says the same thing in several ways: ``contains`` of single pairs (what the oracle asks), and the keys of whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.adaptive import is_adaptive
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.patterns import Pattern
from dilcompile.progression import Positions, Progression, RowKeys, distinct


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

    def needed(self, kv_head: int, rows: Progression, k_len: int) -> list[Progression]:
        """Keys that the query positions ``rows`` may read under this key head, before the mask."""
        return [Progression(0, k_len)]

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
        stop = np.where(self._has(h, t), stop, start)
        return RowKeys(start + residue, stop, self.rate).limited(0, k_len)

    def active(self, h: int, start: int, stop: int) -> Positions:
        """The query positions in ``[start, stop)`` that have keys here."""
        t = np.arange(start, stop, dtype=np.int64)
        return t[self._has(h, t)]

    def _has(self, h: int, t: Positions) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        if self.heads is not None and not self.heads[0] <= h < self.heads[1]:
            return np.zeros(t.shape, dtype=np.bool_)
        if self.residues is None:
            return np.ones(t.shape, dtype=np.bool_)
        return np.asarray(t % self.length % self.rate == self.residues[h // self.group], dtype=np.bool_)

    def needed(self, kv_head: int, rows: Progression, k_len: int) -> list[Progression]:
        """Keys that the query positions ``rows`` may read under this key head, before the mask."""
        if self.heads is not None:
            first, last = kv_head * self.group, (kv_head + 1) * self.group
            if last <= self.heads[0] or first >= self.heads[1]:
                return []
        found = []
        begin = max(0, rows.start) // self.length * self.length
        for start in range(begin, min(rows.stop, k_len), self.length):
            stop = min(start + self.length, k_len)
            inside = range(max(rows.start, start), min(rows.stop, start + self.length))
            found += [Progression(start + c, stop, self.rate) for c in self._classes(kv_head, inside, start)]
        return found

    def _classes(self, kv_head: int, inside: range, start: int) -> list[int]:
        if self.residues is None:
            return sorted({(t - start) % self.rate for t in inside[: self.rate]})
        residue = self.residues[kv_head]
        first = inside.start + (residue - (inside.start - start)) % self.rate
        return [residue] if first < inside.stop else []

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

    def needed(self, kv_head: int, rows: Progression, k_len: int) -> list[Progression]:
        """Keys that the query positions ``rows`` may read under this key head, before the mask."""
        found = []
        for start in range(rows.start, min(rows.stop, rows.start + self.step)):
            last = start + (rows.stop - 1 - start) // self.step * self.step
            low = start % self.step if self.left is None else start - self.left // self.step * self.step
            low = low if low >= 0 else low % self.step
            high = k_len if self.right is None else min(k_len, last + self.right + 1)
            found.append(Progression(low, high, self.step))
        if self.step > 1 and len(found) == self.step:
            return [Progression(min(p.start for p in found), max(p.stop for p in found))]
        return found

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

    def needed(self, kv_head: int, rows: Progression, k_len: int) -> list[Progression]:
        """Keys that the query positions ``rows`` may read under this key head, before the mask."""
        return [Progression(0, min(self.count, k_len))]

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

    @property
    def adaptive(self) -> bool:
        """Do the blocks depend on the data? These here are then all that there may be."""
        return is_adaptive(self.pattern)

    def lists(self, head: int, grid: Grid) -> BlockLists:
        """The blocks in which the queries and keys of ``grid`` meet under this query head."""
        rows, columns = np.divmod(self.pattern.codes(head, grid.rows, self.grid), max(1, self.grid.columns))
        there = columns < grid.columns
        return lists_of(rows[there] * grid.columns + columns[there], grid)

    def needed(self, kv_head: int, rows: Progression, k_len: int) -> list[Progression]:
        """Keys that the query positions ``rows`` may read under this key head, before the mask."""
        size = self.grid
        lines = np.arange(max(0, rows.start) // size.q_block, -(-max(1, rows.stop) // size.q_block), dtype=np.int64)
        heads = range(kv_head * self.group, (kv_head + 1) * self.group) if self.pattern.by_head else range(1)
        columns = distinct(np.concatenate([self.pattern.codes(h, lines, size) for h in heads]) % max(1, size.columns))
        return [
            Progression(int(run[0]) * size.k_block, min((int(run[-1]) + 1) * size.k_block, k_len))
            for run in np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)
            if len(run)
        ]

    def __str__(self) -> str:
        return f"blocks({self.grid.q_block} x {self.grid.k_block}, {self.pattern})"


# Whose rows hold one progression of keys each.
ByRow = Everything | Segment | Window | Sinks
Generator = ByRow | Blocks

"""Relations: how often each (head, query position, key position) pair counts in the softmax.

``multiplicity(h, t, k)`` is 0 for a pair that may not attend. Positions are global: query row ``i`` stands at key
position ``t = i + q_offset``. Everything here is plain arithmetic on positions; no tensor of size S x S is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.patterns import Pattern
from dilcompile.progression import Positions, Progression, RowKeys, union_count

_ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Problem:
    """The sizes and the site's own mask, all plain numbers.

    Args:
        q_offset: key position of query row 0.
        is_causal: only keys ``k <= t``.
        window_left: only keys ``k >= t - window_left``; None for no limit.
        window_right: only keys ``k <= t + window_right``; None for no limit.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    v_dim: int
    q_offset: int = 0
    is_causal: bool = False
    window_left: int | None = None
    window_right: int | None = None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def left(self) -> int | None:
        """Limit on ``t - k``."""
        return self.window_left

    @property
    def right(self) -> int | None:
        """Limit on ``k - t``: 0 when causal."""
        if not self.is_causal:
            return self.window_right
        return 0 if self.window_right is None else min(0, self.window_right)


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


def grid_of(problem: Problem, q_block: int, k_block: int) -> Grid:
    """The blocks of a problem. Queries before position 0 are in none."""
    start, stop = (max(0, problem.q_offset + n) for n in (0, problem.q_len))
    return Grid(q_block, k_block, start, stop, problem.k_len, problem.left, problem.right)


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

    def lists(self, head: int, problem: Problem) -> BlockLists:
        """The blocks in which the problem's queries and keys meet under this query head."""
        grid = grid_of(problem, self.grid.q_block, self.grid.k_block)
        rows, columns = np.divmod(self.pattern.codes(head, grid.rows, self.grid), max(1, self.grid.columns))
        there = columns < grid.columns
        return lists_of(rows[there] * grid.columns + columns[there], grid)

    def needed(self, kv_head: int, rows: Progression, k_len: int) -> list[Progression]:
        """Keys that the query positions ``rows`` may read under this key head, before the mask."""
        size = self.grid
        lines = np.arange(max(0, rows.start) // size.q_block, -(-max(1, rows.stop) // size.q_block), dtype=np.int64)
        heads = range(kv_head * self.group, (kv_head + 1) * self.group) if self.pattern.by_head else range(1)
        columns = np.unique(np.concatenate([self.pattern.codes(h, lines, size) for h in heads]) % max(1, size.columns))
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


@dataclass(frozen=True)
class Term:
    """A generator; with ``dedupe`` it counts only the pairs that no earlier term contains."""

    generator: Generator
    dedupe: bool = False

    def __str__(self) -> str:
        return f"| {self.generator}" if self.dedupe else f"+ {self.generator}"


@dataclass(frozen=True)
class Relation:
    """The sum of the terms, intersected with the problem's own mask (causal and window)."""

    problem: Problem
    terms: tuple[Term, ...]

    def multiplicity(self, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """How often each pair counts.

        Args:
            h: query heads, int64, broadcastable with the others.
            t: query positions (row + q_offset), int64.
            k: key positions, int64, each in ``[0, k_len)``.

        Returns:
            int64 over the broadcast shape.
        """
        total = torch.zeros_like(h + t + k)
        before = torch.zeros_like(total, dtype=torch.bool)
        for term in self.terms:
            found = term.generator.contains(h, t, k)
            total += (found & ~before) if term.dedupe else found
            before |= found
        return total * self.allowed(t, k)

    def allowed(self, t: Tensor, k: Tensor) -> Tensor:
        """The problem's own mask at these positions, bool."""
        distance = t - k
        keep = torch.ones_like(distance, dtype=torch.bool)
        if self.problem.left is not None:
            keep &= distance <= self.problem.left
        if self.problem.right is not None:
            keep &= distance >= -self.problem.right
        return keep

    def pairs(self) -> int:
        """The exact sum of multiplicities over one batch row: all heads, queries and keys."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        for head in range(self.problem.heads):
            kinds.setdefault(tuple(_kind(term.generator, head) for term in self.terms), []).append(head)
        return sum(len(heads) * self._head_pairs(heads[0]) for heads in kinds.values())

    def density(self) -> float:
        """``pairs`` over all pairs (above 1 is possible for a multiset)."""
        return self.pairs() / max(1, self.problem.heads * self.problem.q_len * self.problem.k_len)

    def flops(self, backward: bool = False) -> int:
        """Multiply-adds counted as 2: forward 2*(D + Dv) a pair; backward 2.5 times as much (five products)."""
        size = self.problem
        forward = 2 * (size.head_dim + size.v_dim)
        return size.batch * self.pairs() * (2 * (3 * size.head_dim + 2 * size.v_dim) if backward else forward)

    def keys_needed(self, rows: Progression, kv_head: int) -> list[Progression]:
        """The key positions that the query positions ``rows`` (step 1) read under one key head.

        A superset may be named where a term is not of one step; nothing outside is ever read. Duplicates between terms stay.
        """
        size = self.problem
        low = 0 if size.left is None else max(0, rows.start - size.left)
        high = size.k_len if size.right is None else min(size.k_len, rows.stop + size.right)
        found = []
        for term in self.terms:
            for keys in term.generator.needed(kv_head, rows, size.k_len):
                first = keys.start + -(-max(0, low - keys.start) // keys.step) * keys.step
                clipped = Progression(first, min(keys.stop, high), keys.step)
                if len(clipped) and clipped not in found:
                    found.append(clipped)
        return found

    def at(self, q_len: int, k_len: int, q_offset: int) -> Relation:
        """The same terms over other lengths (a document, a shard, a decode step)."""
        return replace(self, problem=replace(self.problem, q_len=q_len, k_len=k_len, q_offset=q_offset))

    def _head_pairs(self, head: int) -> int:
        return sum(self._term_pairs(index, head) for index in range(len(self.terms)))

    def _block_pairs(self, index: int, head: int) -> int:
        """``_term_pairs`` where blocks are involved."""
        term, size = self.terms[index], self.problem
        if isinstance(term.generator, Blocks) and (index == 0 or not term.dedupe):
            lists = term.generator.lists(head, size)
            grid = grid_of(size, term.generator.grid.q_block, term.generator.grid.k_block)
            return int(grid.pairs(lists.owners(), lists.blocks).sum())
        # Which pairs an earlier term holds is asked pair by pair.
        total, h, k = 0, torch.tensor(head), torch.arange(size.k_len)
        step = max(1, _ROWS_AT_ONCE // max(1, size.k_len))
        for start in range(size.q_offset, size.q_offset + size.q_len, step):
            t = torch.arange(start, min(start + step, size.q_offset + size.q_len))[:, None]
            found = term.generator.contains(h, t, k) & self.allowed(t, k)
            for earlier in self.terms[:index]:
                found = found & ~earlier.generator.contains(h, t, k)
            total += int(found.sum())
        return total

    def _term_pairs(self, index: int, head: int) -> int:
        if any(isinstance(term.generator, Blocks) for term in self._involved(index)):
            return self._block_pairs(index, head)
        start, stop = self.problem.q_offset, self.problem.q_offset + self.problem.q_len
        period = self._period(index)
        # Whole periods hold equally many pairs, so one of them is counted.
        first, last = -(-max(0, start) // period), min(stop, self.problem.k_len) // period
        if last - first < 2:
            return self._rows_pairs(index, head, start, stop)
        whole = (last - first) * self._rows_pairs(index, head, first * period, (first + 1) * period)
        before = self._rows_pairs(index, head, start, first * period)
        return before + whole + self._rows_pairs(index, head, last * period, stop)

    def _involved(self, index: int) -> tuple[Term, ...]:
        """The terms that say how many pairs a term adds."""
        return self.terms[: index + 1] if self.terms[index].dedupe else (self.terms[index],)

    def _period(self, index: int) -> int:
        involved = [term.generator for term in self._involved(index)]
        never = self.problem.k_len + 1
        if not all(isinstance(generator, Segment) for generator in involved):
            return never
        return min(never, lcm(*(g.length for g in involved if isinstance(g, Segment))))

    def _rows_pairs(self, index: int, head: int, start: int, stop: int) -> int:
        term, total = self.terms[index], 0
        generator, *before = (_by_row(each.generator) for each in (term, *self.terms[:index]))
        for t in self._active(generator, head, start, stop):
            keys = self._masked(generator.rows(head, t, self.problem.k_len), t)
            total += int(keys.count.sum())
            if term.dedupe and index:
                earlier = [each.rows(head, t, self.problem.k_len).meet(keys) for each in before]
                total -= int(union_count(earlier).sum())
        return total

    def _active(self, generator: ByRow, head: int, start: int, stop: int) -> Iterator[Positions]:
        for low in range(start, stop, _ROWS_AT_ONCE):
            t = generator.active(head, low, min(stop, low + _ROWS_AT_ONCE))
            if len(t):
                yield t

    def _masked(self, keys: RowKeys, t: Positions) -> RowKeys:
        low = 0 if self.problem.left is None else t - self.problem.left
        high = self.problem.k_len if self.problem.right is None else t + self.problem.right + 1
        return keys.limited(low, high)

    def __str__(self) -> str:
        terms = " ".join(map(str, self.terms)).removeprefix("+ ").removeprefix("| ") or "nothing"
        size = self.problem
        mask = " & causal" if size.is_causal else ""
        if size.window_left is not None or size.window_right is not None:
            mask += f" & {Window(size.window_left, size.window_right)}"
        return f"{terms}{mask}"


def _by_row(generator: Generator) -> ByRow:
    assert not isinstance(generator, Blocks), "the keys of a row of blocks are no progression"
    return generator


def _kind(generator: Generator, head: int) -> object:
    """What distinguishes heads under a generator: equal kinds have equal keys."""
    if isinstance(generator, Blocks):
        return head if generator.pattern.by_head else None
    if not isinstance(generator, Segment):
        return None
    here = generator.heads is None or generator.heads[0] <= head < generator.heads[1]
    return here, None if generator.residues is None else generator.residues[head // generator.group]

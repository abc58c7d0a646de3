"""Relations: how often each (head, query position, key position) pair counts in the softmax.

``multiplicity(h, t, k)`` is 0 for a pair that may not attend. Positions are global: query row ``i`` stands at key
position ``t = i + q_offset``. Everything here is plain arithmetic on positions; no tensor of size S x S is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import lcm

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.adaptive import most_pairs
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.heads import kind_of_head
from dilcompile.generators import Blocks, ByRow, Generator, Segment, Window
from dilcompile.progression import Positions, Progression, RowKeys, SomeRows, union_count_of_rows

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


def grid_of(problem: Problem, q_block: int, k_block: int) -> Grid:
    """The blocks of a problem. Queries before position 0 are in none."""
    start, stop = (max(0, problem.q_offset + n) for n in (0, problem.q_len))
    return Grid(q_block, k_block, start, stop, problem.k_len, problem.left, problem.right)


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

    @property
    def is_bound(self) -> bool:
        """Do blocks depend on the data, so that this is all that there may be?"""
        return any(isinstance(term.generator, Blocks) and term.generator.adaptive for term in self.terms)

    def pairs(self) -> int:
        """The exact sum of multiplicities over one batch row: all heads, queries and keys; a bound on it where blocks depend on
        the data."""
        alike = ((index, heads) for index in range(len(self.terms)) for heads in self._alike_heads(index))
        return sum(len(heads) * self._term_pairs(index, heads[0]) for index, heads in alike)

    def pairs_by_head(self) -> Positions:
        """``pairs`` of each query head, int64 [H]."""
        found = np.zeros(self.problem.heads, dtype=np.int64)
        for index in range(len(self.terms)):
            for heads in self._alike_heads(index):
                found[heads] += self._term_pairs(index, heads[0])
        return found

    def pairs_of_rows(self) -> Iterator[tuple[Positions, Positions]]:
        """Query positions and what they add to ``pairs``, int64 both; a position may come many times, with less than nothing too.

        In time of rows and of blocks times their queries. Not where blocks depend on the data.
        """
        for index in range(len(self.terms)):
            for heads in self._alike_heads(index):
                for t, counts in self._term_rows(index, heads[0]):
                    yield t, len(heads) * counts

    def _alike_heads(self, index: int) -> list[list[int]]:
        """The query heads, those together to which a term adds the same keys."""
        kinds: dict[tuple[object, ...], list[int]] = {}
        involved = self._involved(index)
        for head in range(self.problem.heads):
            kinds.setdefault(tuple(_kind(term.generator, head) for term in involved), []).append(head)
        return list(kinds.values())

    def density(self) -> float:
        """``pairs`` over all pairs (above 1 is possible for a multiset)."""
        return self.pairs() / max(1, self.problem.heads * self.problem.q_len * self.problem.k_len)

    def flops(self, backward: bool = False) -> int:
        """Multiply-adds counted as 2: forward 2*(D + Dv) a pair; backward 2.5 times as much (five products)."""
        size = self.problem
        forward = 2 * (size.head_dim + size.v_dim)
        return size.batch * self.pairs() * (2 * (3 * size.head_dim + 2 * size.v_dim) if backward else forward)

    def keys_needed(self, rows: Progression, kv_head: int) -> list[Progression]:
        """The key positions that the query positions ``rows`` read under one key head: no other, though several times where terms
        meet. Where blocks depend on the data: all that may be read."""
        return next(self.keys_needed_by_heads(rows, [kv_head]))

    def keys_needed_by_heads(self, rows: Progression, kv_heads: Sequence[int]) -> Iterator[list[Progression]]:
        """``keys_needed`` of each of the key heads; a term is asked once for all to which it gives the same."""
        size, found = self.problem, [dict[Progression, None]() for _ in kv_heads]
        for term, first in zip(self.terms, _first_alike(self), strict=True):
            known: dict[int, dict[Progression, None]] = {}
            for keys, kv_head in zip(found, kv_heads, strict=True):
                like = first[kv_head]
                if like not in known:
                    known[like] = dict.fromkeys(term.generator.needed(like, rows, size.k_len, size.left, size.right))
                keys.update(known[like])
        return map(list, found)

    def alike_kv_heads(self) -> list[list[int]]:
        """The key heads, those together of which the same keys are read at every position."""
        kinds: dict[tuple[int, ...], list[int]] = {}
        first = _first_alike(self)
        for kv_head in range(self.problem.kv_heads):
            kinds.setdefault(tuple(of_term[kv_head] for of_term in first), []).append(kv_head)
        return list(kinds.values())

    def at(self, q_len: int, k_len: int, q_offset: int) -> Relation:
        """The same terms over other lengths (a document, a shard, a decode step)."""
        return replace(self, problem=replace(self.problem, q_len=q_len, k_len=k_len, q_offset=q_offset))

    def of_heads(self, kv_start: int, kv_stop: int) -> Relation:
        """The same relation as the key heads from ``kv_start`` to before ``kv_stop`` and their query heads see it; both are
        counted from 0 then."""
        size = replace(self.problem, heads=(kv_stop - kv_start) * self.problem.group, kv_heads=kv_stop - kv_start)
        terms = tuple(
            replace(term, generator=term.generator.of_heads(kv_start, kv_stop))
            if isinstance(term.generator, Segment | Blocks)
            else term
            for term in self.terms
        )
        return Relation(size, terms)

    def _block_pairs(self, index: int, head: int) -> int:
        """``_term_pairs`` where blocks are involved."""
        term, size = self.terms[index], self.problem
        generator = term.generator
        if isinstance(generator, Blocks) and generator.adaptive:
            assert len(self.terms) == 1, "blocks that the data chooses stand alone"
            return most_pairs(generator.pattern, grid_of(size, generator.grid.q_block, generator.grid.k_block), size.heads)
        held = self._blocks_involved(index)
        if len(held) > 1 or (term.dedupe and index):
            return sum(int(counts.sum()) for _, counts in self._term_rows(index, head))
        grid = grid_of(size, held[0].grid.q_block, held[0].grid.k_block)
        lists = held[0].lists(head, grid)
        return int(grid.pairs(lists.owners(), lists.blocks).sum())

    def _term_rows(self, index: int, head: int) -> Iterator[tuple[Positions, Positions]]:
        """Query positions and the pairs that a term adds to theirs."""
        held, size = self._blocks_involved(index), self.problem
        rows = (size.q_offset, size.q_offset + size.q_len)
        if not held:
            yield from self._counts_of_rows(index, head, *rows)
        elif len(held) > 1:
            yield from self._counts_one_by_one(index, head)
        elif self.terms[index].generator is held[0]:
            yield from self._counts_in_blocks(index, head, held[0])
        else:
            yield from self._counts_of_rows(index, head, *rows)
            yield from ((t, -counts) for t, counts in self._counts_in_blocks(index, head, held[0]))

    def _blocks_involved(self, index: int) -> list[Blocks]:
        return [each.generator for each in self._involved(index) if isinstance(each.generator, Blocks)]

    def _counts_in_blocks(self, index: int, head: int, blocks: Blocks) -> Iterator[tuple[Positions, Positions]]:
        """The pairs of a term in these blocks; with ``dedupe``, those that no earlier term by row holds."""
        size, generator = self.problem, self.terms[index].generator
        grid = grid_of(size, blocks.grid.q_block, blocks.grid.k_block)
        lists, before = blocks.lists(head, grid), self._by_row_before(index) if self.terms[index].dedupe else []
        rows, columns = lists.owners(), lists.blocks
        step = max(1, _ROWS_AT_ONCE // grid.q_block)
        for start in range(0, len(rows), step):
            # One run of keys for each query of each block.
            t = (rows[start : start + step, None] * grid.q_block + np.arange(grid.q_block)).ravel()
            first = np.repeat(columns[start : start + step] * grid.k_block, grid.q_block)
            there = (t >= grid.q_start) & (t < grid.q_stop)
            t, first = t[there], first[there]
            keys = self._masked(RowKeys(first, np.minimum(first + grid.k_block, size.k_len), 1), t)
            if not isinstance(generator, Blocks):
                keys = generator.rows(head, t, size.k_len).meet(keys)
            counts = keys.count
            if before:
                counts = counts - union_count_of_rows([_common(each, head, t, keys, size.k_len) for each in before], len(t))
            yield t, counts

    def _counts_one_by_one(self, index: int, head: int) -> Iterator[tuple[Positions, Positions]]:
        """Where blocks of several sizes meet: which pairs an earlier term holds is asked pair by pair."""
        term, size = self.terms[index], self.problem
        h, k = torch.tensor(head), torch.arange(size.k_len)
        step = max(1, _ROWS_AT_ONCE // max(1, size.k_len))
        for start in range(size.q_offset, size.q_offset + size.q_len, step):
            t = torch.arange(start, min(start + step, size.q_offset + size.q_len))[:, None]
            found = term.generator.contains(h, t, k) & self.allowed(t, k)
            for earlier in self.terms[:index]:
                found = found & ~earlier.generator.contains(h, t, k)
            yield t[:, 0].numpy(), found.sum(1).numpy()

    def _by_row_before(self, index: int) -> list[ByRow]:
        """The earlier terms whose rows hold one progression of keys each."""
        return [term.generator for term in self.terms[:index] if not isinstance(term.generator, Blocks)]

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
        return sum(int(counts.sum()) for _, counts in self._counts_of_rows(index, head, start, stop))

    def _counts_of_rows(self, index: int, head: int, start: int, stop: int) -> Iterator[tuple[Positions, Positions]]:
        """The pairs of a term in these rows; with ``dedupe``, those that no earlier term by row holds."""
        term = self.terms[index]
        generator, before = _by_row(term.generator), self._by_row_before(index)
        for t in self._active(generator, head, start, stop):
            keys = self._masked(generator.rows(head, t, self.problem.k_len), t)
            counts = keys.count
            if term.dedupe and before:
                counts = counts - union_count_of_rows(
                    [_common(each, head, t, keys, self.problem.k_len) for each in before], len(t)
                )
            yield t, counts

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


@lru_cache(maxsize=64)
def _first_alike(relation: Relation) -> tuple[tuple[int, ...], ...]:
    """For each term and key head the first key head of which the term lets the same keys be read at every position."""
    size, found = relation.problem, []
    for term in relation.terms:
        kinds: dict[frozenset[object], int] = {}
        groups = (range(kv_head * size.group, (kv_head + 1) * size.group) for kv_head in range(size.kv_heads))
        each = (frozenset(_kind(term.generator, head) for head in heads) for heads in groups)
        found.append(tuple(kinds.setdefault(kind, kv_head) for kv_head, kind in enumerate(each)))
    return tuple(found)


def _by_row(generator: Generator) -> ByRow:
    assert not isinstance(generator, Blocks), "the keys of a row of blocks are no progression"
    return generator


def _common(generator: ByRow, head: int, t: Positions, keys: RowKeys, k_len: int) -> SomeRows:
    """Those of ``keys`` that the generator holds too, of the rows that are active in it."""
    rows = np.arange(len(t), dtype=np.int64)
    if isinstance(generator, Segment):
        rows = np.flatnonzero(generator.has(head, t))
    return SomeRows(rows, generator.rows(head, t[rows], k_len).meet(keys.rows(rows)))


def _kind(generator: Generator, head: int) -> object:
    """What distinguishes heads under a generator: equal kinds have equal keys."""
    if isinstance(generator, Blocks):
        return kind_of_head(generator.pattern, head)
    if not isinstance(generator, Segment):
        return None
    here = generator.heads is None or generator.heads[0] <= head < generator.heads[1]
    return here, None if generator.residues is None else generator.residues[head // generator.group]

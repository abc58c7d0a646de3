"""Which blocks a call computes where its pattern leaves that to the data: lists of block columns, chosen or given."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.adaptive import Given, Scored, capacity, is_adaptive, is_given, leaves
from dilcompile.blocks.composed import AllOf, AnyOf
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import lists_of
from dilcompile.blocks.patterns import Pattern
from dilcompile.errors import FormError
from dilcompile.generators import Blocks
from dilcompile.lowering.choice import probing
from dilcompile.lowering.estimators import ESTIMATORS
from dilcompile.lowering.estimators.operands import Operands, Rows, beside, reached
from dilcompile.relation import Problem, Relation, grid_of

# Scores of blocks that are held at once.
_SCORES_AT_ONCE = 1 << 22


class Selection(NamedTuple):
    """Lists of blocks, one for each block row that holds queries; dims of size 1 are for all batch rows or heads.

    Args:
        columns: int32 [B or 1, H or 1, block rows, capacity], the block columns of each row, ascending, each once; what is behind
            the row's count says nothing.
        counts: int32 [B or 1, H or 1, block rows].
    """

    columns: Tensor
    counts: Tensor

    @property
    def capacity(self) -> int:
        """The most blocks that a row has place for."""
        return self.columns.shape[3]

    def held(self, first: int, stop: int, columns: int) -> Tensor:
        """Which blocks of these rows there are: bool [B or 1, H or 1, rows, columns]."""
        listed, counts = self.columns[:, :, first:stop].long(), self.counts[:, :, first:stop, None]
        there = (torch.arange(self.capacity, device=listed.device) < counts) & (listed >= 0)
        found = torch.zeros(*listed.shape[:3], columns + 1, dtype=torch.bool, device=listed.device)
        return found.scatter_(3, torch.where(there, listed.clamp(0, columns), columns), True)[..., :columns]

    def contains(self, b: int, t: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Which pairs of the query positions ``t`` [n, 1] and the keys ``k`` [m] are in listed blocks: bool [H or 1, n, m]."""
        row = torch.div(t[:, 0], grid.q_block, rounding_mode="floor") - grid.q_start // grid.q_block
        held = self.held(0, self.columns.shape[2], grid.columns)[b if self.columns.shape[0] > 1 else 0]
        there = (t[:, 0] >= 0) & (row >= 0) & (row < held.shape[1])
        found = held.new_zeros(held.shape[0], len(t), len(k))
        found[:, there] = held[:, row[there]][:, :, torch.div(k, grid.k_block, rounding_mode="floor")]
        return found

    def pairs(self, problem: Problem, q_block: int, k_block: int) -> int:
        """How many pairs the listed blocks hold within the problem's limits, over all batch rows and heads. Reads the lists."""
        grid = grid_of(problem, q_block, k_block)
        there = torch.arange(self.capacity, device=self.columns.device) < self.counts[..., None]
        places = there.nonzero().cpu().numpy()
        columns = self.columns[there].cpu().numpy().astype(np.int64)
        shared = problem.batch // self.columns.shape[0] * (problem.heads // self.columns.shape[1])
        return shared * int(grid.pairs(places[:, 2] + grid.q_start // q_block, columns).sum())

    def density(self, problem: Problem, q_block: int, k_block: int) -> float:
        """``pairs`` over all pairs."""
        every = problem.batch * problem.heads * problem.q_len * problem.k_len
        return self.pairs(problem, q_block, k_block) / max(1, every)


def unchosen(q: Tensor) -> Selection:
    """Lists that say nothing, for a call of operands that hold no data."""
    none = q.new_empty((1, 1, 0, 0), dtype=torch.int32)
    return Selection(none, none[..., 0])


@torch.no_grad()
def select_blocks(
    relation: Relation,
    q: Tensor,
    k: Tensor,
    keep: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    given: Selection | None = None,
) -> Selection | None:
    """The blocks that a call computes; None where its pattern doesn't ask the data.

    Args:
        q: [B, H, Sq, D]; k: [B, Hkv, Sk, D]; keep: bool [B, Sk] or None.
        scale, softcap: of the scores, as in ``Call``; D ** -0.5 by default.
        given: what stands for ``given`` in the pattern.

    Raises:
        FormError: if blocks are given and the pattern has no place for them, or the other way round, or if they don't fit. The
            numbers of blocks are looked at on a CPU only; on a device a number of no block counts for nothing.
    """
    blocks = adaptive_blocks(relation)
    wanted = blocks is not None and is_given(blocks.pattern)
    if wanted and given is None:
        raise FormError("the pattern's `given` blocks did not come: pass them as `blocks` to dilcompile.functional.attention")
    if given is not None and not wanted:
        raise FormError(
            "blocks came, but the form has no place for them: use block_sparse with {given: {most: ...}} in its pattern"
        )
    if blocks is None:
        return None
    size = relation.problem
    grid = grid_of(size, blocks.grid.q_block, blocks.grid.k_block)
    if given is not None:
        _check_given(given, blocks.pattern, size, grid)
    before = grid.q_start - size.q_offset
    operands = Operands(q[:, :, before:], k, keep, q.shape[3] ** -0.5 if scale is None else scale, softcap, grid)
    most = capacity(blocks.pattern, grid, size.heads)
    held = _held(blocks.pattern, operands, given)
    step = max(1, _SCORES_AT_ONCE // max(1, size.batch * size.heads * grid.columns))
    starts = range(0, operands.num_rows, step)
    parts = [listed(held(start, min(start + step, operands.num_rows)), most) for start in starts]
    if not parts:
        empty = torch.zeros(1, 1, 0, most, dtype=torch.int32, device=q.device)
        return Selection(empty, empty[..., 0])
    return Selection(torch.cat([part.columns for part in parts], 2), torch.cat([part.counts for part in parts], 2))


def adaptive_blocks(relation: Relation) -> Blocks | None:
    """The blocks of the relation if they depend on the data."""
    found = relation.terms[0].generator if len(relation.terms) == 1 else None
    return found if isinstance(found, Blocks) and found.adaptive else None


def _check_given(given: Selection, pattern: Pattern, size: Problem, grid: Grid) -> None:
    columns, counts = given
    if columns.shape[0] not in (1, size.batch) or columns.shape[1] not in (1, size.heads) or columns.shape[2] != len(grid.rows):
        raise FormError(
            f"blocks.columns must be [B or 1, H or 1, block rows, capacity] = [{size.batch} or 1, {size.heads} or 1, "
            f"{len(grid.rows)}, ...], not {list(columns.shape)}: the queries at {grid.q_start} to {grid.q_stop - 1} stand in "
            f"{len(grid.rows)} blocks of {grid.q_block}"
        )
    most = min(leaf.most for leaf in leaves(pattern) if isinstance(leaf, Given))
    if given.capacity > most:
        raise FormError(
            f"blocks.columns has place for {given.capacity} blocks a row, more than the {most} of {{given: {{most: {most}}}}}; "
            "raise `most` in the form"
        )
    if columns.device.type == "cpu" and not probing.without_data(columns):
        _check_numbers(columns, counts, grid)


def _check_numbers(columns: Tensor, counts: Tensor, grid: Grid) -> None:
    wrong = (counts < 0) | (counts > columns.shape[3])
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise FormError(f"blocks.counts{at} is {int(counts[tuple(at)])}, not from 0 to the capacity, {columns.shape[3]}")
    there = torch.arange(columns.shape[3]) < counts[..., None]
    wrong = there & ((columns < 0) | (columns >= grid.columns))
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        raise FormError(
            f"blocks.columns{at} is {int(columns[tuple(at)])}, which is no block: {grid.k_len} keys are {grid.columns} blocks of "
            f"{grid.k_block}, numbers 0 to {grid.columns - 1}"
        )
    wrong = there[..., 1:] & (columns[..., 1:] <= columns[..., :-1])
    if wrong.any():
        *row, place = wrong.nonzero()[0].tolist()
        one, next_one = columns[tuple(row)][place : place + 2].tolist()
        raise FormError(
            f"blocks.columns{row} does not ascend: {next_one} comes after {one}; sort the blocks of a row and name each once"
        )


def best(scores: Tensor, own: Tensor, seen: Tensor, most: int, mass: float | None = None) -> Tensor:
    """The best blocks of each row, and its own ones.

    Args:
        scores: logarithms of weights [B, H, rows, columns]; own, seen: bool [rows, columns], own ones only where seen.
        most: blocks of a row at most, if its own are not more.
        mass: take no more than make up this share of the row's weight.

    Returns:
        bool [B, H, rows, columns]. Of equal scores, torch.topk says which.
    """
    scores = scores.masked_fill(~seen, -torch.inf)
    values, places = scores.masked_fill(own, torch.inf).topk(min(most, scores.shape[3]))
    kept = values > -torch.inf
    if mass is not None:
        share = scores.softmax(-1).nan_to_num(0.0).gather(3, places)
        kept &= share.cumsum(-1) - share < mass
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(3, places, kept) | own


def listed(held: Tensor, most: int) -> Selection:
    """The lists of bool [B or 1, H or 1, rows, columns], which holds at most ``most`` a row."""
    columns = held.shape[3]
    numbers = torch.arange(columns, dtype=torch.int32, device=held.device)
    first = torch.where(held, numbers, columns).topk(most, largest=False, sorted=True).values
    return Selection(torch.where(first < columns, first, 0).int(), held.sum(3, dtype=torch.int32))


def _held(pattern: Pattern, operands: Operands, given: Selection | None) -> Rows:
    """Which blocks of a range of rows the pattern holds within the limits: bool [B or 1, H or 1, rows, columns]."""
    grid = operands.grid
    if not is_adaptive(pattern):
        return _fixed(pattern, operands)
    if isinstance(pattern, Given):
        assert given is not None, "asked before"
        return lambda first, stop: given.held(first, stop, grid.columns) & reached(grid, operands.rows(first, stop))
    if isinstance(pattern, Scored):
        return _scored(pattern, operands)
    assert isinstance(pattern, AnyOf | AllOf), pattern
    parts = [_held(part, operands, given) for part in pattern.parts]
    join = torch.logical_or if isinstance(pattern, AnyOf) else torch.logical_and

    def joined(first: int, stop: int) -> Tensor:
        found = parts[0](first, stop)
        for part in parts[1:]:
            found = join(found, part(first, stop))
        return found

    return joined


def _scored(pattern: Scored, operands: Operands) -> Rows:
    scores = ESTIMATORS[pattern.estimator](operands)

    def rows(first: int, stop: int) -> Tensor:
        numbers = operands.rows(first, stop)
        seen = reached(operands.grid, numbers)
        own = beside(operands.grid, numbers) & seen
        return best(scores(first, stop), own, seen, pattern.most, pattern.mass)

    return rows


def _fixed(pattern: Pattern, operands: Operands) -> Rows:
    """A part that the data has no say in, from lists that are kept on the device."""
    heads, device = operands.q.shape[1], operands.q.device
    make = _lists_on.__wrapped__ if probing.without_data(operands.q) else _lists_on
    lists = make(pattern, operands.grid, heads, device)
    return lambda first, stop: lists.held(first, stop, operands.grid.columns)


@lru_cache(maxsize=64)
def _lists_on(pattern: Pattern, grid: Grid, heads: int, device: torch.device) -> Selection:
    by_head = [lists_of(pattern.codes(head, grid.rows, grid), grid) for head in range(heads if pattern.by_head else 1)]
    counts = np.stack([np.diff(one.starts) for one in by_head])
    columns = np.zeros((*counts.shape, max(1, counts.max(initial=0))), dtype=np.int32)
    for one, rows, count in zip(by_head, columns, counts, strict=True):
        rows[np.arange(rows.shape[1]) < count[:, None]] = one.blocks
    return Selection(*(torch.tensor(x[None].astype(np.int32), device=device) for x in (columns, counts)))

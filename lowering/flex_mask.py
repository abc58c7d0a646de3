"""Calls as FlexAttention takes them: tables of blocks, and functions of one pair that read everything else from tensors.

What is compiled depends on the kind of a call alone. Limits, offsets, caps, padding and lists of blocks are tensors, so that
other numbers compile nothing anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.cells import with_pairs
from dilcompile.blocks.grid import Grid
from dilcompile.blocks.recut import counted_from_first_query, recut, within_reach
from dilcompile.generators import Blocks
from dilcompile.lowering.band import limits_of
from dilcompile.lowering.call import Call
from dilcompile.lowering.selection import Selection
from dilcompile.relation import Relation, grid_of

# FlexAttention's own size: every one of its tilings for CUDA devices divides it, and few divide a smaller one.
BLOCK = 128
# More than any length, and half of what 32 bits hold.
_FAR = 1 << 30
# The lists of a few relations: those of many heads over long sequences are large.
_KEPT = 16

Visible = Callable[..., Tensor]


class Shape(NamedTuple):
    """Of the blocks that a pair is looked up in: queries and keys in one, and whether batch rows and heads differ."""

    q_block: int
    k_block: int
    by_batch: bool
    by_head: bool


@dataclass(frozen=True)
class Kind:
    """What the functions of a pair are made of.

    Args:
        left, right: whether the relation has limits on t - k and on k - t.
        blocks: those of the pattern; None: no pattern.
        padding: whether keys are left out.
        documents: whether there are documents, and each batch row has its own.
        softcap: whether scores are capped.
        bias: for each dim of [B, H, Sq, Sk] whether the bias has it; None: no bias.
    """

    left: bool
    right: bool
    blocks: Shape | None
    padding: bool
    documents: bool | None
    softcap: bool
    bias: tuple[bool, ...] | None

    @staticmethod
    def of(call: Call) -> Kind:
        """The kind of a call."""
        grid, held = _grid(call.relation), _blocks(call.relation)
        batch, heads = _tables_apart(call)
        return Kind(
            left=grid.left is not None,
            right=grid.right is not None,
            blocks=None if held is None else Shape(held.grid.q_block, held.grid.k_block, batch > 1, heads > 1),
            padding=call.key_padding is not None,
            documents=None if call.documents is None else call.documents.shape[0] > 1,
            softcap=call.softcap is not None,
            bias=None if call.bias is None else tuple(length > 1 for length in _four(call.bias).shape),
        )

    @property
    def hides_more(self) -> bool:
        """Whether pairs are hidden that the lists know nothing of, so that no block is full."""
        return self.padding or self.documents is not None


def refusal_of_relation(call: Call) -> str | None:
    """What of a relation has no lists here, or None."""
    held, size = _blocks(call.relation), call.problem
    if held is None:
        limits = limits_of(call.relation)
        if isinstance(limits, str):
            return limits
        outside = size.q_offset < 0 or size.q_offset + size.q_len > size.k_len
        if call.documents is not None and outside:
            return f"{size.q_len} queries from position {size.q_offset} on, of which some are in no document"
    elif call.documents is not None:
        return "blocks that count from the start of each document"
    elif size.q_offset < 0:
        return f"query row 0 stands at position {size.q_offset}: queries before key 0 are in no block"
    return None


def bytes_of_tables(call: Call) -> int:
    """What the tables of a call take, all of them dense over the grid of blocks."""
    size, held = call.problem, _blocks(call.relation)
    places = math.ceil(size.q_len / BLOCK) * math.ceil(size.k_len / BLOCK)
    looked_up = 0 if held is None else (math.ceil(size.q_len / held.grid.q_block) + 1) * held.grid.columns
    return math.prod(_tables_apart(call)) * (16 * places + looked_up)


def _tables_apart(call: Call) -> tuple[int, int]:
    """For how many batch rows and heads there are tables."""
    if call.selection is not None:
        batch, heads = call.selection.columns.shape[:2]
        return batch, heads
    held = _blocks(call.relation)
    return 1, call.problem.heads if held is not None and held.pattern.by_head else 1


def _blocks(relation: Relation) -> Blocks | None:
    """The blocks that a relation is made of, if it is made of nothing else."""
    generator = relation.terms[0].generator if len(relation.terms) == 1 else None
    return generator if isinstance(generator, Blocks) else None


def _grid(relation: Relation) -> Grid:
    """The pattern's grid, or FlexAttention's; with the limits of a window where that is the relation."""
    size, held = relation.problem, _blocks(relation)
    if held is not None:
        return grid_of(size, held.grid.q_block, held.grid.k_block)
    limits = limits_of(relation)
    assert not isinstance(limits, str), limits
    return Grid(BLOCK, BLOCK, size.q_offset, size.q_offset + size.q_len, size.k_len, *limits)


@dataclass(frozen=True, eq=False)
class Tables:
    """Of one call, on a device.

    Args:
        lists: what a BlockMask is made of, see ``tables_of``; blocks of ``BLOCK`` x ``BLOCK``, counted from the first query.
        numbers: int32 [4]: the limits left and right of a query that counts from the first; the position of the first query; the
            number of its block row in the pattern.
        held: bool [batch or 1, heads or 1, rows, columns] of the pattern's blocks, from the row of the first query on; None: no
            pattern.
    """

    lists: tuple[Tensor, ...]
    numbers: Tensor
    held: Tensor | None


def tables(call: Call, kind: Kind) -> Tables:
    """The tables of a call; nothing is read back from the device."""
    if call.selection is not None:
        return _chosen(call.selection, _cut(call.relation, call.q.device), kind.hides_more)
    return _kept(call.relation, call.q.device, kind.hides_more)


@lru_cache(maxsize=_KEPT)
def _kept(relation: Relation, device: torch.device, hides_more: bool) -> Tables:
    """The tables of a relation that asks no data, made once; no block is full where a call ``hides_more``."""
    from dilcompile.blocks.block_mask import held_of, tables_of

    grid, held = _grid(relation), _blocks(relation)
    into = counted_from_first_query(grid, BLOCK, BLOCK)
    # What is made while a caller infers must serve another who trains.
    with torch.inference_mode(False):
        if held is None:
            lists, there = [within_reach(into)], None
        else:
            own = [held.lists(head, grid) for head in range(relation.problem.heads if held.pattern.by_head else 1)]
            lists, there = [recut(each, grid, into) for each in own], held_of(own, grid, device)[None]
        if hides_more:
            lists = [replace(each, full=np.zeros_like(each.full)) for each in lists]
        return Tables(tables_of(lists, into, device), _numbers(grid, into, device), there)


def _numbers(grid: Grid, into: Grid, device: torch.device) -> Tensor:
    limits = [max(-_FAR, min(_FAR, 0 if limit is None else limit)) for limit in (into.left, into.right)]
    return torch.tensor([*limits, grid.q_start, grid.q_start // grid.q_block], dtype=torch.int32, device=device)


class _Cut(NamedTuple):
    """How the pattern's blocks lie in FlexAttention's, on a device.

    Args:
        rows, columns: int64 [2, lines]: the first of the pattern's rows (columns) that a block row (column) of ``BLOCK`` meets,
            and the one behind its last; rows count from that of the first query.
        seen: bool [rows, columns] of blocks of ``BLOCK``: the limits let a pair through.
        whole: the limits let every pair through, and no padding is in it.
        size: rows and columns of the pattern.
        numbers: see ``Tables``.
    """

    rows: Tensor
    columns: Tensor
    seen: Tensor
    whole: Tensor
    size: tuple[int, int]
    numbers: Tensor


@lru_cache(maxsize=_KEPT)
def _cut(relation: Relation, device: torch.device) -> _Cut:
    """Made once for all selections of a relation."""
    from dilcompile.blocks.block_mask import full_of, held_of

    grid = _grid(relation)
    into = counted_from_first_query(grid, BLOCK, BLOCK)
    with torch.inference_mode(False):
        inside = [with_pairs(within_reach(into), into)]
        return _Cut(
            _met(grid.q_start, into.q_stop, grid.q_block).to(device),
            _met(0, into.k_len, grid.k_block).to(device),
            held_of(inside, into, device)[0],
            full_of(inside, into, device)[0],
            (len(grid.rows), grid.columns),
            _numbers(grid, into, device),
        )


def _met(start: int, length: int, block: int) -> Tensor:
    """The first block of a pattern and the one behind the last, for each ``BLOCK`` of the positions from ``start`` on."""
    first = torch.arange(0, length, BLOCK)
    last = (first + BLOCK).clamp(max=length) - 1
    return torch.stack([(start + first) // block, (start + last) // block + 1]) - start // block


def _chosen(selection: Selection, cut: _Cut, hides_more: bool) -> Tables:
    """The tables of chosen blocks: how many of them each block of ``BLOCK`` meets is a difference of sums over both sides."""
    held = selection.held(0, *cut.size)
    sums = torch.nn.functional.pad(held.cumsum(2, dtype=torch.int32).cumsum(3, dtype=torch.int32), (1, 0, 1, 0))
    (top, bottom), (left, right) = cut.rows, cut.columns
    bands = sums[:, :, bottom] - sums[:, :, top]
    met = bands[..., right] - bands[..., left]
    some, full = (met > 0) & cut.seen, (met == (bottom - top)[:, None] * (right - left)) & cut.whole
    if hides_more:
        full = torch.zeros_like(full)
    by_row = some & ~full, full
    by_column = (there.mT for there in by_row)
    lists = [table for there in (*by_row, *by_column) for table in _listed(there)]
    return Tables(tuple(lists), cut.numbers, held)


def _listed(there: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each line are there, int32 [..., lines], and which, int32 [..., lines, columns], ascending."""
    columns = there.shape[-1]
    places = torch.where(there, there.cumsum(-1) - 1, columns)
    numbers = torch.arange(columns, dtype=torch.int32, device=there.device).expand(there.shape)
    found = torch.zeros(*there.shape[:-1], columns + 1, dtype=torch.int32, device=there.device).scatter_(-1, places, numbers)
    return there.sum(-1, dtype=torch.int32), found[..., :columns].contiguous()


def buffers_of_mask(call: Call, found: Tables) -> tuple[Tensor, ...]:
    """The tensors that ``visible_of`` reads behind a pair's numbers."""
    read = (found.held, call.key_padding, call.documents)
    return (found.numbers, *(x for x in read if x is not None))


def visible_of(kind: Kind) -> Visible:
    """Whether a pair counts: (b, h, q, k, *``buffers_of_mask``) -> bool; complete, also where the lists have said so already."""

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor, numbers: Tensor, *read: Tensor) -> Tensor:
        ahead = k - q
        found = k >= 0
        if kind.left:
            found = found & (ahead >= -numbers[0])
        if kind.right:
            found = found & (ahead <= numbers[1])
        place = 0
        if kind.blocks is not None:
            q_block, k_block, by_batch, by_head = kind.blocks
            row = (q + numbers[2]) // q_block - numbers[3]
            found = found & read[place][b if by_batch else b * 0, h if by_head else h * 0, row, k // k_block]
            place += 1
        if kind.padding:
            found = found & read[place][b, k]
            place += 1
        if kind.documents is not None:
            of = b if kind.documents else b * 0
            found = found & (read[place][of, q + numbers[2]] == read[place][of, k])
        return found

    return visible


def buffers_of_score(call: Call) -> tuple[Tensor, ...]:
    """The tensors that ``score_of`` and ``slope_of`` read behind a pair's numbers."""
    cap = () if call.softcap is None else (_cap(call.softcap, call.score_dtype, call.q.device),)
    return cap if call.bias is None else (*cap, _four(call.bias.detach()))


@lru_cache(maxsize=64)
def _cap(softcap: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([softcap], dtype=dtype, device=device)


def score_of(kind: Kind) -> Callable[..., Tensor]:
    """The scaled score, capped and with its bias: (score, b, h, q, k, *``buffers_of_score``)."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *read: Tensor) -> Tensor:
        if kind.softcap:
            score = torch.tanh(score / read[0][0]) * read[0][0]
        if kind.bias is not None:
            at = [x if there else x * 0 for x, there in zip((b, h, q, k), kind.bias, strict=True)]
            score = score + read[-1][at[0], at[1], at[2], at[3]]
        return score

    return score_mod


def slope_of(kind: Kind) -> Callable[..., Any]:
    """The gradient of a scaled score, given that of what ``score_of`` makes of it; nothing else has a gradient.

    The order of arguments and results is that of the graph which FlexAttention traces of a ``score_mod`` and its gradient.
    """

    def joint(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, grad: Tensor, *read: Tensor) -> Any:
        if kind.softcap:
            capped = torch.tanh(score / read[0][0])
            grad = grad * (1 - capped * capped)
        return [grad, None, None, None, None, *(None for _ in read)]

    return joint


def _four(bias: Tensor) -> Tensor:
    return bias[(None,) * (4 - bias.dim())]

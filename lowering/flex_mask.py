"""Calls as FlexAttention takes them: tables of blocks, and functions of one pair that read everything else from tensors.

What is compiled depends on the kind of a call alone. Limits, offsets, caps, padding and lists of blocks are tensors, so that
other numbers compile nothing anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.recut import counted_from_first_query, recut, within_reach
from dilcompile.generators import Blocks
from dilcompile.lowering.band import limits_of
from dilcompile.lowering.call import Call
from dilcompile.relation import Relation, grid_of

# FlexAttention's own size: every one of its tilings for CUDA devices divides it, and few divide a smaller one.
BLOCK = 128
# More than any length, and half of what 32 bits hold.
_FAR = 1 << 30
# The lists of a few relations: those of many heads over long sequences are large.
_KEPT = 16

Visible = Callable[..., Tensor]


@dataclass(frozen=True)
class Kind:
    """What the functions of a pair are made of.

    Args:
        left, right: whether the relation has limits on t - k and on k - t.
        blocks: queries and keys in a block of the pattern, and whether heads differ; None: no pattern.
        padding: whether keys are left out.
        documents: whether there are documents, and each batch row has its own.
        softcap: whether scores are capped.
        bias: for each dim of [B, H, Sq, Sk] whether the bias has it; None: no bias.
    """

    left: bool
    right: bool
    blocks: tuple[int, int, bool] | None
    padding: bool
    documents: bool | None
    softcap: bool
    bias: tuple[bool, ...] | None

    @staticmethod
    def of(call: Call) -> Kind:
        """The kind of a call."""
        grid, held = _grid(call.relation), _blocks(call.relation)
        return Kind(
            left=grid.left is not None,
            right=grid.right is not None,
            blocks=None if held is None else (held.grid.q_block, held.grid.k_block, held.pattern.by_head),
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


def bytes_of_tables(relation: Relation) -> int:
    """What the tables of a relation take, all of them dense over the grid of blocks."""
    size, held = relation.problem, _blocks(relation)
    heads = size.heads if held is not None and held.pattern.by_head else 1
    places = math.ceil(size.q_len / BLOCK) * math.ceil(size.k_len / BLOCK)
    looked_up = 0 if held is None else (math.ceil(size.q_len / held.grid.q_block) + 1) * held.grid.columns
    return heads * (16 * places + looked_up)


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
    """Of one relation, on a device.

    Args:
        lists: what a BlockMask is made of, see ``tables_of``; blocks of ``BLOCK`` x ``BLOCK``, counted from the first query.
        numbers: int32 [4]: the limits left and right of a query that counts from the first; the position of the first query; the
            number of its block row in the pattern.
        held: bool [heads or 1, rows, columns] of the pattern's blocks, from the row of the first query on; None: no pattern.
    """

    lists: tuple[Tensor, ...]
    numbers: Tensor
    held: Tensor | None


@lru_cache(maxsize=_KEPT)
def tables(relation: Relation, device: torch.device, hides_more: bool) -> Tables:
    """The tables of a relation, made once; no block is full where a call ``hides_more``."""
    from dilcompile.blocks.block_mask import held_of, tables_of

    grid, held = _grid(relation), _blocks(relation)
    into = counted_from_first_query(grid, BLOCK, BLOCK)
    # What is made while a caller infers must serve another who trains.
    with torch.inference_mode(False):
        if held is None:
            lists, there = [within_reach(into)], None
        else:
            own = [held.lists(head, grid) for head in range(relation.problem.heads if held.pattern.by_head else 1)]
            lists, there = [recut(each, grid, into) for each in own], held_of(own, grid, device)
        if hides_more:
            lists = [replace(each, full=np.zeros_like(each.full)) for each in lists]
        limits = [max(-_FAR, min(_FAR, 0 if limit is None else limit)) for limit in (into.left, into.right)]
        numbers = [*limits, grid.q_start, grid.q_start // grid.q_block]
        return Tables(tables_of(lists, into, device), torch.tensor(numbers, dtype=torch.int32, device=device), there)


def buffers_of_mask(call: Call, kind: Kind) -> tuple[Tensor, ...]:
    """The tensors that ``visible_of`` reads behind a pair's numbers."""
    found = tables(call.relation, call.q.device, kind.hides_more)
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
            q_block, k_block, by_head = kind.blocks
            row = (q + numbers[2]) // q_block - numbers[3]
            found = found & read[place][h if by_head else h * 0, row, k // k_block]
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

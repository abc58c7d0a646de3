"""Which pairs of a block count, as tensors over the block's own coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dilcompile.lowering.view_path.pieces import Piece
from dilcompile.lowering.view_path.strided import Block, Cut
from dilcompile.relation import Relation


@dataclass(frozen=True)
class Places:
    """Coordinates of a block's pairs, int64, broadcastable to [first, second, rows, keys].

    Args:
        b: batch rows; h: query heads; t: query positions; k: key positions.
    """

    b: Tensor
    h: Tensor
    t: Tensor
    k: Tensor

    def cut(self, cut: Cut) -> Places:
        """The coordinates of a part of the block."""
        first, second, rows, keys = cut
        picked = (_pick(x, 0, first) for x in (self.b, self.h, self.t, self.k))
        b, h, t, k = (_pick(x, 1, second) for x in picked)
        return Places(b, h, t[:, :, rows], k[..., keys])


def _pick(x: Tensor, dim: int, part: slice) -> Tensor:
    if x.shape[dim] == 1:
        return x
    return x.narrow(dim, part.start, part.stop - part.start)


def places(block: Block, relation: Relation, first_batch: int, first_head: int, device: torch.device) -> Places:
    """Coordinates of a block whose operands were narrowed to start at this batch row and key head."""
    piece, problem = block.piece, relation.problem
    head = block.coordinates("head", device) + piece.head + first_head
    group = block.coordinates("group", device) + piece.group
    position = block.coordinates("position", device)
    rows = torch.arange(piece.rows, device=device)[:, None] * piece.step + piece.row
    keys = torch.arange(piece.keys, device=device) * piece.step + piece.key
    return Places(
        b=block.coordinates("batch", device) + first_batch,
        h=head * problem.group + group,
        t=position + rows + problem.q_offset,
        k=position + keys,
    )


def keys_seen(piece: Piece, row: int, stop: int) -> tuple[int, int]:
    """First and last key number that the rows ``row`` up to ``stop`` of a piece see."""
    first = 0 if piece.low is None else min(piece.keys, max(0, row + piece.low))
    last = piece.keys if piece.high is None else max(0, min(piece.keys, stop + piece.high))
    return first, max(first, last)


@lru_cache(maxsize=64)
def _band_at(rows: int, keys: int, low: int | None, high: int | None, device: torch.device) -> Tensor:
    gap = torch.arange(keys, device=device) - torch.arange(rows, device=device)[:, None]
    visible = torch.ones_like(gap, dtype=torch.bool)
    if low is not None:
        visible &= gap >= low
    if high is not None:
        visible &= gap <= high
    return visible


def band(piece: Piece, cut: Cut, device: torch.device) -> Tensor:
    """The piece's band over the rows and keys of a cut: bool [rows, keys]."""
    _, _, rows, keys = cut
    shift = rows.start - keys.start
    low = None if piece.low is None else piece.low + shift
    high = None if piece.high is None else piece.high + shift
    return _band_at(rows.stop - rows.start, keys.stop - keys.start, low, high, device)


@lru_cache(maxsize=64)
def band_bias(piece_band: tuple[int, int, int | None, int | None], dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where (rows, keys, low, high) lets a pair through and -inf elsewhere: [1, 1, rows, keys]."""
    return as_bias(_band_at(*piece_band, device), dtype)[None, None]


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 for visible pairs and -inf for the others."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def uncounted(relation: Relation, term: int, where: Places) -> Tensor:
    """Bool over the places: pairs that no term before ``term`` holds."""
    found = torch.zeros_like(where.h + where.t + where.k, dtype=torch.bool)
    for earlier in relation.terms[:term]:
        found |= earlier.generator.contains(where.h, where.t, where.k)
    return ~found

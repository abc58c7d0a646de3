"""What a part of a call knows of masks by row: limits on the keys of each row, and formulas over pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dilcompile.lowering.call import Call
from dilcompile.lowering.pairs import Pairs
from dilcompile.lowering.view_path.strided import Block, Cut, Operand


@dataclass(frozen=True)
class RowMasks:
    """Operands of one part, narrowed to it.

    Args:
        limits: first key and end of keys [B, Sq] and the keys' own positions [1, Sk]; empty without limits.
        reach: the least first key and the largest end over the batch rows, each [Sq]; known on the CPU only.
        pairs: the formula; rows, keys: its terms, [B, Sq] and [B, Sk] each.
    """

    limits: tuple[Operand, ...]
    reach: tuple[Tensor, Tensor] | None
    pairs: Pairs | None
    rows: tuple[Operand, ...]
    keys: tuple[Operand, ...]
    first_position: int

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands, for the choice of views."""
        return (*self.limits, *self.rows, *self.keys)

    @property
    def sees_nothing(self) -> bool:
        """Surely no row has a key."""
        return self.reach is not None and bool((self.reach[0] >= self.reach[1]).all())

    def visible(self, block: Block, cut: Cut) -> Tensor:
        """Bool, broadcastable to the cut of the block: the pairs that all masks let through."""
        first, second, rows, keys = cut
        found: Tensor | None = None
        if self.limits:
            low, end, position = (block.view(x) for x in self.limits)
            here = position[first, second, :, keys]
            found = (here >= low[first, second, rows]) & (here < end[first, second, rows])
        if self.pairs is not None:

            def sums(number: int) -> Tensor:
                by_row, by_key = block.view(self.rows[number]), block.view(self.keys[number])
                return by_row[first, second, rows] + by_key[first, second, :, keys]

            held = self.pairs.visible(sums)
            found = held if found is None else found & held
        assert found is not None
        return found

    def narrowed(self, block: Block, row: int, stop: int, first: int, last: int) -> tuple[int, int]:
        """The keys from ``first`` to ``last`` of a block that any of its rows ``row`` to ``stop`` may see."""
        if self.reach is None or any(axis.position for axis in (*block.first, *block.second)):
            return first, last
        piece, shift = block.piece, block.shift[3]
        at = slice(piece.row + shift + row * piece.step, piece.row + shift + (stop - 1) * piece.step + 1, piece.step)
        base = piece.key + shift + self.first_position
        low = -(-(int(self.reach[0][at].min()) - base) // piece.step)
        end = -(-(int(self.reach[1][at].max()) - base) // piece.step)
        first = min(last, max(first, low))
        return first, max(first, min(last, end))


def row_masks(call: Call, batch: slice, query_rows: slice, keys: slice) -> RowMasks | None:
    """The masks by row of a region, or None if the call has none."""
    if call.row_limits is None and call.pairs is None:
        return None
    size = call.problem.batch
    limits: tuple[Operand, ...] = ()
    reach = None
    if call.row_limits is not None:
        low, end = (x.expand(size, -1)[batch, query_rows] for x in call.row_limits)
        position = torch.arange(keys.start, keys.stop, device=low.device)[None].expand(low.shape[0], -1)
        limits = (_by_row(low), _by_row(end), _by_key(position))
        # A row that sees nothing reaches nowhere.
        none = low >= end
        low, end = low.masked_fill(none, call.problem.k_len), end.masked_fill(none, 0)
        # Elsewhere it would have to be waited for.
        reach = (low.amin(0), end.amax(0)) if low.device.type == "cpu" else None
    rows: tuple[Operand, ...] = ()
    columns: tuple[Operand, ...] = ()
    if call.pairs is not None:
        rows = tuple(_by_row(x.expand(size, -1)[batch, query_rows]) for x in call.pairs.rows)
        columns = tuple(_by_key(x.expand(size, -1)[batch, keys]) for x in call.pairs.keys)
    return RowMasks(limits, reach, call.pairs, rows, columns, keys.start)


def _by_row(x: Tensor) -> Operand:
    return Operand(x, x.stride(0), 0, 0, x.stride(1), 0, ("row", "one"))


def _by_key(x: Tensor) -> Operand:
    return Operand(x, x.stride(0), 0, 0, 0, x.stride(1), ("one", "key"))

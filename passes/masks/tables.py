"""Registered buffers read by value: ranges, bands of diagonals, constants."""

from __future__ import annotations

import torch

from dilcompile.passes.masks.arithmetic import as_expr, as_value
from dilcompile.passes.masks.terms import Expr, Ge0, Indices, Number, Truth, choice, conjunction, if_else


def table_formula(table: torch.Tensor, indices: Indices) -> Number | Truth | None:
    """A registered buffer's formula if it is a range, a band of diagonals or constant, else None."""
    live = [index for index, size in zip(indices, table.shape, strict=True) if size != 1]
    squeezed = table.squeeze()
    if squeezed.dim() == 0:
        return as_value(squeezed)
    if squeezed.dim() == 1 and not table.dtype.is_floating_point and table.dtype is not torch.bool:
        plain = torch.arange(squeezed.shape[0], dtype=table.dtype, device=table.device)
        return live[0] if torch.equal(squeezed, plain) else None
    if squeezed.dim() == 2 and squeezed.shape[0] == squeezed.shape[1]:
        return _band(squeezed, live[0], live[1])
    return None


def _band(table: torch.Tensor, row: Expr, column: Expr) -> Number | Truth | None:
    """A square table with one value in a band of diagonals and another outside (a triangle is half a band)."""
    size = table.shape[0]
    if size < 2 or not torch.equal(table[1:, 1:], table[:-1, :-1]):
        return None
    # The value on each diagonal row - column, from -(size - 1) to size - 1.
    diagonals = torch.cat((table[0].flip(0), table[1:, 0]))
    changes = (diagonals[1:] != diagonals[:-1]).nonzero().flatten().tolist()
    if len(changes) not in (1, 2):
        return as_value(table[0, 0]) if not changes else None
    first, last = changes[0] + 1, changes[-1]
    if len(changes) == 2:
        if not torch.equal(diagonals[0], diagonals[-1]):
            return None
        low, high = first - (size - 1), last - (size - 1)
        inside = conjunction(Ge0(row - column - low), Ge0(high - (row - column)))
        return _two_values(inside, diagonals[first], diagonals[0])
    return _two_values(Ge0(row - column - (first - (size - 1))), diagonals[-1], diagonals[0])


def _two_values(inside: Truth, within: torch.Tensor, without: torch.Tensor) -> Number | Truth:
    if within.dtype is torch.bool:
        return if_else(inside, bool(within), bool(without))
    return choice(inside, as_expr(within.item()), as_expr(without.item()))

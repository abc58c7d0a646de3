"""Operators that make a tensor from positions or along a dim: ranges, grids, constants, triangles, sums and differences."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.graph.operators import is_tensor, op_name, shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.masks.arithmetic import Unreadable, as_expr, as_number, as_truth, lift, nonzero
from dilcompile.passes.masks.rules.rule import WRAPPING, Rule
from dilcompile.passes.masks.terms import (
    Choice,
    Expr,
    Ge0,
    Indices,
    Number,
    Truth,
    choice,
    conjunction,
    negation,
)

if TYPE_CHECKING:
    from dilcompile.passes.masks.reader import MaskReader


def _arange(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    dtype = node.meta["val"].dtype
    if dtype in WRAPPING or dtype is torch.bool or (dtype.is_floating_point and torch.finfo(dtype).bits < 32):
        raise Unreadable("positions in few bits")
    held = [as_expr(arg.meta["val"] if isinstance(arg, Node) else arg) for arg in node.args]
    start = held[0] if len(held) > 1 else sympy.Integer(0)
    step = held[2] if len(held) > 2 else sympy.Integer(1)
    return start + step * indices[0]


def _constant(position: int | None, default: int) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        value = default if position is None else node.args[position]
        if is_tensor(value):
            raise Unreadable("a fill value that is data")
        held = value.meta["val"] if isinstance(value, Node) else value
        dtype = node.meta["val"].dtype
        if dtype is torch.bool:
            return bool(held)
        if isinstance(held, (int, float)):
            return as_expr(torch.tensor(held, dtype=torch.float64).to(dtype).item() if isinstance(held, float) else held)
        return as_expr(held)

    return rule


def _triangular(lower: bool) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        shift = as_expr(diagonal.meta["val"] if isinstance(diagonal, Node) else diagonal)
        row, column = indices[-2:]
        inside = Ge0(sympy.expand(row + shift - column if lower else column - row - shift))
        value = reader.operand(node.args[0], indices, len(indices))
        if node.meta["val"].dtype is torch.bool:
            return conjunction(inside, as_truth(value))
        return choice(inside, as_number(value), sympy.Integer(0))

    return rule


def _identity(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    row, column = indices
    inside = negation(nonzero(sympy.expand(row - column)))
    return inside if node.meta["val"].dtype is torch.bool else as_number(inside)


def _from_grid(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    """One tensor of ``meshgrid``: the vector that it was made of, along its own dim."""
    grid: Any
    number: Any
    grid, number = node.args[:2]
    if not isinstance(grid, Node) or op_name(grid) != "meshgrid":
        raise Unreadable("one of several results")
    parts: Any = grid.args[0]
    order = list(range(len(parts)))
    if grid.kwargs.get("indexing") == "xy" and len(order) > 1:
        order[:2] = [1, 0]
    part = parts[number]
    if reader.stale(part, grid):
        raise Unreadable("it was written in place")
    return reader.value(part, (indices[order[number]],) * len(shape_of(part)))


def _cumsum(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    value = reader.number(source, indices)
    dim = int(node.args[1]) % len(indices)  # type: ignore[arg-type]
    if isinstance(value, Choice) or not value.is_number:
        raise Unreadable("a running sum of data")
    return sympy.expand(value * (indices[dim] + 1))


def _diff(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    n = node.args[1] if len(node.args) > 1 else 1
    dim = int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)) % len(indices)  # type: ignore[arg-type]
    prepend = node.args[3] if len(node.args) > 3 else node.kwargs.get("prepend")
    append = node.args[4] if len(node.args) > 4 else node.kwargs.get("append")
    if n != 1 or append is not None or node.meta["val"].dtype is torch.bool:
        raise Unreadable("a higher difference")
    assert isinstance(source, Node)

    def at(index: Expr) -> Number:
        return reader.number(source, (*indices[:dim], index, *indices[dim + 1 :]))

    here = indices[dim]
    if prepend is None:
        return lift(operator.sub, at(here + 1), at(here))
    if not isinstance(prepend, Node) or not same_size(shape_of(prepend)[dim], 1):
        raise Unreadable("a difference with a long prefix")
    first = reader.number(prepend, (*indices[:dim], sympy.Integer(0), *indices[dim + 1 :]))
    later = lift(operator.sub, at(here), at(here - 1))
    return choice(Ge0(-here), lift(operator.sub, at(sympy.Integer(0)), first), later)


MAKING: dict[str, Rule] = {
    "arange": _arange,
    "full": _constant(1, 0),
    "new_full": _constant(2, 0),
    "full_like": _constant(1, 0),
    "scalar_tensor": _constant(0, 0),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(None, 0)),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(None, 1)),
    "cumsum": _cumsum,
    "diff": _diff,
    "eye": _identity,
    "getitem": _from_grid,
    "tril": _triangular(lower=True),
    "triu": _triangular(lower=False),
}

"""Operators whose indices are data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.graph.operators import indexed, is_tensor, shape_of
from dilcompile.passes.masks.arithmetic import Unreadable, as_expr, as_number
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.rules.rule import Rule
from dilcompile.passes.masks.terms import (
    Choice,
    Expr,
    Indices,
    Number,
    Truth,
)
from dilcompile.site import Length

if TYPE_CHECKING:
    from dilcompile.passes.masks.reader import MaskReader


def _indexed(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    found = indexed(node)
    if found is None:
        raise Unreadable("a function that is applied as it is")
    source, chosen = found
    rank = len(shape_of(source))
    chosen += [None] * (rank - len(chosen))
    positions = [i for i, index in enumerate(chosen) if index is not None]
    if any(not is_tensor(chosen[i]) or chosen[i].meta["val"].dtype is torch.bool for i in positions):
        raise Unreadable("indexing by a boolean")
    if positions != list(range(positions[0], positions[0] + len(positions))):
        raise Unreadable("indexing of separated dims")
    span = len(indices) - (rank - len(positions))
    block = indices[positions[0] : positions[0] + span]
    before, after = indices[: positions[0]], indices[positions[0] + span :]
    sizes = shape_of(source)
    at = [place(reader, as_number(reader.operand(chosen[i], block, span)), sizes[i]) for i in positions]
    return reader.value(source, (*before, *at, *after))


def _gathered(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source, dim, index = node.args[:3]
    assert isinstance(source, Node)
    assert isinstance(index, Node)
    axis = int(dim) % len(indices)  # type: ignore[arg-type]
    at = place(reader, as_number(reader.value(index, indices)), shape_of(source)[axis])
    return reader.value(source, (*indices[:axis], at, *indices[axis + 1 :]))


def place(reader: MaskReader, index: Number, size: Length) -> Expr:
    """The index counted from the front: a negative one counts from the back, and one outside has no result."""
    if isinstance(index, Choice):
        raise Unreadable("an index that is a choice")
    bounds = Bounds(reader.sizes)
    if bounds.always(index) and bounds.always(as_expr(size) - 1 - index):
        return index
    return sympy.Mod(index, as_expr(size))


INDEXING: dict[str, Rule] = {
    "index": _indexed,
    "flat_apply": _indexed,
    "gather": _gathered,
}

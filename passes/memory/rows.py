"""Some of the indices along one dim of a value, and where the same numbers are in what it is a view of."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Node

from dilcompile.passes.axes.along import argument
from dilcompile.passes.axes.atoms import Atom, Layout, Leaves
from dilcompile.passes.axes.axis_rules import RULES as LAYOUT_RULES
from dilcompile.passes.graph.operators import op_name, shape_of
from dilcompile.site import Length


@dataclass(frozen=True)
class Rows:
    """The indices from ``start`` to before ``stop`` along a dim."""

    dim: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many."""
        return self.stop - self.start


def sized(node: Node, rows: Rows) -> list[int]:
    """The node's sizes with so many rows."""
    return [rows.size if dim == rows.dim else int(size) for dim, size in enumerate(shape_of(node))]


class _Dims:
    """Stands for the axes of one node's operand: each dim is an axis of its own. See ``axis_rules``."""

    def __init__(self, operand: Node) -> None:
        sizes = shape_of(operand)
        self.layout: Layout = tuple(() if size == 1 else (Atom(size),) for size in sizes)

    def __getitem__(self, node: Node) -> Layout:
        return self.layout

    def fresh(self, size: Length, *_: Any, **__: Any) -> Leaves:
        """An axis that is none of the operand's."""
        return (Atom(size),)


def source_dim(node: Node, dim: int) -> int | None:
    """The dim of a view's (or a sum's) first operand that is ``dim`` of its result; None: it is none of them."""
    dims = _Dims(node.args[0])  # type: ignore[arg-type]
    after = LAYOUT_RULES[op_name(node)](dims, node)  # type: ignore[arg-type]
    assert after is not None, "these rules have an answer"
    return dims.layout.index(after[dim]) if after[dim] and after[dim] in dims.layout else None


def run_in(node: Node, other: Node, rows: Rows) -> Rows | None:
    """Where rows of a node lie in another one with the same numbers in other sizes: a run along one dim; None if they don't."""
    shape, sizes = ([int(size) for size in shape_of(one)] for one in (node, other))
    outer, inner = prod(shape[: rows.dim]), prod(shape[rows.dim + 1 :])
    for dim, size in enumerate(sizes):
        if size == 1 or prod(sizes[:dim]) != outer:
            continue
        own = prod(sizes[dim + 1 :])
        if rows.start * inner % own or rows.stop * inner % own:
            return None
        return Rows(dim, rows.start * inner // own, rows.stop * inner // own)
    return None


def triangle_of_rows(node: Node, rows: Rows) -> int:
    """The diagonal of a ``tril`` or ``triu`` as some of its rows, or of its columns, see it."""
    rank = len(shape_of(node))
    shift = {rank - 2: rows.start, rank - 1: -rows.start}.get(rows.dim, 0)
    return int(argument(node, "diagonal")) + shift

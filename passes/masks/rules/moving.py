"""Operators that only move elements: views, transposes, repeats, slices, concatenations, outer products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
from torch.fx import Node

from dilcompile.passes.graph.operators import VIEWS, is_tensor, shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.masks.arithmetic import Unreadable, as_expr
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.rules.rule import Rule
from dilcompile.passes.masks.rules.values import product, select_value
from dilcompile.passes.masks.terms import (
    Expr,
    Ge0,
    Indices,
    Number,
    Truth,
)
from dilcompile.site import Length

if TYPE_CHECKING:
    from dilcompile.passes.masks.reader import MaskReader


def _view(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    return reader.value(source, reindex(shape_of(source), shape_of(node), indices, Bounds(reader.sizes)))


def reindex(old: Sequence[Length], new: Sequence[Length], indices: Indices, bounds: Bounds) -> Indices:
    """Indices into a tensor of shape ``old`` for the element at ``indices`` of its view of shape ``new``."""
    found: list[Expr] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and same_size(old[i], 1):
            found.append(sympy.Integer(0))
            i += 1
        elif j < len(new) and same_size(new[j], 1):
            j += 1
        elif i < len(old) and j < len(new) and same_size(old[i], new[j]):
            found.append(indices[j])
            i, j = i + 1, j + 1
        elif i < len(old) and j < len(new) and _prefix(new[j:], old[i]):
            # One dim was split in several.
            count = _prefix(new[j:], old[i])
            index = sympy.Integer(0)
            for size, part in zip(new[j : j + count], indices[j : j + count], strict=True):
                index = index * as_expr(size) + part
            found.append(sympy.expand(index))
            i, j = i + 1, j + count
        elif i < len(old) and j < len(new) and _prefix(old[i:], new[j]):
            # Several dims were merged into one.
            count = _prefix(old[i:], new[j])
            rest, parts = indices[j], []
            for size in reversed(old[i + 1 : i + count]):
                rest, part = bounds.divide(rest, as_expr(size))
                parts.append(part)
            found.extend([rest, *reversed(parts)])
            i, j = i + count, j + 1
        else:
            raise Unreadable("a view that cuts across dims")
    return tuple(found)


def _prefix(sizes: Sequence[Length], whole: Length) -> int:
    """How many leading sizes multiply to ``whole``; 0 if none do."""
    span: Length = 1
    for count, size in enumerate(sizes, start=1):
        span = span * size
        if same_size(span, whole):
            return count
    return 0


def _permuted(order: Callable[[Node, int], Sequence[int]]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        back: list[Expr] = [sympy.Integer(0)] * len(indices)
        for position, dim in enumerate(order(node, len(indices))):
            back[dim] = indices[position]
        source = node.args[0]
        assert isinstance(source, Node)
        return reader.value(source, tuple(back))

    return rule


def _transposed(node: Node, rank: int) -> Sequence[int]:
    order = list(range(rank))
    i, j = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
    order[i], order[j] = order[j], order[i]
    return order


def _last_two(node: Node, rank: int) -> Sequence[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _expand(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    return reader.operand(node.args[0], indices, len(indices))


def _repeated(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    shape, bounds = shape_of(source), Bounds(reader.sizes)
    own = indices[len(indices) - len(shape) :]
    whole = shape_of(node)[len(indices) - len(shape) :]
    tiled = [
        index if same_size(size, full) else bounds.divide(index, as_expr(size))[1]
        for index, size, full in zip(own, shape, whole, strict=True)
    ]
    return reader.value(source, tuple(tiled))


def _unsqueeze(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    dim = int(node.args[1]) % len(indices)  # type: ignore[arg-type]
    source = node.args[0]
    assert isinstance(source, Node)
    return reader.value(source, indices[:dim] + indices[dim + 1 :])


def _selected(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    rank = len(indices) + 1
    dim = int(node.args[1]) % rank  # type: ignore[arg-type]
    at = node.args[2]
    index = as_expr(at.meta["val"] if isinstance(at, Node) else at)
    if index.is_negative:
        index = as_expr(shape_of(source)[dim]) + index
    return reader.value(source, (*indices[:dim], index, *indices[dim:]))


def _sliced(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    held: list[Any] = [arg.meta["val"] if isinstance(arg, Node) and not is_tensor(arg) else arg for arg in node.args[1:]]
    dim, start, _, step = (held + [None] * 4)[:4] if len(held) < 4 else held[:4]
    dim = int(dim or 0) % len(indices)
    start = 0 if start is None else start
    begin = as_expr(start)
    size = shape_of(source)[dim]
    if begin.is_negative:
        begin = sympy.Max(as_expr(size) + begin, 0) if not isinstance(size, int) else sympy.Integer(max(size + int(start), 0))
    index = begin + as_expr(1 if step is None else step) * indices[dim]
    return reader.value(source, (*indices[:dim], index, *indices[dim + 1 :]))


def _cat(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    parts: list[Node] = [part for part in node.args[0] if is_tensor(part)]  # type: ignore[union-attr, misc]
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % len(indices)  # type: ignore[arg-type]
    if len(parts) > 4:
        raise Unreadable("a concatenation of many parts")
    ends, end = [], sympy.Integer(0)
    for part in parts:
        end = end + as_expr(shape_of(part)[dim])
        ends.append(end)
    value: Number | Truth | None = None
    for part, stop in reversed(list(zip(parts, ends, strict=True))):
        start = stop - as_expr(shape_of(part)[dim])
        inner = reader.value(part, (*indices[:dim], sympy.expand(indices[dim] - start), *indices[dim + 1 :]))
        if value is None:
            value = inner
        else:
            value = select_value(Ge0(sympy.expand(stop - 1 - indices[dim])), inner, value)
    assert value is not None
    return value


def _einsum(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    """An einsum without sums: ``ijbn->bnij``, ``bi,bj->bij``."""
    equation, operands = node.args[:2]
    given, _, made = str(equation).replace(" ", "").partition("->")
    parts = given.split(",")
    if not isinstance(operands, (list, tuple)) or set(given) - {","} != set(made) or not made.isalpha():
        raise Unreadable("a product")
    if any(len(set(part)) != len(part) for part in (made, *parts)):
        raise Unreadable("a diagonal")
    factors = [
        reader.value(source, tuple(indices[made.index(letter)] for letter in part))
        for source, part in zip(operands, parts, strict=True)
        if isinstance(source, Node)
    ]
    return factors[0] if len(factors) == 1 else product(factors, node)


MOVING: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    "squeeze": _view,
    "unsqueeze": _unsqueeze,
    "repeat": _repeated,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "transpose": _permuted(_transposed),
    "permute": _permuted(lambda node, rank: [int(d) % rank for d in node.args[1]]),  # type: ignore[union-attr, arg-type]
    "t": _permuted(_last_two),
    "mT": _permuted(_last_two),
    "select": _selected,
    "slice": _sliced,
    "cat": _cat,
    "einsum": _einsum,
}

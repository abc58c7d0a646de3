"""Evaluate the sub-graph that builds a mask for one symbolic element, without building the mask.

``MaskReader.number(node, indices)`` and ``truth(node, indices)`` follow the graph backwards from an element: a view
rewrites the indices, an ``arange`` becomes its index, a comparison becomes a formula, an input becomes an ``Element``.
Nothing of size S x S is ever made, and symbolic lengths stay symbolic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.axes import VIEWS, is_tensor, op_name, same_size, shape_of
from dilcompile.passes.mask_terms import (
    Bounds,
    Choice,
    Element,
    Eq0,
    Expr,
    Ge0,
    Given,
    IntegerElement,
    Less,
    Number,
    Truth,
    choice,
    conjunction,
    disjunction,
    if_else,
    negation,
)
from dilcompile.site import Length

Indices = tuple[Expr, ...]
# Integers whose arithmetic wraps around within the values that masks have.
_WRAPPING = frozenset((torch.uint8, torch.int8, torch.int16))
# A choice tree wider than this is no mask that a person wrote; it is kept as data.
_WIDEST_CHOICE = 64


class Unreadable(Exception):
    """The element depends on something that has no formula; the message names the node."""


def as_expr(value: Any) -> Expr:
    """A Python number or symbolic length as a sympy expression."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.expr
    if isinstance(value, float) and math.isinf(value):
        return sympy.oo if value > 0 else -sympy.oo
    if isinstance(value, float) and value.is_integer():
        # sympy holds 1.0 and 1 for different; a mask of floats compares them.
        return sympy.Integer(int(value))
    return sympy.sympify(value)


class MaskReader:
    """Reads elements of tensors of one graph.

    Args:
        tables: inputs whose values are known (registered buffers), by node.
        stale: tells whether a tensor was written in place between its making and its use by another node.
        outside: inputs of a checkpoint's body, and the nodes of the graph around it that they stand for.
        carries_gradient: tells whether a tensor's gradient is asked for.
    """

    def __init__(
        self,
        tables: Mapping[Node, torch.Tensor],
        stale: Callable[[Node, Node], bool],
        outside: Mapping[Node, Node] | None = None,
        carries_gradient: Callable[[Node], bool] = lambda node: False,
    ) -> None:
        self.tables = dict(tables)
        self.outside = dict(outside or {})
        self.sizes: dict[sympy.Symbol, Expr] = {}
        self.elements: list[Node] = []
        self.used_tables: set[Node] = set()
        self._numbers: dict[Node, int] = {}
        self.stale = stale
        self._carries_gradient = carries_gradient
        self._memo: dict[tuple[Node, Indices], Number | Truth] = {}

    def set_sizes(self, sizes: Mapping[sympy.Symbol, Expr]) -> None:
        """The ranges of the index symbols from now on; formulas read under other ranges are forgotten."""
        if self.sizes != sizes:
            self.sizes = dict(sizes)
            self._memo.clear()

    def truth(self, node: Node, indices: Sequence[Expr], at: Node | None = None) -> Truth:
        """Element ``node[indices]`` as a truth value (nonzero is true), as the node ``at`` reads it."""
        value = self._read(node, tuple(indices), at)
        if isinstance(value, (sympy.Basic, Choice)):
            return nonzero(value)
        return value

    def number(self, node: Node, indices: Sequence[Expr], at: Node | None = None) -> Number:
        """Element ``node[indices]`` as a number (true is 1), as the node ``at`` reads it."""
        value = self._read(node, tuple(indices), at)
        if isinstance(value, (sympy.Basic, Choice)):
            return value
        return choice(value, sympy.Integer(1), sympy.Integer(0))

    def _read(self, node: Node, indices: Indices, at: Node | None) -> Number | Truth:
        if at is not None and self.stale(node, at):
            # It holds what was written to it since, not what its node computed.
            return self.element(node, self._at_zero(node, indices))
        return self._value(node, indices)

    @staticmethod
    def _at_zero(node: Node, indices: Indices) -> Indices:
        """Dims of size 1 are read at 0 whatever the index, as broadcasting does."""
        sizes = zip(shape_of(node), indices, strict=True)
        return tuple(sympy.Integer(0) if same_size(size, 1) else index for size, index in sizes)

    def _value(self, node: Node, indices: Indices) -> Number | Truth:
        key = (node, indices)
        if key not in self._memo:
            self._memo[key] = self._compute(node, indices)
        return self._memo[key]

    def _compute(self, node: Node, indices: Indices) -> Number | Truth:
        if not is_tensor(node):
            raise Unreadable(f"{node.name} is not a tensor")
        indices = self._at_zero(node, indices)
        if node in self.tables:
            return self._table(node, indices)
        if node in self.outside:
            return self._value(self.outside[node], indices)
        rule = _READ.get(op_name(node)) if node.op == "call_function" else None
        if rule is None or any(self.stale(source, node) for source in node.all_input_nodes if is_tensor(source)):
            return self.element(node, indices)
        try:
            return rule(self, node, indices)
        except Unreadable:
            return self.element(node, indices)

    def learned(self, element: Expr) -> bool:
        """Does a gradient flow into this element?"""
        return self._carries_gradient(self.elements[int(element.args[0])])

    def wrapped(self, element: Expr) -> bool:
        """May it be the result of arithmetic that wrapped around?"""
        node = self.elements[int(element.args[0])]
        computed = node.op == "call_function" and op_name(node) in ("add", "sub", "rsub", "mul", "neg")
        return computed and node.meta["val"].dtype in _WRAPPING

    def element(self, node: Node, indices: Indices) -> Number | Truth:
        """The element kept as data."""
        if node not in self._numbers:
            self._numbers[node] = len(self.elements)
            self.elements.append(node)
        dtype = node.meta["val"].dtype
        kind = Element if dtype.is_floating_point else IntegerElement
        found = kind(sympy.Integer(self._numbers[node]), *indices)
        return Given(found) if dtype is torch.bool else found

    def _table(self, node: Node, indices: Indices) -> Number | Truth:
        formula = table_formula(self.tables[node], indices)
        if formula is None:
            return self.element(node, indices)
        self.used_tables.add(node)
        return formula

    def operand(self, value: Any, indices: Indices, rank: int) -> Number | Truth:
        """A number, or a tensor broadcast against a result of ``rank`` dims."""
        if is_tensor(value):
            own = value.meta["val"].dim()
            return self._value(value, indices[rank - own :])
        if isinstance(value, bool):
            return value
        held = value.meta["val"] if isinstance(value, Node) else value
        return as_expr(held)


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


def as_value(element: torch.Tensor) -> Number | Truth:
    return bool(element) if element.dtype is torch.bool else as_expr(element.item())


def nonzero(value: Number) -> Truth:
    if isinstance(value, Choice):
        return if_else(value.when, nonzero(value.then), nonzero(value.other))
    if value.is_number:
        return not value.is_zero
    return negation(Eq0(value))


def lift(op: Callable[[Expr, Expr], Any], a: Number, b: Number) -> Number:
    """Apply an arithmetic operator to numbers, choices distributed."""
    if isinstance(a, Choice):
        return choice(a.when, lift(op, a.then, b), lift(op, a.other, b))
    if isinstance(b, Choice):
        return choice(b.when, lift(op, a, b.then), lift(op, a, b.other))
    result = op(a, b)
    if not isinstance(result, sympy.Expr) or result is sympy.nan or _half_infinite(result):
        raise Unreadable("arithmetic without a value")
    return result


def _half_infinite(value: Expr) -> bool:
    """Infinity mixed with data: no algebra holds for it."""
    return not value.is_number and bool(value.has(sympy.oo, -sympy.oo, sympy.zoo))


def compare(op: str, a: Number, b: Number) -> Truth:
    """``a op b`` with choices distributed; op one of le, lt, ge, gt, eq, ne."""
    if isinstance(a, Choice):
        return if_else(a.when, compare(op, a.then, b), compare(op, a.other, b))
    if isinstance(b, Choice):
        return if_else(b.when, compare(op, a, b.then), compare(op, a, b.other))
    if not (a.is_number and b.is_number) and (a.is_infinite or b.is_infinite):
        raise Unreadable("a comparison with infinity")
    if a.is_number and b.is_number:
        return bool(getattr(operator, op)(float(a), float(b)))
    if op == "ne":
        return negation(compare("eq", a, b))
    if op == "eq":
        return Eq0(sympy.expand(a - b))
    low, high = (a, b) if op in ("le", "lt") else (b, a)
    gap = sympy.expand(high - low)
    if gap.is_integer:
        return at_least_zero(gap if op in ("le", "ge") else gap - 1)
    return Less(low, high) if op in ("lt", "gt") else negation(Less(high, low))


def at_least_zero(gap: Expr) -> Truth:
    """``gap >= 0``; a bound on an absolute value becomes a bound on either side."""
    for term in sympy.Add.make_args(gap):
        sign, inner = term.as_coeff_Mul()
        if isinstance(inner, sympy.Abs) and sign in (1, -1):
            rest = gap - term
            both = (Ge0(sympy.expand(rest + sign * inner.args[0])), Ge0(sympy.expand(rest - sign * inner.args[0])))
            return conjunction(*both) if sign == -1 else disjunction(*both)
    return Ge0(gap)


Rule = Callable[[MaskReader, Node, Indices], "Number | Truth"]


def _width(value: Number | Truth) -> int:
    return _width(value.then) + _width(value.other) if isinstance(value, Choice) else 1


def _number(value: Number | Truth) -> Number:
    if isinstance(value, (sympy.Basic, Choice)):
        return value
    return choice(value, sympy.Integer(1), sympy.Integer(0))


def _truth(value: Number | Truth) -> Truth:
    return nonzero(value) if isinstance(value, (sympy.Basic, Choice)) else value


def _sides(reader: MaskReader, node: Node, indices: Indices) -> tuple[Number | Truth, Number | Truth]:
    rank = len(indices)
    return reader.operand(node.args[0], indices, rank), reader.operand(node.args[1], indices, rank)


def _arithmetic(op: Callable[[Expr, Expr], Any]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        a, b = _sides(reader, node, indices)
        if node.meta["val"].dtype is torch.bool:
            # On booleans + is or, * is and.
            return disjunction(_truth(a), _truth(b)) if op is operator.add else conjunction(_truth(a), _truth(b))
        _exact_arithmetic(node)
        alpha = node.kwargs.get("alpha", 1)
        right = _number(b)
        if alpha != 1:
            right = lift(operator.mul, right, as_expr(alpha))
        result = lift(op, _number(a), right)
        if _width(result) > _WIDEST_CHOICE:
            raise Unreadable("a choice with too many cases")
        return result

    return rule


def _exact_arithmetic(node: Node) -> None:
    """Small integers wrap around; 0 - 1 is 255."""
    if node.meta["val"].dtype in _WRAPPING:
        raise Unreadable("arithmetic that wraps around")


def _rsub(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    _exact_arithmetic(node)
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise Unreadable("a scaled subtraction")
    a, b = _sides(reader, node, indices)
    return lift(operator.sub, _number(b), _number(a))


def _divide(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    _exact_arithmetic(node)
    a, b = _sides(reader, node, indices)
    mode = node.kwargs.get("rounding_mode")
    floor = mode == "floor" or op_name(node) == "floor_divide"
    if mode == "trunc":
        raise Unreadable("division that truncates")
    return lift((lambda x, y: sympy.floor(x / y)) if floor else operator.truediv, _number(a), _number(b))


def _comparison(op: str) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        a, b = _sides(reader, node, indices)
        if not isinstance(a, (sympy.Basic, Choice)) and isinstance(b, sympy.Basic) and b in (0, 1) and op in ("eq", "ne"):
            same = a if bool(b == 1) else negation(a)
            return same if op == "eq" else negation(same)
        return compare(op, _number(a), _number(b))

    return rule


def _logical(combine: Callable[..., Truth]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        if node.meta["val"].dtype is not torch.bool:
            raise Unreadable("bitwise arithmetic on integers")
        a, b = _sides(reader, node, indices)
        return combine(_truth(a), _truth(b))

    return rule


def _xor(a: Truth, b: Truth) -> Truth:
    return if_else(a, negation(b), b)


def _not(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    if node.meta["val"].dtype is not torch.bool:
        raise Unreadable("bitwise not on integers")
    return negation(_truth(reader.operand(node.args[0], indices, len(indices))))


def _cast(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    value = reader._value(source, indices)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if after is torch.bool:
        return _truth(value)
    if before is torch.bool:
        return _number(value)
    if before.is_floating_point and not after.is_floating_point:
        raise Unreadable("a cast that truncates")
    return _map(lambda leaf: _held_as(leaf, before, after), _number(value))


def _map(function: Callable[[Expr], Expr], value: Number) -> Number:
    """Apply a function to every case of a choice."""
    if isinstance(value, Choice):
        return choice(value.when, _map(function, value.then), _map(function, value.other))
    return function(value)


def _held_as(value: Expr, before: torch.dtype, after: torch.dtype) -> Expr:
    """A number after a cast: rounded, or infinite where the dtype ends."""
    if torch.promote_types(before, after) == after:
        return value
    if value.is_number:
        return as_expr(torch.tensor(float(value), dtype=torch.float64).to(after).item())
    if not after.is_floating_point:
        raise Unreadable("a cast to fewer bits")
    if not before.is_floating_point and torch.finfo(after).bits < 32:
        raise Unreadable("positions in half precision")
    return value


def _where(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    if len(node.args) != 3:
        raise Unreadable("where without values")
    rank = len(indices)
    when = _truth(reader.operand(node.args[0], indices, rank))
    then, other = (reader.operand(arg, indices, rank) for arg in node.args[1:])
    return _select_value(when, then, other)


def _select_value(when: Truth, then: Number | Truth, other: Number | Truth) -> Number | Truth:
    if not isinstance(then, (sympy.Basic, Choice)) and not isinstance(other, (sympy.Basic, Choice)):
        return if_else(when, then, other)
    return choice(when, _number(then), _number(other))


def _masked_fill(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    rank = len(indices)
    inner, mask, fill = (reader.operand(arg, indices, rank) for arg in node.args[:3])
    if not node.meta["val"].dtype.is_floating_point and isinstance(fill, sympy.Expr) and not fill.is_integer:
        raise Unreadable("a fill that is cut off")
    if node.meta["val"].dtype is torch.bool:
        return if_else(_truth(mask), _truth(fill), _truth(inner))
    return choice(_truth(mask), _number(fill), _number(inner))


def _triangular(lower: bool) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
        shift = as_expr(diagonal.meta["val"] if isinstance(diagonal, Node) else diagonal)
        row, column = indices[-2:]
        inside = Ge0(sympy.expand(row + shift - column if lower else column - row - shift))
        value = reader.operand(node.args[0], indices, len(indices))
        if node.meta["val"].dtype is torch.bool:
            return conjunction(inside, _truth(value))
        return choice(inside, _number(value), sympy.Integer(0))

    return rule


def _arange(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    dtype = node.meta["val"].dtype
    if dtype in _WRAPPING or dtype is torch.bool or (dtype.is_floating_point and torch.finfo(dtype).bits < 32):
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


def _view(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    return reader._value(source, reindex(shape_of(source), shape_of(node), indices, Bounds(reader.sizes)))


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
        return reader._value(source, tuple(back))

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
    return reader._value(source, tuple(tiled))


def _unsqueeze(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    dim = int(node.args[1]) % len(indices)  # type: ignore[arg-type]
    source = node.args[0]
    assert isinstance(source, Node)
    return reader._value(source, indices[:dim] + indices[dim + 1 :])


def _selected(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    rank = len(indices) + 1
    dim = int(node.args[1]) % rank  # type: ignore[arg-type]
    at = node.args[2]
    index = as_expr(at.meta["val"] if isinstance(at, Node) else at)
    if index.is_negative:
        index = as_expr(shape_of(source)[dim]) + index
    return reader._value(source, (*indices[:dim], index, *indices[dim:]))


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
    return reader._value(source, (*indices[:dim], index, *indices[dim + 1 :]))


def _indexed(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source, chosen = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(source, Node)
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
    at = [_place(reader, _number(reader.operand(chosen[i], block, span)), sizes[i]) for i in positions]
    return reader._value(source, (*before, *at, *after))


def _place(reader: MaskReader, index: Number, size: Length) -> Expr:
    """An index that surely counts from the front (a negative one would count from the back)."""
    if isinstance(index, Choice):
        raise Unreadable("an index that is a choice")
    bounds = Bounds(reader.sizes)
    if not index.has(Element) and not (bounds.always(index) and bounds.always(as_expr(size) - 1 - index)):
        raise Unreadable("an index that may count from the back")
    return index


def _gathered(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source, dim, index = node.args[:3]
    assert isinstance(source, Node)
    assert isinstance(index, Node)
    place = int(dim) % len(indices)  # type: ignore[arg-type]
    at = _place(reader, _number(reader._value(index, indices)), shape_of(source)[place])
    return reader._value(source, (*indices[:place], at, *indices[place + 1 :]))


def _cumsum(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    value = reader.number(source, indices)
    dim = int(node.args[1]) % len(indices)  # type: ignore[arg-type]
    if isinstance(value, Choice) or not value.is_number:
        raise Unreadable("a running sum of data")
    return sympy.expand(value * (indices[dim] + 1))


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
        inner = reader._value(part, (*indices[:dim], sympy.expand(indices[dim] - start), *indices[dim + 1 :]))
        if value is None:
            value = inner
        else:
            value = _select_value(Ge0(sympy.expand(stop - 1 - indices[dim])), inner, value)
    assert value is not None
    return value


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


def _negated(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    return lift(operator.mul, _number(reader.operand(node.args[0], indices, len(indices))), sympy.Integer(-1))


def _absolute(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    value = _number(reader.operand(node.args[0], indices, len(indices)))
    if isinstance(value, Choice) or not value.is_integer:
        raise Unreadable("an absolute value of data")
    return sympy.Abs(value)


def _power(exponent: Callable[[Node], Any]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        return lift(lambda a, b: a**b, _number(reader.operand(node.args[0], indices, len(indices))), as_expr(exponent(node)))

    return rule


_READ: dict[str, Rule] = {
    "sqrt": _power(lambda node: 0.5),
    "rsqrt": _power(lambda node: -0.5),
    "reciprocal": _power(lambda node: -1),
    "arange": _arange,
    "full": _constant(1, 0),
    "new_full": _constant(2, 0),
    "full_like": _constant(1, 0),
    "scalar_tensor": _constant(0, 0),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(None, 0)),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(None, 1)),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys("to _to_copy contiguous clone alias lift_fresh lift_fresh_copy detach type_as float".split(), _cast),
    "repeat": _repeated,
    "unsqueeze": _unsqueeze,
    "squeeze": _view,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "transpose": _permuted(_transposed),
    "permute": _permuted(lambda node, rank: [int(d) % rank for d in node.args[1]]),  # type: ignore[union-attr, arg-type]
    "t": _permuted(_last_two),
    "mT": _permuted(_last_two),
    "select": _selected,
    "slice": _sliced,
    "index": _indexed,
    "gather": _gathered,
    "cat": _cat,
    "cumsum": _cumsum,
    "diff": _diff,
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "rsub": _rsub,
    "mul": _arithmetic(operator.mul),
    "div": _divide,
    "floor_divide": _divide,
    "neg": _negated,
    "abs": _absolute,
    **{op: _comparison(op) for op in ("le", "lt", "ge", "gt", "eq", "ne")},
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logical(conjunction)),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logical(disjunction)),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), _logical(_xor)),
    **dict.fromkeys(("logical_not", "bitwise_not"), _not),
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangular(lower=True),
    "triu": _triangular(lower=False),
}

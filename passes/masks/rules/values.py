"""Operators that compute a value from values: arithmetic, comparisons, logic, casts, choices."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.graph.operators import is_tensor, op_name
from dilcompile.passes.masks.arithmetic import Unreadable, as_expr, as_number, as_truth, compare, lift, over_cases, width
from dilcompile.passes.masks.rules.rule import Rule, exact_arithmetic, numbers, result, sides
from dilcompile.passes.masks.terms import (
    Choice,
    Element,
    Expr,
    Indices,
    Number,
    Truth,
    choice,
    conjunction,
    disjunction,
    if_else,
    negation,
)

if TYPE_CHECKING:
    from dilcompile.passes.masks.reader import MaskReader


# A choice tree wider than this is no mask that a person wrote; it is kept as data.
_WIDEST_CHOICE = 64


def _arithmetic(op: Callable[[Expr, Expr], Any]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        if node.meta["val"].dtype is torch.bool:
            # On booleans + is or, * is and.
            a, b = sides(reader, node, indices)
            return disjunction(as_truth(a), as_truth(b)) if op is operator.add else conjunction(as_truth(a), as_truth(b))
        exact_arithmetic(node)
        alpha = node.kwargs.get("alpha", 1)
        left, right = numbers(reader, node, indices)
        if alpha != 1:
            right = lift(operator.mul, right, as_expr(alpha))
        if op is operator.mul and node.meta["val"].dtype is torch.int32 and _is_data(left) and _is_data(right):
            raise Unreadable("a product that may wrap around to zero")
        found = result(lift(op, left, right), node)
        if width(found) > _WIDEST_CHOICE:
            raise Unreadable("a choice with too many cases")
        return found

    return rule


def product(factors: Sequence[Number | Truth], node: Node) -> Number:
    """The product of numbers that an operator multiplies, in its own dtype."""
    exact_arithmetic(node)
    found = as_number(factors[0])
    for factor in factors[1:]:
        if node.meta["val"].dtype is torch.int32 and _is_data(found) and _is_data(factor):
            raise Unreadable("a product that may wrap around to zero")
        found = result(lift(operator.mul, found, as_number(factor)), node)
    if width(found) > _WIDEST_CHOICE:
        raise Unreadable("a choice with too many cases")
    return found


def _is_data(value: Number | Truth) -> bool:
    return isinstance(value, sympy.Basic) and bool(value.has(Element))


def _rsub(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    exact_arithmetic(node)
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise Unreadable("a scaled subtraction")
    a, b = numbers(reader, node, indices)
    return result(lift(operator.sub, b, a), node)


def _divide(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    exact_arithmetic(node)
    a, b = numbers(reader, node, indices)
    mode = node.kwargs.get("rounding_mode")
    floor = mode == "floor" or op_name(node) == "floor_divide"
    if mode == "trunc":
        raise Unreadable("division that truncates")
    return result(lift((lambda x, y: sympy.floor(x / y)) if floor else operator.truediv, a, b), node)


def _remainder(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    exact_arithmetic(node)
    a, b = numbers(reader, node, indices)
    if isinstance(b, Choice) or not (b.is_Integer and b.is_positive) or node.meta["val"].dtype.is_floating_point:
        raise Unreadable("a remainder of another number")

    def of(leaf: Expr) -> Expr:
        if not leaf.is_integer:
            raise Unreadable("a remainder of fractions")
        return sympy.Mod(leaf, b)

    return over_cases(of, a)


def _logarithm(function: Callable[[torch.Tensor], torch.Tensor]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        dtype = node.meta["val"].dtype

        def of(leaf: Expr) -> Expr:
            found = function(torch.tensor(float(leaf), dtype=dtype)).item() if leaf.is_number else math.nan
            if math.isnan(found):
                raise Unreadable("a logarithm of data")
            return as_expr(found)

        return over_cases(of, as_number(reader.operand(node.args[0], indices, len(indices))))

    return rule


def _extreme(op: str) -> Rule:
    """The one of two numbers that compares so with the other."""

    def of(a: Expr, b: Expr) -> Expr:
        if not (a.is_number and b.is_number):
            raise Unreadable("an extreme of data")
        return a if compare(op, a, b) else b

    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        if len(node.args) != 2 or not is_tensor(node.args[1]):
            raise Unreadable("an extreme along a dim")
        a, b = numbers(reader, node, indices)
        try:
            found = lift(of, a, b)
        except Unreadable:
            found = choice(compare(op, a, b), a, b)
        if width(found) > _WIDEST_CHOICE:
            raise Unreadable("a choice with too many cases")
        return found if node.meta["val"].dtype is not torch.bool else as_truth(found)

    return rule


def _comparison(op: str) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        a, b = sides(reader, node, indices)
        if not isinstance(a, (sympy.Basic, Choice)) and isinstance(b, sympy.Basic) and b in (0, 1) and op in ("eq", "ne"):
            same = a if bool(b == 1) else negation(a)
            return same if op == "eq" else negation(same)
        return compare(op, as_number(a), as_number(b))

    return rule


def _logical(combine: Callable[..., Truth]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        if node.meta["val"].dtype is not torch.bool:
            raise Unreadable("bitwise arithmetic on integers")
        a, b = sides(reader, node, indices)
        return combine(as_truth(a), as_truth(b))

    return rule


def _xor(a: Truth, b: Truth) -> Truth:
    return if_else(a, negation(b), b)


def _not(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    if node.meta["val"].dtype is not torch.bool:
        raise Unreadable("bitwise not on integers")
    return negation(as_truth(reader.operand(node.args[0], indices, len(indices))))


def _cast(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    source = node.args[0]
    assert isinstance(source, Node)
    value = reader.value(source, indices)
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if after is torch.bool:
        return as_truth(value)
    if before is torch.bool:
        return as_number(value)
    if before.is_floating_point and not after.is_floating_point:
        raise Unreadable("a cast that truncates")
    found = over_cases(lambda leaf: _held_as(leaf, before, after), as_number(value))
    return result(found, node)


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
    when = as_truth(reader.operand(node.args[0], indices, rank))
    then, other = (reader.operand(arg, indices, rank) for arg in node.args[1:])
    value = select_value(when, then, other)
    return result(value, node) if isinstance(value, (sympy.Basic, Choice)) else value


def select_value(when: Truth, then: Number | Truth, other: Number | Truth) -> Number | Truth:
    if not isinstance(then, (sympy.Basic, Choice)) and not isinstance(other, (sympy.Basic, Choice)):
        return if_else(when, then, other)
    return choice(when, as_number(then), as_number(other))


def _masked_fill(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    rank = len(indices)
    inner, mask, fill = (reader.operand(arg, indices, rank) for arg in node.args[:3])
    if not node.meta["val"].dtype.is_floating_point and isinstance(fill, sympy.Expr) and not fill.is_integer:
        raise Unreadable("a fill that is cut off")
    if node.meta["val"].dtype is torch.bool:
        return if_else(as_truth(mask), as_truth(fill), as_truth(inner))
    return choice(as_truth(mask), as_number(fill), as_number(inner))


def _negated(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    return lift(operator.mul, as_number(reader.operand(node.args[0], indices, len(indices))), sympy.Integer(-1))


def _absolute(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
    value = as_number(reader.operand(node.args[0], indices, len(indices)))
    if isinstance(value, Choice) or not value.is_integer:
        raise Unreadable("an absolute value of data")
    return sympy.Abs(value)


def _power(exponent: Callable[[Node], Any]) -> Rule:
    def rule(reader: MaskReader, node: Node, indices: Indices) -> Number | Truth:
        return lift(lambda a, b: a**b, as_number(reader.operand(node.args[0], indices, len(indices))), as_expr(exponent(node)))

    return rule


VALUES: dict[str, Rule] = {
    "sqrt": _power(lambda node: 0.5),
    "rsqrt": _power(lambda node: -0.5),
    "reciprocal": _power(lambda node: -1),
    **dict.fromkeys("to _to_copy contiguous clone alias lift_fresh lift_fresh_copy detach type_as float".split(), _cast),
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "rsub": _rsub,
    "mul": _arithmetic(operator.mul),
    "div": _divide,
    "floor_divide": _divide,
    "remainder": _remainder,
    "log": _logarithm(torch.log),
    "log2": _logarithm(torch.log2),
    **dict.fromkeys(("min", "minimum"), _extreme("le")),
    **dict.fromkeys(("max", "maximum"), _extreme("ge")),
    "neg": _negated,
    "abs": _absolute,
    **{op: _comparison(op) for op in ("le", "lt", "ge", "gt", "eq", "ne")},
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logical(conjunction)),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logical(disjunction)),
    **dict.fromkeys(("logical_xor", "bitwise_xor", "__xor__"), _logical(_xor)),
    **dict.fromkeys(("logical_not", "bitwise_not"), _not),
    "where": _where,
    "masked_fill": _masked_fill,
}

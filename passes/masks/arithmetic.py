"""Arithmetic and comparisons of numbers that may be choices."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from dilcompile.passes.masks.terms import (
    Choice,
    Eq0,
    Expr,
    Ge0,
    Less,
    Number,
    Truth,
    choice,
    conjunction,
    disjunction,
    if_else,
    negation,
)


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


def as_value(element: torch.Tensor) -> Number | Truth:
    return bool(element) if element.dtype is torch.bool else as_expr(element.item())


def as_number(value: Number | Truth) -> Number:
    if isinstance(value, (sympy.Basic, Choice)):
        return value
    return choice(value, sympy.Integer(1), sympy.Integer(0))


def as_truth(value: Number | Truth) -> Truth:
    return nonzero(value) if isinstance(value, (sympy.Basic, Choice)) else value


def nonzero(value: Number) -> Truth:
    if isinstance(value, Choice):
        return if_else(value.when, nonzero(value.then), nonzero(value.other))
    if value.is_number:
        return not value.is_zero
    factors = sympy.Mul.make_args(value.as_coeff_Mul()[1])
    if len(factors) > 1 and all(factor.is_integer for factor in factors):
        return conjunction(*(negation(Eq0(factor)) for factor in factors))
    return negation(Eq0(value))


def lift(op: Callable[[Expr, Expr], Any], a: Number, b: Number) -> Number:
    """Apply an arithmetic operator to numbers, choices distributed."""
    if isinstance(a, Choice):
        return choice(a.when, lift(op, a.then, b), lift(op, a.other, b))
    if isinstance(b, Choice):
        return choice(b.when, lift(op, a, b.then), lift(op, a, b.other))
    result = op(a, b)
    if not isinstance(result, sympy.Expr) or result in (sympy.nan, sympy.zoo) or _half_infinite(result):
        raise Unreadable("arithmetic without a value")
    return result


def _half_infinite(value: Expr) -> bool:
    """Infinity mixed with data: no algebra holds for it."""
    return not value.is_number and bool(value.has(sympy.oo, -sympy.oo, sympy.zoo))


def held(value: Number, dtype: torch.dtype) -> Number:
    """A number as this floating dtype holds it: infinite beyond its end.

    Raises:
        Unreadable: if data is scaled by more than the dtype holds; what comes out is infinite for some data, ordinary for other.
    """
    most = torch.finfo(dtype).max

    def ended(leaf: Expr) -> Expr:
        if leaf.is_number:
            return leaf if abs(leaf) <= most else as_expr(torch.tensor(float(leaf), dtype=torch.float64).to(dtype).item())
        if any(abs(factor) > most for factor in leaf.as_coefficients_dict().values()):
            raise Unreadable("data scaled beyond what its dtype holds")
        return leaf

    return over_cases(ended, value)


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
        return negation(nonzero(sympy.expand(a - b)))
    low, high = (a, b) if op in ("le", "lt") else (b, a)
    gap = sympy.expand(high - low)
    if gap.is_integer:
        return at_least_zero(gap if op in ("le", "ge") else gap - 1)
    return Less(low, high) if op in ("lt", "gt") else negation(Less(high, low))


def at_least_zero(gap: Expr) -> Truth:
    """``gap >= 0``; a bound on an absolute value becomes a bound on either side."""
    for term in sympy.Add.make_args(gap):
        sign, inner = term.as_coeff_Mul()
        if isinstance(inner, sympy.Abs) and sign.is_Integer:
            rest = gap - term
            both = (Ge0(sympy.expand(rest + sign * inner.args[0])), Ge0(sympy.expand(rest - sign * inner.args[0])))
            return conjunction(*both) if sign < 0 else disjunction(*both)
    return Ge0(gap)


def width(value: Number | Truth) -> int:
    return width(value.then) + width(value.other) if isinstance(value, Choice) else 1


def over_cases(function: Callable[[Expr], Expr], value: Number) -> Number:
    """Apply a function to every case of a choice."""
    if isinstance(value, Choice):
        return choice(value.when, over_cases(function, value.then), over_cases(function, value.other))
    return function(value)

"""Which formulas can be computed as a vector along the rows or along the keys."""

from __future__ import annotations

import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

from dilcompile.passes.masks.symbols import INDICES, B
from dilcompile.passes.masks.terms import Choice, Element, Expr, Number, Truth, numbers_of

# Lengths come with operators of torch's own.
FLOORED = (sympy.floor, FloorDiv)
REMAINDERS = (sympy.Mod, Mod, PythonMod)
LARGEST, LEAST = (sympy.Max, Max), (sympy.Min, Min)


def emittable(truth: Truth, axis: sympy.Symbol) -> bool:
    """Can the truth value be computed as a tensor [B, S], S the rows (``axis`` Q) or the keys (K)?"""
    return all(emittable_number(expr, axis) for expr in numbers_of(truth))


def emittable_number(value: Number, axis: sympy.Symbol) -> bool:
    """Can the number be computed as a tensor [B, S]?"""
    if isinstance(value, Choice):
        return emittable(value.when, axis) and emittable_number(value.then, axis) and emittable_number(value.other, axis)
    if isinstance(value, sympy.Symbol):
        return value == axis or value not in INDICES  # what is no index is a length
    if value.is_number and not value.args:
        return bool(value.is_finite)
    if isinstance(value, Element):
        return all(index == B or emittable_number(index, axis) for index in value.args[1:])
    if isinstance(value, FLOORED):
        numerator, divisor = quotient_of(value)
        return bool(numerator.is_integer) and _divides(divisor) and emittable_number(numerator, axis)
    if isinstance(value, REMAINDERS):
        dividend, divisor = value.args
        return bool(dividend.is_integer) and _divides(divisor) and emittable_number(dividend, axis)
    if isinstance(value, (sympy.Add, sympy.Mul, *LARGEST, *LEAST)):
        return all(emittable_number(part, axis) for part in value.args)
    return False


def quotient_of(value: Expr) -> tuple[Expr, Expr]:
    """``floor(a / b)`` as (a, b)."""
    if isinstance(value, FloorDiv):
        numerator, divisor = value.args
        return numerator, divisor
    numerator, divisor = sympy.fraction(sympy.together(value.args[0]))
    return sympy.expand(numerator), divisor


def _divides(divisor: Expr) -> bool:
    """Is it a length or a positive integer?"""
    return bool(divisor.is_integer and divisor.is_positive and (divisor.is_Integer or divisor.is_Symbol))

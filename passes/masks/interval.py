"""Factors that let each row see one run of keys: ``first(b, q) <= k < stop(b, q)``."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dilcompile.passes.masks.arithmetic import lift
from dilcompile.passes.masks.symbols import K, symbols_of
from dilcompile.passes.masks.terms import (
    And,
    Eq0,
    Expr,
    Ge0,
    Number,
    Or,
    Truth,
    choice,
    conjunction,
    disjunction,
    negation,
)


@dataclass(frozen=True)
class Interval:
    """The keys ``first <= k < stop`` of a row; None: from the first key, up to the last."""

    first: Number | None = None
    stop: Number | None = None

    def meet(self, other: Interval) -> Interval:
        return Interval(_joined(sympy.Max, self.first, other.first), _joined(sympy.Min, self.stop, other.stop))

    def where(self, rows: Truth, otherwise: Interval, end: Expr) -> Interval:
        """This one for the rows where ``rows`` holds, else the other."""
        return Interval(
            _chosen(rows, self.first, otherwise.first, sympy.Integer(0)), _chosen(rows, self.stop, otherwise.stop, end)
        )


EVERYTHING, NOTHING = Interval(), Interval(None, sympy.Integer(0))


def _joined(op: type[Expr], a: Number | None, b: Number | None) -> Number | None:
    if a is None or b is None:
        return b if a is None else a
    return lift(op, a, b)


def _chosen(rows: Truth, then: Number | None, other: Number | None, unlimited: Expr) -> Number | None:
    if then is None and other is None:
        return None
    return choice(rows, unlimited if then is None else then, unlimited if other is None else other)


def interval_of(factor: Truth, end: Expr) -> Interval | None:
    """The factor as one run of keys a row, or None.

    Args:
        end: the number of keys.
    """
    if K not in symbols_of(factor):
        return EVERYTHING.where(factor, NOTHING, end)
    if isinstance(factor, Ge0):
        return _half(factor.expr)
    if isinstance(factor, Eq0):
        return _chunk(factor.expr)
    if isinstance(factor, And):
        return _all_of(factor, end)
    return _any_of(factor, end) if isinstance(factor, Or) else None


def _without_keys(expr: Expr) -> bool:
    return K not in expr.free_symbols


def _half(expr: Expr) -> Interval | None:
    """``slope * k + rest >= 0``."""
    expr = sympy.expand(expr)
    slope = expr.coeff(K)
    rest = sympy.expand(expr - slope * K)
    if not slope.is_Integer or slope == 0 or not _without_keys(rest) or not rest.is_integer:
        return None
    if slope > 0:
        return Interval(first=-_floored(rest, slope))
    return Interval(stop=_floored(rest, -slope) + 1)


def _floored(expr: Expr, by: Expr) -> Expr:
    return expr if by == 1 else sympy.floor(expr / by)


def _chunk(expr: Expr) -> Interval | None:
    """``floor((k + a) / size) == c``, or ``k == c``."""
    expr = sympy.expand(expr)
    steps = [term for term in expr.atoms(sympy.floor) if not _without_keys(term)]
    step, size, shift = K, sympy.Integer(1), sympy.Integer(0)
    if steps:
        step = steps[0]
        slope = sympy.expand(step.args[0]).coeff(K)
        if slope == 0:
            return None
        size = 1 / slope
        shift = sympy.expand((step.args[0] - slope * K) * size)
        if not (size.is_integer and size.is_positive and shift.is_integer and _without_keys(shift)):
            return None
    sign = expr.coeff(step)
    if sign not in (1, -1):
        return None
    number = sympy.expand(-(expr - sign * step) * sign)
    if not _without_keys(number) or not number.is_integer:
        return None
    first = sympy.expand(number * size - shift)
    return Interval(first, first + size)


def _all_of(factor: And, end: Expr) -> Interval | None:
    found = EVERYTHING
    for part in factor.parts:
        one = interval_of(part, end)
        if one is None:
            return None
        found = found.meet(one)
    return found


def _any_of(factor: Or, end: Expr) -> Interval | None:
    rows = [part for part in factor.parts if K not in symbols_of(part)]
    if rows:
        rest = interval_of(disjunction(*(part for part in factor.parts if part not in rows)), end)
        return None if rest is None else EVERYTHING.where(disjunction(*rows), rest, end)
    chosen = _choice_of(factor)
    if chosen is not None:
        when, then, other = (interval_of(part, end) if i else part for i, part in enumerate(chosen))
        if isinstance(then, Interval) and isinstance(other, Interval):
            return then.where(when, other, end)  # type: ignore[arg-type]
    found = [interval_of(part, end) for part in factor.parts]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    # Two runs are one where both begin at the first key, or both end at the last.
    if all(one.first is None for one in known):
        return Interval(None, _most(sympy.Max, [one.stop for one in known]))
    if all(one.stop is None for one in known):
        return Interval(_most(sympy.Min, [one.first for one in known]), None)
    return None


def _most(op: type[Expr], ends: list[Number | None]) -> Number | None:
    if any(end is None for end in ends):
        return None
    first, *rest = (end for end in ends if end is not None)
    for end in rest:
        first = lift(op, first, end)
    return first


def _choice_of(factor: Or) -> tuple[Truth, Truth, Truth] | None:
    """``(c and x) or (not c and y)`` with a c that does not depend on the key: (c, x, y)."""
    if len(factor.parts) != 2:
        return None
    one, other = factor.parts
    for part in one.parts if isinstance(one, And) else (one,):
        others = other.parts if isinstance(other, And) else frozenset((other,))
        if K not in symbols_of(part) and negation(part) in others:
            mine = one.parts if isinstance(one, And) else frozenset((one,))
            return part, conjunction(*(mine - {part})), conjunction(*(others - {negation(part)}))
    return None


def chunk_size(factor: Truth, place: Expr) -> int | None:
    """The n of ``floor(k / n) == floor(place / n)``, or None."""
    if not isinstance(factor, Eq0):
        return None
    expr = sympy.expand(factor.expr)
    for step in expr.atoms(sympy.floor):
        size = K / step.args[0]
        if size.is_Integer and size > 1 and sympy.expand(expr - expr.coeff(step) * (step - sympy.floor(place / size))) == 0:
            return int(size)
    return None


def is_chunk(factor: Truth) -> bool:
    """Does it compare positions rounded down?"""
    return isinstance(factor, Eq0) and bool(factor.expr.atoms(sympy.floor))

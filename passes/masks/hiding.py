"""How an additive operand hides scores: where it lets through, and what it adds to the rest."""

from __future__ import annotations

import sympy
import torch

from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.terms import Choice, Element, Eq0, Expr, Less, Number, Truth, if_else

# An additive mask hides with at least this much: the smallest fill in use (BERT's -1e4) hides within exp(-1e4) = 0.
HIDES = -1e3
# Scores beyond this are not expected; a number that swallows them all swallows this.
_LARGEST_SCORE = 16.0


def absorbs(fill: float, resolution: float) -> bool:
    """Is nothing left of an ordinary score after the fill is added, at this relative resolution of the dtype?"""
    return -fill * resolution >= _LARGEST_SCORE


def swallows(dtype: torch.dtype) -> float:
    """What is added to an ordinary score of this dtype and leaves nothing of it: this number, and all below."""
    return -_LARGEST_SCORE / torch.finfo(dtype).eps


class NotAMask(Exception):
    """The operand is a bias, not a mask; the message says what it adds."""


def keep_of(value: Number, resolution: float, reader: MaskReader) -> tuple[Truth, set[float]]:
    """Where an additive mask lets through, and what it adds to the rest.

    Args:
        value: the element that is added to the scores.
        resolution: relative resolution of the scores' dtype.
        reader: what it was read with.

    Raises:
        NotAMask: if the value is anything else than 0 or a large negative number.
    """
    if isinstance(value, Choice):
        then, fills = keep_of(value.then, resolution, reader)
        other, more = keep_of(value.other, resolution, reader)
        return if_else(value.when, then, other), fills | more
    if value.is_number:
        if value.is_zero:
            return True, set()
        if value <= HIDES:
            return False, {float(value)}
        raise NotAMask(f"the constant {value}")
    return _scaled_keep(value, resolution, reader)


def where_one(value: Number) -> Truth | None:
    """Where a number is 1 that is 0 everywhere else; None if it may be another."""
    if isinstance(value, Choice):
        then, other = where_one(value.then), where_one(value.other)
        return None if then is None or other is None else if_else(value.when, then, other)
    if value.is_number and (value.is_zero or value == 1):
        return bool(value == 1)
    return None


def _scaled_keep(value: Expr, resolution: float, reader: MaskReader) -> tuple[Truth, set[float]]:
    """``(1 - m) * c`` with a huge negative c: visible where m is 1.

    An m of integers is taken to hold 0 and 1, which is checked when the graph runs. One of fractions may hold anything: c must
    be so large that only 1 shows.
    """
    fill, factor = sympy.factor_terms(value).as_coeff_Mul()
    elements = factor.atoms(Element)
    if not fill.is_number or abs(fill) < -HIDES or not elements:
        raise NotAMask(f"the data {value}")
    if factor.subs({element: sympy.Integer(0) for element in elements}).free_symbols:
        raise NotAMask(f"positions beside data: {value}")
    hidden, size = sympy.expand(factor if fill < 0 else -factor), -float(abs(fill))
    if all(element.is_integer and not reader.wrapped(element) for element in elements):
        for element in elements:
            reader.take_as_binary(element)
        # 1 - m is 0 or 1; half of that tells them apart.
        return Less(hidden, sympy.Rational(1, 2)), {size}
    if any(element.is_integer or reader.learned(element) for element in elements) or not absorbs(size, resolution):
        raise NotAMask(f"fractions: {value}")
    return Eq0(hidden), {size}

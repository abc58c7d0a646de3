"""What one element of a mask says, as a formula over its indices: the terms that the mask reader computes with.

Truth values are Python bools or ``Ge0``, ``Eq0``, ``Less``, ``Given``, ``And``, ``Or``, ``Not``. Numbers are sympy expressions
over index symbols, lengths and tensor elements, or ``Choice`` between two numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import sympy

Expr: TypeAlias = sympy.Expr


Indices: TypeAlias = tuple[Expr, ...]


class Element(sympy.Function):  # type: ignore[misc]
    """``Element(number, i, j, ...)``: an element of a tensor that the reader keeps as data (number: which)."""

    # sympy takes a function of numbers for a number; this one is data.
    is_number = False

    @classmethod
    def eval(cls, *args: object) -> None:
        return None


class IntegerElement(Element):
    """An element of an integer tensor."""

    is_integer = True


@dataclass(frozen=True)
class Ge0:
    """``expr >= 0`` for an integer expression."""

    expr: Expr

    def __str__(self) -> str:
        return f"{self.expr} >= 0"


@dataclass(frozen=True)
class Eq0:
    """``expr == 0``."""

    expr: Expr

    def __str__(self) -> str:
        return f"{self.expr} == 0"


@dataclass(frozen=True)
class Less:
    """``left < right`` for numbers that may be fractional."""

    left: Expr
    right: Expr

    def __str__(self) -> str:
        return f"{self.left} < {self.right}"


@dataclass(frozen=True)
class Given:
    """An element of a boolean tensor."""

    element: Expr

    def __str__(self) -> str:
        return str(self.element)


@dataclass(frozen=True)
class Not:
    inner: Truth

    def __str__(self) -> str:
        return f"not ({self.inner})"


@dataclass(frozen=True)
class And:
    parts: frozenset[Truth]

    def __str__(self) -> str:
        return " and ".join(sorted(f"({part})" for part in self.parts))


@dataclass(frozen=True)
class Or:
    parts: frozenset[Truth]

    def __str__(self) -> str:
        return " or ".join(sorted(f"({part})" for part in self.parts))


Truth: TypeAlias = bool | Ge0 | Eq0 | Less | Given | Not | And | Or


@dataclass(frozen=True)
class Choice:
    """``then`` where the condition holds, else ``other``."""

    when: Truth
    then: Number
    other: Number


Number: TypeAlias = "Expr | Choice"


def conjunction(*parts: Truth) -> Truth:
    flat: set[Truth] = set()
    for part in parts:
        if part is False:
            return False
        if isinstance(part, And):
            flat |= part.parts
        elif part is not True:
            flat.add(part)
    if not flat:
        return True
    return flat.pop() if len(flat) == 1 else And(frozenset(flat))


def disjunction(*parts: Truth) -> Truth:
    flat: set[Truth] = set()
    for part in parts:
        if part is True:
            return True
        if isinstance(part, Or):
            flat |= part.parts
        elif part is not False:
            flat.add(part)
    if not flat:
        return False
    if any(negation(part) in flat for part in flat):
        return True
    return flat.pop() if len(flat) == 1 else Or(frozenset(flat))


def negation(truth: Truth) -> Truth:
    if isinstance(truth, bool):
        return not truth
    if isinstance(truth, Not):
        return truth.inner
    if isinstance(truth, Ge0):
        return Ge0(sympy.expand(-truth.expr - 1))
    if isinstance(truth, And):
        return disjunction(*(negation(part) for part in truth.parts))
    if isinstance(truth, Or):
        return conjunction(*(negation(part) for part in truth.parts))
    return Not(truth)


def if_else(when: Truth, then: Truth, other: Truth) -> Truth:
    if when is True:
        return then
    if when is False:
        return other
    return disjunction(conjunction(when, then), conjunction(negation(when), other))


def mapped(truth: Truth, change: Callable[[Expr], Expr]) -> Truth:
    """The same truth with every number in it changed."""
    if isinstance(truth, bool):
        return truth
    if isinstance(truth, And):
        return conjunction(*(mapped(part, change) for part in truth.parts))
    if isinstance(truth, Or):
        return disjunction(*(mapped(part, change) for part in truth.parts))
    if isinstance(truth, Not):
        return negation(mapped(truth.inner, change))
    if isinstance(truth, Less):
        return Less(change(truth.left), change(truth.right))
    if isinstance(truth, Given):
        return Given(change(truth.element))
    return Ge0(change(truth.expr)) if isinstance(truth, Ge0) else Eq0(change(truth.expr))


def choice(when: Truth, then: Number, other: Number) -> Number:
    if isinstance(when, bool):
        return then if when else other
    then, other = _where_true(then, when), _where_true(other, negation(when))
    return then if then == other else Choice(when, then, other)


def _where_true(number: Number, known: Truth) -> Number:
    """The number where a truth value is known to hold."""
    if isinstance(number, Choice):
        if number.when == known:
            return number.then
        return number.other if number.when == negation(known) else number
    if isinstance(known, Eq0) and not number.is_number and _ratio(number, known.expr) is not None:
        return sympy.Integer(0)
    return number


def _ratio(number: Expr, unit: Expr) -> Expr | None:
    """The constant that a number is of another, if it is one."""
    (share, one), (of, other) = (sympy.factor_terms(expr).as_coeff_Mul() for expr in (number, unit))
    if not (share.is_finite and of.is_finite and of.is_nonzero):
        return None
    return share / of if one == other else -share / of if sympy.expand(one + other) == 0 else None


def numbers_of(truth: Truth) -> tuple[Expr, ...]:
    """All number expressions in a truth value."""
    if isinstance(truth, bool):
        return ()
    if isinstance(truth, (And, Or)):
        return tuple(expr for part in truth.parts for expr in numbers_of(part))
    if isinstance(truth, Not):
        return numbers_of(truth.inner)
    if isinstance(truth, Less):
        return truth.left, truth.right
    return (truth.element,) if isinstance(truth, Given) else (truth.expr,)


def elements_of(truth: Truth) -> set[Expr]:
    """The elements of data that a truth value depends on."""
    return {element for expr in numbers_of(truth) for element in expr.atoms(Element)}


def elements_in(number: Number) -> set[Expr]:
    """The elements of data that a number depends on."""
    if isinstance(number, Choice):
        return elements_of(number.when) | elements_in(number.then) | elements_in(number.other)
    return set(number.atoms(Element))

"""Which comparisons hold for all indices in range."""

from __future__ import annotations

from functools import lru_cache

import sympy

from dilcompile.passes.masks.terms import And, Element, Eq0, Expr, Ge0, Not, Or, Truth, conjunction, disjunction, negation


@lru_cache(maxsize=4096)
def _is_nonnegative(expr: Expr) -> bool:
    if expr.is_number:
        return bool(expr >= 0)
    if not all(symbol.is_nonnegative for symbol in expr.free_symbols):
        return False  # a number that the caller gives may be anything
    # Lengths are positive integers: shift them to start at 0, so that non-negative coefficients prove it.
    least = {s: 1 if s.is_positive else 0 for s in expr.free_symbols}
    shifted = sympy.expand(expr.subs({s: sympy.Symbol(f"_{s}", integer=True, nonnegative=True) + n for s, n in least.items()}))
    return all(term.is_nonnegative for term in sympy.Add.make_args(shifted))


class Bounds:
    """The range of every index symbol: 0 <= symbol < size. Decides affine comparisons that hold everywhere."""

    def __init__(self, sizes: dict[sympy.Symbol, Expr]) -> None:
        self.sizes = sizes

    def settle(self, truth: Truth) -> Truth:
        """The same truth with every comparison that always or never holds replaced by a constant."""
        if isinstance(truth, Ge0):
            return self._settle_ge(truth)
        if isinstance(truth, Eq0):
            if truth.expr.is_zero:
                return True
            never = self.always(truth.expr - 1) or self.always(-truth.expr - 1)
            return False if never else truth
        if isinstance(truth, And):
            return conjunction(*(self.settle(part) for part in truth.parts))
        if isinstance(truth, Or):
            return disjunction(*(self.settle(part) for part in truth.parts))
        if isinstance(truth, Not):
            return negation(self.settle(truth.inner))
        return truth

    def divide(self, index: Expr, by: Expr) -> tuple[Expr, Expr]:
        """Quotient and remainder of an affine index, exact where the bounds prove the remainder's range."""
        quotient, remainder = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(index)):
            share = sympy.cancel(term / by)
            if share.is_integer:
                quotient += share
            else:
                remainder += term
        if remainder != 0 and not (self.always(remainder) and self.always(by - 1 - remainder)):
            return sympy.floor(index / by), sympy.Mod(index, by)
        return quotient, remainder

    def _settle_ge(self, truth: Ge0) -> Truth:
        if self.always(truth.expr):
            return True
        return False if self.always(-truth.expr - 1) else truth

    def always(self, expr: Expr) -> bool:
        """Is ``expr >= 0`` for all indices in range? Only affine expressions are decided."""
        if expr.has(Element):
            return False
        lowest = sympy.expand(expr)
        for symbol, size in self.sizes.items():
            slope = lowest.coeff(symbol)
            if symbol not in lowest.free_symbols:
                continue
            if not slope.is_number or symbol in (lowest - slope * symbol).free_symbols:
                return False
            lowest = sympy.expand(lowest.subs(symbol, 0 if slope >= 0 else size - 1))
        return _is_nonnegative(lowest)

"""Factors that compare numbers of the row with numbers of the key: a formula and two vectors a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from dilcompile.passes.masks.emittable import emittable, emittable_number
from dilcompile.passes.masks.symbols import K, Q, symbols_of
from dilcompile.passes.masks.terms import And, Eq0, Expr, Ge0, Not, Number, Or, Truth, choice

# More comparisons than this are no mask that a person wrote.
_MOST_TERMS = 16


@dataclass
class Separated:
    """Formulas over sums of a row's and a key's number; the numbers are collected as the formulas are made."""

    rows: list[Number] = field(default_factory=list)
    keys: list[Number] = field(default_factory=list)

    def formula(self, truth: Truth) -> str | None:
        """The truth value as a formula over terms, or None if it does not separate."""
        for axis, mine in ((Q, self.rows), (K, self.keys)):
            if symbols_of(truth) & {Q, K} <= {axis}:
                if not emittable(truth, axis):
                    return None
                return self._term("g", mine, choice(truth, sympy.Integer(0), sympy.Integer(-1)))
        if isinstance(truth, (And, Or)):
            parts = [self.formula(part) for part in sorted(truth.parts, key=str)]
            known = [part for part in parts if part is not None]
            joined = (" & " if isinstance(truth, And) else " | ").join(known)
            return f"({joined})" if len(known) == len(parts) else None
        if isinstance(truth, Not):
            inner = self.formula(truth.inner)
            return None if inner is None else f"~{inner}"
        return self._compared(truth) if isinstance(truth, (Ge0, Eq0)) else None

    def _compared(self, truth: Ge0 | Eq0) -> str | None:
        if not truth.expr.is_integer:
            return None
        by_row, by_key = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(_apart(truth)):
            if K not in term.free_symbols:
                by_row += term
            elif Q not in term.free_symbols:
                by_key += term
            else:
                return None
        if not (emittable_number(by_row, Q) and emittable_number(by_key, K)):
            return None
        return self._pair("g" if isinstance(truth, Ge0) else "e", by_row, by_key)

    def _term(self, kind: str, mine: list[Number], number: Number) -> str | None:
        row, key = (number, sympy.Integer(0)) if mine is self.rows else (sympy.Integer(0), number)
        return self._pair(kind, row, key)

    def _pair(self, kind: str, row: Number, key: Number) -> str | None:
        if len(self.rows) == _MOST_TERMS:
            return None
        self.rows.append(row)
        self.keys.append(key)
        return f"{kind}{len(self.rows) - 1}"


def compares_labels(truth: Truth) -> Expr | None:
    """The f of ``f(b, q) == f(b, k)``, or None."""
    if not isinstance(truth, Eq0) or not {Q, K} <= symbols_of(truth):
        return None
    expr = _apart(truth)
    by_key = sympy.Add(*(term for term in sympy.Add.make_args(expr) if K in term.free_symbols))
    return by_key if sympy.expand(expr - by_key + by_key.subs(K, Q)) == 0 else None


def _apart(truth: Ge0 | Eq0) -> Expr:
    """The compared sum, where ``(row + key) mod n == r`` is ``(row - r) mod n == -key mod n``."""
    expr = sympy.expand(truth.expr)
    for term in sympy.Add.make_args(expr) if isinstance(truth, Eq0) else ():
        sign, inner = term.as_coeff_Mul()
        if not isinstance(inner, sympy.Mod) or sign not in (1, -1) or not {Q, K} <= inner.free_symbols:
            continue
        whole, by = inner.args
        rest = -sign * (expr - term)
        by_key = sympy.Add(*(part for part in sympy.Add.make_args(sympy.expand(whole)) if K in part.free_symbols))
        if Q in by_key.free_symbols or not (rest.is_Integer and by.is_Integer and 0 <= rest < by):
            continue
        return sympy.Mod(sympy.expand(whole - by_key - rest), by) - sympy.Mod(-by_key, by)
    return expr

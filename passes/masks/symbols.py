"""The index symbols of a site's pairs, and what they range over."""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from dilcompile.passes.masks.arithmetic import as_expr
from dilcompile.passes.masks.terms import Expr, Truth, numbers_of
from dilcompile.site import Length

B, H, Q, K = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "q", "k"))
# Where several axes make up the batch, heads, rows or columns, each has an index of its own.
DIGITS = {axis: tuple(sympy.Symbol(f"{axis}{i}", integer=True, nonnegative=True) for i in range(8)) for axis in (B, H, Q, K)}
INDICES = frozenset((*DIGITS, *(digit for digits in DIGITS.values() for digit in digits)))


@dataclass(frozen=True)
class Lengths:
    """The sizes the index symbols run over."""

    batch: Length
    heads: Length
    q_len: Length
    k_len: Length

    @property
    def bounds(self) -> dict[sympy.Symbol, Expr]:
        sizes = (self.batch, self.heads, self.q_len, self.k_len)
        return {symbol: as_expr(size) for symbol, size in zip((B, H, Q, K), sizes, strict=True)}


def symbols_of(truth: Truth) -> set[sympy.Symbol]:
    """The index symbols that a truth value depends on."""
    return {symbol for expr in numbers_of(truth) for symbol in expr.free_symbols if symbol in INDICES}

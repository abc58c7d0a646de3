"""The band of a mask: the edges ``k <= q + c`` and ``k >= q - c`` that its factors set, and where query row 0 stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.masks.arithmetic import as_expr
from dilcompile.passes.masks.symbols import INDICES, K, Lengths, Q
from dilcompile.passes.masks.terms import Element, Expr, Ge0, Truth
from dilcompile.site import MaskSpec


@dataclass(frozen=True)
class Edge:
    """``k <= q + reach + data`` (upper) or ``k >= q - reach + data``; data: a sum of elements without index, or 0."""

    factor: Truth
    upper: bool
    reach: Expr
    data: Expr


def edge_of(factor: Truth, lengths: Lengths) -> Edge | None:
    """The factor as an edge of the band, or None."""
    if not isinstance(factor, Ge0):
        return None
    expr = sympy.expand(factor.expr)
    slope_q, slope_k = expr.coeff(Q), expr.coeff(K)
    rest = sympy.expand(expr - slope_q * Q - slope_k * K)
    data = sympy.Add(*(term for term in sympy.Add.make_args(rest) if term.has(Element)))
    if rest.free_symbols & INDICES or not data.is_integer:
        return None
    if slope_q == 0 and data != 0 and same_size(lengths.q_len, 1):
        slope_q = -slope_k  # the only row is row 0
    if (slope_q, slope_k) == (1, -1):
        return Edge(factor, True, rest - data, data)
    if (slope_q, slope_k) == (-1, 1):
        return Edge(factor, False, rest - data, -data)
    return None


@dataclass(frozen=True)
class Band:
    """What the edges say together.

    Args:
        start: added to ``spec.q_offset``, known when the model runs; None for 0.
        over: factors that the band leaves to others.
    """

    spec: MaskSpec
    start: Expr | None
    over: tuple[Truth, ...]
    upper: tuple[Expr, ...] = ()
    lower: tuple[Expr, ...] = ()


def band_of(edges: Sequence[Edge], lengths: Lengths) -> Band:
    """The band of the edges.

    Edges with data make it where all data is the same number; edges whose reach is no number are left over.
    """
    starts = {edge.data for edge in edges if edge.data != 0}
    if len(starts) == 1 and any(edge.upper and edge.data != 0 for edge in edges):
        return _from_start(edges, starts.pop())
    shift = sympy.expand(as_expr(lengths.k_len) - as_expr(lengths.q_len))
    used, over = _of_numbers([edge for edge in edges if edge.data == 0], shift)
    over += [edge.factor for edge in edges if edge.data != 0]
    upper, lower = ([edge.reach for edge in used if edge.upper == wanted] for wanted in (True, False))
    right, left = (min(found, default=None) for found in (upper, lower))
    if right is not None and right in (0, shift):
        # The diagonal ends at one of the two corners: causal, aligned there.
        offset = int(right) if right.is_Integer else lengths.k_len - lengths.q_len
        spec = MaskSpec(causal=True, left=None if left is None else int(left + right), q_offset=offset)
    else:
        spec = MaskSpec(left=None if left is None else int(left), right=None if right is None else int(right))
    return Band(spec, None, tuple(over), tuple(upper), tuple(lower))


def _of_numbers(edges: Sequence[Edge], shift: Expr) -> tuple[list[Edge], list[Truth]]:
    """The edges that make a band of numbers, and the factors of the others."""
    used: list[Edge] = []
    over: list[Truth] = []
    aligned = any(edge.upper and edge.reach == shift for edge in edges) and not shift.is_Integer
    for edge in edges:
        # Beside a diagonal that ends in the lower right corner, distances count from there.
        fits = edge.reach == shift if aligned and edge.upper else sympy.expand(edge.reach + (shift if aligned else 0)).is_Integer
        if fits:
            used.append(edge)
        else:
            over.append(edge.factor)
    return used, over


def _from_start(edges: Sequence[Edge], start: Expr) -> Band:
    """Query row 0 stands at a position that is data: all distances count from there."""
    used = [edge for edge in edges if edge.data == start and edge.reach.is_Integer]
    over = tuple(edge.factor for edge in edges if edge not in used)
    right = min((int(edge.reach) for edge in used if edge.upper), default=None)
    if right is None:
        return Band(MaskSpec(), None, tuple(edge.factor for edge in edges))
    left = min((int(edge.reach) for edge in used if not edge.upper), default=None)
    spec = MaskSpec(causal=True, left=None if left is None else left + right, runtime_offset=True)
    return Band(spec, start + right, over)

"""Sort the factors of a mask's formula into causal, window, padding, documents, and what can't be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy
from torch.fx import Node

from dilcompile.passes.atoms import same_size
from dilcompile.passes.masks.arithmetic import as_expr
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.emittable import emittable, emittable_number
from dilcompile.passes.masks.read import ReadMask
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.symbols import INDICES, B, K, Lengths, Q, symbols_of
from dilcompile.passes.masks.terms import And, Choice, Element, Eq0, Expr, Ge0, Number, Truth, conjunction
from dilcompile.passes.operators import op_name
from dilcompile.site import EmptyRows, Length, MaskSpec


def read_mask(keep: Truth, empty: EmptyRows, reader: MaskReader, lengths: Lengths) -> ReadMask:
    """Sort the factors of ``keep(b, h, q, k)`` into causal, window, padding, documents, and what can't be read.

    Args:
        empty: what rows become that see no key.
    """
    bounds = Bounds(reader.sizes)
    keep = bounds.settle(keep)
    if keep is False:
        return ReadMask(MaskSpec(unread="false: nothing is visible"))
    factors = list(keep.parts) if isinstance(keep, And) else [] if keep is True else [keep]
    upper: list[Expr] = []
    lower: list[Expr] = []
    padding: list[Truth] = []
    documents: list[Expr] = []
    unread: list[str] = []
    for factor in factors:
        edge = _edge(factor)
        document = _document(factor, reader, lengths)
        if edge is not None:
            (upper if edge[0] else lower).append(edge[1])
        elif symbols_of(factor) <= {B, K} and emittable(factor, reader, lengths):
            padding.append(factor)
        elif document is not None:
            documents.append(document)
        else:
            unread.append(describe(factor, reader))
    spec = _band(upper, lower, lengths)
    if documents and (len(documents) > 1 or not same_size(spec.q_offset, 0)):
        unread.append("several document factors" if len(documents) > 1 else "documents of shifted queries")
    never = not padding and not unread and _always_sees(upper, lower, bool(documents), bounds, lengths)
    spec = replace(
        spec,
        key_padding=bool(padding),
        documents=bool(documents),
        unread=" and ".join(sorted(unread)) or None,
        empty_rows="zero" if never else empty,
    )
    return ReadMask(spec, conjunction(*padding), documents[0] if documents else None, tuple(reader.elements))


def _always_sees(upper: Sequence[Expr], lower: Sequence[Expr], documents: bool, bounds: Bounds, lengths: Lengths) -> bool:
    """Does the band leave every row a key? With documents: the row's own."""
    if documents:
        return all(map(bounds.always, (*upper, *lower)))
    # The first row must reach key 0, the last row a key that exists, and the band must not be empty in between.
    beyond = as_expr(lengths.k_len) - as_expr(lengths.q_len)
    ends = (*upper, *(beyond + edge for edge in lower), *(a + b for a in upper for b in lower))
    return all(bounds.always(sympy.expand(end)) for end in ends)


def _edge(factor: Truth) -> tuple[bool, Expr] | None:
    """``(True, c)`` for ``k <= q + c``, ``(False, c)`` for ``k >= q - c``, else None."""
    if not isinstance(factor, Ge0) or factor.expr.has(Element):
        return None
    expr = sympy.expand(factor.expr)
    slope_q, slope_k = expr.coeff(Q), expr.coeff(K)
    rest = sympy.expand(expr - slope_q * Q - slope_k * K)
    if rest.free_symbols & INDICES:
        return None
    if (slope_q, slope_k) == (1, -1):
        return True, rest
    if (slope_q, slope_k) == (-1, 1):
        return False, rest
    return None


def _document(factor: Truth, reader: MaskReader, lengths: Lengths) -> Expr | None:
    """``f(b, q) == f(b, k)``: the f as an element in (b, k), if both sides are the same running number of documents."""
    if not isinstance(factor, Eq0) or not {Q, K} <= factor.expr.free_symbols:
        return None
    if not same_size(lengths.q_len, lengths.k_len):
        return None
    for sign in (1, -1):
        own = sympy.expand(sign * factor.expr)
        for element in own.atoms(Element):
            if K not in element.free_symbols or element.free_symbols - {B, K}:
                continue
            if own == element - element.subs(K, Q) and emittable_number(element, reader, lengths) and _runs(element, reader):
                return element
    return None


def _runs(element: Expr, reader: MaskReader) -> bool:
    """Does a number never come back once it changed along the keys? A running sum of what is never negative does not."""
    node = reader.elements[int(element.args[0])]
    if node.op != "call_function" or op_name(node) != "cumsum":
        return False
    source, dim = node.args[:2]
    assert isinstance(source, Node)
    rank = len(element.args) - 1
    if element.args[1:][int(dim) % rank] != K:  # type: ignore[arg-type]
        return False
    return never_negative(reader.number(source, element.args[1:], node))


def never_negative(value: Number) -> bool:
    if isinstance(value, Choice):
        return never_negative(value.then) and never_negative(value.other)
    return bool(value.is_number and value >= 0)


def _band(upper: Sequence[Expr], lower: Sequence[Expr], lengths: Lengths) -> MaskSpec:
    shift = sympy.expand(as_expr(lengths.k_len) - as_expr(lengths.q_len))
    right, left = _tightest(upper), _tightest(lower)
    if right is not None and right in (0, shift):
        # The diagonal ends at one of the two corners: causal, aligned there.
        return MaskSpec(
            causal=True,
            left=None if left is None else _as_int(left + right, lengths),
            q_offset=_as_length(right, lengths),
        )
    return MaskSpec(
        left=None if left is None else _as_int(left, lengths),
        right=None if right is None else _as_int(right, lengths),
    )


def _tightest(edges: Sequence[Expr]) -> Expr | None:
    if not edges:
        return None
    found = sympy.Min(*edges)
    if isinstance(found, sympy.Min):
        raise UnclearWindow(f"which of {list(edges)} is the nearer edge depends on a length")
    return found


class UnclearWindow(Exception):
    """The window's edge is not a number; the message says what it depends on."""


def _as_int(expr: Expr, lengths: Lengths) -> int:
    expr = sympy.expand(expr)
    if not expr.is_Integer:
        raise UnclearWindow(f"the window's edge {expr} depends on a length")
    return int(expr)


def _as_length(expr: Expr, lengths: Lengths) -> Length:
    if expr.is_Integer:
        return int(expr)
    return lengths.k_len - lengths.q_len


def describe(truth: Truth, reader: MaskReader) -> str:
    """The formula with elements by the names of their nodes."""
    text = str(truth)
    for number, node in enumerate(reader.elements):
        text = (
            text.replace("IntegerElement", "Element")
            .replace(f"Element({number}, ", f"{node.name}(")
            .replace(f"Element({number})", node.name)
        )
    return text

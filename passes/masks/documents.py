"""Documents packed in one row: ``f(b, q) == f(b, k)`` whose f is a running number, and positions that count inside each."""

from __future__ import annotations

import sympy
from torch.fx import Node

from dilcompile.passes.graph.operators import op_name
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.masks.arithmetic import nonzero
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.emittable import emittable_number
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.separable import compares_labels
from dilcompile.passes.masks.symbols import B, K, Lengths, Q
from dilcompile.passes.masks.terms import Choice, Element, Expr, IntegerElement, Not, Number, Truth, mapped


def document_of(factor: Truth, reader: MaskReader, lengths: Lengths) -> Expr | None:
    """The f of ``f(b, q) == f(b, k)`` as an element at (b, k), if it is a running number of documents."""
    label = compares_labels(factor)
    if label is None or not same_size(lengths.q_len, lengths.k_len):
        return None
    _, element = label.as_coeff_Mul()
    if label not in (element, -element) or not isinstance(element, Element) or not element.free_symbols <= {B, K}:
        return None
    return element if emittable_number(element, K) and _runs(element, reader) else None


def _runs(element: Expr, reader: MaskReader) -> bool:
    """Does a number never come back once it changed along the keys? A running sum of what is never negative does not."""
    summed = _summed(element, reader)
    return summed is not None and never_negative(summed)


def _summed(element: Expr, reader: MaskReader) -> Number | None:
    """What an element sums up along the keys, or None."""
    node = reader.elements[int(element.args[0])]
    if node.op != "call_function" or op_name(node) != "cumsum":
        return None
    source, dim = node.args[:2]
    assert isinstance(source, Node)
    rank = len(element.args) - 1
    if element.args[1:][int(dim) % rank] != K:  # type: ignore[arg-type]
        return None
    return reader.number(source, element.args[1:], node)


def never_negative(value: Number) -> bool:
    if isinstance(value, Choice):
        return never_negative(value.then) and never_negative(value.other)
    return bool(value.is_number and value >= 0)


def counted_inside(factors: list[Truth], documents: list[Expr], reader: MaskReader) -> list[Truth]:
    """The factors with positions that count inside each document replaced by those of the row.

    A position p counts inside the documents if a new one begins wherever p does not go up by one: between two tokens of
    one document p then differs as their places do.
    """
    counts = {p for document in documents for p in _positions(document, reader)}
    if not counts:
        return factors

    def by_place(expr: Expr) -> Expr:
        for p in counts:
            there = p.subs(K, Q)
            here, slope = sympy.expand(expr), sympy.expand(expr).coeff(p)
            if slope != 0 and here.coeff(there) == -slope:
                expr = sympy.expand(here + slope * (there - p) + slope * (K - Q))
        return expr

    return [mapped(factor, by_place) for factor in factors]


def _positions(document: Expr, reader: MaskReader) -> list[Expr]:
    """The elements p(b, k) that go up by one inside the document."""
    summed = _summed(document, reader)
    if not isinstance(summed, Choice):
        return []
    # Past the first token: what is summed there says where a new document begins.
    sizes = {**reader.sizes, K: reader.sizes[K] - 1}
    begins = Bounds(sizes).settle(mapped(nonzero(summed), lambda expr: expr.subs(K, K + 1)))
    if not isinstance(begins, Not):
        return []
    step = getattr(begins.inner, "expr", None)
    if step is None:
        return []
    step = sympy.expand(step)
    own = {p.subs(K, K - 1) for p in step.atoms(IntegerElement)} | step.atoms(IntegerElement)
    return [p for p in own if K in p.free_symbols and step in (rise := sympy.expand(p.subs(K, K + 1) - p - 1), -rise)]

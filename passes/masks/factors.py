"""Sort the factors of a mask's formula: causal, window, padding, documents, keys by row, pairs, and what can't be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sympy

from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.masks.arithmetic import as_expr
from dilcompile.passes.masks.band import Band, Edge, band_of, edge_of
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.documents import counted_inside, document_of
from dilcompile.passes.masks.emittable import emittable, emittable_number
from dilcompile.passes.masks.interval import EVERYTHING, Interval, chunk_size, interval_of, is_chunk
from dilcompile.passes.masks.read import ReadMask
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.separable import Separated, compares_labels
from dilcompile.passes.masks.symbols import B, K, Lengths, Q, symbols_of
from dilcompile.passes.masks.terms import And, Expr, Or, Truth, conjunction, mapped
from dilcompile.site import ByRow, EmptyRows, MaskSpec


@dataclass
class _Sorted:
    """The factors by kind."""

    edges: list[Edge] = field(default_factory=list)
    padding: list[Truth] = field(default_factory=list)
    documents: list[Expr] = field(default_factory=list)
    others: list[Truth] = field(default_factory=list)


def read_mask(keep: Truth, empty: EmptyRows, reader: MaskReader, lengths: Lengths, *, tensors: bool = False) -> ReadMask:
    """Sort the factors of ``keep(b, h, q, k)``.

    Args:
        empty: what rows become that see no key.
        tensors: masks that are not read wholly stay operands as tensors, so that nothing is left out.
    """
    bounds = Bounds(reader.sizes)
    keep = bounds.settle(keep)
    if keep is False:
        return ReadMask(MaskSpec(unread="false: nothing is visible"))
    factors = list(keep.parts) if isinstance(keep, And) else [] if keep is True else [keep]
    found = _sorted(factors, reader, lengths)
    band = band_of(found.edges, lengths)
    others = [*found.others, *band.over]
    if found.documents and (len(found.documents) > 1 or band.start is not None or not same_size(band.spec.q_offset, 0)):
        others += [factor for factor in factors if document_of(factor, reader, lengths) is not None]
        found.documents.clear()
    end = as_expr(lengths.k_len)
    limits, named, rest = _limited(others, end)
    chunk, beside = _chunked(others, band, bool(found.documents))
    separated, formulas, unread = Separated(), [], []
    for factor in rest:
        formula = separated.formula(factor)
        if formula is None:
            unread.append(describe(factor, reader))
        else:
            formulas.append(formula)
            named.append((_pair_word(factor), factor))
    by_row = [ByRow(word, describe(factor, reader)) for word, factor in named]
    if tensors:
        by_row.append(ByRow("other", " and ".join(sorted(unread)) or "float masks that are data"))
    never = not unread and not tensors and _always_sees(conjunction(*factors), found, band, bounds, lengths)
    spec = replace(
        band.spec,
        key_padding=bool(found.padding),
        documents=bool(found.documents),
        by_row=tuple(by_row),
        chunk=chunk,
        unread=None if tensors else " and ".join(sorted(unread)) or None,
        empty_rows="zero" if never else empty,
    )
    return ReadMask(
        spec,
        conjunction(*found.padding),
        found.documents[0] if found.documents else None,
        band.start,
        limits,
        _limited(beside, end)[0],
        " & ".join(formulas) or None,
        tuple(separated.rows),
        tuple(separated.keys),
        tuple(reader.elements),
        late=frozenset(reader.late),
    )


def _sorted(factors: Sequence[Truth], reader: MaskReader, lengths: Lengths) -> _Sorted:
    found = _Sorted()
    plain = []
    for factor in factors:
        document = document_of(factor, reader, lengths)
        if document is None:
            plain.append(factor)
        elif document not in found.documents:
            found.documents.append(document)
    bounds = Bounds(reader.sizes)
    for factor in map(bounds.settle, counted_inside(plain, found.documents, reader)):
        edge = edge_of(factor, lengths)
        if factor is True:
            continue
        if edge is not None:
            found.edges.append(edge)
        elif symbols_of(factor) <= {B, K} and emittable(factor, K):
            found.padding.append(factor)
        else:
            found.others.append(factor)
    return found


def _limited(factors: Sequence[Truth], end: Expr) -> tuple[Interval | None, list[tuple[str, Truth]], list[Truth]]:
    """The run of keys that each row sees by the factors that are such runs, these with their words, and the rest."""
    limits, named, rest = EVERYTHING, [], []
    for factor in factors:
        one = interval_of(factor, end) if symbols_of(factor) <= {B, Q, K} else None
        ends = () if one is None else (one.first, one.stop)
        if one is None or not all(number is None or emittable_number(number, Q) for number in ends):
            rest.append(factor)
        else:
            limits = limits.meet(one)
            named.append((_limit_word(factor), factor))
    return limits if named else None, named, rest


def _chunked(factors: Sequence[Truth], band: Band, documents: bool) -> tuple[int | None, list[Truth]]:
    """The size of the chunks, counted from key 0, that the queries stand in at their places; and the other factors."""
    place = Q + as_expr(band.spec.q_offset) + (0 if band.start is None else band.start)
    for number, factor in enumerate(factors):
        # Forms count from the start of each document.
        size = None if documents else chunk_size(factor, place)
        if size is not None:
            return size, [*factors[:number], *factors[number + 1 :]]
    return None, list(factors)


def _limit_word(factor: Truth) -> str:
    if is_chunk(factor):
        return "chunk"
    return "prefix" if isinstance(factor, Or) and K in symbols_of(factor) else "rows"


def _pair_word(factor: Truth) -> str:
    return "pairs" if compares_labels(factor) is None else "label"


def _always_sees(keep: Truth, found: _Sorted, band: Band, bounds: Bounds, lengths: Lengths) -> bool:
    """Does every row surely see a key?"""
    shift = sympy.expand(as_expr(lengths.k_len) - as_expr(lengths.q_len))
    for own in {sympy.Integer(0), shift}:
        # The key at the row's own place, counted from either end.
        there = bounds.always(own) and bounds.always(shift - own)
        if there and bounds.settle(_at(keep, own)) is True:
            return True
    if found.padding or found.documents or found.others or band.over or band.start is not None:
        return False
    # The first row must reach key 0, the last row a key that exists, and the band must not be empty in between.
    ends = (*band.upper, *(shift + edge for edge in band.lower), *(a + b for a in band.upper for b in band.lower))
    return all(bounds.always(sympy.expand(end)) for end in ends)


def _at(keep: Truth, own: Expr) -> Truth:
    """The truth value at the key ``q + own``."""
    return mapped(keep, lambda expr: sympy.expand(expr.subs(K, Q + own)))


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

"""From the formulas of a site's mask operands to a ``MaskSpec`` and the few vectors it needs at run time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dilcompile.passes.axes import op_name, same_size, shape_of
from dilcompile.passes.emit import Emitter, aten
from dilcompile.passes.mask_reader import MaskReader, as_expr
from dilcompile.passes.mask_terms import (
    And,
    Bounds,
    Choice,
    Element,
    Eq0,
    Expr,
    Ge0,
    Given,
    Less,
    Not,
    Number,
    Or,
    Truth,
    conjunction,
    if_else,
)
from dilcompile.site import EmptyRows, Length, MaskSpec

B, H, Q, K = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "q", "k"))
# Where several axes make up the batch, heads, rows or columns, each has an index of its own.
DIGITS = {axis: tuple(sympy.Symbol(f"{axis}{i}", integer=True, nonnegative=True) for i in range(8)) for axis in (B, H, Q, K)}
_INDICES = frozenset((*DIGITS, *(digit for digits in DIGITS.values() for digit in digits)))

# An additive mask hides with at least this much: the smallest fill in use (BERT's -1e4) hides within exp(-1e4) = 0.
_HIDES = -1e3
# Scores beyond this are not expected; a number that swallows them all swallows this.
_LARGEST_SCORE = 16.0


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


@dataclass(frozen=True)
class ReadMask:
    """A mask as read: its description, and the formulas of the operands to emit.

    Args:
        elements: the nodes that elements in the formulas belong to, by number.
        all_if_none: where the padding hides all keys of a batch row, it hides none.
    """

    spec: MaskSpec
    key_padding: Truth = True
    documents: Expr | None = None
    elements: tuple[Node, ...] = field(default=())
    all_if_none: bool = False

    @property
    def sources(self) -> frozenset[Node]:
        """The nodes that the operands are made of."""
        used = elements_of(self.key_padding) | (set() if self.documents is None else self.documents.atoms(Element))
        return frozenset(self.elements[int(element.args[0])] for element in used)


@dataclass(frozen=True)
class Hiding:
    """How one operand hides scores.

    Args:
        fills: what the hidden scores become, or what is added to them.
        replaces: the scores are overwritten, not added to.
        absorbs: adding the fill leaves nothing of the score.
        biased: something is added after it.
    """

    fills: frozenset[float]
    replaces: bool
    absorbs: bool = True
    biased: bool = False


def empty_rows(hidings: Sequence[Hiding], calls_sdpa: bool) -> EmptyRows:
    """What rows become that see no key."""
    fills: frozenset[float] = frozenset().union(*(hiding.fills for hiding in hidings))
    if not fills:
        return "zero"
    if fills == {-math.inf}:
        return "zero" if calls_sdpa else "nan"
    if len(fills) > 1:
        return "other"
    if all(hiding.replaces and not hiding.biased for hiding in hidings):
        return "uniform"
    (first, *rest) = hidings
    return "other" if rest or first.replaces or not first.absorbs else "shifted"


def absorbs(fill: float, resolution: float) -> bool:
    """Is nothing left of an ordinary score after the fill is added, at this relative resolution of the dtype?"""
    return -fill * resolution >= _LARGEST_SCORE


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
        if value <= _HIDES:
            return False, {float(value)}
        raise NotAMask(f"the constant {value}")
    return _scaled_keep(value, resolution, reader)


class NotAMask(Exception):
    """The operand is a bias, not a mask; the message says what it adds."""


def _scaled_keep(value: Expr, resolution: float, reader: MaskReader) -> tuple[Truth, set[float]]:
    """``(1 - m) * c`` with a huge negative c: visible where m is 1.

    An m of integers is taken to hold 0 and 1. One of fractions may hold anything: c must be so large that only 1 shows.
    """
    fill, factor = sympy.factor_terms(value).as_coeff_Mul()
    elements = factor.atoms(Element)
    if not fill.is_number or abs(fill) < -_HIDES or not elements:
        raise NotAMask(f"the data {value}")
    if factor.subs({element: sympy.Integer(0) for element in elements}).free_symbols:
        raise NotAMask(f"positions beside data: {value}")
    hidden, size = sympy.expand(factor if fill < 0 else -factor), -float(abs(fill))
    if all(element.is_integer and not reader.wrapped(element) for element in elements):
        # 1 - m is 0 or 1; half of that tells them apart.
        return Less(hidden, sympy.Rational(1, 2)), {size}
    if any(element.is_integer or reader.learned(element) for element in elements) or not absorbs(size, resolution):
        raise NotAMask(f"fractions: {value}")
    return Eq0(hidden), {size}


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
        elif symbols_of(factor) <= {B, K} and _emittable(factor, reader, lengths):
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


def symbols_of(truth: Truth) -> set[sympy.Symbol]:
    """The index symbols that a truth value depends on."""
    return {symbol for expr in numbers_of(truth) for symbol in expr.free_symbols if symbol in _INDICES}


def elements_of(truth: Truth) -> set[Expr]:
    """The elements of data that a truth value depends on."""
    return {element for expr in numbers_of(truth) for element in expr.atoms(Element)}


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


def _edge(factor: Truth) -> tuple[bool, Expr] | None:
    """``(True, c)`` for ``k <= q + c``, ``(False, c)`` for ``k >= q - c``, else None."""
    if not isinstance(factor, Ge0) or factor.expr.has(Element):
        return None
    expr = sympy.expand(factor.expr)
    slope_q, slope_k = expr.coeff(Q), expr.coeff(K)
    rest = sympy.expand(expr - slope_q * Q - slope_k * K)
    if rest.free_symbols & _INDICES:
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
            if own == element - element.subs(K, Q) and _emittable_number(element, reader, lengths) and _runs(element, reader):
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


def _emittable(truth: Truth, reader: MaskReader, lengths: Lengths) -> bool:
    """Can the factor be computed as a [B, Sk] tensor?"""
    return all(_emittable_number(expr, reader, lengths) for expr in numbers_of(truth))


def _emittable_number(expr: Expr, reader: MaskReader, lengths: Lengths) -> bool:
    """Is it a sum of numbers, the key position and elements at (b, k), each with a number before it?"""
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(expr))]
    return all(
        factor.is_finite and (rest == 1 or rest == K or (isinstance(rest, Element) and _plain_indices(rest, reader, lengths)))
        for factor, rest in terms
    )


def _plain_indices(element: Expr, reader: MaskReader, lengths: Lengths) -> bool:
    """Is the element indexed by b, k and numbers, the letters at most once, in a tensor that is long enough?"""
    live = [index for index in element.args[1:] if not index.is_Integer]
    if any(index not in (B, K) for index in live) or len(set(live)) != len(live):
        return False
    shape = shape_of(reader.elements[int(element.args[0])])
    ends = {B: lengths.batch, K: lengths.k_len}
    return all(
        index.is_Integer or statically_known_true(size >= ends[index])
        for size, index in zip(shape, element.args[1:], strict=True)
    )


class Vectors:
    """Emits the [B or 1, Sk] operands of a read mask."""

    def __init__(self, emit: Emitter, read: ReadMask, like: Node, k_len: Length, bring_in: Callable[[Node], Node]) -> None:
        self._emit = emit
        self._elements = read.elements
        self._bring_in = bring_in
        self._all_if_none = read.all_if_none
        self._device = like.meta["val"].device
        self._batch: Length = like.meta["val"].shape[0]
        self._k_len = k_len

    def keep(self, truth: Truth, batch: Length) -> Node:
        """A bool tensor [B, Sk]: True where the key may be seen."""
        found = self._truth(truth)
        if self._all_if_none:
            found = self._emit(aten.logical_or.default, found, self._emit(aten.logical_not.default, self._any_key(found)))
        shape = found.meta["val"].shape
        wanted = (batch, self._k_len)
        if all(a is b or a == b for a, b in zip(shape, wanted, strict=True)):
            return found
        return self._emit(aten.expand.default, found, [self._emit.size(batch), self._emit.size(self._k_len)])

    def _any_key(self, keep: Node) -> Node:
        return self._emit(aten.any.dim, keep, 1, True)

    def documents(self, element: Expr) -> Node:
        """An integer tensor [B or 1, Sk]: the number of each key's document."""
        return self._element(element)

    def _truth(self, truth: Truth) -> Node:
        emit = self._emit
        if isinstance(truth, (And, Or)):
            op = aten.logical_and.default if isinstance(truth, And) else aten.logical_or.default
            first, *rest = sorted(truth.parts, key=str)
            found = self._truth(first)
            for part in rest:
                found = emit(op, found, self._truth(part))
            return found
        if isinstance(truth, Not):
            return emit(aten.logical_not.default, self._truth(truth.inner))
        if isinstance(truth, Given):
            return self._element(truth.element)
        if isinstance(truth, Ge0):
            return emit(aten.ge.Scalar, self._number(truth.expr), 0)
        if isinstance(truth, Eq0):
            return emit(aten.eq.Scalar, self._number(truth.expr), 0)
        if isinstance(truth, Less):
            return emit(aten.lt.Scalar, self._number(truth.left - truth.right), 0)
        raise AssertionError(f"a constant factor was left in the mask: {truth}")

    def _number(self, expr: Expr) -> Node:
        emit, total, constant = self._emit, None, 0.0
        for term in sympy.Add.make_args(sympy.expand(expr)):
            factor, rest = term.as_coeff_Mul()
            if rest == 1:
                constant += float(factor)
                continue
            part = self._keys() if rest == K else self._element(rest)
            scaled = part if factor == 1 else emit(aten.mul.Scalar, part, _plain(factor))
            total = scaled if total is None else emit(aten.add.Tensor, total, scaled)
        assert total is not None
        return total if constant == 0.0 else emit(aten.add.Scalar, total, _plain(sympy.nsimplify(constant)))

    def _keys(self) -> Node:
        keys = self._emit(aten.arange.default, self._emit.size(self._k_len), device=self._device)
        return self._emit(aten.unsqueeze.default, keys, 0)

    def _element(self, element: Expr) -> Node:
        """The tensor as [B or 1, Sk or 1]."""
        emit, node = self._emit, self._bring_in(self._elements[int(element.args[0])])
        indices = list(element.args[1:])
        for dim in reversed(range(len(indices))):
            length = self._batch if indices[dim] == B else self._k_len
            if not indices[dim].is_Integer and not same_size(shape_of(node)[dim], length):
                # A mask may be longer than the keys it was cut to.
                node = emit(aten.slice.Tensor, node, dim, 0, emit.size(length))
            if indices[dim].is_Integer:
                node = emit(aten.select.int, node, dim, int(indices.pop(dim)))
        if not node.meta["val"].dtype.is_floating_point and node.meta["val"].dtype not in (torch.bool, torch.int64):
            node = emit(aten.to.dtype, node, torch.int64)  # small integers would wrap around below
        if indices == [K, B]:
            node = emit(aten.transpose.int, node, 0, 1)
        if B not in indices:
            node = emit(aten.unsqueeze.default, node, 0)
        if K not in indices:
            node = emit(aten.unsqueeze.default, node, 1)
        return node


def _plain(number: Expr) -> int | float:
    return int(number) if number.is_Integer else float(number)

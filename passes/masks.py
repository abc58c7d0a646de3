"""From the formulas of a site's mask operands to a ``MaskSpec`` and the few vectors it needs at run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import sympy
from torch.fx import Node

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

# An additive mask hides with at least this much: the smallest fill in use (BERT's -1e4) hides within exp(-1e4) = 0.
_HIDES = -1e3


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
    """A mask as read: its description, and the formulas of the operands to emit."""

    spec: MaskSpec
    key_padding: Truth = True
    documents: Expr | None = None
    elements: tuple[Node, ...] = field(default=())


def keep_of(value: Number) -> tuple[Truth, set[EmptyRows]]:
    """Where an additive mask lets through, and what its fill gives for rows that see nothing.

    Raises:
        NotAMask: if the value is anything else than 0 or a large negative number.
    """
    if isinstance(value, Choice):
        then, fills = keep_of(value.then)
        other, more = keep_of(value.other)
        return if_else(value.when, then, other), fills | more
    if value.is_number:
        if value.is_zero:
            return True, set()
        if value <= _HIDES:
            return False, {"nan" if value == -sympy.oo else "uniform"}
        raise NotAMask(f"the constant {value}")
    return _scaled_keep(value)


class NotAMask(Exception):
    """The operand is a bias, not a mask; the message says what it adds."""


def _scaled_keep(value: Expr) -> tuple[Truth, set[EmptyRows]]:
    """``(1 - m) * c`` with a huge negative c: visible where m is 1."""
    fill, factor = sympy.factor_terms(value).as_coeff_Mul()
    if fill.is_number and abs(fill) >= -_HIDES and factor.has(Element):
        hidden = factor if fill < 0 else -factor
        # 1 - m is 0 or 1; half of that tells them apart whatever m's dtype rounds to.
        return Less(sympy.expand(hidden), sympy.Rational(1, 2)), {"uniform"}
    raise NotAMask(f"the data {value}")


def read_mask(keep: Truth, empty_rows: set[EmptyRows], reader: MaskReader, lengths: Lengths) -> ReadMask:
    """Sort the factors of ``keep(b, h, q, k)`` into causal, window, padding, documents, and what can't be read."""
    keep = Bounds(lengths.bounds).settle(keep)
    if keep is False:
        return ReadMask(MaskSpec(unread="false: nothing is visible"))
    factors = list(keep.parts) if isinstance(keep, And) else [] if keep is True else [keep]
    upper: list[Expr] = []
    lower: list[Expr] = []
    padding: list[Truth] = []
    documents: list[Expr] = []
    unread: list[str] = []
    for factor in factors:
        used = symbols_of(factor)
        edge = _edge(factor)
        if edge is not None:
            (upper if edge[0] else lower).append(edge[1])
        elif used <= {B, K} and _emittable(factor):
            padding.append(factor)
        elif _document(factor) is not None:
            documents.append(_document(factor))  # type: ignore[arg-type]
        else:
            unread.append(describe(factor, reader))
    spec = _band(upper, lower, lengths)
    fill: EmptyRows = "zero" if not empty_rows else "uniform" if "uniform" in empty_rows else "nan"
    if len(documents) > 1:
        unread.append("several document factors")
    spec = replace(
        spec,
        key_padding=bool(padding),
        documents=bool(documents),
        unread=" and ".join(sorted(unread)) or None,
        empty_rows=fill if padding or unread else "zero",
    )
    return ReadMask(spec, conjunction(*padding), documents[0] if documents else None, tuple(reader.elements))


def symbols_of(truth: Truth) -> set[sympy.Symbol]:
    """The index symbols that a truth value depends on."""
    if isinstance(truth, (And, Or)):
        return set().union(*(symbols_of(part) for part in truth.parts))
    if isinstance(truth, Not):
        return symbols_of(truth.inner)
    if isinstance(truth, bool):
        return set()
    exprs = (truth.left, truth.right) if isinstance(truth, Less) else (truth.element,) if isinstance(truth, Given) else (truth.expr,)
    return {symbol for expr in exprs for symbol in expr.free_symbols if symbol in (B, H, Q, K)}


def _edge(factor: Truth) -> tuple[bool, Expr] | None:
    """``(True, c)`` for ``k <= q + c``, ``(False, c)`` for ``k >= q - c``, else None."""
    if not isinstance(factor, Ge0) or factor.expr.has(Element):
        return None
    expr = sympy.expand(factor.expr)
    slope_q, slope_k = expr.coeff(Q), expr.coeff(K)
    rest = sympy.expand(expr - slope_q * Q - slope_k * K)
    if rest.free_symbols & {B, H, Q, K}:
        return None
    if (slope_q, slope_k) == (1, -1):
        return True, rest
    if (slope_q, slope_k) == (-1, 1):
        return False, rest
    return None


def _document(factor: Truth) -> Expr | None:
    """``f(b, q) == f(b, k)``: the f as an expression in (b, k), if both sides are the same function."""
    if not isinstance(factor, Eq0) or not {Q, K} <= factor.expr.free_symbols:
        return None
    terms = sympy.Add.make_args(sympy.expand(factor.expr))
    of_q = sympy.Add(*(t for t in terms if Q in t.free_symbols))
    of_k = sympy.Add(*(t for t in terms if K in t.free_symbols))
    if sympy.expand(of_q + of_k - factor.expr) != 0 or H in factor.expr.free_symbols:
        return None
    if sympy.expand(of_q.subs(Q, K) + of_k) != 0:
        return None
    return of_k if isinstance(of_k, Element) else -of_k if isinstance(-of_k, Element) else None


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
        text = text.replace("IntegerElement", "Element").replace(f"Element({number}, ", f"{node.name}(").replace(f"Element({number})", node.name)
    return text


def _emittable(truth: Truth) -> bool:
    """Can the factor be computed as a [B, Sk] tensor? Every element must be indexed by plain b, k or a number."""
    if isinstance(truth, (And, Or)):
        return all(_emittable(part) for part in truth.parts)
    if isinstance(truth, Not):
        return _emittable(truth.inner)
    if isinstance(truth, bool):
        return True
    exprs = (truth.left, truth.right) if isinstance(truth, Less) else (truth.element,) if isinstance(truth, Given) else (truth.expr,)
    return all(_emittable_number(expr) for expr in exprs)


def _emittable_number(expr: Expr) -> bool:
    for element in expr.atoms(Element):
        indices = element.args[1:]
        live = [index for index in indices if not index.is_Integer]
        if any(index not in (B, K) for index in live) or len(set(live)) != len(live):
            return False
    bare = expr.subs({element: sympy.Symbol("_e") for element in expr.atoms(Element)})
    return bool(bare.is_polynomial()) and not (bare.free_symbols - {B, K, sympy.Symbol("_e")})


class Vectors:
    """Emits the [B or 1, Sk] operands of a read mask."""

    def __init__(self, emit: Emitter, read: ReadMask, like: Node, k_len: Length, bring_in: Callable[[Node], Node]) -> None:
        self._emit = emit
        self._elements = read.elements
        self._bring_in = bring_in
        self._device = like.meta["val"].device
        self._k_len = k_len

    def keep(self, truth: Truth, batch: Length) -> Node:
        """A bool tensor [B, Sk]: True where the key may be seen."""
        found = self._truth(truth)
        shape = found.meta["val"].shape
        wanted = (batch, self._k_len)
        if all(a is b or a == b for a, b in zip(shape, wanted, strict=True)):
            return found
        return self._emit(aten.expand.default, found, [self._emit.size(batch), self._emit.size(self._k_len)])

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
            if indices[dim].is_Integer:
                node = emit(aten.select.int, node, dim, int(indices.pop(dim)))
        if indices == [K, B]:
            node = emit(aten.transpose.int, node, 0, 1)
        if B not in indices:
            node = emit(aten.unsqueeze.default, node, 0)
        if K not in indices:
            node = emit(aten.unsqueeze.default, node, 1)
        return node


def _plain(number: Expr) -> int | float:
    return int(number) if number.is_Integer else float(number)

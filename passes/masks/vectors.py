"""Emit the vectors that stand for a mask's data: formulas along the rows or along the keys as tensors [B or 1, S or 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.masks.emittable import FLOORED, LARGEST, LEAST, REMAINDERS, quotient_of
from dilcompile.passes.masks.symbols import B
from dilcompile.passes.masks.terms import And, Choice, Element, Eq0, Expr, Ge0, Given, Less, Not, Number, Or, Truth
from dilcompile.site import Length


class Vectors:
    """Emits formulas over (b, q) or (b, k).

    Args:
        elements: the nodes that elements in the formulas belong to, by number.
        device: where the vectors are made.
        lengths: the range of each index symbol.
        bring_in: gives a node of a graph around this one in this one.
    """

    def __init__(
        self,
        emit: Emitter,
        elements: Sequence[Node],
        device: torch.device,
        lengths: Mapping[sympy.Symbol, Length],
        bring_in: Callable[[Node], Node],
    ) -> None:
        self._emit, self._elements, self.device = emit, elements, device
        self._lengths, self._bring_in = lengths, bring_in

    def truth(self, truth: Truth, axis: sympy.Symbol) -> Node:
        """A bool tensor."""
        emit = self._emit
        if isinstance(truth, bool):
            return emit(aten.full.default, [1, 1], truth, dtype=torch.bool, device=self.device)
        if isinstance(truth, (And, Or)):
            op = aten.logical_and.default if isinstance(truth, And) else aten.logical_or.default
            first, *rest = sorted(truth.parts, key=str)
            found = self.truth(first, axis)
            for part in rest:
                found = emit(op, found, self.truth(part, axis))
            return found
        if isinstance(truth, Not):
            return emit(aten.logical_not.default, self.truth(truth.inner, axis))
        if isinstance(truth, Given):
            return self._element(truth.element, axis)
        if isinstance(truth, Ge0):
            return emit(aten.ge.Scalar, self.number(truth.expr, axis), 0)
        if isinstance(truth, Eq0):
            return emit(aten.eq.Scalar, self.number(truth.expr, axis), 0)
        assert isinstance(truth, Less)
        return emit(aten.lt.Scalar, self.number(truth.left - truth.right, axis), 0)

    def number(self, value: Number, axis: sympy.Symbol) -> Node:
        """An int64 tensor, or a float one where floats are compared."""
        emit = self._emit
        if isinstance(value, Choice):
            then, other = self.number(value.then, axis), self.number(value.other, axis)
            return emit(aten.where.self, self.truth(value.when, axis), then, other)
        if isinstance(value, Element):
            return self._element(value, axis)
        if isinstance(value, sympy.Add):
            return self._sum(value, axis)
        if isinstance(value, sympy.Mul):
            return self._product(value, axis)
        if isinstance(value, FLOORED):
            numerator, divisor = quotient_of(value)
            return emit(aten.div.Tensor_mode, self.number(numerator, axis), self.number(divisor, axis), rounding_mode="floor")
        if isinstance(value, REMAINDERS):
            return emit(aten.remainder.Tensor, *(self.number(part, axis) for part in value.args))
        if isinstance(value, (*LARGEST, *LEAST)):
            op = aten.maximum.default if isinstance(value, LARGEST) else aten.minimum.default
            first, *rest = (self.number(part, axis) for part in sorted(value.args, key=str))
            for part in rest:
                first = emit(op, first, part)
            return first
        return self._positions(axis) if value == axis else self._constant(value)

    def _sum(self, value: Expr, axis: sympy.Symbol) -> Node:
        number, terms = value.as_coeff_Add()
        first, *rest = (self.number(part, axis) for part in sympy.Add.make_args(terms))
        for part in rest:
            first = self._emit(aten.add.Tensor, first, part)
        return first if number == 0 else self._emit(aten.add.Scalar, first, _plain(number))

    def _product(self, value: Expr, axis: sympy.Symbol) -> Node:
        number, factors = value.as_coeff_Mul()
        first, *rest = (self.number(part, axis) for part in sympy.Mul.make_args(factors))
        for part in rest:
            first = self._emit(aten.mul.Tensor, first, part)
        return first if number == 1 else self._emit(aten.mul.Scalar, first, _plain(number))

    def _constant(self, value: Expr) -> Node:
        held = _plain(value) if value.is_number else self._emit.symbol(value)
        dtype = torch.float64 if isinstance(held, float) else torch.int64
        return self._emit(aten.full.default, [1, 1], held, dtype=dtype, device=self.device)

    def _positions(self, axis: sympy.Symbol) -> Node:
        found = self._emit(aten.arange.default, self._emit.size(self._lengths[axis]), device=self.device)
        return self._emit(aten.unsqueeze.default, found, 1 if axis == B else 0)

    def _element(self, element: Expr, axis: sympy.Symbol) -> Node:
        node = self._bring_in(self._elements[int(element.args[0])])
        indices = list(element.args[1:])
        for dim in reversed(range(len(indices))):
            if indices[dim].is_Integer:
                node = self._emit(aten.select.int, node, dim, int(indices.pop(dim)))
        found = self._cut(node, indices, axis) or self._picked(node, indices, axis)
        dtype = found.meta["val"].dtype
        if not dtype.is_floating_point and dtype not in (torch.bool, torch.int64):
            found = self._emit(aten.to.dtype, found, torch.int64)  # small integers would wrap around
        return found

    def _cut(self, node: Node, indices: Sequence[Expr], axis: sympy.Symbol) -> Node | None:
        """The tensor by views alone, if its dims are batch and axis as they are or cut at either end."""
        emit, seen = self._emit, []
        for dim, index in enumerate(indices):
            symbol = next((s for s in (B, axis) if s in index.free_symbols), None)
            if symbol is None or symbol in seen or not (index - symbol).is_Integer or index - symbol < 0:
                return None
            seen.append(symbol)
            start, length, size = int(index - symbol), self._lengths[symbol], shape_of(node)[dim]
            if not statically_known_true(size >= length + start):
                return None
            if start or not same_size(size, length):
                node = emit(aten.slice.Tensor, node, dim, start, emit.size(length + start))
        if seen == [axis, B]:
            node = emit(aten.transpose.int, node, 0, 1)
        for place, symbol in enumerate((B, axis)):
            if symbol not in seen:
                node = emit(aten.unsqueeze.default, node, place)
        return node

    def _picked(self, node: Node, indices: Sequence[Expr], axis: sympy.Symbol) -> Node:
        """The tensor by indexing.

        An index outside it belongs to an element that the formula does not choose there: any other may stand for it.
        """
        emit, places = self._emit, []
        for size, index in zip(shape_of(node), indices, strict=True):
            place = self._positions(B) if index == B else self.number(index, axis)
            last = emit(aten.full.default, [1, 1], emit.size(size - 1), dtype=torch.int64, device=self.device)
            places.append(emit(aten.minimum.default, emit(aten.clamp.default, place, 0), last))
        return emit(aten.index.Tensor, node, places)


def _plain(number: Expr) -> int | float:
    return int(number) if number.is_Integer else float(number)

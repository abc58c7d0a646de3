"""Emit the vectors that stand for a mask's data."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.atoms import same_size
from dilcompile.passes.emit import Emitter, aten
from dilcompile.passes.masks.read import ReadMask
from dilcompile.passes.masks.symbols import B, K
from dilcompile.passes.masks.terms import And, Eq0, Expr, Ge0, Given, Less, Not, Or, Truth
from dilcompile.passes.operators import shape_of
from dilcompile.site import Length


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

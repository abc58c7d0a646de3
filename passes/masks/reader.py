"""Evaluate the sub-graph that builds a mask for one symbolic element, without building the mask.

``MaskReader.number(node, indices)`` and ``truth(node, indices)`` follow the graph backwards from an element: a view
rewrites the indices, an ``arange`` becomes its index, a comparison becomes a formula, an input becomes an ``Element``.
What each operator does stands in ``rules``. Nothing of size S x S is ever made, and symbolic lengths stay symbolic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.graph.operators import held_number, is_tensor, op_name, shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.masks.arithmetic import Unreadable, as_expr, as_number, as_truth
from dilcompile.passes.masks.rules import READ, WRAPPING
from dilcompile.passes.masks.tables import table_formula
from dilcompile.passes.masks.terms import Element, Expr, Given, Indices, IntegerElement, Number, Truth


class MaskReader:
    """Reads elements of tensors of one graph.

    Args:
        tables: inputs whose values are known (registered buffers), by node.
        stale: tells whether a tensor was written in place between its making and its use by another node.
        outside: inputs of a checkpoint's body, and the nodes of the graph around it that they stand for.
        carries_gradient: tells whether a tensor's gradient is asked for.
        writers: gives the in-place writes to a tensor.
        captured: inputs that are variables around the model's code, with values that may change: good for words alone.

    Attributes:
        given: inputs of a mask function, and the index expressions that they are.
        binary: tensors of integers that are taken to hold 0 and 1.
    """

    def __init__(
        self,
        tables: Mapping[Node, torch.Tensor],
        stale: Callable[[Node, Node], bool],
        outside: Mapping[Node, Node] | None = None,
        carries_gradient: Callable[[Node], bool] = lambda node: False,
        writers: Callable[[Node], Sequence[Node]] = lambda node: (),
        captured: Mapping[Node, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self.tables = dict(tables)
        self.outside = dict(outside or {})
        self.given: dict[Node, Expr] = {}
        self.sizes: dict[sympy.Symbol, Expr] = {}
        self.elements: list[Node] = []
        self.used_tables: set[Node] = set()
        self.late: set[Node] = set()
        self.binary: set[Node] = set()
        self._numbers: dict[Node, int] = {}
        self.stale = stale
        self.writers, self.captured = writers, captured
        self._carries_gradient = carries_gradient
        self._memo: dict[tuple[Node, Indices], Number | Truth] = {}

    def set_sizes(self, sizes: Mapping[sympy.Symbol, Expr]) -> None:
        """The ranges of the index symbols from now on; formulas read under other ranges are forgotten."""
        if self.sizes != sizes:
            self.sizes = dict(sizes)
            self._memo.clear()

    def truth(self, node: Node, indices: Sequence[Expr], at: Node | None = None) -> Truth:
        """Element ``node[indices]`` as a truth value (nonzero is true), as the node ``at`` reads it."""
        return as_truth(self._read(node, tuple(indices), at))

    def number(self, node: Node, indices: Sequence[Expr], at: Node | None = None) -> Number:
        """Element ``node[indices]`` as a number (true is 1), as the node ``at`` reads it."""
        return as_number(self._read(node, tuple(indices), at))

    def constant(self, value: Any, at: Node) -> float | None:
        """The number that ``at`` reads, or None if it is data: a number, a node that holds one, or a tensor of one constant."""
        if not is_tensor(value):
            return held_number(value) if isinstance(value, (int, float, Node)) else None
        held = value.meta["val"]
        if any(size != 1 for size in held.shape) or self.stale(value, at):
            return None
        try:
            number = self.number(value, (sympy.Integer(0),) * held.dim())
        except Unreadable:
            return None
        return float(number) if isinstance(number, sympy.Expr) and number.is_number else None

    def _read(self, node: Node, indices: Indices, at: Node | None) -> Number | Truth:
        if at is not None and self.stale(node, at):
            # It holds what was written to it since, not what its node computed.
            self.late.add(node)
            return self.element(node, self._at_zero(node, indices))
        return self.value(node, indices)

    @staticmethod
    def _at_zero(node: Node, indices: Indices) -> Indices:
        """Dims of size 1 are read at 0 whatever the index, as broadcasting does."""
        sizes = zip(shape_of(node), indices, strict=True)
        return tuple(sympy.Integer(0) if same_size(size, 1) else index for size, index in sizes)

    def value(self, node: Node, indices: Indices) -> Number | Truth:
        key = (node, indices)
        if key not in self._memo:
            self._memo[key] = self._compute(node, indices)
        return self._memo[key]

    def _compute(self, node: Node, indices: Indices) -> Number | Truth:
        if not is_tensor(node):
            raise Unreadable(f"{node.name} is not a tensor")
        indices = self._at_zero(node, indices)
        if node in self.given:
            return self.given[node]
        if node in self.tables:
            return self._table(node, indices)
        if node in self.outside:
            return self.value(self.outside[node], indices)
        rule = READ.get(op_name(node)) if node.op == "call_function" else None
        if rule is None or any(self.stale(source, node) for source in node.all_input_nodes if is_tensor(source)):
            return self.element(node, indices)
        try:
            return rule(self, node, indices)
        except Unreadable:
            return self.element(node, indices)

    def take_as_binary(self, element: Expr) -> None:
        """Read on as if this element were 0 or 1."""
        self.binary.add(self.elements[int(element.args[0])])

    def learned(self, element: Expr) -> bool:
        """Does a gradient flow into this element?"""
        return self._carries_gradient(self.elements[int(element.args[0])])

    def follows_gradient(self, node: Node) -> bool:
        """Does a gradient flow into this tensor?"""
        return self._carries_gradient(node)

    def is_inner(self, element: Expr) -> bool:
        """Does it stand inside a function of pairs, so that no node of the graph around has it?"""
        return self._stands_inside(self.elements[int(element.args[0])])

    def _stands_inside(self, node: Node) -> bool:
        return any(one.graph is node.graph for one in self.given)

    def wrapped(self, element: Expr) -> bool:
        """May it be the result of arithmetic that wrapped around?"""
        node = self.elements[int(element.args[0])]
        computed = node.op == "call_function" and op_name(node) in ("add", "sub", "rsub", "mul", "neg")
        return computed and node.meta["val"].dtype in WRAPPING

    def element(self, node: Node, indices: Indices) -> Number | Truth:
        """The element kept as data. A number inside a function of pairs is one for each of the indices that it is made of."""
        indices = (*indices, *self.made_of(node)) if self._stands_inside(node) else indices
        if node not in self._numbers:
            self._numbers[node] = len(self.elements)
            self.elements.append(node)
        dtype = node.meta["val"].dtype
        kind = Element if dtype.is_floating_point else IntegerElement
        found = kind(sympy.Integer(self._numbers[node]), *indices)
        return Given(found) if dtype is torch.bool else found

    def made_of(self, node: Node) -> list[Expr]:
        """The given indices that a number inside a function of pairs is computed from."""
        found: dict[Expr, None] = {}
        queue, seen = [node], {node}
        while queue:
            one = queue.pop()
            if one in self.given:
                found[self.given[one]] = None
            fresh = [source for source in one.all_input_nodes if source not in seen]
            seen.update(fresh)
            queue += fresh
        return sorted(found, key=str)

    def _table(self, node: Node, indices: Indices) -> Number | Truth:
        formula = table_formula(self.tables[node], indices)
        if formula is None:
            return self.element(node, indices)
        self.used_tables.add(node)
        return formula

    def operand(self, value: Any, indices: Indices, rank: int) -> Number | Truth:
        """A number, or a tensor broadcast against a result of ``rank`` dims."""
        if is_tensor(value):
            own = value.meta["val"].dim()
            return self.value(value, indices[rank - own :])
        if isinstance(value, bool):
            return value
        held = value.meta["val"] if isinstance(value, Node) else value
        return as_expr(held)

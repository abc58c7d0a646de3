"""What is known of a graph before any attention is looked for; every rule reads it, none changes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy
from torch.fx import Node

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.axes.labels import Labels
from dilcompile.passes.graph.grad_modes import GradModes
from dilcompile.passes.graph.mutations import Mutations
from dilcompile.passes.graph.operators import is_tensor
from dilcompile.passes.masks.arithmetic import Unreadable
from dilcompile.passes.masks.hiding import where_one
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.terms import IntegerElement, Number


@dataclass(frozen=True)
class Facts:
    """A graph, seen through.

    Args:
        axes: what every dim is made of.
        scores: for every tensor the products it is an elementwise function of.
        reader: reads single elements of masks and constants.
        mutations: the graph's in-place writes.
        modes: where it computes without gradients.
    """

    axes: Axes
    scores: Labels
    reader: MaskReader
    mutations: Mutations
    modes: GradModes

    def scalar(self, value: Any, at: Node) -> float | None:
        """The number that ``at`` reads, or None if it is data: a number, a node that holds one, or a tensor of one constant."""
        return self.reader.constant(value, at)

    def constant(self, tensor: Node) -> float | None:
        """The number that a tensor holds everywhere, or None."""
        number = self._anywhere(tensor)
        return float(number) if isinstance(number, sympy.Expr) and number.is_number else None

    def is_zero(self, value: Any, at: Node) -> bool:
        """Does ``at`` read 0 there, a number or a tensor of zeros?"""
        number = self.scalar(value, at)
        if number is None and is_tensor(value) and not self.mutations.stale(value, at):
            number = self.constant(value)
        return number == 0

    def zeros_and_ones(self, tensor: Node) -> Literal["surely", "integers", "others"]:
        """Does a tensor hold 0 and 1 alone: surely, if its integers are what masks hold, or may it hold other numbers?"""
        number = self._anywhere(tensor)
        if number is None or self.reader.follows_gradient(tensor):
            return "others"
        if isinstance(number, IntegerElement) and not self.reader.wrapped(number):
            return "integers"
        return "others" if where_one(number) is None else "surely"

    def _anywhere(self, tensor: Node) -> Number | None:
        """Any element of a tensor as a formula."""
        anywhere = tuple(sympy.Dummy(integer=True, nonnegative=True) for _ in range(tensor.meta["val"].dim()))
        try:
            return self.reader.number(tensor, anywhere)
        except Unreadable:
            return None

"""What is known of a graph before any attention is looked for; every rule reads it, none changes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from dilcompile.passes.axes import Axes
from dilcompile.passes.labels import Labels
from dilcompile.passes.masks.arithmetic import Unreadable
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.mutations import Mutations


@dataclass(frozen=True)
class Facts:
    """A graph, seen through.

    Args:
        axes: what every dim is made of.
        scores: for every tensor the products it is an elementwise function of.
        reader: reads single elements of masks and constants.
        mutations: the graph's in-place writes.
    """

    axes: Axes
    scores: Labels
    reader: MaskReader
    mutations: Mutations

    def scalar(self, value: Any, at: Node) -> float | None:
        """The number that ``at`` reads, or None if it is data: a number, a node that holds one, or a tensor of one constant."""
        return self.reader.constant(value, at)

    def constant(self, tensor: Node) -> float | None:
        """The number that a tensor holds everywhere, or None."""
        anywhere = tuple(sympy.Dummy(integer=True, nonnegative=True) for _ in range(tensor.meta["val"].dim()))
        try:
            number = self.reader.number(tensor, anywhere)
        except Unreadable:
            return None
        return float(number) if isinstance(number, sympy.Expr) and number.is_number else None

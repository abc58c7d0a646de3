"""A mask as read."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from dilcompile.passes.masks.terms import Element, Expr, Truth, elements_of
from dilcompile.site import MaskSpec


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

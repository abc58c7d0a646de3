"""A mask as read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch.fx import Node

from dilcompile.passes.masks.emptiness import Gradient
from dilcompile.passes.masks.interval import Interval
from dilcompile.passes.masks.terms import Element, Expr, Number, Truth, elements_in, elements_of
from dilcompile.site import MaskSpec


@dataclass(frozen=True)
class Others:
    """What rows without keys see instead.

    Args:
        mask: the keys.
        flat: they all weigh alike.
        gradient: what still has a gradient then.
        joins: they share one softmax with those before.
    """

    mask: ReadMask
    flat: bool
    gradient: Gradient
    joins: bool = False


@dataclass(frozen=True)
class ReadMask:
    """A mask as read: its description, and the formulas of the operands to emit.

    Args:
        key_padding: which keys may be seen, over (b, k).
        documents: each key's document, over (b, k).
        start: added to ``spec.q_offset``; None for nothing.
        limits: first key and end of keys of each row, over (b, q).
        limits_in_chunk: the same, where ``spec.chunk`` is known otherwise.
        pairs: a formula over terms, each of them a number over (b, q) and one over (b, k).
        elements: the nodes that elements in the formulas belong to, by number.
        others: what rows without keys see instead, in turn, where ``spec.empty_rows`` is ``others``.
        late: nodes whose elements are what was written to them later.
        all_if_none: where the padding hides all keys of a batch row, it hides none.
        binary: tensors of integers that were taken to hold 0 and 1.
    """

    spec: MaskSpec
    key_padding: Truth = True
    documents: Expr | None = None
    start: Expr | None = None
    limits: Interval | None = None
    limits_in_chunk: Interval | None = None
    pairs: str | None = None
    row_terms: tuple[Number, ...] = ()
    key_terms: tuple[Number, ...] = ()
    elements: tuple[Node, ...] = field(default=())
    others: tuple[Others, ...] = ()
    late: frozenset[Node] = frozenset()
    all_if_none: bool = False
    binary: frozenset[Node] = frozenset()

    def inside_chunks(self) -> ReadMask:
        """The mask for a form that holds the chunks itself."""
        return replace(self, limits=self.limits_in_chunk)

    @property
    def sources(self) -> frozenset[Node]:
        """The nodes that the operands are made of."""
        limits = () if self.limits is None else (self.limits.first, self.limits.stop)
        numbers = [*limits, self.documents, self.start, *self.row_terms, *self.key_terms]
        used: set[Element] = elements_of(self.key_padding)
        for number in numbers:
            used |= set() if number is None else elements_in(number)
        own = frozenset(self.elements[int(element.args[0])] for element in used)
        return own.union(*(other.mask.sources for other in self.others))

"""Emit the operands that a read mask becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.masks.interval import Interval
from dilcompile.passes.masks.read import ReadMask
from dilcompile.passes.masks.symbols import B, K, Q
from dilcompile.passes.masks.terms import Number, Truth
from dilcompile.passes.masks.vectors import Vectors
from dilcompile.site import Length


@dataclass(frozen=True)
class MaskOperands:
    """The operands of ``dilcompile::attention`` that hold a mask's data; None where it has none.

    Args:
        key_padding: bool [B, Sk]; documents: int64 [B or 1, Sk]; start: int64 [1]; limits: int64 [2, B or 1, Sq].
        row_terms, key_terms: int64 [terms, B or 1, Sq or Sk]; pairs: the formula over them.
    """

    key_padding: Node | None = None
    documents: Node | None = None
    start: Node | None = None
    limits: Node | None = None
    row_terms: Node | None = None
    key_terms: Node | None = None
    pairs: str | None = None

    def copied(self, emit: Emitter) -> MaskOperands:
        """The same in memory of their own, which later writes to the mask's tensors don't reach."""

        def copy(node: Node | None) -> Node | None:
            return None if node is None else emit(aten.clone.default, node)

        return MaskOperands(
            copy(self.key_padding), copy(self.documents), copy(self.start), copy(self.limits), copy(self.row_terms),
            copy(self.key_terms), self.pairs,
        )  # fmt: skip


def mask_operands(
    emit: Emitter,
    read: ReadMask,
    sizes: tuple[Length, Length, Length],
    device: torch.device,
    bring_in: Callable[[Node], Node],
) -> MaskOperands:
    """Emit everything that the mask was read as.

    Args:
        sizes: batch, q_len, k_len.
        bring_in: gives a node of a graph around the emitter's in the emitter's.
    """
    batch, q_len, k_len = sizes
    vectors = Vectors(emit, read.elements, device, {B: batch, Q: q_len, K: k_len}, bring_in)
    made = _Made(emit, vectors, batch, q_len, k_len)
    return MaskOperands(
        made.keep(read.key_padding, read.all_if_none) if read.spec.key_padding else None,
        None if read.documents is None else made.stretched(vectors.number(read.documents, K), k_len),
        None if read.start is None else emit(aten.reshape.default, vectors.number(read.start, K), [1]),
        None if read.limits is None else made.limits(read.limits),
        made.terms(read.row_terms, Q, q_len) if read.pairs is not None else None,
        made.terms(read.key_terms, K, k_len) if read.pairs is not None else None,
        read.pairs,
    )


@dataclass(frozen=True)
class _Made:
    emit: Emitter
    vectors: Vectors
    batch: Length
    q_len: Length
    k_len: Length

    def keep(self, truth: Truth, all_if_none: bool) -> Node:
        emit, found = self.emit, self.vectors.truth(truth, K)
        if all_if_none:
            none = emit(aten.logical_not.default, emit(aten.any.dim, found, 1, True))
            found = emit(aten.logical_or.default, found, none)
        return self.expanded(found, [self.batch, self.k_len])

    def limits(self, interval: Interval) -> Node:
        first = sympy.Integer(0) if interval.first is None else interval.first
        if interval.stop is not None:
            return self.terms((first, interval.stop), Q, self.q_len)
        ends = self.emit(aten.full.default, [1, 1], self.emit.size(self.k_len), dtype=torch.int64, device=self.device)
        return self.stacked([self.vectors.number(first, Q), ends], self.q_len)

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    def terms(self, numbers: Sequence[Number], axis: sympy.Symbol, length: Length) -> Node:
        return self.stacked([self.vectors.number(number, axis) for number in numbers], length)

    def stacked(self, vectors: Sequence[Node], length: Length) -> Node:
        """[vectors, B or 1, length] of vectors [B or 1, length or 1]."""
        by_row = any(_larger(vector.meta["val"].shape[0]) for vector in vectors)
        shape = [self.batch if by_row else 1, length]
        return self.emit(aten.stack.default, [self.expanded(vector, shape) for vector in vectors])

    def stretched(self, vector: Node, length: Length) -> Node:
        return self.expanded(vector, [vector.meta["val"].shape[0], length])

    def expanded(self, vector: Node, shape: Sequence[Length]) -> Node:
        held = vector.meta["val"].shape
        if all(a is b or a == b for a, b in zip(held, shape, strict=True)):
            return vector
        return self.emit(aten.expand.default, vector, [self.emit.size(size) for size in shape])


def _larger(size: Length) -> bool:
    return not (isinstance(size, int) and size == 1)

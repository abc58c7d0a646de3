"""Emit what is added to the scores: biases, masks that could not be read, and float masks that are data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.finding.anchors import MaskOperand
from dilcompile.passes.finding.roles import Roles
from dilcompile.passes.finding.score_order import in_score_order
from dilcompile.passes.graph.emit import Emitter, aten
from dilcompile.passes.masks.hiding import HIDES, swallows


@dataclass(frozen=True)
class Biases:
    """Tensors broadcastable to [B, H, Sq, Sk]; None where there are none.

    Args:
        total: all that is added; -inf where a mask hides, or where a float mask swallows the scores.
        plain: the biases alone.
        levels: of the pairs that a float mask swallows, how far each lies below the row's best: 0 or a large negative number.
    """

    total: Node | None = None
    plain: Node | None = None
    levels: Node | None = None


def emit_biases(emit: Emitter, operands: Sequence[MaskOperand], roles: Roles, axes: Axes) -> Biases:
    """Emit all operands that were not read as masks."""
    plain = hidden = floats = None
    dtype = torch.float32
    for operand in operands:
        node = operand.node
        if operand.function is not None:
            node = operand.function.emit(emit, node, operand.on.meta["val"].device)
        part = in_score_order(emit, node, roles.score_dims(operand.on, axes), roles)
        if operand.factor != 1.0:
            part = emit(aten.mul.Scalar, part, operand.factor)
        if operand.kind == "add":
            plain = _sum(emit, plain, part)
        elif operand.kind == "drown":
            floats, dtype = _sum(emit, floats, part), operand.dtype
        else:
            hidden = _sum(emit, hidden, _filled(emit, operand, part))
    levels = None
    if floats is not None:
        swallowed = emit(aten.le.Scalar, floats, swallows(dtype))
        hidden = _sum(emit, hidden, emit(aten.masked_fill.Scalar, floats, swallowed, float("-inf")))
        levels = _levels(emit, floats, swallowed)
    total = plain if hidden is None else _sum(emit, plain, hidden)
    return Biases(total, plain, levels)


def _sum(emit: Emitter, total: Node | None, part: Node) -> Node:
    return part if total is None else emit(aten.add.Tensor, total, part)


def _filled(emit: Emitter, operand: MaskOperand, part: Node) -> Node:
    """0 where the mask lets through, else -inf."""
    if operand.kind == "below":
        part = emit(aten.le.Scalar, part, HIDES)
    elif part.meta["val"].dtype is not torch.bool:
        part = emit(aten.ne.Scalar, part, 0)
    if operand.kind == "keep":
        part = emit(aten.logical_not.default, part)
    zeros = emit(aten.zeros_like.default, part, dtype=operand.dtype)
    return emit(aten.masked_fill.Scalar, zeros, part, float("-inf"))


def _levels(emit: Emitter, floats: Node, swallowed: Node) -> Node:
    """Fills in order: the largest of a row gets 0, one that is smaller by a factor of two 1000 less."""
    finite = emit(aten.logical_and.default, swallowed, emit(aten.ne.Scalar, floats, float("-inf")))
    depth = emit(aten.log2.default, emit(aten.abs.default, floats))
    depth = emit(aten.masked_fill.Scalar, depth, emit(aten.logical_not.default, finite), float("inf"))
    least = emit(aten.amin.default, depth, [-1], True)
    least = emit(aten.masked_fill.Scalar, least, emit(aten.eq.Scalar, least, float("inf")), 0.0)
    return emit(aten.mul.Scalar, emit(aten.sub.Tensor, depth, least), HIDES)

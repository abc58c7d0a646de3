"""Masks that scores are multiplied with: ``scores * m + fill * (1 - m)``, as GPT-1 hides what is to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dilcompile.passes.finding.anchors import MaskOperand
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.arithmetic import Unreadable
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.hiding import NotAMask, keep_of, where_one
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.terms import Number, Truth

Read = Callable[[MaskOperand], Number]


def gates_as_fills(operands: Sequence[MaskOperand], read: Read, reader: MaskReader) -> list[MaskOperand]:
    """The operands with each ``gate`` and what is added where it is zero as one mask that overwrites scores.

    Args:
        operands: from the softmax inwards.
        read: an operand's element as it reaches the softmax.

    Raises:
        Unproven: if a gate holds other numbers than 0 and 1, or if nothing that hides is added exactly where it holds 0.
    """
    found = list(operands)
    for gate in [operand for operand in operands if operand.kind == "gate"]:
        seen = _where_one(gate, read)
        if seen is None:
            reason = "the scores are multiplied by a tensor that varies over queries and keys"
            raise Unproven(gate.node, reason, "it stays as it is")
        seen = Bounds(reader.sizes).settle(seen)
        fills = [(one, fill) for one in found if (fill := _fill_outside(one, seen, read, reader)) is not None]
        if seen is not True and not fills:
            reason = "scores are set to zero by a mask, which does not hide them"
            raise Unproven(gate.node, reason, "fill with -inf")
        place = found.index(gate)
        found[place : place + 1] = []
        if fills:
            added, fill = fills[0]
            found.insert(place, replace(added, node=gate.node, on=gate.on, kind="keep", factor=1.0, fill=fill))
            found.remove(added)
    return found


def _where_one(gate: MaskOperand, read: Read) -> Truth | None:
    try:
        return where_one(read(gate))
    except Unreadable:
        return None


def _fill_outside(operand: MaskOperand, seen: Truth, read: Read, reader: MaskReader) -> float | None:
    """What an operand adds outside of ``seen``, if it adds nothing inside and hides all the rest alike."""
    if operand.kind != "add":
        return None
    try:
        visible, fills = keep_of(read(operand), torch.finfo(operand.on.meta["val"].dtype).eps, reader)
    except (NotAMask, Unreadable):
        return None
    same = len(fills) == 1 and Bounds(reader.sizes).settle(visible) == seen
    return fills.pop() if same else None

"""What a rule is, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.fx import Node

from dilcompile.passes.masks.arithmetic import Unreadable, as_number, held
from dilcompile.passes.masks.terms import Indices, Number, Truth

if TYPE_CHECKING:
    from dilcompile.passes.masks.reader import MaskReader


Rule: TypeAlias = "Callable[[MaskReader, Node, Indices], Number | Truth]"


# Integers whose arithmetic wraps around within the values that masks have.
WRAPPING = frozenset((torch.uint8, torch.int8, torch.int16))


def sides(reader: MaskReader, node: Node, indices: Indices) -> tuple[Number | Truth, Number | Truth]:
    rank = len(indices)
    return reader.operand(node.args[0], indices, rank), reader.operand(node.args[1], indices, rank)


def numbers(reader: MaskReader, node: Node, indices: Indices) -> tuple[Number, Number]:
    """Both operands of an arithmetic operator, as it computes with them: halves are computed with in float32."""
    a, b = (as_number(side) for side in sides(reader, node, indices))
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        dtype = dtype if torch.finfo(dtype).bits >= 32 else torch.float32
        return held(a, dtype), held(b, dtype)
    return a, b


def result(value: Number, node: Node) -> Number:
    """What the operator gives, in its own dtype."""
    dtype = node.meta["val"].dtype
    return held(value, dtype) if dtype.is_floating_point else value


def exact_arithmetic(node: Node) -> None:
    """Small integers wrap around; 0 - 1 is 255."""
    if node.meta["val"].dtype in WRAPPING:
        raise Unreadable("arithmetic that wraps around")

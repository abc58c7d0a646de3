"""What a rule is, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch.fx import Node

from dilcompile.passes.masks.arithmetic import Unreadable
from dilcompile.passes.masks.terms import Indices, Number, Truth

if TYPE_CHECKING:
    from dilcompile.passes.masks.reader import MaskReader


Rule: TypeAlias = "Callable[[MaskReader, Node, Indices], Number | Truth]"


# Integers whose arithmetic wraps around within the values that masks have.
WRAPPING = frozenset((torch.uint8, torch.int8, torch.int16))


def sides(reader: MaskReader, node: Node, indices: Indices) -> tuple[Number | Truth, Number | Truth]:
    rank = len(indices)
    return reader.operand(node.args[0], indices, rank), reader.operand(node.args[1], indices, rank)


def exact_arithmetic(node: Node) -> None:
    """Small integers wrap around; 0 - 1 is 255."""
    if node.meta["val"].dtype in WRAPPING:
        raise Unreadable("arithmetic that wraps around")

"""Take apart what is added to the scores: sums of a bias and a mask, and biases that are chosen where a mask lets through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from dilcompile.passes.finding.anchors import MaskOperand
from dilcompile.passes.graph.operators import is_tensor, op_name
from dilcompile.passes.masks.hiding import HIDES
from dilcompile.passes.masks.reader import MaskReader

# They leave a tensor's values and shape as they are.
_COPIES = frozenset(("contiguous", "clone", "alias"))


@dataclass(frozen=True)
class Summand:
    """One operand, or a part of one.

    Args:
        adds: a ``hide`` or ``keep`` whose fill is added to the scores it hides.
        cuts: it takes the place of a bias there, which has no gradient then.
    """

    operand: MaskOperand
    adds: bool = False
    cuts: bool = False


def summands(operands: Sequence[MaskOperand], reader: MaskReader, hides_only: Callable[[MaskOperand], bool]) -> Iterator[Summand]:
    """The operands, those that hold a bias and a mask in parts.

    Args:
        hides_only: tells whether an operand adds nothing but 0 where it lets through.
    """
    for operand in operands:
        node = _uncopied(operand.node)
        parts = [] if operand.kind != "add" else _of_sum(operand, node) or _of_choice(operand, node, reader)
        if len(parts) == 2 and parts[0].cuts and hides_only(operand):
            parts = []
        nodes = (operand.node, node, *(part.operand.node for part in parts))
        if not parts or any(reader.stale(one, operand.on) for one in nodes):
            yield Summand(operand)
            continue
        for part in parts:
            if part.adds:
                yield part
            else:
                yield from summands([part.operand], reader, hides_only)


def _uncopied(node: Node) -> Node:
    while op_name(node) in _COPIES and is_tensor(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _of_sum(operand: MaskOperand, node: Node) -> list[Summand]:
    if op_name(node) != "add" or node.kwargs.get("alpha", 1) != 1:
        return []
    parts = [part for part in node.args[:2] if isinstance(part, Node) and _is_float(part)]
    return [Summand(replace(operand, node=part)) for part in parts] if len(parts) == 2 else []


def _of_choice(operand: MaskOperand, node: Node, reader: MaskReader) -> list[Summand]:
    """``where(mask, bias, fill)``: the bias, and the fill on what the mask hides."""
    name = op_name(node)
    if name == "where" and len(node.args) == 3:
        mask, then, other = node.args
        kind, bias, fill = ("keep", then, other) if isinstance(then, Node) and _is_float(then) else ("hide", other, then)
    elif name == "masked_fill":
        bias, mask, fill = node.args[:3]
        kind = "hide"
    else:
        return []
    if not (isinstance(bias, Node) and isinstance(mask, Node) and _is_float(bias) and is_tensor(mask)):
        return []
    number = reader.constant(fill, node)
    if number is None or number * operand.factor > HIDES:
        return []
    hidden = replace(operand, node=mask, kind=kind, factor=1.0, fill=number * operand.factor)
    return [Summand(hidden, adds=True, cuts=True), Summand(replace(operand, node=bias))]


def _is_float(node: Node) -> bool:
    return is_tensor(node) and bool(node.meta["val"].dtype.is_floating_point)

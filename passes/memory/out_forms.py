"""How an operator is told where to write: its ``out`` form, or for one that copies, the copy into a tensor that is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.fx import Node

aten = torch.ops.aten

# Copies by another name.
_COPIES = (aten.clone.default, aten._to_copy.default)
# What torch itself computes by the form for two tensors.
_SCALARS = {
    aten.add.Scalar: aten.add.out,
    aten.sub.Scalar: aten.sub.out,
    aten.mul.Scalar: aten.mul.out,
    aten.div.Scalar: aten.div.out,
}
# One pass over the elements, each from those at its own place: the result may lie where an operand lies.
_BY_ELEMENT = (
    "abs add addcmul clamp copy_ cos div exp hardtanh_backward leaky_relu leaky_relu_backward log mul neg pow reciprocal rsqrt "
    "sigmoid sigmoid_backward silu silu_backward sin sqrt sub tanh tanh_backward threshold_backward"
).split()
# Of these the digits are the same however the result lies in memory.
_EXACT = ("add", "copy_", "div", "mul", "neg", "sub", "attention", "attention_backward")


@dataclass(frozen=True)
class OutForm:
    """What computes into given memory.

    Args:
        op: called in place of the operator.
        names: of its ``out`` operands; none: the place is the first operand, and the source the second.
        workspace: there is an operand ``workspace``.
        source: where there are no names: which operand of the operator is the source.
    """

    op: torch._ops.OpOverload
    names: tuple[str, ...] = ()
    workspace: bool = False
    source: int = 0

    @property
    def by_element(self) -> bool:
        """May the result lie where an operand of the same strides lies?"""
        return _name(self.op) in _BY_ELEMENT

    @property
    def anywhere(self) -> bool:
        """Are the digits the same whatever the strides of the result?"""
        return _name(self.op) in _EXACT

    def write(self, node: Node, places: Sequence[Node], workspace: Node | None) -> None:
        """Make a node write to places."""
        node.target = self.op
        if not self.names:
            node.args, node.kwargs = (places[0], node.args[self.source]), {}
            return
        given = {} if workspace is None else {"workspace": workspace}
        node.kwargs = {**node.kwargs, **dict(zip(self.names, places, strict=True)), **given}


def out_form(node: Node) -> OutForm | None:
    """The form of a node's operator that takes memory for its results, or None.

    Forms that torch generates make a result of their own and copy it: they are none.
    """
    return _of_operator(node.target) if isinstance(node.target, torch._ops.OpOverload) else None


def workspace_form(node: Node) -> torch._ops.OpOverload | None:
    """The form that takes a workspace and makes its results itself, or None."""
    op = node.target
    return (
        op.overloadpacket.within if isinstance(op, torch._ops.OpOverload) and "within" in op.overloadpacket.overloads() else None
    )


@lru_cache(maxsize=1024)
def _of_operator(op: torch._ops.OpOverload) -> OutForm | None:
    if op in _COPIES:
        return OutForm(aten.copy_.default)
    if op is aten.copy.default:
        return OutForm(aten.copy_.default, source=1)
    if op in _SCALARS:
        return OutForm(_SCALARS[op], ("out",))
    own = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    packet = op.overloadpacket
    for name in packet.overloads():
        other: torch._ops.OpOverload = getattr(packet, name)
        if torch.Tag.generated in other.tags:
            continue
        outs = [argument for argument in other._schema.arguments if argument.is_out and not argument.has_default_value()]
        rest = [(argument.name, str(argument.type)) for argument in other._schema.arguments if not argument.is_out]
        if outs and rest == own and len(outs) == len(op._schema.returns):
            names = tuple(argument.name for argument in outs)
            return OutForm(other, names, any(argument.name == "workspace" for argument in other._schema.arguments))
    return None


def _name(op: torch._ops.OpOverload) -> str:
    return str(op._schema.name).partition("::")[2]

"""Where to read an operand from: behind all views and copies, before any head was repeated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dilcompile.passes.axes.atoms import Leaves, flat
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.graph.operators import is_tensor, narrows, op_name

LAYOUT_ONLY = frozenset(
    "view reshape _unsafe_view flatten unflatten transpose permute t mT swapaxes movedim unsqueeze squeeze expand "
    "repeat repeat_interleave contiguous clone alias to _to_copy type_as float".split()
)


@dataclass(frozen=True)
class Operand:
    """Where to read one of q, k, v from: behind all views and copies, before any head was repeated.

    Args:
        source: the node to read.
        factor: product of the plain numbers it was multiplied with on the way.
    """

    source: Node
    factor: float


def strip(node: Node, needed: Leaves, facts: Facts, stale_at: Node, scaled: bool) -> Operand:
    """Walk back from an operand through everything that only moves, repeats, copies or scales it.

    Args:
        needed: the operand's atoms that vary; the walk stops before a tensor that has others.
        stale_at: the node at whose place the operand will be read.
        scaled: also walk through multiplication by a number (q and k, not v).
    """
    wanted = {id(atom) for atom in needed}
    stale = facts.mutations.stale
    source, factor = node, 1.0
    while source.op == "call_function" and source.args and is_tensor(source.args[0]):
        before = source.args[0]
        assert isinstance(before, Node)
        own = {id(atom) for atom in flat(facts.axes[before]) if not atom.broadcast}
        if own != wanted or stale(source, stale_at) or stale(before, stale_at) or facts.modes.cut(source, stale_at):
            break
        name = op_name(source)
        if name in LAYOUT_ONLY and not narrows(before, source):
            source = before
        elif scaled and name in ("mul", "div") and source.kwargs.get("rounding_mode") is None:
            value = facts.scalar(source.args[1], source)
            if value is None or value == 0 or _rounds(source, node):
                break
            factor *= 1 / value if name == "div" else value
            source = before
        else:
            break
    return Operand(source, factor)


def _rounds(scaled: Node, operand: Node) -> bool:
    """Was a float64 operand scaled in fewer digits?"""
    return operand.meta["val"].dtype is torch.float64 and scaled.meta["val"].dtype is not torch.float64

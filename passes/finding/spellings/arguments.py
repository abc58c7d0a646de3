"""What the rules for whole attentions share: arguments by name, the one output, the usual mask and scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from dilcompile.passes.finding.anchors import MaskOperand
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.graph.operators import op_name, shape_of
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.symbols import K, Q
from dilcompile.passes.masks.terms import Expr, Ge0, Truth, conjunction

# Arguments of flash-attention's operators that change what is computed in a way that no form covers, by the reason.
NOT_COVERED = {
    "alibi_slopes": "it adds a bias by slopes",
    "block_table": "its keys stand in pages",
    "seqused_k": "its keys end where a tensor says",
    "leftpad_k": "its keys begin where a tensor says",
}


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of an operator's call by the names of its schema, defaults included."""
    found = {}
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, default)
    return found


def first_output(node: Node) -> Node | None:
    """The node that takes the result out of a call with several; None if nobody asks for it.

    Raises:
        Unproven: if another output is used too.
    """
    taken = [user for user in node.users if user.users]
    if any(op_name(user) != "getitem" or user.args[1] != 0 for user in taken):
        raise Unproven(node, "the log-sum-exp or another by-product of the call is used too", "take the output alone")
    return taken[0] if len(taken) == 1 else None


def given_scale(given: dict[str, Any], node: Node, facts: Facts) -> float:
    """The ``scale`` argument; one over the root of the features if there is none.

    Raises:
        Unproven: if it is computed in the graph.
    """
    if given["scale"] is None:
        return float(int(shape_of(given["query"])[-1]) ** -0.5)
    scale = facts.scalar(given["scale"], node)
    if scale is None:
        raise Unproven(node, "the scale is computed in the graph", "give it as a number")
    return scale


def mask_of(mask: Any, scores: Node) -> tuple[MaskOperand, ...]:
    """A mask argument: boolean (true is seen) or added."""
    if not isinstance(mask, Node):
        return ()
    boolean = mask.meta["val"].dtype is torch.bool
    return (MaskOperand(mask, scores, "keep" if boolean else "add"),)


def causal(flag: Any) -> Truth:
    """``is_causal``: row q sees the keys up to q."""
    return Ge0(Q - K) if flag else True


def refuse(node: Node, given: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raises: Unproven: if one of the arguments is given."""
    for name, reason in reasons.items():
        if given.get(name) is not None:
            raise Unproven(node, reason, "it stays as it is")


def window_around(place: Expr, given: Mapping[str, Any], causal: bool, node: Node) -> Truth:
    """flash-attention's window: keys from ``place - left`` to ``place + right``; -1 is no limit.

    Raises:
        Unproven: if it is computed in the graph.
    """
    window = given.get("window_size") or (given.get("window_size_left"), given.get("window_size_right"))
    left, right = (-1 if side is None else side for side in window)
    if not isinstance(left, int) or not isinstance(right, int):
        raise Unproven(node, "its window is computed in the graph", "give it as a number")
    seen: Truth = True
    if causal or right >= 0:
        seen = Ge0(place + (0 if causal else right) - K)
    if left >= 0:
        seen = conjunction(seen, Ge0(K - place + left))
    return seen

"""``e / e.sum()`` with ``e = exp(scores)``: the maximum taken off or not, exponentials masked, a number added to the sum."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from dilcompile.passes.anchors import MaskOperand, Sink, Softmax, Spelling
from dilcompile.passes.facts import Facts
from dilcompile.passes.operators import is_tensor, op_name, shape_of
from dilcompile.passes.score_steps import is_row_number
from dilcompile.passes.spellings.reductions import reduced_dim
from dilcompile.passes.unproven import Unproven

_STAYS = "write torch.softmax, or leave it as it is"
# exp(-700) is nothing beside any sum that float32 or float64 hold.
_NOTHING = 700.0


@dataclass(frozen=True)
class _Sum:
    """``max(sum over dim + added, least)``."""

    dim: int
    added: float = 0.0
    least: float = 0.0


def _read(node: Node, facts: Facts) -> Softmax | None:
    if node not in facts.scores:
        return None
    weights, masks = _masked(node, facts)
    for user in weights.users:
        total = _sum_below(user, weights, facts)
        if total is None:
            continue
        exponent = node.args[0]
        assert isinstance(exponent, Node)
        shifted = _is_shifted(exponent, facts.axes[node][total.dim], facts)
        _check(total, user, shifted, bool(masks))
        sinks = (Sink(math.log(total.added), node, total.dim),) if total.added > 0 else ()
        limit = math.inf if shifted else _NOTHING
        return Softmax(exponent, node, total.dim, user, user.meta["val"].dtype, limit, masks=masks, sinks=sinks)
    return None


def _check(total: _Sum, at: Node, shifted: bool, masked: bool) -> None:
    if total.added < 0:
        raise Unproven(at, "a negative number is added to the sum of exponentials", _STAYS)
    if total.added > 0 and shifted:
        reason = "a number is added to the sum after the row's maximum was taken off: it weighs differently in every row"
        raise Unproven(at, reason, _STAYS)
    # The largest exponential of a row is 1 and part of the sum: the clamp never acts.
    if total.least > 0 and not (shifted and not masked and total.least <= 1.0):
        raise Unproven(at, "the sum of exponentials is clamped", _STAYS)


def _masked(weights: Node, facts: Facts) -> tuple[Node, tuple[MaskOperand, ...]]:
    """The exponentials as they are summed, and what was set to zero among them."""
    masks: list[MaskOperand] = []
    while True:
        for user in weights.users:
            mask = _zeroed(user, weights)
            if mask is not None and shape_of(user) == shape_of(weights) and not facts.mutations.stale(weights, user):
                masks.append(mask)
                weights = user
                break
        else:
            return weights, tuple(reversed(masks))


def _zeroed(user: Node, weights: Node) -> MaskOperand | None:
    if op_name(user) == "masked_fill" and user.args[0] is weights and user.args[2] == 0 and is_tensor(user.args[1]):
        return MaskOperand(user.args[1], user, "hide")  # type: ignore[arg-type]
    if op_name(user) != "mul" or weights not in user.args:
        return None
    other = user.args[1] if user.args[0] is weights else user.args[0]
    while isinstance(other, Node) and op_name(other) in ("to", "_to_copy", "float", "type_as"):
        other = other.args[0]
    if is_tensor(other) and other.meta["val"].dtype is torch.bool:  # type: ignore[union-attr]
        return MaskOperand(other, user, "keep")  # type: ignore[arg-type]
    return None


def _sum_below(quotient: Node, weights: Node, facts: Facts) -> _Sum | None:
    """What ``weights`` are divided by, if it is their own sum."""
    if op_name(quotient) not in ("div", "true_divide", "mul") or quotient.kwargs.get("rounding_mode") is not None:
        return None
    if facts.mutations.stale(weights, quotient):
        return None
    over = quotient.args[1]
    if op_name(quotient) == "mul":
        over = over if quotient.args[0] is weights else quotient.args[0]
        if not isinstance(over, Node) or op_name(over) != "reciprocal":
            return None
        over = over.args[0]
    elif quotient.args[0] is not weights:
        return None
    return _total(over, weights, quotient, facts)


def _total(number: object, weights: Node, at: Node, facts: Facts) -> _Sum | None:
    if not isinstance(number, Node) or facts.mutations.stale(number, at):
        return None
    dim = reduced_dim(number, ("sum",), weights, facts)
    if dim is not None:
        return _Sum(dim)
    name = op_name(number)
    if name == "add":
        first, second = number.args[:2]
        inner, constant = (first, second) if _total(first, weights, number, facts) else (second, first)
        below, added = _total(inner, weights, number, facts), facts.scalar(constant, number)
        if below is None or below.least or number.kwargs.get("alpha", 1) != 1:
            return None
        if added is None:
            raise Unproven(number, "something computed is added to the sum of exponentials", _STAYS)
        return _Sum(below.dim, below.added + added)
    if name in ("clamp", "clamp_min", "maximum"):
        below, least = _total(number.args[0], weights, number, facts), facts.scalar(number.args[1], number)
        if below is None or below.added or least is None or (name == "clamp" and len(number.args) > 2):
            return None
        return _Sum(below.dim, least=max(below.least, least))
    return None


def _is_shifted(exponent: Node, columns: object, facts: Facts) -> bool:
    """Is the row's maximum taken off last of all?"""
    if op_name(exponent) != "sub" or exponent.kwargs.get("alpha", 1) != 1:
        return False
    scores, number = exponent.args[:2]
    if not isinstance(scores, Node) or not isinstance(number, Node):
        return False
    return is_row_number(number, scores, columns, facts)  # type: ignore[arg-type]


EXP_OVER_SUM = Spelling("exp over sum", frozenset(("aten::exp",)), _read)

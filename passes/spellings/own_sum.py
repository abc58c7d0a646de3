"""What exponentials or probabilities are divided by where it is their own sum, and what was set to zero among them before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dilcompile.passes.anchors import MaskOperand
from dilcompile.passes.atoms import same_shape
from dilcompile.passes.facts import Facts
from dilcompile.passes.operators import is_tensor, op_name, shape_of
from dilcompile.passes.spellings.reductions import reduced_dim
from dilcompile.passes.unproven import Unproven

_STAYS = "write torch.softmax, or leave it as it is"


@dataclass(frozen=True)
class Sum:
    """``max(sum over dim + added, least)``."""

    dim: int
    added: float = 0.0
    least: float = 0.0


def masked(weights: Node, facts: Facts) -> tuple[Node, tuple[MaskOperand, ...]]:
    """Exponentials or probabilities as they are summed, and what was set to zero among them."""
    masks: list[MaskOperand] = []
    while True:
        for user in weights.users:
            mask = _zeroed(user, weights, facts)
            if mask is not None and same_shape(shape_of(user), shape_of(weights)) and not facts.mutations.stale(weights, user):
                masks.append(mask)
                weights = user
                break
        else:
            return weights, tuple(reversed(masks))


def _zeroed(user: Node, weights: Node, facts: Facts) -> MaskOperand | None:
    name = op_name(user)
    if name == "masked_fill" and user.args[0] is weights and is_zero(user.args[2], user, facts):
        return MaskOperand(user.args[1], user, "hide") if is_tensor(user.args[1]) else None  # type: ignore[arg-type]
    if name == "where" and len(user.args) == 3 and is_tensor(user.args[0]) and user.args[0] is not weights:
        mask, then, other = user.args
        if then is weights and is_zero(other, user, facts):
            return MaskOperand(mask, user, "keep")  # type: ignore[arg-type]
        if other is weights and is_zero(then, user, facts):
            return MaskOperand(mask, user, "hide")  # type: ignore[arg-type]
    if name != "mul" or weights not in user.args:
        return None
    other = user.args[1] if user.args[0] is weights else user.args[0]
    if not isinstance(other, Node) or not is_tensor(other) or facts.mutations.stale(other, user):
        return None
    held = facts.zeros_and_ones(other)
    return None if held == "others" else MaskOperand(other, user, "keep", binary=held == "integers")


def is_zero(value: Any, at: Node, facts: Facts) -> bool:
    """Does ``at`` read 0 there, a number or a tensor of zeros?"""
    number = facts.scalar(value, at)
    if number is None and is_tensor(value) and not facts.mutations.stale(value, at):
        number = facts.constant(value)
    return number == 0


def sum_below(quotient: Node, weights: Node, facts: Facts) -> Sum | None:
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


def _total(number: object, weights: Node, at: Node, facts: Facts) -> Sum | None:
    if not isinstance(number, Node) or facts.mutations.stale(number, at):
        return None
    dim = reduced_dim(number, ("sum",), weights, facts)
    if dim is not None:
        return Sum(dim)
    name = op_name(number)
    if name == "add":
        first, second = number.args[:2]
        inner, constant = (first, second) if _total(first, weights, number, facts) else (second, first)
        below, added = _total(inner, weights, number, facts), facts.scalar(constant, number)
        if below is None or below.least or number.kwargs.get("alpha", 1) != 1:
            return None
        if added is None:
            raise Unproven(number, "something computed is added to the sum that weights are divided by", _STAYS)
        return Sum(below.dim, below.added + added)
    if name in ("clamp", "clamp_min", "maximum"):
        below, least = _total(number.args[0], weights, number, facts), facts.scalar(number.args[1], number)
        if below is None or below.added or least is None or (name == "clamp" and len(number.args) > 2):
            return None
        return Sum(below.dim, least=max(below.least, least))
    return None

"""What exponentials or probabilities are divided by where it is their own sum, and what was set to zero among them before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dilcompile.passes.finding.anchors import Division, MaskOperand
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings.reductions import reduced_dim
from dilcompile.passes.graph.operators import CASTS, REORDERS, is_float, is_tensor, op_name, shape_of
from dilcompile.passes.graph.sizes import same_shape
from dilcompile.passes.graph.unproven import Unproven

# They put numbers at other places, which the axes tell (see ``value_path``).
_MOVES = REORDERS | CASTS | frozenset(("expand", "expand_as"))
_ON_THE_WAY = _MOVES | frozenset("add clamp clamp_min maximum reciprocal mul".split())
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
            mask = zeroed(user, weights, facts) or _gated(user, weights, facts)
            if mask is not None and same_shape(shape_of(user), shape_of(weights)) and not facts.mutations.stale(weights, user):
                masks.append(mask)
                weights = user
                break
        else:
            return weights, tuple(reversed(masks))


def zeroed(user: Node, weights: Node, facts: Facts) -> MaskOperand | None:
    """Where ``user`` is 0 in place of the weights; None if it does something else."""
    name = op_name(user)
    if name == "masked_fill" and user.args[0] is weights and facts.is_zero(user.args[2], user):
        return MaskOperand(user.args[1], user, "hide") if is_tensor(user.args[1]) else None  # type: ignore[arg-type]
    if name == "where" and len(user.args) == 3 and is_tensor(user.args[0]) and user.args[0] is not weights:
        mask, then, other = user.args
        if then is weights and facts.is_zero(other, user):
            return MaskOperand(mask, user, "keep")  # type: ignore[arg-type]
        if other is weights and facts.is_zero(then, user):
            return MaskOperand(mask, user, "hide")  # type: ignore[arg-type]
    return None


def _gated(user: Node, weights: Node, facts: Facts) -> MaskOperand | None:
    """What the weights are multiplied with, if that is a mask."""
    if op_name(user) != "mul" or weights not in user.args:
        return None
    other = user.args[1] if user.args[0] is weights else user.args[0]
    if not isinstance(other, Node) or not is_tensor(other) or facts.mutations.stale(other, user):
        return None
    held = facts.zeros_and_ones(other)
    return None if held == "others" else MaskOperand(other, user, "keep", binary=held == "integers")


def divisions(weights: Node, facts: Facts) -> Iterator[tuple[Node, Sum, Division | None]]:
    """Where weights are divided by their own sum: the quotient, what it divides by, and how, if the values came first."""
    for user in weights.users:
        over = _over(user, weights, facts)
        if over is not None and not facts.mutations.stale(weights, user):
            below = _total(over, user, facts, lambda number: reduced_dim(number, ("sum",), weights, facts))
            if below is not None:
                yield user, below, None
    for total in weights.users if len(weights.users) > 1 else ():
        division = _division(total, weights, facts)
        if division is not None:
            below = _total(division.by, division.at, facts, lambda number: _dim_summed(number, weights, facts), _MOVES)
            if below is not None:
                yield division.at, below, division


def _over(quotient: Node, numerator: Node, facts: Facts) -> Node | None:
    """What ``numerator`` is divided by at a node."""
    if op_name(quotient) not in ("div", "true_divide", "mul") or quotient.kwargs.get("rounding_mode") is not None:
        return None
    first, second = quotient.args[:2]
    if op_name(quotient) == "mul":
        return _inverted(second if first is numerator else first, quotient, facts)
    return second if first is numerator and isinstance(second, Node) else None


def _inverted(number: Any, reader: Node, facts: Facts) -> Node | None:
    """x of ``1 / x``, which torch writes as the reciprocal times 1, as long as it still is that where it is read."""
    stale = facts.mutations.stale
    if isinstance(number, Node) and op_name(number) == "mul" and number.args[1] == 1 and not stale(number, reader):
        number, reader = number.args[0], number
    if not isinstance(number, Node) or op_name(number) != "reciprocal" or stale(number, reader):
        return None
    found = number.args[0]
    assert isinstance(found, Node)
    return found


def _division(total: Node, weights: Node, facts: Facts) -> Division | None:
    """What is divided by ``total`` alone, the sum of ``weights``, be it moved, cast, made larger or inverted on the way."""
    if _dim_summed(total, weights, facts) is None:
        return None
    node = total
    while len(node.users) == 1:
        (user,) = node.users
        for numerator in user.all_input_nodes:
            over = _over(user, numerator, facts) if numerator is not node and is_tensor(numerator) else None
            if over is not None and numerator is not over:
                return Division(user, over, total)
        if op_name(user) not in _ON_THE_WAY:
            break
        node = user
    return None


def _dim_summed(number: object, weights: Node, facts: Facts) -> int | None:
    """The one dim of ``weights`` that a number a row sums over, wherever it is moved."""
    while isinstance(number, Node) and op_name(number) in _MOVES:
        if not is_float(number) or facts.mutations.stale(number.args[0], number):  # type: ignore[arg-type]
            return None
        number = number.args[0]
    if not isinstance(number, Node) or op_name(number) != "sum" or number.args[0] is not weights or len(number.args) < 2:
        return None
    dims: Any = number.args[1]
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    if len(listed) != 1 or not is_float(number) or facts.mutations.stale(weights, number):
        return None
    return int(listed[0]) % len(shape_of(weights))


def _total(
    number: object, at: Node, facts: Facts, dim_of: Callable[[Node], int | None], moves: Collection[str] = ()
) -> Sum | None:
    """A sum over ``dim_of``, made larger or not, and moved by operators of ``moves``."""
    if not isinstance(number, Node) or not is_tensor(number) or not is_float(number) or facts.mutations.stale(number, at):
        return None
    dim = dim_of(number)
    if dim is not None:
        return Sum(dim)
    name = op_name(number)
    if name in moves:
        return _total(number.args[0], number, facts, dim_of, moves)
    if name == "add":
        first, second = number.args[:2]
        inner, constant = (first, second) if _total(first, number, facts, dim_of, moves) else (second, first)
        below, added = _total(inner, number, facts, dim_of, moves), facts.scalar(constant, number)
        if below is None or below.least or number.kwargs.get("alpha", 1) != 1:
            return None
        if added is None:
            raise Unproven(number, "something computed is added to the sum that weights are divided by", _STAYS)
        return Sum(below.dim, below.added + added)
    if name in ("clamp", "clamp_min", "maximum"):
        below, least = _total(number.args[0], number, facts, dim_of, moves), facts.scalar(number.args[1], number)
        if below is None or below.added or least is None or (name == "clamp" and len(number.args) > 2):
            return None
        return Sum(below.dim, least=max(below.least, least))
    return None

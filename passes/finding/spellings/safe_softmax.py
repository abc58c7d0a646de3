"""``where((scores == -inf).all(dim, keepdim=True), 0, softmax(scores))``: what scaled_dot_product_attention decomposes into."""

from __future__ import annotations

import math
from dataclasses import replace

from torch.fx import Node

from dilcompile.passes.finding.anchors import Softmax, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.score_steps import largest
from dilcompile.passes.finding.spellings.reductions import reduced_dim
from dilcompile.passes.finding.spellings.softmax import SOFTMAX
from dilcompile.passes.graph.operators import is_tensor, op_name, shape_of
from dilcompile.passes.graph.sizes import same_shape

_NOT = frozenset(("logical_not", "bitwise_not"))
# They read the shape of the probabilities, not their values.
_SHAPED = frozenset("full_like zeros_like ones_like empty_like new_zeros new_full sym_size".split())


def _read(node: Node, facts: Facts) -> Softmax | None:
    plain = SOFTMAX.read(node, facts)
    if not isinstance(plain, Softmax):
        return None
    users = [user for user in node.users if op_name(user) not in _SHAPED]
    if len(users) != 1 or facts.mutations.stale(node, users[0]):
        return None
    empty = _where_zero(users[0], node, facts)
    if empty is None or facts.mutations.stale(empty, users[0]) or not _says_empty(empty, True, plain, facts):
        return None
    if not same_shape(shape_of(users[0]), shape_of(node)):
        return None
    # A narrower softmax has rows of -inf that the scores don't show.
    if largest(node) < largest(plain.scores):
        return None
    # The rows' own NaN is overwritten, but its gradient would still reach what is added to the scores.
    return replace(plain, probabilities=users[0], empty="zero" if plain.empty == "zero" else "cleared")


def _where_zero(user: Node, weights: Node, facts: Facts) -> Node | None:
    """The condition under which ``user`` is 0 in place of the probabilities."""
    if op_name(user) == "masked_fill" and user.args[0] is weights and facts.is_zero(user.args[2], user):
        return user.args[1] if is_tensor(user.args[1]) else None  # type: ignore[return-value]
    if op_name(user) != "where" or len(user.args) != 3 or user.args[2] is not weights or not facts.is_zero(user.args[1], user):
        return None
    return user.args[0] if is_tensor(user.args[0]) else None  # type: ignore[return-value]


def _says_empty(node: Node, yes: bool, softmax: Softmax, facts: Facts) -> bool:
    """Is ``node`` one truth a row: that all its scores are -inf (``yes``), or that some are not?"""
    if node.op != "call_function":
        return False
    inner = node.args[0]
    if op_name(node) in _NOT and isinstance(inner, Node) and not facts.mutations.stale(inner, node):
        return _says_empty(inner, not yes, softmax, facts)
    if not isinstance(inner, Node) or not _says_hidden(inner, yes, softmax, facts):
        return False
    return reduced_dim(node, ("all",) if yes else ("any",), inner, facts) == softmax.dim


def _says_hidden(node: Node, yes: bool, softmax: Softmax, facts: Facts) -> bool:
    """Is ``node`` one truth a score: that it is -inf (``yes``), or that it is not?"""
    if node.op != "call_function" or facts.mutations.stale(softmax.scores, node):
        return False
    inner = node.args[0]
    if op_name(node) in _NOT and isinstance(inner, Node):
        return not facts.mutations.stale(inner, node) and _says_hidden(inner, not yes, softmax, facts)
    if op_name(node) != ("eq" if yes else "ne") or inner is not softmax.scores:
        return False
    return facts.scalar(node.args[1], node) == -math.inf


SAFE_SOFTMAX = Spelling("safe softmax", SOFTMAX.anchors, _read)

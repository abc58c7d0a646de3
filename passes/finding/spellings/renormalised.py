"""``p / p.sum()`` with ``p = softmax(scores) * mask``: probabilities of a softmax over the keys that the mask shows."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from dilcompile.passes.finding.anchors import Softmax, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings.own_sum import divisions, masked
from dilcompile.passes.finding.spellings.softmax import SOFTMAX
from dilcompile.passes.graph.operators import CASTS, op_name
from dilcompile.passes.graph.unproven import Unproven


def _read(node: Node, facts: Facts) -> Softmax | None:
    plain = SOFTMAX.read(node, facts)
    if not isinstance(plain, Softmax) or plain.scores not in facts.scores:
        return None
    weights, masks = masked(_cast(node), facts)
    for quotient, total, division in divisions(weights, facts):
        if total.dim != plain.dim:
            continue
        if total.added or total.least:
            reason = "the sum that the probabilities are divided by is made larger: they don't sum up to one"
            raise Unproven(quotient, reason, "divide by the sum alone")
        found = replace(plain, probabilities=weights if division is not None else quotient, division=division)
        if not masks:
            # They sum up to one: nothing is done to them, but for rows of zeros, which become NaN.
            return replace(found, empty="plain")
        # A row is empty where the two masks leave no key: then the sum is 0, whatever number the first one filled in.
        return replace(found, empty="odd", masks=masks)
    return None


def _cast(node: Node) -> Node:
    """The probabilities behind casts to other floats."""
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) not in CASTS or not user.meta["val"].dtype.is_floating_point:
            break
        node = user
    return node


RENORMALISED = Spelling("renormalised softmax", SOFTMAX.anchors, _read)

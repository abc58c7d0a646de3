"""``e / e.sum()``, ``e = exp(scores)`` or ``exp2``: the maximum taken off or not, exponentials masked, the sum made larger.

The values may be summed before they are divided: ``e @ v / e.sum()``.
"""

from __future__ import annotations

import math

from torch.fx import Node

from dilcompile.passes.finding.anchors import Sink, Softmax, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.score_steps import is_row_number
from dilcompile.passes.finding.spellings.own_sum import Sum, divisions, masked
from dilcompile.passes.graph.operators import op_name
from dilcompile.passes.graph.unproven import Unproven

_STAYS = "write torch.softmax, or leave it as it is"
# exp(-700) is nothing beside any sum that float32 or float64 hold.
_NOTHING = 700.0


def _read(node: Node, facts: Facts) -> Softmax | None:
    if node not in facts.scores:
        return None
    weights, masks = masked(node, facts)
    for quotient, total, division in divisions(weights, facts):
        exponent = node.args[0]
        assert isinstance(exponent, Node)
        shifted = _is_shifted(exponent, facts.axes[node][total.dim], facts)
        _check(total, quotient, shifted, bool(masks))
        sinks = (Sink(math.log(total.added), node, total.dim),) if total.added > 0 else ()
        return Softmax(
            exponent,
            node,
            total.dim,
            weights if division is not None else quotient,
            quotient.meta["val"].dtype,
            limit=math.inf if shifted else _NOTHING,
            masks=masks,
            sinks=sinks,
            base=2.0 if op_name(node) == "exp2" else math.e,
            division=division,
        )
    return None


def _check(total: Sum, at: Node, shifted: bool, masked: bool) -> None:
    if total.added < 0:
        raise Unproven(at, "a negative number is added to the sum of exponentials", _STAYS)
    if total.added > 0 and shifted:
        reason = "a number is added to the sum after the row's maximum was taken off: it weighs differently in every row"
        raise Unproven(at, reason, _STAYS)
    # The largest exponential of a row is 1 and part of the sum: the clamp never acts.
    if total.least > 0 and not (shifted and not masked and total.least <= 1.0):
        raise Unproven(at, "the sum of exponentials is clamped", _STAYS)


def _is_shifted(exponent: Node, columns: object, facts: Facts) -> bool:
    """Is the row's maximum taken off last of all?"""
    if op_name(exponent) != "sub" or exponent.kwargs.get("alpha", 1) != 1:
        return False
    scores, number = exponent.args[:2]
    if not isinstance(scores, Node) or not isinstance(number, Node):
        return False
    return is_row_number(number, scores, columns, facts)  # type: ignore[arg-type]


EXP_OVER_SUM = Spelling("exp over sum", frozenset(("aten::exp", "aten::exp2")), _read)

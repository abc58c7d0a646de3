"""``exp(scores - logsumexp(scores))`` (Reformer)."""

from __future__ import annotations

from torch.fx import Node

from dilcompile.passes.finding.anchors import Softmax, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings.reductions import reduced_dim
from dilcompile.passes.graph.operators import op_name, shape_of
from dilcompile.passes.graph.sizes import same_shape


def _read(node: Node, facts: Facts) -> Softmax | None:
    difference = node.args[0]
    if not isinstance(difference, Node) or op_name(difference) != "sub" or difference.kwargs.get("alpha", 1) != 1:
        return None
    scores, total = difference.args[:2]
    if not isinstance(scores, Node) or not isinstance(total, Node):
        return None
    dim = reduced_dim(total, ("logsumexp",), scores, facts)
    if dim is None or facts.mutations.stale(difference, node) or not same_shape(shape_of(difference), shape_of(scores)):
        return None
    return Softmax(scores, difference, dim, node, node.meta["val"].dtype, empty="odd")


EXP_LESS_LOGSUMEXP = Spelling("exp less logsumexp", frozenset(("aten::exp",)), _read)

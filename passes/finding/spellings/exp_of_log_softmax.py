"""``log_softmax(scores).exp()``."""

from __future__ import annotations

from torch.fx import Node

from dilcompile.passes.finding.anchors import Softmax, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.graph.operators import op_name, shape_of


def _read(node: Node, facts: Facts) -> Softmax | None:
    logs = node.args[0]
    if not isinstance(logs, Node) or op_name(logs) not in ("log_softmax", "_log_softmax"):
        return None
    scores, dim = logs.args[:2]
    if not isinstance(scores, Node) or not isinstance(dim, int) or facts.mutations.stale(logs, node):
        return None
    return Softmax(scores, logs, dim % len(shape_of(node)), node, node.meta["val"].dtype)


EXP_OF_LOG_SOFTMAX = Spelling("exp of log_softmax", frozenset(("aten::exp",)), _read)

"""``softmax`` by its name, ``_safe_softmax`` included."""

from __future__ import annotations

from torch.fx import Node

from dilcompile.passes.finding.anchors import EmptyRule, Softmax, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.graph.operators import op_name, shape_of


def _read(node: Node, facts: Facts) -> Softmax | None:
    scores, dim = node.args[:2]
    if not isinstance(scores, Node) or not isinstance(dim, int) or not shape_of(node):
        return None
    dtype = node.meta["val"].dtype
    empty: EmptyRule = "zero" if op_name(node) == "_safe_softmax" else "plain"
    return Softmax(scores, node, dim % len(shape_of(node)), node, dtype, empty=empty)


SOFTMAX = Spelling("softmax", frozenset(("aten::softmax", "aten::_softmax", "aten::_safe_softmax")), _read)

"""``type_as`` reads only the dtype of its second tensor. Written as a cast to that dtype, it is no use of attention weights."""

from __future__ import annotations

from torch.fx import GraphModule

from dilcompile.passes.graph.emit import aten
from dilcompile.passes.graph.operators import is_tensor


def name_dtypes(gm: GraphModule) -> None:
    """Let every ``x.type_as(y)`` be ``x.to(y.dtype)``, unless it also moves ``x`` to another device or layout."""
    for node in gm.graph.find_nodes(op="call_function", target=aten.type_as.default):
        if len(node.args) != 2 or not all(map(is_tensor, node.args)):
            continue
        given, like = (arg.meta["val"] for arg in node.args)
        if (given.device, given.layout) == (like.device, like.layout):
            node.target = aten.to.dtype
            node.args = (node.args[0], like.dtype)

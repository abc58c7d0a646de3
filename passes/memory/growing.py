"""Nodes put into a graph that has fake values, each with the value that it will have; and the order of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)

_UNDECOMPOSED = (aten._to_copy.default, aten.t.default, aten.transpose.int, aten.detach.default, aten._unsafe_view.default)
# Of a node that another one is made after: what holds for its own value and place alone.
_OWN = ("val", "tensor_meta", "recompute", "partitioner_tag", "unbacked_bindings", "ac_graph_id")


@dataclass(frozen=True)
class Growing:
    """Puts nodes into a graph, before one of its own.

    Args:
        mode: of the graph's fake values.
        anchor: what the nodes are put before.
    """

    graph: Graph
    mode: FakeTensorMode
    anchor: Node

    def call(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], like: Node) -> Node:
        """A call made after ``like``: of its module, with its source."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, tuple(args), dict(kwargs))
        node.meta = {key: value for key, value in like.meta.items() if key not in _OWN}
        read = map_arg((node.args, node.kwargs), lambda held: held.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = value = target(*read[0], **read[1])
        if isinstance(value, Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)
        return node

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """The node's value in this dtype."""
        if node.meta["val"].dtype == dtype:
            return node
        # What is traced for Inductor has no copy that casts.
        if any(other.target in _UNDECOMPOSED for other in self.graph.nodes):
            return self.call(aten._to_copy.default, (node,), {"dtype": dtype}, node)
        return self.call(torch.ops.prims.convert_element_type.default, (node, dtype), {}, node)

    def wide_sum(self, held: Node | None, share: Node, like: Node) -> Node:
        """One share more of a sum, which is in float32 at least."""
        if share.meta["val"].dtype in _HALVES:
            share = self.cast(share, torch.float32)
        return share if held is None else self.call(aten.add.Tensor, (held, share), {}, like)


def put_in_order(graph: Graph) -> None:
    """Let each node stand where it did, or before the first of its readers where that is earlier."""
    order: dict[Node, None] = {}
    for node in graph.nodes:
        stack = [(node, iter(node.all_input_nodes))]
        while stack:
            current, read = stack[-1]
            missing = next((operand for operand in read if operand not in order), None)
            if missing is not None:
                stack.append((missing, iter(missing.all_input_nodes)))
                continue
            order[current] = None
            stack.pop()
    output = graph.output_node()
    for node in order:
        if node is not output:
            output.prepend(node)


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """That of the graph's values; None if it has no such ones."""
    values = (value for node in graph.nodes for value in tree_leaves(node.meta.get("val")))
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)

"""Gather the facts of one graph: which tensors are weights, which values are known, where gradients flow."""

from __future__ import annotations

from functools import cache

import torch
from torch.fx import Node

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.axes.labels import carries_elements, reached_from
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.spellings import CALLS
from dilcompile.passes.graph.grad_modes import GradModes
from dilcompile.passes.graph.operators import is_tensor, op_name
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.masks.reader import MaskReader

_MOVES = frozenset("t transpose permute view reshape to expand unsqueeze mul select".split())


def gather_facts(graph: Graph) -> Facts:
    nodes = list(graph.gm.graph.nodes)
    axes = Axes(nodes, weight_like(nodes, graph.weights), CALLS)
    learned = cache(lambda: _learned_everywhere(graph))
    reader = MaskReader(_known(graph), graph.stale, graph.outside, lambda node: node in learned(), graph.writers, graph.captured)
    scores, modes = reached_from(nodes, axes.products, carries_elements), GradModes(nodes, graph.training)
    return Facts(axes, scores, reader, graph.mutations, modes)


def weight_like(nodes: list[Node], parameters: frozenset[Node]) -> frozenset[Node]:
    """Parameters, and whatever is made of parameters by views and elementwise operators only."""
    found = set(parameters)
    for node in nodes:
        if node.op == "call_function" and is_tensor(node) and op_name(node) in _MOVES:
            inputs = [arg for arg in node.all_input_nodes if is_tensor(arg)]
            if inputs and all(arg in found for arg in inputs):
                found.add(node)
    return frozenset(found)


def _known(graph: Graph | None) -> dict[Node, torch.Tensor]:
    """Buffers, and tensors that the retrace folded into the graph (``torch.tensor(8.0)`` in the model's code)."""
    if graph is None:
        return {}
    found = {**_known(graph.parent), **graph.tables}
    for node in graph.gm.graph.find_nodes(op="get_attr"):
        held = getattr(graph.gm, str(node.target), None)
        if type(held) is torch.Tensor:
            found[node] = held
    return found


def _wants_gradient(node: Node) -> bool:
    """Retracing detaches ``val``; Dynamo's own record has the flag."""
    return any(getattr(node.meta.get(key), "requires_grad", False) for key in ("val", "example_value"))


def _learned_everywhere(graph: Graph) -> frozenset[Node]:
    """Tensors that gradients flow through, in this graph and in those around it."""
    found: set[Node] = set()
    part: Graph | None = graph if graph.training else None
    while part is not None:
        found |= _learned(part)
        part = part.parent
    return frozenset(found)


def _learned(graph: Graph) -> set[Node]:
    found = set(graph.weights)
    for node in graph.gm.graph.nodes:
        if not is_tensor(node) or not node.meta["val"].dtype.is_floating_point or op_name(node) == "detach":
            continue
        asked = node.op == "placeholder" and (_wants_gradient(node) or graph.parent is not None)
        if asked or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found

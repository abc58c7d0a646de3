"""The graphs inside a graph: bodies of activation checkpoints are treated like the graph that calls them."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from dilcompile.passes.find_sites import Graph
from dilcompile.passes.normalize import CHECKPOINT


def regions(graph: Graph) -> Iterator[Graph]:
    """The graph itself, then the body of every checkpoint in it, with what is known of its inputs."""
    yield graph
    for node in graph.gm.graph.nodes:
        if node.op != "call_function" or node.target is not CHECKPOINT:
            continue
        body = _body(graph.gm, node)
        if body is None:
            continue
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
        yield from regions(
            Graph(
                body,
                frozenset(own for own, outer in inner.items() if outer in graph.weights),
                {own: graph.tables[outer] for own, outer in inner.items() if outer in graph.tables},
                graph.training,
            )
        )


def _body(gm: GraphModule, call: Node) -> GraphModule | None:
    held = call.args[0]
    if not isinstance(held, Node) or held.op != "get_attr":
        return None
    body = getattr(gm, str(held.target), None)
    return body if isinstance(body, GraphModule) else None

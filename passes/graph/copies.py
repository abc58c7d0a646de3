"""A copy of a graph, for what changes the graph that it is given."""

from __future__ import annotations

from torch.fx import Graph, GraphModule


def copied(gm: GraphModule) -> GraphModule:
    """The same nodes by the same names, over the same fake values and submodules."""
    graph = Graph(tracer_cls=gm.graph._tracer_cls)
    result, output = graph.graph_copy(gm.graph, {}, return_output_node=True)  # type: ignore[misc]
    made = graph.output(result)
    made.meta = dict(output.meta)  # type: ignore[union-attr]
    return GraphModule(gm, graph)

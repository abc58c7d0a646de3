"""The graphs inside a graph: bodies of activation checkpoints are treated like the graph that calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.fx import GraphModule, Node

from dilcompile.passes.dialect.normalize import CHECKPOINT
from dilcompile.passes.graph.dead_code import erase_dead
from dilcompile.passes.graph.dtype_sources import name_dtypes
from dilcompile.passes.graph.frames import Frame, compiled_frame
from dilcompile.passes.graph.mutations import Mutations


@dataclass(frozen=True)
class Graph:
    """What the finder needs to know about a graph besides its nodes.

    Args:
        gm: the graph in pre-dispatch ATen.
        weights: inputs that are parameters.
        tables: inputs that are buffers, with their values.
        training: gradients will be asked for.
        parent: the graph around a checkpoint's body; None for a whole graph.
        call: the node of the parent that runs the body.
        outside: the body's inputs and the parent's nodes that they stand for.
        frame: what Dynamo captured the graph from.
        captured: inputs that are no arguments but variables around the model's code, with their values now.
    """

    gm: GraphModule
    weights: frozenset[Node]
    tables: Mapping[Node, torch.Tensor]
    training: bool
    parent: Graph | None = None
    call: Node | None = None
    outside: Mapping[Node, Node] = field(default_factory=dict)
    frame: Frame = field(default_factory=compiled_frame)
    captured: Mapping[Node, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def mutations(self) -> Mutations:
        return Mutations(list(self.gm.graph.nodes))

    def stale(self, source: Node, reader: Node) -> bool:
        """Was ``source`` written in place between its making and its reading, in whichever graph both stand?"""
        graph: Graph | None = self
        while graph is not None and source.graph is not graph.gm.graph:
            graph = graph.parent
        return graph is not None and graph.mutations.stale(source, reader)

    def writers(self, tensor: Node) -> Sequence[Node]:
        """All in-place writes to a tensor, in whichever graph it stands."""
        graph: Graph | None = self
        while graph is not None and tensor.graph is not graph.gm.graph:
            graph = graph.parent
        return () if graph is None else graph.mutations.writers(tensor)

    def bring_in(self, node: Node) -> Node:
        """A node of this graph with the value of ``node``, which may stand in a graph around it."""
        if node.graph is self.gm.graph:
            return node
        assert self.parent is not None
        assert self.call is not None
        outer = self.parent.bring_in(node)
        placeholders: list[Node] = list(self.gm.graph.find_nodes(op="placeholder"))
        for own, argument in zip(placeholders, self.call.args[1:], strict=True):
            if argument is outer:
                return own
        with self.gm.graph.inserting_after(placeholders[-1]):
            own = self.gm.graph.placeholder(f"outer_{outer.name}")
        own.meta["val"] = outer.meta["val"]
        self.call.args = (*self.call.args, outer)
        return own

    def drop_unused_inputs(self) -> None:
        """Take inputs that nothing reads any more off the body and its call, so that the parent need not make them."""
        if self.call is None:
            return
        body, *arguments = self.call.args
        kept = []
        for own, argument in zip(self.gm.graph.find_nodes(op="placeholder"), arguments, strict=True):
            if own.users:
                kept.append(argument)
            else:
                self.gm.graph.erase_node(own)
        self.call.args = (body, *kept)


def regions(graph: Graph) -> Iterator[Graph]:
    """The graph itself, then the body of every checkpoint in it, with what is known of its inputs; each without dead code."""
    name_dtypes(graph.gm)
    # Weights that are written into a tensor that nobody reads are not used. Random draws stay, for the sake of the random state.
    erase_dead(graph.gm, frozenset(graph.gm.graph.nodes))
    yield graph
    for node in graph.gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        body = _body(graph.gm, node)
        if body is None:
            continue
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[1:], strict=True))
        outside = {
            own: outer for own, outer in inner.items() if isinstance(outer, Node) and not _written_since(graph, outer, node)
        }
        yield from regions(
            Graph(
                body,
                frozenset(own for own, outer in inner.items() if outer in graph.weights),
                {own: graph.tables[outer] for own, outer in outside.items() if outer in graph.tables},
                graph.training,
                parent=graph,
                call=node,
                outside=outside,
                frame=graph.frame,
                captured=graph.captured,
            )
        )


def _written_since(graph: Graph, node: Node, call: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor) and graph.mutations.stale(node, call)


def _body(gm: GraphModule, call: Node) -> GraphModule | None:
    held = call.args[0]
    if not isinstance(held, Node) or held.op != "get_attr":
        return None
    body = getattr(gm, str(held.target), None)
    return body if isinstance(body, GraphModule) else None

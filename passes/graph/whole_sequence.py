"""Numbers that are counted from token to token, where a rank holds a part of the tokens: count them over all of them.

Transformers' models tell packed sequences apart by where position ids jump, and number them by a running sum. On one rank's shard
both would begin anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dilcompile.passes.graph.emit import Emitter
from dilcompile.passes.graph.operators import is_pointwise, is_tensor, op_name, shape_of
from dilcompile.passes.graph.regions import Graph
from dilcompile.placements.choice import PlacementChoice

_ALONG = frozenset(("cumsum", "diff"))
_MOVES = frozenset("select unsqueeze to _to_copy clone contiguous alias detach".split())


@dataclass(frozen=True)
class Sharding:
    """The functions that sharded sites call; they stand in the graph as they are.

    Args:
        attention: (q, k, v, key_padding, documents, row_limits, dropout_seed, spec) -> (out, lse).
        whole: (x, spec) -> x of all ranks, by position.
    """

    attention: Callable[..., Any]
    whole: Callable[..., Any]


@dataclass(frozen=True)
class WholeSequence:
    """Recomputes numbers of tokens for the whole sequence, from what all ranks were given.

    Args:
        spec: that of the site which asks.
    """

    placement: PlacementChoice
    spec: str
    sharding: Sharding

    def documents(self, graph: Graph, emit: Emitter, node: Node) -> Node:
        """Document numbers of all tokens [B or 1, S], where they are counted along the sequence; else ``node``, this rank's.

        Where anything on the way to them depends on the length, this rank's own stay, and the check of the graph refuses them.
        """
        way: dict[Node, None] = {}
        if not _lengthless(graph, node, way) or not any(op_name(part) in _ALONG for part in way):
            return node
        return self._made(graph, emit, node)

    def _made(self, graph: Graph, emit: Emitter, node: Node) -> Node:
        key = f"dilcompile_of_whole {self.placement}"
        if key in node.meta:
            found: Node = node.meta[key]
            return found
        if node.op != "placeholder":
            inputs = {arg: self._made(graph, emit, arg) for arg in node.all_input_nodes}
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), inputs.__getitem__)
            made = emit(node.target, *args, **kwargs)  # type: ignore[arg-type]
        elif graph.parent is not None and graph.call is not None:
            outer = self._made(graph.parent, Emitter(graph.parent.gm, graph.call), _outer(graph, node))
            made = graph.bring_in(outer)
        else:
            held = node.meta["val"]
            ranks = self.placement.ranks * self.placement.heads_ranks
            made = emit.held(self.sharding.whole, held.new_empty((*held.shape[:-1], held.shape[-1] * ranks)), (node, self.spec))
        node.meta[key] = made
        return made


def _lengthless(graph: Graph, node: Node, way: dict[Node, None]) -> bool:
    """Does everything from the model's inputs to ``node`` mean the same at any length? ``way``: what was passed."""
    if node in way:
        return True
    way[node] = None
    if node.op == "call_function":
        return _is_lengthless(node) and all(_lengthless(graph, arg, way) for arg in node.all_input_nodes)
    if node.op != "placeholder" or not is_tensor(node) or node in graph.weights or node in graph.tables:
        return False
    return graph.parent is None or _lengthless(graph.parent, _outer(graph, node), way)


def _outer(graph: Graph, node: Node) -> Node:
    """What an input of a checkpoint's body stands for."""
    assert graph.call is not None
    own: list[Node] = list(graph.gm.graph.find_nodes(op="placeholder"))
    outer = graph.call.args[1 + own.index(node)]
    assert isinstance(outer, Node)
    return outer


def _is_lengthless(node: Node) -> bool:
    name = op_name(node)
    if name == "slice":
        # The first token's number, from which differences begin; or all of another dim, as graphs of dynamic shape cut it.
        return tuple(node.args[2:4]) in ((0, 1), (0, sys.maxsize))
    if name == "select":
        rank = len(shape_of(node)) + 1
        dim = node.args[1]
        return isinstance(dim, int) and dim % rank != rank - 1
    return name in _ALONG or name in _MOVES or is_pointwise(node)

"""Everything in a graph that would be silently wrong because several ranks hold its sequence, besides the sharded sites."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from dilcompile.passes.graph.operators import MOVES_ONLY, is_pointwise, op_name, shape_of
from dilcompile.passes.graph.provenance import module_path, source_line
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.sequence.sequence_axes import SequenceAxes
from dilcompile.passes.sequence.sequence_rules import POSITIONS, Wrong, wrong_with

# Our own functions know of the other ranks (``sharded_loss`` inside a compiled step).
_OURS = os.path.join("dilcompile", "distributed", "")


@dataclass(frozen=True)
class Hazard:
    """One thing that would be wrong.

    Args:
        module, source: where it stands in the user's code.
        node: its name in the graph, with the operator.
        reason: what would be wrong.
        cure: what to change.
    """

    module: str
    source: str
    node: str
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.module or '<top>'} ({self.source}): {self.node}: {self.reason}; {self.cure}"


def hazards(parts: Sequence[Graph], along: SequenceAxes) -> list[Hazard]:
    """All of them, in graph order; empty where nothing runs along a sharded sequence.

    Args:
        parts: the rewritten graph without dead nodes, then the checkpoint bodies in it.
        along: what runs along the sequence in them.
    """
    if not along.axis_of:
        return []
    found = [_hazard(site, part, wrong) for part in parts for site, wrong in _between_sites(part, along)]
    for part in parts:
        numbers: set[Node] = set()
        for node in part.gm.graph.nodes:
            wrong = _wrong(node, part, along, numbers)
            if wrong is not None:
                found.append(_hazard(node, part, wrong))
    # Layers of one kind are told of once.
    return list({(each.source, each.node.partition(" ")[0], each.reason): each for each in reversed(found)}.values())[::-1]


def _hazard(node: Node, part: Graph, wrong: Wrong) -> Hazard:
    named = node.name if node.op != "call_function" else f"{op_name(node)} ({node.name})"
    return Hazard(module_path(node, part.frame.prefix), source_line(node), named, wrong.reason, wrong.cure)


def _between_sites(part: Graph, along: SequenceAxes) -> Iterator[tuple[Node, Wrong]]:
    """Sites that hold one sequence over different axes, or in different orders."""
    for site, first, second in along.conflicts:
        if site.graph is part.gm.graph:
            reason = f"its sequence is held over mesh axis {first!r} elsewhere, and over {second!r} here"
            yield site, Wrong(reason, "give all rules of one sequence the same mesh axis")
    first_of: dict[str, tuple[str, str]] = {}
    for site, spec in along.sites.items():
        order, where = first_of.setdefault(spec["axis"], (spec["order"], spec["site"]))
        if order != spec["order"] and site.graph is part.gm.graph:
            reason = f"it holds the tokens {spec['order']}, but {where} holds them {order}"
            yield site, Wrong(reason, f"say the order once, as `layout` of mesh axis {spec['axis']!r}")


def _wrong(node: Node, part: Graph, along: SequenceAxes, numbers: set[Node]) -> Wrong | None:
    if node.op == "placeholder":
        return _input(node, part, along)
    if node.op == "get_attr":
        held = getattr(part.gm, str(node.target), None)
        return _table(node, held, along)
    if node.op != "call_function":
        return None
    if _is_local_length(node, along, numbers):
        numbers.add(node)
        return None
    if is_pointwise(node) and not numbers.isdisjoint(node.all_input_nodes):
        return Wrong("it computes with the length of this rank's shard", "give the model the length of the whole sequence")
    if _of_uniform_table(node, part.tables) or _OURS in (node.meta.get("stack_trace") or ""):
        return None
    return wrong_with(node, along)


def _input(node: Node, part: Graph, along: SequenceAxes) -> Wrong | None:
    """Of the model's inputs the ranks have shards; of its weights and buffers each has all."""
    if part.parent is not None or not along.dims(node):
        return None
    if node in part.weights:
        return Wrong("a weight with one entry a token, taken from its start on every rank", POSITIONS)
    mark = along.known.inputs.get(node)
    if mark is not None and mark.counted & along.dims(node):
        return Wrong("an earlier graph counted it from this rank's first row on", POSITIONS)
    return _table(node, part.tables.get(node), along)


def _table(node: Node, held: object, along: SequenceAxes) -> Wrong | None:
    if not isinstance(held, torch.Tensor) or not along.dims(node) or _is_uniform(held):
        return None
    return Wrong("a table with one entry a token, taken from its start on every rank", POSITIONS)


def _is_uniform(held: torch.Tensor) -> bool:
    return held.numel() > 0 and bool((held == held.reshape(-1)[0]).all())


def _of_uniform_table(node: Node, tables: Mapping[Node, torch.Tensor]) -> bool:
    """Cut out of a table that holds one number everywhere."""
    while op_name(node) in MOVES_ONLY and node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node in tables:
            return _is_uniform(tables[node])
        if node.op != "call_function":
            return False
    return False


def _is_local_length(node: Node, along: SequenceAxes, numbers: set[Node]) -> bool:
    """A number that is made of the length of this rank's shard."""
    if not isinstance(node.meta.get("val"), torch.SymInt):
        return False
    if op_name(node) == "sym_size":
        tensor, dim = node.args
        assert isinstance(tensor, Node)
        assert isinstance(dim, int)
        return dim % len(shape_of(tensor)) in along.dims(tensor)
    return node.target in vars(operator).values() and not numbers.isdisjoint(node.all_input_nodes)

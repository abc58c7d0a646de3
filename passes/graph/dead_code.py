"""Erase what nobody reads, in-place writes included: a tensor that is filled part by part and then dropped goes whole."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import GraphModule, Node

from dilcompile.passes.dialect.normalize import bounds_vmap
from dilcompile.passes.graph.emit import aten
from dilcompile.passes.graph.mutations import storage, written
from dilcompile.passes.graph.operators import is_tensor

# torch.export's checks of dtypes that it knows by itself; they must not keep a dead mask alive.
_CHECK = aten._assert_tensor_metadata.default


def unused(gm: GraphModule) -> frozenset[Node]:
    """The nodes without users: what the user's own graph computes for nothing (or for its random state)."""
    return frozenset(node for node in gm.graph.nodes if not node.users)


def erase_dead(gm: GraphModule, idle: frozenset[Node]) -> int:
    """Erase what has no effect on outputs, inputs or the world outside.

    Args:
        idle: random operators among them stay, for the sake of the random state.

    Returns:
        How many nodes went.
    """
    live = _live(gm, idle)
    dead = [node for node in reversed(gm.graph.nodes) if node not in live]
    for node in dead:
        gm.graph.erase_node(node)
    return len(dead)


def _live(gm: GraphModule, idle: frozenset[Node]) -> set[Node]:
    """The nodes that count: what is read by one that counts, and what writes to memory that such a one reads."""
    nodes = list(gm.graph.nodes)
    outside = {storage(node) for node in nodes if node.op in ("placeholder", "get_attr") and is_tensor(node)}
    writes: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        for target in written(node):
            writes[storage(target)].append(node)
    queue = [node for node in nodes if _counts(node, outside, idle)]
    live = set(queue)
    for node in queue:
        for arg in node.all_input_nodes:
            needed = [arg, *(writes.get(storage(arg), ()) if is_tensor(arg) else ())]
            fresh = [one for one in needed if one not in live]
            live.update(fresh)
            queue += fresh
    checks = [node for node in nodes if node.target is _CHECK and live.issuperset(node.all_input_nodes)]
    return live.union(checks)


def _counts(node: Node, outside: set[int], idle: frozenset[Node]) -> bool:
    """Does it count whoever reads it?"""
    if node.op in ("placeholder", "output") or bounds_vmap(node):
        return True
    if node.target is _CHECK:
        return False
    targets = written(node)
    if not targets:
        return bool(node.is_impure(impure_random=node in idle))
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return (draws and node in idle) or any(storage(target) in outside for target in targets)

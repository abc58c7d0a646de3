"""Views behind a rewritten site: its output lies in memory in another order than the model's own did.

``aten.view`` of it, or of what is computed from it element by element, may be impossible then; and a ``contiguous()`` before
it is not in the graph where the model's own output was contiguous already. ``aten.reshape`` is the same view where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dilcompile.passes.dialect.normalize import CHECKPOINT
from dilcompile.passes.graph.emit import aten
from dilcompile.passes.graph.mutations import storage, written
from dilcompile.passes.graph.operators import is_tensor

_RELAXED: Mapping[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}


def relax_views(gm: GraphModule) -> None:
    """Let every view behind a rewritten site copy where it can't be one; views that are written through stay views."""
    nodes: list[Node] = list(gm.graph.nodes)
    kept = {storage(target) for node in nodes for target in written(node)}
    behind: set[Node] = set()
    for node in nodes:
        if node.target in (torch.ops.dilcompile.attention.default, CHECKPOINT):
            behind.add(node)
        elif not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
            if node.target in _RELAXED and is_tensor(node) and storage(node) not in kept:
                node.target = _RELAXED[node.target]

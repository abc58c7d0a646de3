"""Functions with a backward of their own (``torch.autograd.Function``): one node of the graph before and after the retrace.

Running through such a function's forward would record its operators alone, and autograd would derive their gradient in place of
the one that the user wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from dilcompile.passes.dialect.recording import record

CUSTOM = torch.ops.higher_order.autograd_function_apply


def keep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record ``autograd_function_apply(*args, **kwargs)`` as one node; its forward and backward stay as Dynamo made them.

    Returns:
        The fake results, which stand for the node's.
    """
    with disable_proxy_modes_tracing():
        results = CUSTOM(*args, **kwargs)
    return record(CUSTOM, args, kwargs, results)


def bodies(gm: GraphModule) -> frozenset[Graph]:
    """The graphs of the functions' forwards and backwards, and those inside of them, which are as Dynamo made them."""
    found: set[Graph] = set()
    for node in gm.graph.find_nodes(op="call_function", target=CUSTOM):
        for body in node.args[:2]:
            assert isinstance(body, Node)
            module = gm.get_submodule(str(body.target))
            found.update(part.graph for part in module.modules() if isinstance(part, GraphModule))
    return frozenset(found)

"""Functions with a backward of their own (``torch.autograd.Function``): one node of the graph before and after the retrace.

Running through such a function's forward would record its operators alone, and autograd would derive their gradient in place of
the one that the user wrote.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils._pytree import tree_map

CUSTOM = torch.ops.higher_order.autograd_function_apply


def keep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record ``autograd_function_apply(*args, **kwargs)`` as one node; its forward and backward stay as Dynamo made them.

    Returns:
        The fake results, which stand for the node's.
    """
    mode = get_proxy_mode()
    assert mode is not None, "a retrace runs under a proxy mode"
    tracer: Any = mode.tracer
    with disable_proxy_modes_tracing():
        results = CUSTOM(*args, **kwargs)

    def proxied(value: Any) -> Any:
        if isinstance(value, GraphModule):
            name = tracer.get_fresh_qualname("custom_gradient_")
            tracer.root.register_module(name, value)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(value) if isinstance(value, (Tensor, torch.SymInt)) else value

    node = tracer.create_proxy("call_function", CUSTOM, tuple(proxied(arg) for arg in args), tree_map(proxied, kwargs))
    return track_tensor_tree(results, node, constant=None, tracer=tracer)

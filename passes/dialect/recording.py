"""Put one node into the graph that is being traced, with results that are already known."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils._pytree import tree_map

# Composite operators that one Python function stands for. Running one takes as long as all the operators that it consists of.
WHOLE: Mapping[Any, Any] = {
    torch._C._nn.linear: torch.ops.aten.linear.default,
    torch.matmul: torch.ops.aten.matmul.default,
    operator.matmul: torch.ops.aten.matmul.default,
}

_RESHAPES = frozenset("unsqueeze_ squeeze_ transpose_ t_ swapaxes_ swapdims_ as_strided_ resize_ resize_as_ set_".split())


def differentiates(gm: GraphModule) -> bool:
    """Is there a function transform or a gradient inside the graph? Its values have to be computed from one another."""
    return any(
        node.op == "call_function"
        and (node.target is torch.autograd.grad or str(getattr(node.target, "__name__", "")).endswith("_increment_nesting"))
        for node in gm.graph.nodes
    )


def reshapes_in_place(gm: GraphModule) -> bool:
    """Does a tensor change its shape in place? What Dynamo keeps of it then shows it as it is at the end."""
    return any(
        node.op in ("call_function", "call_method")
        and str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")).split(".")[0] in _RESHAPES
        for node in gm.graph.nodes
    )


def record(target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], results: Any) -> Any:
    """Record ``target(*args, **kwargs)`` as one node that gives ``results``, without running it.

    Args:
        args, kwargs: tensors, graph modules and other values.
        results: fake tensors of the trace's own fake mode.

    Returns:
        ``results``, which stand for the node's.
    """
    mode = get_proxy_mode()
    assert mode is not None, "a retrace runs under a proxy mode"
    tracer: Any = mode.tracer

    def proxied(value: Any) -> Any:
        if isinstance(value, GraphModule):
            name = tracer.get_fresh_qualname("custom_gradient_")
            tracer.root.register_module(name, value)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(value) if isinstance(value, (Tensor, torch.SymInt)) else value

    operands = tuple(proxied(arg) for arg in args)
    name = target.overloadpacket.__name__ if isinstance(target, torch._ops.OpOverload) else None
    node = tracer.create_proxy("call_function", target, operands, tree_map(proxied, dict(kwargs)), name=name)
    return track_tensor_tree(results, node, constant=None, tracer=tracer)


def whole(target: Callable[..., Any], args: Sequence[Any], known: Any) -> Any:
    """Record a call of one of ``WHOLE`` with the result that Dynamo computed for it, not connected with what it came from.

    Args:
        known: a tensor like the result, of whatever fake mode.

    Returns:
        The result; None if the call has to be run: nothing is known of it, or its sizes are symbols, which the trace has to
        derive itself.
    """
    if not isinstance(known, Tensor) or known.layout is not torch.strided:
        return None
    if not all(isinstance(size, int) for size in (*known.shape, *known.stride())):
        return None
    with disable_proxy_modes_tracing():
        result = torch.empty_strided(known.shape, known.stride(), dtype=known.dtype, device=known.device)
    return record(target, args, {}, result)

"""Write the fused nn fast paths of an exported graph out, as a retrace does for a Dynamo graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from dilcompile.passes.dialect.fused_layers import EXPANSIONS
from dilcompile.passes.dialect.normalize import fake_mode_of

# Where a node stands in the model: what an expansion takes over from the call that it stands for.
_PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack", "from_node")


def expand_fused_layers(gm: GraphModule) -> list[str]:
    """Put what each call of ``EXPANSIONS`` computes in its place; ``gm`` is changed.

    Returns:
        A note on each call that stays, because it could not be traced.
    """
    notes = []
    for node in list(gm.graph.nodes):
        expansion = EXPANSIONS.get(node.target) if node.op == "call_function" else None
        if expansion is None:
            continue
        try:
            body = _traced(node, expansion, gm)
        except Exception as error:
            notes.append(f"{node.target} could not be written out, attention in it is not seen: {type(error).__name__}: {error}")
        else:
            _replace(node, _inlined(node, body))
    gm.recompile()
    return notes


def _traced(node: Node, expansion: Callable[..., Any], gm: GraphModule) -> GraphModule:
    """The expansion as a graph of the call's tensors."""
    inputs = node.all_input_nodes

    def run(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = _with(node.args, given), _with(node.kwargs, given)
        return expansion(*args, **kwargs)

    with fake_mode_of(gm):
        values = [source.meta["val"] for source in inputs]
        traced: GraphModule = make_fx(run, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
    return traced


def _with(value: Any, given: dict[Node, Any]) -> Any:
    return tree_map(lambda item: given[item] if isinstance(item, Node) else item, value)


def _inlined(node: Node, body: GraphModule) -> Any:
    """Copy the body in front of the call; its results, as nodes of the call's graph."""
    own: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    place = {key: node.meta[key] for key in _PLACE if key in node.meta}
    with node.graph.inserting_before(node):
        for part in body.graph.nodes:
            if part.op == "output":
                return tree_map(lambda item: own.get(item, item) if isinstance(item, Node) else item, part.args[0])
            if part.op != "placeholder":
                own[part] = node.graph.node_copy(part, lambda source: own[source])
                own[part].meta.update(place)
    raise AssertionError("a traced graph has an output")


def _replace(node: Node, results: Node | Sequence[Node | None]) -> None:
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            result = results[user.args[1]]  # type: ignore[index]
            if result is not None:
                user.replace_all_uses_with(result)
            assert not user.users
            node.graph.erase_node(user)
    node.graph.erase_node(node)

"""What the finder does not look into: graphs over tensor subclasses, and the graphs inside operators that it doesn't know.

Both run as the model has them. They are told of where they hold something like attention, so that nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dilcompile.passes.dialect.normalize import CHECKPOINT
from dilcompile.passes.graph.provenance import source_line

_LIKE_ATTENTION = ("softmax", "scaled_dot_product", "multi_head_attention", "flex_attention", "encoder_layer_fwd")


def like_attention(gm: GraphModule) -> int:
    """How many calls of the graph and of those inside it are a softmax or a ready-made attention."""
    parts = {part for part in gm.modules() if isinstance(part, GraphModule)}
    return sum(_is_like_attention(node) for part in parts for node in part.graph.nodes)


def _is_like_attention(node: Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return any(word in name for word in _LIKE_ATTENTION)


def subclasses(values: Mapping[Node, Any]) -> str:
    """The tensors that are of a subclass, the first of each, in words; empty if there are none.

    The operators of a subclass mean what it says that they mean, so that no rule of the finder holds for them.
    """
    first: dict[str, Node] = {}
    for node, value in values.items():
        if isinstance(value, Tensor) and is_traceable_wrapper_subclass(value):
            first.setdefault(type(value).__name__, node)
    return ", ".join(f"{node.name} is a {kind}" for kind, node in first.items())


def closed_bodies(parts: Iterable[GraphModule]) -> Iterator[str]:
    """One note for each operator whose own graph holds something like attention that nobody looked at."""
    for part in parts:
        for node in part.graph.nodes:
            if not isinstance(node.target, HigherOrderOperator) or node.target is CHECKPOINT:
                continue
            count = sum(like_attention(body) for body in _bodies(part, node))
            if count:
                calls = "1 softmax or attention call" if count == 1 else f"{count} softmax or attention calls"
                yield f"{node.target._name} ({source_line(node)}) runs as it is: {calls} in its own graph are not looked at"


def _bodies(part: GraphModule, node: Node) -> Iterator[GraphModule]:
    for argument in node.all_input_nodes:
        held = getattr(part, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(held, GraphModule):
            yield held

"""What a tensor is made of: weights, constants (positions and lengths among them), or data; and its value if that is known."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch.fx import Node

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.graph.operators import RANDOM, is_tensor, op_name
from dilcompile.passes.masks.reader import MaskReader

Origin = Literal["weight", "constant", "data"]

NO_VALUES: Mapping[Node, torch.Tensor] = MappingProxyType({})
_MOST_NODES = 400
_MOST_ELEMENTS = 4096
# Of the tensor that they take they read shape and dtype alone.
_SHAPE_ONLY = frozenset("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty".split())


def origins(node: Node, axes: Axes, reader: MaskReader) -> frozenset[Origin]:
    """Everything a tensor is made of. A count of tokens (an integer without dims) is a position, not data."""
    found: set[Origin] = set()
    for one in behind(node, reader):
        if one in reader.outside:
            continue  # an inner graph's input is what it stands for, which comes next
        if one in axes.weights:
            found.add("weight")
        elif one in reader.tables or one in reader.captured or one.op == "get_attr" or not is_tensor(one):
            found.add("constant")
        elif one.op == "placeholder":
            held = one.meta["val"]
            counts = held.dim() == 0 and not held.dtype.is_floating_point
            found.add("constant" if counts else "data")
        elif op_name(one) in RANDOM:
            found.add("data")
    if len(behind(node, reader)) >= _MOST_NODES:
        found.add("data")
    return frozenset(found)


def behind(node: Node, reader: MaskReader) -> list[Node]:
    """The tensor and all that its values are computed from, nearest first: writes to it, and what an inner graph's input is."""
    found = {node: None}
    queue = [node]
    while queue and len(found) < _MOST_NODES:
        one = queue.pop(0)
        sources = [reader.outside[one]] if one in reader.outside else _read_by(one, reader)
        for source in sources:
            if source not in found:
                found[source] = None
                queue.append(source)
    return list(found)


def _read_by(node: Node, reader: MaskReader) -> list[Node]:
    if not is_tensor(node):
        return []
    made_of = [] if op_name(node) in _SHAPE_ONLY else node.all_input_nodes
    return [*made_of, *reader.writers(node)]


def value_of(node: Node, reader: MaskReader, known: Mapping[Node, torch.Tensor] = NO_VALUES) -> torch.Tensor | None:
    """The values of a small tensor that is made of constants alone, and of what else is known; None if it isn't."""
    held = node.meta.get("val")
    if not isinstance(held, torch.Tensor) or not all(isinstance(size, int) for size in held.shape):
        return None
    if held.numel() > _MOST_ELEMENTS:
        return None
    found = _computed(node, reader, dict(known), [_MOST_NODES])
    return found if isinstance(found, torch.Tensor) else None


class _Unknown(Exception):
    pass


def _computed(node: Node, reader: MaskReader, memo: dict[Node, Any], fuel: list[int]) -> Any:
    try:
        with torch.no_grad():
            return _run(node, reader, memo, fuel)
    except (_Unknown, RuntimeError, TypeError):
        return None


def _run(node: Node, reader: MaskReader, memo: dict[Node, Any], fuel: list[int]) -> Any:
    if node in memo:
        return memo[node]
    fuel[0] -= 1
    held = reader.tables.get(node, reader.captured.get(node))
    if held is not None:
        memo[node] = held
    elif node in reader.outside:
        memo[node] = _run(reader.outside[node], reader, memo, fuel)
    elif node.op != "call_function" or op_name(node) in RANDOM or fuel[0] < 0 or reader.writers(node):
        raise _Unknown(node.name)
    else:
        inputs = {source: _run(source, reader, memo, fuel) for source in node.all_input_nodes}
        args = torch.fx.map_arg(node.args, inputs.__getitem__)
        kwargs = torch.fx.map_arg(node.kwargs, inputs.__getitem__)
        memo[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return memo[node]

"""Float masks that are data: whether they may hold numbers that swallow the scores, and what is left of them then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.graph.operators import CONVOLUTIONS, PRODUCTS, is_tensor, op_name
from dilcompile.passes.masks.hiding import swallows
from dilcompile.passes.masks.reader import MaskReader

# What comes out of them is made of weights and activations: numbers of ordinary size.
_MIXES = PRODUCTS | CONVOLUTIONS
# Only the first argument holds what comes out; the others say which of it.
_LOOKUPS = frozenset("embedding index index_select gather".split())
# The numbers that they name are the largest that come out, not what comes out.
_CLAMPS = frozenset("clamp clamp_min clamp_max".split())
# Minus infinity at 0.
_LOGARITHMS = frozenset("log log2 log10".split())
_MOST_NODES = 200
# No position, distance or slope is so large.
_GIANT = 1e8

_NOT_NEGATIVE = frozenset("abs relu square arange sqrt".split())
# Zero for no ordinary number.
_POSITIVE = frozenset("exp exp2 sigmoid softplus".split())
_SAME = frozenset("to _to_copy float type_as contiguous clone view reshape expand unsqueeze squeeze transpose permute".split())


def may_drown(node: Node, dtype: torch.dtype, axes: Axes, reader: MaskReader, *, inputs: bool = True) -> bool:
    """May a bias hold fills?

    It may if it is made of a float input of the model, of a number that swallows such scores, or of a logarithm of what may be 0.

    Args:
        inputs: float inputs may hold fills; what is learned doesn't.
    """
    least = min(_GIANT, -swallows(dtype))
    # Beside each node: is it made into a float mask by nothing but floats? Integers hold no infinity.
    queue, seen = [(node, True)], {(node, True)}
    while queue:
        one, floats = queue.pop()
        one = reader.outside.get(one, one)
        if not is_tensor(one) or one in axes.parametric or (one.op == "call_function" and op_name(one) in _MIXES):
            continue
        held = one.meta["val"].dtype
        if held is torch.bool:
            continue
        floats = floats and held.is_floating_point
        known = _known(one, reader)
        if known is not None and _has_fills(known, least):
            return True
        if one.op == "placeholder" and known is None and held.is_floating_point:
            if inputs:
                return True
            continue
        if _fills(one, reader, least) or (floats and _may_be_log_of_zero(one, reader)) or len(seen) > _MOST_NODES:
            return True
        fresh = [(source, floats) for source in _sources(one, reader) if (source, floats) not in seen]
        seen.update(fresh)
        queue += fresh
    return False


def _known(node: Node, reader: MaskReader) -> torch.Tensor | None:
    """The values of a buffer, which is watched from now on, or of a constant of the model's code."""
    if node in reader.tables:
        if node.meta["val"].dtype.is_floating_point:
            reader.used_tables.add(node)
        return reader.tables[node]
    return _constant(node) if node.op == "get_attr" else None


def _constant(node: Node) -> torch.Tensor | None:
    held: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part, None)
    return held if isinstance(held, torch.Tensor) else None


def _has_fills(values: torch.Tensor, least: float) -> bool:
    return values.dtype.is_floating_point and not bool((values.detach().abs() < least).all())


def _sources(node: Node, reader: MaskReader) -> Iterator[Node]:
    """What the numbers of a tensor are made of, those written to it later among them."""
    if op_name(node) in _LOOKUPS and isinstance(node.args[0], Node):
        yield node.args[0]
    else:
        yield from node.all_input_nodes
    yield from reader.writers(node)


def _fills(node: Node, reader: MaskReader, least: float) -> bool:
    """Does an operator bring in a number that swallows scores?"""
    if node.op != "call_function" or op_name(node) in _CLAMPS:
        return False
    numbers = [reader.constant(arg, node) for arg in tree_leaves(_values(node)) if _is_number(arg) or is_tensor(arg)]
    return any(number is not None and not abs(number) < least for number in numbers)


def _values(node: Node) -> list[Any]:
    """The arguments of an operator, without places, sizes and dims: a slice may end at the largest integer."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [node.args, node.kwargs]
    types = {argument.name: str(argument.type) for argument in schema.arguments}
    given = {**dict(zip(types, node.args, strict=False)), **node.kwargs}
    return [value for name, value in given.items() if "int" not in types[name]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _may_be_log_of_zero(node: Node, reader: MaskReader) -> bool:
    if op_name(node) not in _LOGARITHMS:
        return False
    least = _least(node.args[0], node, reader)
    return least is None or least <= 0


def _least(value: Any, at: Node, reader: MaskReader) -> float | None:
    """A number that a value is not below, where its own operators tell."""
    number = reader.constant(value, at)
    if number is not None or not isinstance(value, Node) or value.op != "call_function":
        return number
    name = op_name(value)
    if name in _CLAMPS:
        given = value.kwargs.get("min", value.args[1] if len(value.args) > 1 and name != "clamp_max" else None)
        return reader.constant(given, value)
    if name in _POSITIVE:
        return torch.finfo(torch.float32).tiny
    if name in _NOT_NEGATIVE:
        return 0.0
    if name in _SAME:
        return _least(value.args[0], value, reader)
    if name not in ("add", "mul") or value.kwargs.get("alpha", 1) != 1:
        return None
    first, second = (_least(arg, value, reader) for arg in value.args[:2])
    if first is None or second is None:
        return None
    if name == "add":
        return first + second
    return first * second if first >= 0 and second >= 0 else None

"""Float masks that are data: whether they may hold numbers that swallow the scores, and what is left of them then."""

from __future__ import annotations

import torch
from torch.fx import Node

from dilcompile.passes.axes import Axes
from dilcompile.passes.masks.hiding import swallows
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.operators import is_tensor, op_name

# What comes out of them is made of weights and activations: numbers of ordinary size.
_PRODUCTS = frozenset("matmul bmm mm addmm baddbmm linear conv1d conv2d einsum embedding".split())
_MOST_NODES = 200
# No position, distance or slope is so large.
_GIANT = 1e8


def may_drown(node: Node, dtype: torch.dtype, axes: Axes, reader: MaskReader, *, inputs: bool = True) -> bool:
    """May a bias hold fills? It may if it is made of a float input of the model, or of a number that swallows such scores.

    Args:
        inputs: float inputs may hold fills; what is learned doesn't.
    """
    least = min(_GIANT, -swallows(dtype))
    queue, seen = [node], {node}
    while queue:
        one = queue.pop()
        one = reader.outside.get(one, one)
        if not is_tensor(one) or one in axes.parametric or (one.op == "call_function" and op_name(one) in _PRODUCTS):
            continue
        if one.op == "placeholder" and one not in reader.tables and one.meta["val"].dtype.is_floating_point:
            if inputs:
                return True
            continue
        if _fills(one, reader, least) or len(seen) > _MOST_NODES:
            return True
        fresh = [source for source in one.all_input_nodes if source not in seen]
        seen.update(fresh)
        queue += fresh
    return False


def _fills(node: Node, reader: MaskReader, least: float) -> bool:
    if op_name(node) not in ("masked_fill", "where", "full", "full_like", "new_full", "mul"):
        return False
    numbers = [reader.constant(arg, node) for arg in node.args]
    return any(number is not None and abs(number) >= least for number in numbers)

"""Operators that act along dims which an argument names, what an index does to dims, and arguments by their name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from dilcompile.passes.graph.operators import is_tensor, op_name, shape_of
from dilcompile.passes.graph.sizes import same_size

# Operators that act along the dims which an argument names; without it along all.
REDUCES = dict.fromkeys(
    "sum mean amax amin max min any all logsumexp prod var std var_mean std_mean norm linalg_vector_norm nansum nanmean median "
    "argmax argmin count_nonzero aminmax".split(),
    "dim",
)
ALONG = {
    **REDUCES,
    **dict.fromkeys(
        "softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort topk "
        "kthvalue mode diff glu unbind split split_with_sizes chunk tensor_split select narrow slice index_select scatter "
        "scatter_add cat concat".split(),
        "dim",
    ),
    **dict.fromkeys(("flip", "roll"), "dims"),
    "unfold": "dimension",
}


def argument(node: Node, name: str) -> Any:
    """An argument by its name in the operator's schema; None if it has no such one."""
    for i, each in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if each.name == name:
            default = each.default_value if each.has_default_value() else None
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, default)
    return None


def dims_along(node: Node, shape: Sequence[Any]) -> frozenset[int]:
    """The dims of an operand of this shape that an operator acts along."""
    rank, asked = len(shape), argument(node, ALONG[op_name(node)])
    if asked is None or asked == []:
        return frozenset(range(rank))
    return frozenset(int(dim) % rank for dim in (asked if isinstance(asked, (list, tuple)) else [asked])) if rank else frozenset()


def indexed_dims(node: Node, tensor: Node, indices: Sequence[object]) -> Iterator[tuple[Node, int, int]]:
    """Of ``tensor[indices]``: (an operand, a dim of it, the dim of the result that it becomes)."""
    given = [i for i, index in enumerate(indices) if is_tensor(index)]
    held = [index for index in indices if is_tensor(index)]
    if not given or any(index.meta["val"].dtype is torch.bool for index in held):  # type: ignore[attr-defined]
        return
    rank = max(len(shape_of(index)) for index in held)  # type: ignore[arg-type]
    together = given == list(range(given[0], given[-1] + 1))
    first = given[0] if together else 0
    for index in held:
        for back, size in enumerate(reversed(shape_of(index)), 1):  # type: ignore[arg-type]
            if not same_size(size, 1):
                yield index, len(shape_of(index)) - back, first + rank - back  # type: ignore[arg-type, misc]
    rest = [dim for dim in range(len(shape_of(tensor))) if dim not in given]
    places = [dim for dim in range(len(shape_of(node))) if not first <= dim < first + rank]
    for dim, out in zip(rest, places, strict=True):
        yield tensor, dim, out

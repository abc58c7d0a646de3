"""What a graph node is: its operator's name, its shape, and the kinds of operators that the passes tell apart."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from dilcompile.site import Length


def op_name(node: Node) -> str:
    """``aten::masked_fill_.Scalar`` -> ``masked_fill``: in-place and functional spellings are one operator."""
    return full_name(node).rpartition("::")[2]


def full_name(node: Node) -> str:
    """The operator with its namespace: ``aten::masked_fill``; ``higher_order::flex_attention``; a plain name for Python's."""
    return _name_of(node.target)


@lru_cache(maxsize=4096)
def _name_of(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    if schema is None:
        name = getattr(target, "__name__", str(target))
        return f"higher_order::{name}" if isinstance(target, torch._ops.HigherOrderOperator) else name
    name = str(schema.name)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def shape_of(node: Node) -> tuple[Length, ...]:
    return tuple(node.meta["val"].shape)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def held_number(value: Any) -> float | None:
    """A number, or the one that a node holds; None if only the run knows it.

    Dynamo passes the model's own numbers as nodes under ``dynamic=True``. A graph in which one was read is guarded for it alone.
    """
    held = value.meta.get("val") if isinstance(value, Node) else value
    if held is None or isinstance(held, torch.Tensor) or has_free_unbacked_symbols(held):
        return None
    return float(held)


def is_float(node: Node) -> bool:
    """Does it hold floats, alone or among others?"""
    return bool(_floats(node))


def is_narrow(node: Node) -> bool:
    """Does it hold floats of fewer digits than float64?"""
    return any(dtype is not torch.float64 for dtype in _floats(node))


def _floats(node: Node) -> set[torch.dtype]:
    held = [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor)]
    return {value.dtype for value in held if value.dtype.is_floating_point}


def narrows(before: Node, after: Node) -> bool:
    """Does ``after`` have a dtype that can't hold every value of the other's?"""
    old, new = before.meta["val"].dtype, after.meta["val"].dtype
    return bool(torch.promote_types(old, new) != new)


def tensor_args(node: Node) -> list[Node]:
    return [arg for arg in node.all_input_nodes if is_tensor(arg)]


def indexed(node: Node) -> tuple[Node, list[Any]] | None:
    """``tensor[indices]`` as the tensor and the indices; None if the node is something else.

    Where FlexAttention's own index operator is recorded as it is (while a program is exported), it is one, too.
    """
    args: tuple[Any, ...] = node.args
    if op_name(node) == "index":
        return args[0], list(args[1])
    if op_name(node) == "flat_apply" and len(args) > 3 and str(args[2]).endswith(".ModIndex"):
        return args[3], list(args[4:])
    return None


def is_pointwise(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # where's overloads with numbers lack the tag.
    return torch.Tag.pointwise in node.target.tags or op_name(node) == "where"


# What ``products`` reads under names of their own.
PRODUCTS = frozenset("matmul bmm mm mv baddbmm addbmm addmm addmv einsum tensordot inner linalg_vecdot linear".split())
CONVOLUTIONS = frozenset("conv1d conv2d conv3d convolution".split())
KEEPS_LAYOUT = frozenset(
    "to _to_copy contiguous clone alias detach dropout native_dropout lift_fresh lift_fresh_copy softmax _softmax "
    "_safe_softmax log_softmax _log_softmax layer_norm native_layer_norm rms_norm _fused_rms_norm triu tril copy "
    "masked_fill cumsum normalize float type_as alpha_dropout feature_dropout nan_to_num clamp hardtanh gelu "
    "silu relu".split()
)
VIEWS = frozenset("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias".split())
CASTS = frozenset("to _to_copy contiguous clone alias lift_fresh lift_fresh_copy type_as float".split())
# Every element stays, only its place changes.
REORDERS = VIEWS | frozenset("transpose permute t mT swapaxes swapdims movedim moveaxis unsqueeze squeeze".split())
RANDOM = frozenset(("dropout", "native_dropout", "bernoulli", "rand_like", "randn_like"))
# Operators that only move, copy or cast elements: their result varies along an axis just as their input does.
MOVES_ONLY = VIEWS | frozenset(
    "to _to_copy contiguous clone alias detach lift_fresh transpose swapaxes swapdims permute t mT adjoint numpy_T "
    "movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to repeat repeat_interleave select slice narrow "
    "type_as float".split()
)

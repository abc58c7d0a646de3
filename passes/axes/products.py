"""Batched products of two tensors, whatever they are called: which dims are shared, free and contracted."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from dilcompile.passes.graph.operators import held_number, is_float, op_name, shape_of
from dilcompile.passes.graph.sizes import same_size

_EXPANDS = frozenset("expand expand_as broadcast_to".split())


@dataclass(frozen=True)
class Product:
    """``out = alpha * lhs x rhs + beta * addend``, dims by number.

    Args:
        batch: (dim of lhs or None, dim of rhs or None, dim of out) multiplied elementwise.
        lhs_free, rhs_free: (dim, dim of out) that only one side has.
        contracted: (dim of lhs, dim of rhs) that are summed over.
        addend: a tensor added to the product (``baddbmm``, ``linear``), or None.
        inner: the nodes between the operands and ``node``, where several compute the product; each has one user. The first one
            multiplies.
        computed: alpha or beta is a number that only the run knows; what stands for them says nothing.
    """

    node: Node
    lhs: Node
    rhs: Node
    batch: tuple[tuple[int | None, int | None, int], ...]
    lhs_free: tuple[tuple[int, int], ...]
    rhs_free: tuple[tuple[int, int], ...]
    contracted: tuple[tuple[int, int], ...]
    alpha: float = 1.0
    beta: float = 1.0
    addend: Node | None = None
    inner: tuple[Node, ...] = ()
    computed: bool = False

    @property
    def reader(self) -> Node:
        """The node that reads what the operands hold."""
        return self.inner[0] if self.inner else self.node


def parse_product(node: Node) -> Product | None:
    """The product that ``node`` computes, or None if it is something else."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return None
    name = str(node.target._schema.name).split("::")[-1]
    if name in ("matmul", "bmm", "mm", "mv"):
        return _matmul(node, node.args[0], node.args[1])
    if name in ("baddbmm", "addmm", "addmv"):
        plain = _matmul(node, node.args[1], node.args[2])
        return None if plain is None else _with_addend(plain, node)
    if name == "addbmm":
        lhs, rhs = node.args[1:3]
        plain = Product(node, lhs, rhs, (), ((1, 0),), ((2, 1),), ((2, 1), (0, 0)))  # type: ignore[arg-type]
        return _with_addend(plain, node)
    if name == "tensordot":
        return _tensordot(node)
    if name == "inner":
        return _inner(node, *node.args[:2])
    if name == "linalg_vecdot":
        return _vecdot(node)
    if name in ("sum", "mean"):
        return _multiplied_and_summed(node)
    if name == "linear":
        return _linear(node)
    if name == "einsum":
        return _einsum(node)
    return None


def _rank(value: Any) -> int | None:
    held = value.meta.get("val") if isinstance(value, Node) else None
    return held.dim() if isinstance(held, torch.Tensor) else None


def _matmul(node: Node, lhs: Any, rhs: Any) -> Product | None:
    left, right = _rank(lhs), _rank(rhs)
    if not left or not right or left == right == 1:
        return None
    if right == 1:
        return Product(node, lhs, rhs, (), tuple((dim, dim) for dim in range(left - 1)), (), ((left - 1, 0),))
    if left == 1:
        kept = [dim for dim in range(right) if dim != right - 2]
        return Product(node, lhs, rhs, (), (), tuple((dim, out) for out, dim in enumerate(kept)), ((0, right - 2),))
    rank = max(left, right)
    batch = [
        (left - back if back <= left else None, right - back if back <= right else None, rank - back)
        for back in range(3, rank + 1)
    ]
    return Product(
        node,
        lhs,
        rhs,
        batch=tuple(reversed(batch)),
        lhs_free=((left - 2, rank - 2),),
        rhs_free=((right - 1, rank - 1),),
        contracted=((left - 1, right - 2),),
    )


def _inner(node: Node, lhs: Any, rhs: Any) -> Product | None:
    """Over the last dims of both."""
    left, right = _rank(lhs), _rank(rhs)
    if not left or not right:
        return None
    return Product(
        node,
        lhs,
        rhs,
        batch=(),
        lhs_free=tuple((dim, dim) for dim in range(left - 1)),
        rhs_free=tuple((dim, left - 1 + dim) for dim in range(right - 1)),
        contracted=((left - 1, right - 1),),
    )


def _linear(node: Node) -> Product | None:
    """``lhs x rhs^T + addend``: with computed "weights" of two dims it is a product like any other."""
    product = _inner(node, *node.args[:2]) if _rank(node.args[1]) == 2 else None
    addend = node.args[2] if len(node.args) > 2 and isinstance(node.args[2], Node) else None
    return None if product is None else replace(product, addend=addend)


def _tensordot(node: Node) -> Product | None:
    lhs, rhs, ours, theirs = node.args[:4]
    left, right = _rank(lhs), _rank(rhs)
    if not left or not right:
        return None
    pairs = tuple((int(a) % left, int(b) % right) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]
    own = [dim for dim in range(left) if all(dim != gone for gone, _ in pairs)]
    others = [dim for dim in range(right) if all(dim != gone for _, gone in pairs)]
    return Product(
        node,
        lhs,  # type: ignore[arg-type]
        rhs,  # type: ignore[arg-type]
        batch=(),
        lhs_free=tuple((dim, out) for out, dim in enumerate(own)),
        rhs_free=tuple((dim, len(own) + out) for out, dim in enumerate(others)),
        contracted=pairs,
    )


def _with_addend(product: Product, node: Node) -> Product:
    alpha, beta = (held_number(node.kwargs.get(name, 1)) for name in ("alpha", "beta"))
    addend = node.args[0]
    assert isinstance(addend, Node)
    if alpha is None or beta is None:
        return replace(product, addend=addend, computed=True)
    # With beta = 0 the addend is not read at all, not even its NaNs.
    return replace(product, alpha=alpha, beta=beta, addend=addend if beta != 0 else None)


def _vecdot(node: Node) -> Product | None:
    lhs, rhs = node.args[:2]
    left, right = _rank(lhs), _rank(rhs)
    if not left or not right or not is_float(node):
        return None
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
    rank = max(left, right)
    return _broadcast(Product(node, lhs, rhs, (), (), (), ()), rank, {dim % rank})  # type: ignore[arg-type]


def _multiplied_and_summed(node: Node) -> Product | None:
    """``(a * b).sum(dims)`` or their mean."""
    summed = node.args[1] if len(node.args) > 1 else None
    factors = _factors(node.args[0], node)
    if factors is None or not isinstance(summed, (int, list, tuple)):
        return None
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    rank = len(shape)
    over = {int(dim) % rank for dim in ([summed] if isinstance(summed, int) else summed)}
    if op_name(node) == "mean":
        sizes = [size for dim in over if isinstance(size := shape[dim], int)]
        if len(sizes) < len(over):
            return None
        factors = replace(factors, alpha=factors.alpha / math.prod(sizes))
    return _broadcast(factors, rank, over, bool(len(node.args) > 2 and node.args[2]))


def _broadcast(factors: Product, rank: int, over: set[int], keeps: bool = False) -> Product | None:
    """Two tensors broadcast along different dims, multiplied and summed over dims that both have.

    Args:
        factors: a product whose dims are not known yet.
        rank: of the tensor that is summed.
        keeps: the dims that are summed over stay, of size 1.
    """
    batch, lhs_free, rhs_free, contracted = [], [], [], []
    for dim in range(rank):
        left, right = (_varying(operand, dim, rank) for operand in (factors.lhs, factors.rhs))
        out = dim if keeps else dim - sum(other < dim for other in over)
        if dim in over:
            contracted.append((left, right))
        elif left is not None and right is None:
            lhs_free.append((left, out))
        elif right is not None and left is None:
            rhs_free.append((right, out))
        else:
            batch.append((left, right, out))
    pairs = tuple((left, right) for left, right in contracted if left is not None and right is not None)
    if not pairs or len(pairs) < len(contracted) or not (lhs_free or rhs_free):
        return None
    return replace(factors, batch=tuple(batch), lhs_free=tuple(lhs_free), rhs_free=tuple(rhs_free), contracted=pairs)


def _factors(value: Any, node: Node) -> Product | None:
    """What ``node`` alone reads as ``alpha * lhs * rhs``; the dims are not known yet."""
    alpha, inner, reader = 1.0, list[Node](), node
    while isinstance(value, Node) and op_name(value) == "mul" and list(value.users) == [reader] and is_float(value):
        first, second = value.args
        inner.insert(0, value)
        if isinstance(second, (int, float)):
            alpha, value, reader = alpha * second, first, value
            continue
        if not (isinstance(first, Node) and isinstance(second, Node) and _rank(first) and _rank(second)):
            return None
        (lhs, before), (rhs, beside) = _unexpanded(first), _unexpanded(second)
        return Product(node, lhs, rhs, (), (), (), (), alpha, inner=(*inner, *before, *beside))
    return None


def _unexpanded(factor: Node) -> tuple[Node, tuple[Node, ...]]:
    """What is broadcast to ``factor``, and the nodes that do so and are used for nothing else."""
    if op_name(factor) in _EXPANDS and isinstance(factor.args[0], Node) and len(factor.users) == 1:
        return factor.args[0], (factor,)
    return factor, ()


def _varying(operand: Node, dim: int, rank: int) -> int | None:
    """The operand's own dim at a dim of what it is broadcast to; None where it has none or one of size 1."""
    own = dim - rank + len(shape_of(operand))
    return None if own < 0 or same_size(shape_of(operand)[own], 1) else own


def _einsum(node: Node) -> Product | None:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    lhs, rhs = operands
    left, right = _rank(lhs), _rank(rhs)
    letters = None if left is None or right is None else _letters(equation, left, right)
    if letters is None:
        return None
    first, second, out = letters
    if any(len(set(term)) != len(term) for term in letters):
        return None
    alone = [c for c in first if c not in second and c not in out] + [c for c in second if c not in first + out]
    if alone:
        return None
    return Product(
        node,
        lhs,  # type: ignore[arg-type]
        rhs,  # type: ignore[arg-type]
        batch=tuple((first.index(c), second.index(c), i) for i, c in enumerate(out) if c in first and c in second),
        lhs_free=tuple((first.index(c), i) for i, c in enumerate(out) if c not in second),
        rhs_free=tuple((second.index(c), i) for i, c in enumerate(out) if c not in first),
        contracted=tuple((i, second.index(c)) for i, c in enumerate(first) if c in second and c not in out),
    )


def _letters(equation: str, left: int, right: int) -> tuple[str, str, str] | None:
    """The equation's three terms with the ellipsis written out as capital Greek letters."""
    text = equation.replace(" ", "")
    inputs, arrow, out = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    spans = [rank - len(term.replace("...", "")) for rank, term in zip((left, right), terms, strict=True)]
    names = "ΑΒΓΔΕΖΗΘ"
    widest = max((span for span, term in zip(spans, terms, strict=True) if "..." in term), default=0)
    if not arrow:
        seen = [c for c in inputs if c.isalpha()]
        out = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(seen) if seen.count(c) == 1))
    first, second = (
        term.replace("...", names[widest - span : widest] if "..." in term else "")
        for term, span in zip(terms, spans, strict=True)
    )
    return first, second, out.replace("...", names[:widest])

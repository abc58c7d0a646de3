"""Batched products of two tensors, whatever they are called: which dims are shared, free and contracted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node


@dataclass(frozen=True)
class Product:
    """``out = alpha * lhs x rhs + beta * addend``, dims by number.

    Args:
        batch: (dim of lhs or None, dim of rhs or None, dim of out) multiplied elementwise.
        lhs_free, rhs_free: (dim, dim of out) that only one side has.
        contracted: (dim of lhs, dim of rhs) that are summed over.
        addend: a tensor added to the product (``baddbmm``, ``linear``), or None.
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


def parse_product(node: Node) -> Product | None:
    """The product that ``node`` computes, or None if it is something else."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return None
    name = str(node.target._schema.name).split("::")[-1]
    if name in ("matmul", "bmm", "mm"):
        return _matmul(node, node.args[0], node.args[1])
    if name == "baddbmm":
        plain = _matmul(node, node.args[1], node.args[2])
        return None if plain is None else _with_addend(plain, node)
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
    if left is None or right is None or left < 2 or right < 2:
        return None
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


def _linear(node: Node) -> Product | None:
    """``lhs x rhs^T + addend``: with computed "weights" of two dims it is a product like any other."""
    lhs, rhs = node.args[:2]
    left, right = _rank(lhs), _rank(rhs)
    if left is None or right != 2 or left < 1:
        return None
    return Product(
        node,
        lhs,  # type: ignore[arg-type]
        rhs,  # type: ignore[arg-type]
        batch=(),
        lhs_free=tuple((dim, dim) for dim in range(left - 1)),
        rhs_free=((0, left - 1),),
        contracted=((left - 1, 1),),
        addend=node.args[2] if len(node.args) > 2 and isinstance(node.args[2], Node) else None,
    )


def _with_addend(product: Product, node: Node) -> Product | None:
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    addend = node.args[0]
    if not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    assert isinstance(addend, Node)
    return Product(
        product.node,
        product.lhs,
        product.rhs,
        product.batch,
        product.lhs_free,
        product.rhs_free,
        product.contracted,
        alpha=float(alpha),
        beta=float(beta),
        # With beta = 0 the addend is not read at all, not even its NaNs.
        addend=addend if beta != 0 else None,
    )


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

"""The rows of a gradient, handed on by what is linear, up to where numbers of many rows become those of few.

The counterpart of ``rows_of``: there rows are asked for and pulled back to what they are made of, here they are there and go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from dilcompile.passes.axes.along import argument, dims_along
from dilcompile.passes.axes.products import parse_product
from dilcompile.passes.graph.operators import VIEWS, is_tensor, op_name, shape_of
from dilcompile.passes.memory.rows import Rows, run_in, sized, source_dim, triangle_of_rows
from dilcompile.passes.memory.rows_of import COPIES, RowsOf, broadcast, named, reshaped

aten = torch.ops.aten


@dataclass(frozen=True)
class Ended:
    """The numbers of the rows are added: each chunk has a share of all of the result."""


ENDED = Ended()
# Where rows of an operand are in the result, or a reason.
Lands = Callable[[Node, Node, Rows], "Rows | Ended | str"]
# The result for rows of the operand, or a reason.
Takes = Callable[[RowsOf, Node, Node, Node, Rows], "Node | str"]


class Linear(NamedTuple):
    """What an operator does to rows of an operand in which it is linear.

    Args:
        lands: asked with the call, the operand, and the rows.
        takes: asked with where nodes go, the call, the operand, what holds its rows, and the rows.
    """

    lands: Lands
    takes: Takes


def linear(node: Node) -> Linear | None:
    """What is known of a call; None: nothing."""
    if parse_product(node) is not None and op_name(node) not in ("sum", "mean"):
        return Linear(_where_product, _take_product)
    return _LINEAR.get(op_name(node))


def is_sum_of_both(node: Node) -> bool:
    """Does the call add two gradients?"""
    return bool(op_name(node) == "add" and len(node.args) > 1 and is_tensor(node.args[1]) and argument(node, "alpha") == 1)


def _through(node: Node) -> str:
    return f"a gradient of the bias goes through {named(node)}"


def _where_alike(node: Node, operand: Node, rows: Rows) -> Rows | str:
    return rows if shape_of(node) == shape_of(operand) else f"{_through(node)}, which widens it"


def _where_factor(node: Node, operand: Node, rows: Rows) -> Rows | str:
    # Of a quotient the dividend, of a derivative what it is multiplied with: what stands first.
    first = op_name(node) == "mul" or (node.args[0] is operand and list(node.args).count(operand) == 1)
    return _where_alike(node, operand, rows) if first and list(node.args).count(operand) == 1 else _through(node)


def _where_chosen(node: Node, operand: Node, rows: Rows) -> Rows | str:
    rest = node.args[2:] if op_name(node) == "masked_fill" else [arg for arg in node.args[1:] if arg is not operand]
    read = node.args[0] is operand if op_name(node) == "masked_fill" else node.args[0] is not operand
    return _where_alike(node, operand, rows) if read and len(rest) == 1 and is_zero(rest[0]) else _through(node)


def is_zero(value: Any) -> bool:
    """Is it 0, or a tensor of nothing else?"""
    if isinstance(value, Node) and op_name(value) in ("expand", "clone", "_to_copy", "convert_element_type"):
        return is_zero(value.args[0])
    if isinstance(value, Node) and value.op == "call_function":
        filled = argument(value, "fill_value") if op_name(value) in ("full", "full_like", "new_full") else None
        filled = argument(value, "s") if op_name(value) == "scalar_tensor" else filled
        return op_name(value) in ("zeros", "zeros_like", "new_zeros") or (filled is not None and filled == 0)
    return not isinstance(value, Node) and value == 0


def _take_alike(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    args = list(node.args)
    for number, arg in enumerate(args):
        if not is_tensor(arg):
            continue
        made = held if arg is operand else broadcast(over, arg, rows, len(shape_of(node)))  # type: ignore[arg-type]
        if isinstance(made, str):
            return made
        args[number] = made
    return over.like(node, args)


def _where_viewed(node: Node, operand: Node, rows: Rows) -> Rows | str:
    return run_in(operand, node, rows) or f"{_through(node)}, which cuts or joins the rows"


def _take_viewed(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    after = run_in(operand, node, rows)
    return f"{named(node)} cuts the rows" if after is None else reshaped(over.grow, held, sized(node, after), node)


def _where_moved(node: Node, operand: Node, rows: Rows) -> Rows | str:
    dims = [dim for dim in range(len(shape_of(node))) if source_dim(node, dim) == rows.dim]
    return Rows(dims[0], rows.start, rows.stop) if dims else _through(node)


def _take_moved(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    return over.like(node, (held, *node.args[1:]))


def _take_squeezed(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    # A chunk of one row has another dim to squeeze.
    after = _where_moved(node, operand, rows)
    return after if isinstance(after, str) else reshaped(over.grow, held, sized(node, after), node)


def _where_summed(node: Node, operand: Node, rows: Rows) -> Rows | Ended | str:
    return ENDED if rows.dim in dims_along(node, shape_of(operand)) else _where_moved(node, operand, rows)


def _where_uncut(node: Node, operand: Node, rows: Rows) -> Rows | str:
    if int(argument(node, "dim")) % len(shape_of(node)) != rows.dim:
        return rows
    first = argument(node, "start")
    if argument(node, "step") != 1 or first < 0:
        return _through(node)
    return Rows(rows.dim, first + rows.start, first + rows.stop)


def _take_uncut(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    if int(argument(node, "dim")) % len(shape_of(node)) == rows.dim:
        return held
    return over.like(node, (held, sized(node, rows), *node.args[2:]))


def _take_expanded(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    after = _where_moved(node, operand, rows)
    return after if isinstance(after, str) else over.like(node, (held, sized(node, after)))


def _where_selected(node: Node, operand: Node, rows: Rows) -> Rows | str:
    dim = int(argument(node, "dim")) % len(shape_of(node))
    return Rows(rows.dim + (rows.dim >= dim), rows.start, rows.stop)


def _take_selected(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    after = _where_selected(node, operand, rows)
    return after if isinstance(after, str) else over.like(node, (held, sized(node, after), *node.args[2:]))


def _where_beside(node: Node, operand: Node, rows: Rows) -> Rows | str:
    return _through(node) if int(argument(node, "dim")) % len(shape_of(node)) == rows.dim else rows


def _where_padded(node: Node, operand: Node, rows: Rows) -> Rows | str:
    first, last = _widths(node, rows.dim)
    if not is_zero(argument(node, "value")) or first < 0 or last < 0:
        return _through(node)
    return Rows(rows.dim, first + rows.start, first + rows.stop)


def _widths(node: Node, dim: int) -> tuple[int, int]:
    """How many places are put before and behind those of a dim."""
    widths = argument(node, "pad")
    place = 2 * (len(shape_of(node)) - 1 - dim)
    return (widths[place], widths[place + 1]) if place < len(widths) else (0, 0)


def _take_padded(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    widths, place = list(argument(node, "pad")), 2 * (len(shape_of(node)) - 1 - rows.dim)
    widths[place : place + 2] = [0] * len(widths[place : place + 2])
    return over.like(node, (held, widths, *node.args[2:]))


def _take_triangle(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    return over.like(node, (held, triangle_of_rows(node, rows)))


def _where_embedded(node: Node, operand: Node, rows: Rows) -> Ended | str:
    numbers = node.args[1]
    assert isinstance(numbers, Node)
    plain = node.args[0] is operand and not argument(node, "scale_grad_by_freq") and rows.dim < len(shape_of(numbers))
    return ENDED if plain else _through(node)


def _take_embedded(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    made = over.of(node.args[1], rows)  # type: ignore[arg-type]
    return made if isinstance(made, str) else over.like(node, (held, made, *node.args[2:]))


def _where_put(node: Node, operand: Node, rows: Rows) -> Ended | str:
    into, indices, values = (argument(node, name) for name in ("self", "indices", "values"))
    given = [index is not None for index in indices]
    rank = max((len(shape_of(index)) for index in indices if index is not None), default=0)
    adds = op_name(node) == "_unsafe_masked_index_put_accumulate" or argument(node, "accumulate") is True
    leading = given == sorted(given, reverse=True)
    plain = values is operand and is_zero(into) and adds and leading and rows.dim < rank
    return ENDED if plain else _through(node)


def _take_put(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    indices = argument(node, "indices")
    rank = max(len(shape_of(index)) for index in indices if index is not None)
    taken = [index if index is None else broadcast(over, index, rows, rank) for index in indices]
    args = list(node.args)
    for number, each in enumerate(node.target._schema.arguments[: len(args)]):  # type: ignore[union-attr]
        if each.name == "mask":
            args[number] = broadcast(over, args[number], rows, len(shape_of(operand)))  # type: ignore[arg-type]
        elif each.name == "self":
            args[number] = zeros(over, args[number], None)  # type: ignore[arg-type]
        elif each.name in ("indices", "values"):
            args[number] = taken if each.name == "indices" else held
    whys = [made for made in (*taken, *args) if isinstance(made, str)]
    return whys[0] if whys else over.like(node, args)


def _where_scattered(node: Node, operand: Node, rows: Rows) -> Rows | Ended | str:
    into, dim = argument(node, "self"), argument(node, "dim")
    values = argument(node, "src") if op_name(node) == "scatter_add" else argument(node, "source")
    if values is not operand or not is_zero(into) or argument(node, "alpha") not in (None, 1):
        return _through(node)
    return ENDED if int(dim) % len(shape_of(node)) == rows.dim else rows


def _take_scattered(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    into, dim, numbers = node.args[:3]
    assert isinstance(into, Node)
    assert isinstance(numbers, Node)
    along = int(dim) % len(shape_of(node)) == rows.dim  # type: ignore[arg-type]
    made = zeros(over, into, None if along else rows)
    if op_name(node) == "scatter_add":
        taken = over.of(numbers, rows)
    else:
        taken = over.of(numbers, Rows(0, rows.start, rows.stop)) if along else numbers
    return taken if isinstance(taken, str) else over.like(node, (made, dim, taken, held, *node.args[4:]))


def zeros(over: RowsOf, like: Node, rows: Rows | None) -> Node:
    """Zeros as ``like`` has them, or as many rows of it; without what that was made after."""
    value = like.meta["val"]
    sizes = list(map(int, shape_of(like))) if rows is None else sized(like, rows)
    said = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    return over.grow.call(aten.full.default, (sizes, 0), said, like)


def _sides(node: Node, operand: Node) -> tuple[Node, int, dict[int, int], dict[int, int]] | None:
    """Of a product: the other operand, its place, the dims that it shares with this one, and the result's dims by this one's."""
    product = parse_product(node)
    if product is None or product.addend is not None or (product.lhs is operand) == (product.rhs is operand):
        return None
    first = product.lhs is operand
    shared = {(left if first else right): (right if first else left) for left, right in product.contracted}
    after = dict(product.lhs_free if first else product.rhs_free)
    for left, right, out in product.batch:
        own, others = (left, right) if first else (right, left)
        if own is not None:
            after[own] = out
            if others is not None:
                shared[own] = others
    return (product.rhs if first else product.lhs), 1 if first else 0, shared, after


def _where_product(node: Node, operand: Node, rows: Rows) -> Rows | Ended | str:
    sides = _sides(node, operand)
    if sides is None:
        return _through(node)
    after = sides[3]
    return Rows(after[rows.dim], rows.start, rows.stop) if rows.dim in after else ENDED


def _take_product(over: RowsOf, node: Node, operand: Node, held: Node, rows: Rows) -> Node | str:
    sides = _sides(node, operand)
    assert sides is not None, "where the rows land has been asked before"
    other, place, shared, _ = sides
    dim = shared.get(rows.dim)
    whole = dim is None or shape_of(other)[dim] == 1
    made = other if whole else over.of(other, Rows(dim, rows.start, rows.stop))  # type: ignore[arg-type]
    if isinstance(made, str):
        return made
    return over.like(node, (held, made) if place == 1 else (made, held))


_ALIKE = Linear(_where_alike, _take_alike)
_FACTOR = Linear(_where_factor, _take_alike)
_LINEAR: dict[str, Linear] = {
    **dict.fromkeys(COPIES, _ALIKE),
    "neg": _ALIKE,
    **dict.fromkeys(("mul", "div"), _FACTOR),
    **dict.fromkeys(
        (f"{name}_backward" for name in "sigmoid tanh threshold gelu silu hardtanh leaky_relu native_dropout".split()), _FACTOR
    ),
    **dict.fromkeys(("where", "masked_fill"), Linear(_where_chosen, _take_alike)),
    **dict.fromkeys(VIEWS, Linear(_where_viewed, _take_viewed)),
    **dict.fromkeys(("permute", "transpose", "t", "unsqueeze"), Linear(_where_moved, _take_moved)),
    "squeeze": Linear(_where_moved, _take_squeezed),
    "sum": Linear(_where_summed, _take_moved),
    "expand": Linear(_where_moved, _take_expanded),
    "select_backward": Linear(_where_selected, _take_selected),
    "slice": Linear(_where_beside, _take_moved),
    "constant_pad_nd": Linear(_where_padded, _take_padded),
    **dict.fromkeys(("tril", "triu"), Linear(_where_alike, _take_triangle)),
    "slice_backward": Linear(_where_uncut, _take_uncut),
    "embedding_dense_backward": Linear(_where_embedded, _take_embedded),
    **dict.fromkeys(("scatter_add", "index_add"), Linear(_where_scattered, _take_scattered)),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate"), Linear(_where_put, _take_put)),
}
